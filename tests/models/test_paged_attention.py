"""Paged attention computes the formula in both layouts, and its TPU kernel fetches filled pages.

The kernel, which is jax's, runs in Pallas' interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from mmsr1_jax.models import paged_attention
from mmsr1_jax.models.paged_attention import PagedRows
from tests import kernels

PAGE = 16
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture
def interpreted(monkeypatch):
    """Use the TPU kernel, in Pallas' interpreter."""
    kernels.interpret_tpu_kernel(monkeypatch)
    monkeypatch.setattr(paged_attention, "_TPU_BLOCK_TOKENS", 2 * PAGE)
    yield
    jax.clear_caches()


@pytest.fixture(params=["pages", "kernel"])
def form(request):
    """Page by page in XLA, and the TPU kernel."""
    if request.param == "kernel":
        request.getfixturevalue("interpreted")
    return request.param


def inputs(start, count, T, dtype="float32", N=4, K=2, H=128, pages=4, seed=0):
    """New tokens of random sequences, whose pages are shuffled; the last two share one."""
    rng, B = np.random.default_rng(seed), len(start)
    draw = functools.partial(rng.normal, size=(B, pages * PAGE, K, H))
    k, v = draw().astype(dtype), draw().astype(dtype)
    shape, _ = paged_attention.pages_shape(B * pages, PAGE, K, H)
    table = rng.permutation(B * pages).reshape(B, pages).astype(np.int32)
    start, count = np.array(start, np.int32), np.array(count, np.int32)
    k[-1, :PAGE], v[-1, :PAGE] = k[-2, :PAGE], v[-2, :PAGE]
    if min(start[-2:]) >= PAGE:
        table[-1, 0] = table[-2, 0]
    q = rng.normal(size=(B, T, N, H)).astype(dtype)
    everything = PagedRows(table=table, start=np.zeros_like(start), count=start)
    cache = jnp.full(shape, 3.0, dtype)
    cache = jax.jit(paged_attention.append)(cache, k, v, everything)
    rows = PagedRows(table=table, start=start, count=count)
    new = [np.stack([x[b, s : s + T] for b, s in enumerate(start)]) for x in (k, v)]
    cache = jax.jit(paged_attention.append)(cache, *new, rows)
    return q, k, v, cache, rows


def formula(q, k, v, rows):
    """softmax(q k^T / sqrt(H)) v in float64 for each query; 0 at padding."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, _, N, H = q.shape
    out = np.zeros_like(q)
    for b in range(B):
        for t in range(rows.count[b]):
            seen = rows.start[b] + t + 1
            for n in range(N):
                head = n // (N // k.shape[2])
                scores = k[b, :seen, head] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ v[b, :seen, head] / weights.sum()
    return out


def outputs(q, cache, rows):
    out = np.asarray(jax.jit(paged_attention.paged_attention)(q, cache, rows), np.float64)
    padding = np.arange(q.shape[1]) >= rows.count[:, None]
    assert np.isfinite(out[rows.count > 0]).all()
    return np.where(padding[..., None, None], 0.0, out)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decoding_matches_the_formula(form, dtype):
    start = [0, PAGE - 1, PAGE, 2 * PAGE + 3, 4 * PAGE - 1]
    q, k, v, cache, rows = inputs(start, [1] * 5, 1, dtype)
    expected = formula(q, k, v, rows)
    np.testing.assert_allclose(outputs(q, cache, rows), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_longer_extensions_match_the_formula(form, dtype):
    start, count = [0, 5, PAGE, 2 * PAGE - 1, 40], [24, 1, 0, 17, 24]
    q, k, v, cache, rows = inputs(start, count, 24, dtype)
    expected = formula(q, k, v, rows)
    np.testing.assert_allclose(outputs(q, cache, rows), expected, atol=TOLERANCE[dtype], rtol=0)


def test_a_row_depends_on_itself_alone(form):
    """Bit-identical beside other rows, in other pages, and with other contents beyond its own."""
    start = [3, 2 * PAGE, 37, 4 * PAGE - 1]
    q, _, _, cache, rows = inputs(start, [1, 1, 1, 1], 1)
    expected = outputs(q, cache, rows)
    order = np.array([2, 0, 3, 1])
    moved = np.random.default_rng(5).permutation(len(cache))
    other = jnp.zeros_like(cache).at[moved].set(cache)
    again = PagedRows(table=moved.astype(np.int32)[rows.table], start=rows.start, count=rows.count)
    again = jax.tree.map(lambda x: x[order], again)
    np.testing.assert_array_equal(outputs(q[order], other, again), expected[order])
    fuller = PagedRows(table=rows.table, start=np.array([3, 60, 37, 9], np.int32), count=rows.count)
    np.testing.assert_array_equal(outputs(q, cache, fuller)[[0, 2]], expected[[0, 2]])


def test_padding_is_not_written(form):
    _, _, _, cache, rows = inputs([5, 9], [0, 2], 4)
    before = np.asarray(cache)
    new = np.ones((2, 4, 2, 128), np.float32)
    rows = PagedRows(table=rows.table, start=np.array([5, 11], np.int32), count=rows.count)
    after = np.asarray(jax.jit(paged_attention.append)(cache, new, new, rows))
    changed = np.flatnonzero((before != after).reshape(len(before), -1).any(axis=1))
    assert changed.tolist() == [rows.table[1, 0]]
    assert (before != after).sum() == 2 * 2 * 2 * 128  # two tokens, keys and values of two heads


def test_the_kernel_fetches_whole_blocks_of_filled_pages(interpreted, monkeypatch):
    """Pages that its copies fetch, for rows that end within a block."""
    fetched, original = [], kernel.MultiPageAsyncCopyDescriptor.start

    def counted(self):
        jax.debug.callback(lambda: fetched.append(len(self._async_copies)))
        original(self)

    monkeypatch.setattr(kernel.MultiPageAsyncCopyDescriptor, "start", counted)
    start = [0, PAGE, 2 * PAGE, 4 * PAGE - 1]
    q, _, _, cache, rows = inputs(start, [1] * 4, 1)
    outputs(q, cache, rows)
    jax.effects_barrier()
    blocks = sum(-(-(s + 1) // (2 * PAGE)) for s in start)
    assert sum(fetched) == 2 * blocks and set(fetched) == {2}
