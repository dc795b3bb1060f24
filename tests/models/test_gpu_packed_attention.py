"""The kernels for NVIDIA GPUs compute attention over packed rows, and its gradients.

They run in Pallas' interpreter, which emulates shared memory, copies and barriers on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import attention, gpu_packed_attention, packed_blocks
from tests import kernels
from tests.models.test_attention import reference_attention

TOLERANCE = 6e-3  # of the largest entry; the kernels round weights and results to bfloat16


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    kernels.compile_gpu_kernels_once(monkeypatch)


def segments(T, *sizes):
    """Return a row of segments 1, 2, .. of the given sizes, then padding."""
    ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    return np.pad(ids, (0, T - len(ids))).astype(np.int32)


def continued(ids, prefix_of):
    """Return the prefix of each token, -1 for none; prefix_of: segment -> the one it continues."""
    return np.vectorize(lambda i: prefix_of.get(i, -1))(ids).astype(np.int32)


def inputs(B, T, N, K, H, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.bfloat16) for n in (N, K, K)]


def attend(q, k, v, *ids, causal):
    arrays = (q, k, v, *map(jnp.asarray, ids))
    return gpu_packed_attention.attention(*arrays, causal=causal, interpret=True)


def gradients(function, arrays, ids):
    """Return the output and the gradients of a weighted sum of it, float32, 0 at padding."""
    q = arrays[0]
    weights = np.random.default_rng(1).normal(size=q.shape).astype(jnp.bfloat16)
    mask = (ids > 0)[..., None, None]

    def loss(*arrays):
        out = function(*arrays).astype(jnp.float32) * mask
        return (out * weights).sum(), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    grads, out = run(*arrays)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


def assert_equal_to_xla(arrays, ids, prefix_ids, causal):
    """Compare output and gradients with XLA in float32, from the same rounded inputs."""
    given = (ids,) if prefix_ids is None else (ids, prefix_ids)
    ours = gradients(lambda *x: attend(*x, *given, causal=causal), arrays, ids)
    reference = functools.partial(attention.attention, causal=causal, implementation="xla")
    exact = [x.astype(jnp.float32) for x in arrays]
    expected = gradients(lambda *x: reference(*x, *given), exact, ids)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max(), rtol=0, err_msg=name)


def test_rollouts_of_two_prompts_equal_the_xla_implementation():
    """Segments cross the borders of blocks; grouped queries; a row of rollouts, one without."""
    ids = np.stack([segments(384, 70, 90, 150, 60), segments(384, 384)])
    prefixes = continued(ids, {2: 1, 3: 1})
    prefixes[1] = -1
    assert_equal_to_xla(inputs(2, 384, 2, 1, 64), ids, prefixes, causal=True)


@pytest.mark.proof
def test_segments_without_prefixes_equal_the_xla_implementation():
    ids = segments(256, 150, 90)[None]
    assert_equal_to_xla(inputs(1, 256, 2, 2, 128), ids, None, causal=True)


def test_images_equal_the_xla_implementation():
    """Not causal, a head dimension that is padded, and padding inside of an image."""
    ids = segments(256, 140, 60)[None]
    ids[0, 20:30] = 0
    assert_equal_to_xla(inputs(1, 256, 1, 1, 80), ids, None, causal=False)


@pytest.mark.proof
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("N, K, H", [(4, 2, 64), (3, 1, 128), (2, 2, 80), (2, 1, 32)])
@pytest.mark.parametrize("prefixes", [{}, {2: 1, 3: 1, 5: 4}])
def test_all_layouts_equal_the_xla_implementation(N, K, H, causal, prefixes):
    layouts = [(100, 28, 28, 64, 90), (1, 127, 128, 64, 64), (300, 1, 1, 1, 1)]
    ids = np.stack([segments(384, *sizes) for sizes in layouts])
    prefix_ids = continued(ids, prefixes) if prefixes else None
    assert_equal_to_xla(inputs(3, 384, N, K, H), ids, prefix_ids, causal)


def test_the_output_is_that_of_the_formula():
    q, k, v = inputs(1, 128, 2, 1, 64)
    ids = segments(128, 30, 40, 50)[None]
    prefixes = continued(ids, {3: 1})
    ours = np.asarray(jax.jit(functools.partial(attend, causal=True))(q, k, v, ids, prefixes))
    expected = reference_attention(q, k, v, ids, True, np.maximum(prefixes, 0))
    np.testing.assert_allclose(ours[ids > 0], expected[ids > 0], atol=1e-2)
    assert (ours[ids == 0] == 0).all()


def test_blocks_that_no_query_sees_have_no_effect():
    """The segment between a prefix and its continuation fills a block, whose keys are not read."""
    ids = segments(384, 128, 128, 128)[None]
    prefixes = continued(ids, {3: 1})
    q, k, v = inputs(1, 384, 1, 1, 64)
    run = jax.jit(functools.partial(attend, causal=True))
    expected = np.asarray(run(q, k, v, ids, prefixes))
    k, v = (x.at[:, 128:256].set(jnp.nan) for x in (k, v))
    out = np.asarray(run(q, k, v, ids, prefixes))
    np.testing.assert_array_equal(out[ids != 2], expected[ids != 2])


def brute_force_visibility(q_ids, k_ids, causal):
    mask = (q_ids[:, :, :, None] == k_ids[:, None, None, :]).any(axis=1)
    if causal:
        mask &= np.tril(np.ones(mask.shape[1:], bool))
    B, T, _ = mask.shape
    size = packed_blocks.BLOCK
    blocks = mask.reshape(B, T // size, size, T // size, size).swapaxes(2, 3)
    return np.where(blocks.all((3, 4)), 0, np.where(blocks.any((3, 4)), 1, 2))


@pytest.mark.parametrize("causal", [True, False])
def test_visibility_of_blocks_is_that_of_their_pairs(causal):
    ids = np.stack([segments(1024, 256, 300, 400), segments(1024, 200, 600, 100, 124)])
    q_ids = np.stack([ids, continued(ids, {2: 1, 3: 1})], axis=1)
    q_ids = np.where(ids[:, None] > 0, q_ids, -2)
    ours = np.asarray(packed_blocks.block_visibility(jnp.asarray(q_ids), jnp.asarray(ids), causal))
    expected = brute_force_visibility(q_ids, ids, causal)
    assert (ours[expected == 1] == 1).all()
    assert (ours[expected == 2] == 2).all()
    # A block of keys that holds the end of a prefix and the start of its continuation is masked.
    assert (ours[expected == 0] <= 1).all()
    assert (ours == 0).any()


def test_blocks_without_a_mask_are_visited_first():
    visibility = jnp.asarray([[[1, 0, 2, 0], [2, 2, 2, 2]]], jnp.int32)
    order, counts = packed_blocks.visiting_order(visibility)
    assert order[0, 0, :3].tolist() == [1, 3, 0]
    assert counts.tolist() == [[[2, 3], [0, 0]]]
    order, counts = packed_blocks.visiting_order(visibility, last_first=True)
    assert order[0, 0, :3].tolist() == [3, 1, 0]
    assert counts.tolist() == [[[2, 3], [0, 0]]]


def test_the_kernels_lower_for_gpus_and_take_keys_and_values_whole():
    shape = jax.ShapeDtypeStruct
    q = shape((1, 2048, 28, 128), jnp.bfloat16)
    kv = shape((1, 2048, 4, 128), jnp.bfloat16)
    ids = shape((1, 2048), jnp.int32)

    def loss(q, k, v, ids, prefix_ids):
        out = gpu_packed_attention.attention(q, k, v, ids, prefix_ids, causal=True)
        return out.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, kv, kv, ids, ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@mosaic_gpu_v2(" in line]
    heads, kv_heads = "tensor<1x2048x28x128xbf16>", "tensor<1x2048x4x128xbf16>"
    assert len(calls) == 3
    assert all(f" : ({heads}, {kv_heads}, {kv_heads}, " in call for call in calls)


def test_unsupported_arrays_are_errors():
    q, k, v = inputs(1, 128, 1, 1, 64)
    ids = segments(128, 128)[None]
    with pytest.raises(UserError, match="mosaic needs bfloat16, not float32"):
        attend(*(x.astype(jnp.float32) for x in (q, k, v)), ids, causal=True)
    with pytest.raises(UserError, match="a head dimension of at most 128, not 192"):
        attend(*(jnp.tile(x, 3) for x in (q, k, v)), ids, causal=True)


def test_the_cost_counts_the_blocks_that_are_visited():
    """A causal row of 3 blocks visits 6; 132 thread blocks run on 2 rows and 2 kv heads."""
    q = (2, 384, 4, 64)
    block, row, together = 2 * 2 * 128 * 64, 2 * 384 * 64, 132 / 4
    fetched, flops = gpu_packed_attention.kernel_cost("packed_forward", q, 2, causal=True)
    assert fetched == 2 * 4 * (6 * block / together + 2 * row)
    assert flops == 2 * 4 * 6 * 2 * 2 * 128 * 128 * 64
    fetched, flops = gpu_packed_attention.kernel_cost("packed_dkv", q, 2, causal=False)
    assert fetched == 2 * 4 * 9 * block / together + 2 * 2 * 4 * row
    assert flops == 2 * 4 * 9 * 4 * 2 * 128 * 128 * 64
    # Images of 100 patches, at any place: a block sees two.
    _, of_images = gpu_packed_attention.kernel_cost("packed_dkv", q, 2, False, segment=100)
    assert of_images == flops * 2 / 3
