"""Eight devices compute the same output as one, and each holds its shard."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import attention as attention_module
from mmsr1_jax.models import sharding
from mmsr1_jax.processing.batching import Bucket, make_rows
from mmsr1_jax.scripts import random_policy
from tests import kernels
from tests.reference import SMALL, random_conversation, variant

BUCKET = Bucket(length=96, windows=6, rows=8)


CONFIGS = {
    "kv heads 2": random_policy.CONFIG,
    "kv heads 1, tied": variant(num_kv_heads=1, tie_embeddings=True),
    "kv heads 8": variant(num_kv_heads=8),
    "qwen3, kv heads 2": SMALL["qwen3_vl"],
}


def rows_for(config):
    rng = np.random.default_rng(0)
    layouts = [[20, (3, 5), 7], [31], [(2, 2), 9, (1, 3), 4], [50], [5, (4, 4), 5], [8], [64]]
    prompts = [random_conversation(rng, config, layout) for layout in layouts]
    packed = [[prompts[0], prompts[1]], *[[p] for p in prompts[2:]]]
    return make_rows(packed, BUCKET, config, config.image_token_id)


def loss_and_gradient(graph, params, rows):
    def loss(params):
        logprobs = nnx.merge(graph, params).token_logprobs(rows)
        return logprobs.sum(), logprobs

    (_, logprobs), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return logprobs, gradient


def run_on(mesh, config, **keywords):
    graph, params = nnx.split(random_policy.random_model(config, seed=3, **keywords))
    shardings = sharding.param_shardings(params, mesh)
    params = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(loss_and_gradient, graph), out_shardings=(None, shardings))
        return run(params, sharding.shard_batch(rows_for(config), mesh))


MESHES = [(1, 8, 1), (1, 4, 2), (1, 2, 4)]


@pytest.mark.parametrize(
    "name, attention, shapes",
    [
        pytest.param("kv heads 2", "xla", [(2, 2, 2)], marks=pytest.mark.proof),
        pytest.param("kv heads 2", "xla", MESHES, marks=pytest.mark.proof),
        pytest.param("kv heads 1, tied", "xla", MESHES[1:], marks=pytest.mark.proof),
        pytest.param("kv heads 8", "xla", MESHES[2:], marks=pytest.mark.proof),
        pytest.param("qwen3, kv heads 2", "xla", [*MESHES, (2, 2, 2)], marks=pytest.mark.proof),
        pytest.param("kv heads 2", "blockwise", MESHES[2:], marks=pytest.mark.proof),
    ],
)
def test_eight_devices_equal_one(name, attention, shapes):
    config = CONFIGS[name]
    one_device = sharding.make_mesh(devices=jax.devices()[:1])
    expected, expected_gradient = run_on(one_device, config, attention=attention)
    for shape in shapes:
        logprobs, gradient = run_on(sharding.make_mesh(*shape), config, attention=attention)
        np.testing.assert_allclose(logprobs, expected, atol=1e-4, rtol=0, err_msg=str(shape))
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
            scale = np.abs(np.asarray(b)).max()
            np.testing.assert_allclose(a, b, atol=1e-4 * scale, rtol=0, err_msg=str(shape))


@pytest.mark.parametrize("name", ["triton", "splash"])
@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 2, 4)])
def test_kernels_run_on_each_device(name, shape, monkeypatch):
    """The accelerators' kernels support no mesh. Here Pallas interprets them on eight devices."""
    kernel = functools.partial(getattr(attention_module, f"_{name}"), interpret=True)
    monkeypatch.setattr(attention_module, f"_{name}", kernel)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 128, n, 32)), jnp.float32) for n in (8, 2, 2))
    ids = np.repeat(np.arange(1, 5, dtype=np.int32), 32)[None].repeat(4, axis=0)
    run = functools.partial(attention_module.attention, causal=True)
    expected = run(q, k, v, ids, implementation="xla")
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        sharded = jax.jit(functools.partial(run, implementation=name))
        ours = sharded(*sharding.shard_batch((q, k, v, ids), mesh))
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.proof
def test_the_kernel_for_hopper_runs_on_each_device(monkeypatch):
    """Four devices share two kv heads; rollouts continue prompts."""
    kernels.compile_gpu_kernels_once(monkeypatch)
    kernel = functools.partial(attention_module._mosaic, interpret=True)
    monkeypatch.setattr(attention_module, "_mosaic", kernels.one_device_at_a_time(kernel))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 128, n, 32)), jnp.bfloat16) for n in (4, 2, 2))
    ids = np.repeat(np.arange(1, 5, dtype=np.int32), 32)[None].repeat(2, axis=0)
    prefixes = np.where(ids == 3, 1, 0).astype(np.int32)
    prefixes[1] = 0
    run = functools.partial(attention_module.attention, causal=True)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    expected = run(*exact, ids, prefixes, implementation="xla")
    mesh = sharding.make_mesh(1, 2, 4)
    with jax.set_mesh(mesh):
        sharded = jax.jit(functools.partial(run, implementation="mosaic"))
        ours = sharded(*sharding.shard_batch((q, k, v, ids, prefixes), mesh))
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=2e-2)


