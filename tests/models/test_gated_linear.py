"""The kernels of the gated layer compute their formulas, each row by itself.

They run in Pallas' interpreter, on a CPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mmsr1_jax.models import gated_linear as module
from mmsr1_jax.models import gpu_gated_linear, sharding, tpu_gated_mlp


def inputs(rows, F, D, dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, D))
    gate, up = rng.normal(size=(2, F, D)) / np.sqrt(D)
    return tuple(jnp.asarray(a, dtype) for a in (x, gate, up))


def reference(x, gate, up):
    """silu(x gate^T) * (x up^T) in float64."""
    x, gate, up = (np.asarray(a, np.float64) for a in (x, gate, up))
    gated = x @ gate.T
    return gated / (1 + np.exp(-gated)) * (x @ up.T)


def gpu(*arrays):
    assert gpu_gated_linear.supported(*arrays[:2])
    return gpu_gated_linear.gated_linear(*arrays, interpret=True)


def down_inputs(F, D, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(2).normal(size=(D, F)) / np.sqrt(F), dtype)


def tpu(*arrays):
    assert tpu_gated_mlp.supported(*arrays[:2])
    return tpu_gated_mlp.gated_mlp(*arrays, interpret=True)


def test_the_kernel_of_the_layer_matches_the_formula():
    arrays, down = inputs(rows=512, F=768, D=256), down_inputs(768, 256)
    out = tpu(*arrays, down)
    assert out.dtype == jnp.bfloat16 and out.shape == (512, 256)
    expected = reference(*arrays) @ np.asarray(down, np.float64).T
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=1e-2, rtol=2**-8)


def test_a_row_of_the_layer_does_not_depend_on_the_others():
    (x, gate, up), down = inputs(512, 512, 128), down_inputs(512, 128)
    others = inputs(512, 512, 128, seed=1)[0] * 100
    mixed = others.at[7].set(x[7]).at[-1].set(x[-1])
    a, b = (np.asarray(tpu(x, gate, up, down)) for x in (x, mixed))
    np.testing.assert_array_equal(a[[7, -1]], b[[7, -1]])
    assert (a[0] != b[0]).any()


def test_the_kernel_of_the_layer_takes_what_fits_on_the_chip():
    def supported(T, F, D, dtype=jnp.bfloat16):
        arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((T, D), (F, D)))
        answers = []
        jax.eval_shape(lambda x, gate: answers.append(tpu_gated_mlp.supported(x, gate)), *arrays)
        return answers[0]

    assert supported(1024, 18944, 3584) and supported(1024, 11008, 2048)  # 7B, 3B
    assert not supported(2048, 18944, 3584)
    assert not supported(1024, 18944, 3584, jnp.float32)
    assert not supported(64, 18944, 3584)


@pytest.mark.parametrize("devices", [1, 2])
def test_other_shapes_of_the_layer_are_computed_by_xla(devices):
    """With two devices, each computes the part of its hidden units."""
    (x, gate, up), down = inputs(32, 128, 64, jnp.float32), down_inputs(128, 64, jnp.float32)
    mesh: Mesh = sharding.make_mesh(1, 1, devices, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        out = jax.jit(module.gated_mlp)(x[None], gate, up, down)
    expected = reference(x, gate, up) @ np.asarray(down, np.float64).T
    np.testing.assert_allclose(np.asarray(out[0]), expected, atol=1e-5)


def test_the_kernel_matches_the_formula():
    arrays = inputs(rows=128, F=256, D=320)
    out = gpu(*arrays)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float64), reference(*arrays), atol=2e-2, rtol=2**-8
    )


def test_a_row_does_not_depend_on_the_others():
    x, gate, up = inputs(256, 128, 256)
    others = inputs(256, 128, 256, seed=1)[0] * 100
    mixed = others.at[7].set(x[7]).at[-1].set(x[-1])
    a, b = (np.asarray(gpu(x, gate, up)) for x in (x, mixed))
    np.testing.assert_array_equal(a[[7, -1]], b[[7, -1]])
    assert (a[0] != b[0]).any()


@pytest.mark.parametrize("hopper", [False, True])
def test_float32_and_odd_shapes_are_computed_by_xla(hopper, monkeypatch):
    monkeypatch.setattr(sharding, "is_hopper", lambda: hopper)
    for rows, F, D, dtype in ((128, 128, 256, jnp.float32), (24, 40, 72, jnp.bfloat16)):
        x, gate, up = inputs(rows, F, D, dtype)
        out = module.gated_linear(x[None], gate, up)
        assert out.dtype == dtype and out.shape == (1, rows, F)
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(
            np.asarray(out[0], np.float64), reference(x, gate, up), atol=tolerance, rtol=tolerance
        )


def test_columns_are_split_over_the_tensor_axis():
    x, gate, up = inputs(32, 128, 64, jnp.float32)
    mesh: Mesh = sharding.make_mesh(1, 1, 2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        out = jax.jit(module.gated_linear)(x[None], gate, up)
    assert out.sharding.spec[2] == "tensor"
    np.testing.assert_allclose(np.asarray(out[0]), reference(x, gate, up), atol=1e-5)


@pytest.mark.parametrize("F", [18944, 4736])
def test_the_gpu_kernel_lowers_for_gpus_as_one_call(F):
    shape = jax.ShapeDtypeStruct
    arrays = [shape(s, jnp.bfloat16) for s in ((1024, 3584), (F, 3584), (F, 3584))]
    lowered = (
        jax.jit(gpu_gated_linear.gated_linear).trace(*arrays).lower(lowering_platforms=("cuda",))
    )
    text = lowered.as_text()
    assert re.search(r"@mosaic_gpu_v2\(%arg0, %arg1, %arg2\b", text)
    # No copy of a weight: each is an argument of the program and of the kernel.
    assert text.count(f"tensor<{F}x3584xbf16>") == 4
