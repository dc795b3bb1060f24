"""The paged prefill kernel for NVIDIA GPUs computes causal attention over the pages of each row.

It runs in Pallas' interpreter, which emulates shared memory, copies and barriers on a CPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models.gpu_paged_prefill import paged_prefill, prefill_cost


def reference(q, kv, table, start, count):
    """softmax(q k^T / sqrt(H)) v in float64, one new token at a time; 0 at padding."""
    q, kv = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    (B, _, N, H), K = q.shape, kv.shape[1] // 2
    out = np.zeros_like(q)
    for b, n in np.ndindex(B, N):
        k, v = (kv[table[b], 2 * (n // (N // K)) + i].reshape(-1, H) for i in range(2))
        for t in range(count[b]):
            visible = start[b] + t + 1
            scores = k[:visible] @ q[b, t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[:visible] / weights.sum()
    return out


def inputs(start, count, T, page=64, pages_per_lane=3, N=1, K=1, H=64, seed=0):
    """Random rows on shuffled pages."""
    rng, B = np.random.default_rng(seed), len(start)
    q = rng.normal(size=(B, T, N, H)).astype(jnp.bfloat16)
    kv = rng.normal(size=(B * pages_per_lane, 2 * K, page, H)).astype(jnp.bfloat16)
    table = rng.permutation(B * pages_per_lane).reshape(B, pages_per_lane).astype(np.int32)
    return q, kv, table, np.array(start, np.int32), np.array(count, np.int32)


def prefill(*arrays):
    """The kernel's result, float64, with padding set to 0."""
    out = paged_prefill(*map(jnp.asarray, arrays), interpret=True)
    assert out.dtype == jnp.bfloat16
    out = np.array(out, np.float64)
    for row, count in zip(out, arrays[-1], strict=True):
        row[count:] = 0
    return out


@pytest.mark.parametrize(
    "page, T, N, K, H, start, count",
    [
        (64, 64, 2, 2, 64, [0], [64]),  # one warpgroup, two kv heads
        (64, 50, 2, 1, 64, [127], [50]),  # padded to 64; across pages; heads that share keys
        (64, 64, 1, 1, 64, [3], [1]),  # a single token
        (128, 128, 1, 1, 128, [130], [126]),  # two warpgroups, three steps
        (64, 128, 1, 1, 64, [0], [10]),  # a warpgroup of padding
    ],
)
def test_ragged_rows_match_the_formula(page, T, N, K, H, start, count):
    arrays = inputs(start, count, T, page, N=N, K=K, H=H)
    np.testing.assert_allclose(prefill(*arrays), reference(*arrays), atol=2e-2)


def test_a_row_does_not_depend_on_the_others_or_on_page_numbers():
    q, kv, table, start, count = inputs([70], [40], 64)
    out = prefill(q, kv, table, start, count)
    others = inputs([0], [64], 64, seed=1)
    moved = np.array([2, 0, 1])
    kv2 = np.empty_like(kv)
    kv2[moved] = kv  # page i is now page moved[i]
    together = prefill(
        np.concatenate([others[0], q]),
        np.concatenate([kv2, others[1]]),
        np.concatenate([others[2] + 3, moved[table].astype(np.int32)]),
        np.concatenate([others[3], start]),
        np.concatenate([others[4], count]),
    )
    np.testing.assert_array_equal(together[1], out[0])


def test_later_slots_have_no_effect_and_later_pages_are_not_read():
    q, kv, table, start, count = inputs([60], [30], 64, pages_per_lane=4)
    expected = prefill(q, kv, table, start, count)
    kv = kv.copy()
    kv[table[0, 1], :, 90 - 64 :] = 3e38
    kv[table[0, 2:]] = np.nan
    np.testing.assert_array_equal(prefill(q, kv, table, start, count), expected)


def test_rows_of_padding_are_finite():
    arrays = inputs([0], [0], 64)
    out = paged_prefill(*map(jnp.asarray, arrays), interpret=True)
    assert np.isfinite(np.asarray(out, np.float64)).all()


@pytest.mark.parametrize("B, T", [(1, 1024), (4, 256), (16, 64)])
def test_the_kernel_lowers_for_gpus_as_one_call_that_takes_the_cache_whole(B, T):
    shape = jax.ShapeDtypeStruct
    arrays = (
        shape((B, T, 28, 128), jnp.bfloat16),
        shape((512, 8, 128, 128), jnp.bfloat16),
        shape((B, 64), jnp.int32),
        shape((B,), jnp.int32),
        shape((B,), jnp.int32),
    )
    lowered = jax.jit(paged_prefill).trace(*arrays).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert re.search(r"@mosaic_gpu_v2\(%\w+, %arg1, ", text)
    # The cache is an argument of the program and of the kernel, and nothing else has its shape.
    assert text.count("tensor<512x8x128x128xbf16>") == 2


def test_unsupported_arrays_are_errors():
    q, kv, *rest = inputs([0], [1], 64)
    with pytest.raises(UserError, match="needs bfloat16, not queries of float32"):
        paged_prefill(*map(jnp.asarray, (q.astype(np.float32), kv, *rest)), interpret=True)
    with pytest.raises(UserError, match="tokens, not 32"):
        paged_prefill(*map(jnp.asarray, (q, kv[:, :, :32], *rest)), interpret=True)


def test_the_cost_counts_what_each_thread_block_copies():
    """Two blocks of 128 new tokens behind 200 see 384 and 512 keys, in steps of 128."""
    copied, flops = prefill_cost((3, 256, 4, 64), 200)
    keys_and_values = 2 * 2 * 3 * 4 * 64 * (384 + 512)
    assert copied == keys_and_values + 2 * 2 * 3 * 256 * 4 * 64
    assert flops == 4 * 3 * 4 * 64 * 128 * (384 + 512)
