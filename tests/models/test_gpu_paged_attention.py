"""The paged attention kernel for NVIDIA GPUs computes the formula and reads only filled pages.

It runs in Pallas' interpreter, which emulates shared memory, copies and barriers on a CPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import gpu_paged_attention as module
from mmsr1_jax.models.gpu_paged_attention import paged_decode


def reference_decode(q, kv, table, length):
    """softmax(q k^T / sqrt(H)) v in float64, one query head at a time."""
    q, kv = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    (B, N, H), K = q.shape, kv.shape[1] // 2
    out = np.zeros_like(q)
    for b in range(B):
        pages = kv[table[b]]
        for n in range(N):
            k, v = (pages[:, 2 * (n // (N // K)) + i].reshape(-1, H)[: length[b]] for i in range(2))
            scores = k @ q[b, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, n] = weights @ v / weights.sum()
    return out


def inputs(length, page=64, pages_per_lane=3, N=4, K=1, H=64, seed=0):
    """Random rows on shuffled pages; the last two rows share their first page."""
    rng, B = np.random.default_rng(seed), len(length)
    q = rng.normal(size=(B, N, H)).astype(jnp.bfloat16)
    kv = rng.normal(size=(B * pages_per_lane, 2 * K, page, H)).astype(jnp.bfloat16)
    table = rng.permutation(B * pages_per_lane).reshape(B, pages_per_lane).astype(np.int32)
    table[-1, 0] = table[-2, 0]
    return q, kv, table, np.asarray(length, np.int32)


def decode(q, kv, table, length):
    out = paged_decode(*map(jnp.asarray, (q, kv, table, length)), interpret=True)
    assert out.dtype == jnp.bfloat16
    return np.asarray(out)


@pytest.mark.parametrize(
    "page, N, K, H",
    [(64, 14, 2, 128), (128, 7, 1, 128), (64, 8, 1, 64)],
)
def test_ragged_rows_match_the_formula(page, N, K, H):
    arrays = inputs([1, page - 1, page, page + 1, 3 * page], page, N=N, K=K, H=H)
    np.testing.assert_allclose(
        decode(*arrays).astype(np.float64), reference_decode(*arrays), atol=2e-2
    )


def test_the_splits_of_a_row_add_up(monkeypatch):
    monkeypatch.setattr(module, "_SPLIT", 128)
    arrays = inputs([128, 129, 320], pages_per_lane=5, N=4, K=2)
    np.testing.assert_allclose(
        decode(*arrays).astype(np.float64), reference_decode(*arrays), atol=2e-2
    )


def test_large_scores_match_the_formula():
    q, kv, table, length = inputs([150, 20])
    arrays = (q * 30).astype(jnp.bfloat16), kv, table, length  # scores up to about 100
    np.testing.assert_allclose(
        decode(*arrays).astype(np.float64), reference_decode(*arrays), atol=2e-2
    )


def test_a_row_does_not_depend_on_the_others_or_on_page_numbers(monkeypatch):
    monkeypatch.setattr(module, "_SPLIT", 128)
    q, kv, table, length = inputs([150, 7, 192])
    out = decode(q, kv, table, length)

    neighbours = inputs([192, 150, 1], seed=1)
    moved = np.random.default_rng(2).permutation(len(kv)).astype(np.int32)
    kv2 = np.empty_like(kv)
    kv2[moved] = kv  # page i is now page moved[i]
    pages = np.concatenate([kv2, neighbours[1]])
    tables = np.stack([len(kv) + neighbours[2][0], moved[table[0]], len(kv) + neighbours[2][2]])
    q2, length2 = neighbours[0].copy(), neighbours[3].copy()
    q2[1], length2[1] = q[0], length[0]
    np.testing.assert_array_equal(decode(q2, pages, tables, length2)[1], out[0])


def test_unfilled_slots_have_no_effect_and_unfilled_pages_are_not_read():
    q, kv, table, length = inputs([1, 64, 100])
    table = np.arange(9, dtype=np.int32).reshape(3, 3)
    expected = decode(q, kv, table, length)
    kv = kv.copy()
    for b in range(3):
        for i in range(3):
            filled = np.clip(length[b] - i * 64, 0, 64)
            kv[table[b, i], :, filled:] = 3e38 if filled else np.nan
    np.testing.assert_array_equal(decode(q, kv, table, length), expected)


def test_padding_rows_are_finite():
    q, kv, table, _ = inputs([1, 1])
    assert np.isfinite(decode(q, kv, table, np.asarray([0, 5], np.int32))).all()


def fetched_bytes(length, pages_per_lane, page, K=4, H=128):
    """Bytes of keys and values that the kernel copies: all blocks of all splits."""
    splits = np.arange(-(-pages_per_lane * page // module._SPLIT))
    blocks = np.asarray(module._num_blocks(np.asarray(length)[:, None], splits))
    return int(blocks.sum()) * module._BLOCK * 2 * K * H * 2


@pytest.mark.parametrize("page", [64, 128])
def test_only_filled_blocks_are_fetched(page):
    def filled(length):
        return int(np.sum(length)) * 2 * 4 * 128 * 2

    rows = np.full(48, 4096)
    assert fetched_bytes(rows, 8192 // page, page) == filled(rows)
    ragged = np.random.default_rng(0).integers(4096 - 512, 4096 + 512, size=48)
    assert filled(ragged) <= fetched_bytes(ragged, 8192 // page, page) <= 1.05 * filled(ragged)
    for length in range(1, 8193):
        blocks = -(-length // module._BLOCK)  # never more than the whole pages with tokens
        assert fetched_bytes([length], 8192 // page, page) == filled([blocks * module._BLOCK])


@pytest.mark.parametrize("page, N, K, H", [(64, 28, 4, 128), (128, 16, 2, 128), (128, 14, 2, 64)])
def test_the_kernel_lowers_for_gpus_as_one_call_that_takes_the_cache_whole(page, N, K, H):
    q, kv, table, length = (
        jax.ShapeDtypeStruct((48, N, H), jnp.bfloat16),
        jax.ShapeDtypeStruct((512, 2 * K, page, H), jnp.bfloat16),
        jax.ShapeDtypeStruct((48, 8192 // page), jnp.int32),
        jax.ShapeDtypeStruct((48,), jnp.int32),
    )
    lowered = jax.jit(paged_decode).trace(q, kv, table, length).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert re.search(r"@mosaic_gpu_v2\(%\w+, %arg1, ", text)
    # The cache is an argument of the program and of the kernel, and nothing else has its shape.
    assert text.count(f"tensor<512x{2 * K}x{page}x{H}xbf16>") == 2


def test_unsupported_arrays_are_errors():
    q, kv, table, length = inputs([5, 5])

    def attempt(q, kv):
        paged_decode(*map(jnp.asarray, (q, kv, table, length)), interpret=True)

    with pytest.raises(UserError, match="needs bfloat16, not queries of float32"):
        attempt(q.astype(np.float32), kv)
    with pytest.raises(UserError, match="a cache of float32"):
        attempt(q, kv.astype(np.float32))
    with pytest.raises(UserError, match="tokens, not 96"):
        attempt(q, np.zeros((6, 2, 96, 64), jnp.bfloat16))
    with pytest.raises(UserError, match="head dimension of 64 or 128, not 32"):
        attempt(q[..., :32], kv[..., :32])