@pytest.mark.proof
def test_batch_and_parameters_are_sharded():
    mesh = sharding.make_mesh(1, 4, 2)
    logprobs, gradient = run_on(mesh, CONFIGS["kv heads 2"])
    assert logprobs.sharding.shard_shape(logprobs.shape) == (8 // 4, 96)
    kernel = gradient["text"]["layers"]["mlp"]["gate"]["kernel"].get_value()
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 256 // 2, 128 // 4)


def test_partition_specs():
    mesh = sharding.make_mesh(1, 2, 4)
    spec = functools.partial(sharding.partition_spec, mesh=mesh)
    assert spec(("embed", "heads", "head_dim"), (512, 8, 64)) == P("fsdp", "tensor", None)
    assert spec(("embed", "kv_heads", "head_dim"), (512, 2, 64)) == P("fsdp", None, None)
    assert spec(("batch", None), (1, 64)) == P(None, None)
    replicated = sharding.make_mesh(2, 2, 2)
    assert sharding.partition_spec(("batch",), (8,), replicated) == P(("replica", "fsdp"))


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_every_parameter_has_logical_axes(config):
    params = nnx.state(random_policy.random_model(config, seed=0), nnx.Param)
    known = {*sharding.RULES, "layers", "head_dim", None}
    for path, variable in nnx.to_flat_state(params):
        axes = variable.get_metadata("axes")
        assert len(axes) == variable.get_value().ndim, path
        assert set(axes) <= known, path


def test_invalid_meshes_are_rejected():
    with pytest.raises(UserError, match="replica=1 x fsdp=3 x tensor=1 does not match 8 devices"):
        sharding.make_mesh(1, 3, 1)
    with pytest.raises(UserError, match="must be positive, one of them may be -1"):
        sharding.make_mesh(-1, -1, 1)
    assert sharding.make_mesh(1, -1, 2).shape["fsdp"] == 4


def test_the_platform_is_that_of_the_mesh():
    assert sharding.platform() == jax.default_backend()
    with jax.set_mesh(sharding.make_mesh()):
        assert sharding.platform() == jax.default_backend()
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    mesh = jax.sharding.AbstractMesh((4,), ("fsdp",), abstract_device=tpu)
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.platform() == "tpu"
        assert attention_module.choose("auto", 8192, jnp.dtype(jnp.bfloat16), False) == "splash"


@pytest.mark.parametrize("kind, packed", [("NVIDIA H100 80GB HBM3", "mosaic"), ("A100", "triton")])
def test_gpus_use_the_kernels_of_their_generation(kind, packed):
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((8,), ("fsdp",), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention_module.choose("auto", 8192, jnp.bfloat16, False) == packed
        assert attention_module.choose("auto", 8192, jnp.bfloat16, True) == "cudnn"
        assert attention_module.choose("auto", 8192 + 64, jnp.bfloat16, False) == "triton"
        assert attention_module.choose("auto", 8192, jnp.float16, False) == "triton"
        shares = attention_module.supports_prefixes("auto", 8192, jnp.bfloat16)
        assert shares == (packed == "mosaic")


def test_processes_with_different_numbers_of_devices_are_refused():
    devices = [types.SimpleNamespace(process_index=p, id=n) for n, p in enumerate([0, 0, 1])]
    with pytest.raises(UserError, match=r"same number of devices \(process 0: 2, process 1: 1\)"):
        sharding.make_mesh(1, -1, 1, devices=devices)
