"""Attention over packed rows on TPUs, by JAX's splash kernel.

The kernel separates segments by their ids and visits the blocks of queries and keys that a table
names. The table is computed from the ids of the row, so blocks of which no query sees a key cost
nothing. A query whose segment continues another one attends in two parts, to its own segment and to
the prefix, each with the log of the sum of its exponentials:

    out = w1 out1 + w2 out2,    w = exp(l - logsumexp),    logsumexp = log(exp(l1) + exp(l2))

The backward kernels compute the weights of a part from its scores and the logsumexp that they are
given. With the merged output and logsumexp, the gradients of both parts are exact, and add up.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Bool, Float, Int32

BLOCK, ROW_MULTIPLE = 512, 128


def attention(
    q: Float[jax.Array, "B T N H"],
    k: Float[jax.Array, "B T K H"],
    v: Float[jax.Array, "B T K H"],
    segment_ids: Int32[jax.Array, "B T"],
    prefix_ids: Int32[jax.Array, "B T"] | None = None,
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[jax.Array, "B T N H"]:
    """Compute `attention.attention` for rows whose length is a multiple of `ROW_MULTIPLE`.

    Args:
      q: float[B, T, N, H].
      k, v: float[B, T, K, H].
      segment_ids: int32[B, T].
      prefix_ids: int32[B, T], -1 for none; None: no segment continues another.
      causal: Whether to mask the keys after each query.
      interpret: Whether to run the kernel in Pallas' interpreter.
    """
    H = q.shape[-1]
    # The kernel needs a head dimension that is a multiple of 128. Zeros do not change the result.
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, -H % 128),)) for x in (q * H**-0.5, k, v))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    seen = (segment_ids,) if prefix_ids is None else (segment_ids, prefix_ids)
    out: Any = _attend(q, k, v, seen, causal, interpret)
    return out.swapaxes(1, 2)[..., :H].astype(v.dtype)


def visible_blocks(
    q_ids: Int32[jax.Array, "T"], kv_ids: Int32[jax.Array, "T"], block: int, *, causal: bool
) -> Bool[jax.Array, "blocks blocks"]:
    """Return the blocks of queries and keys which the kernel visits.

    They are those in which a query may see a key, by the ranges of ids in a block. Ids increase
    along a row, except those of images whose windows share slots, so few others are among them.

    Args:
      q_ids: int32[T]. Segment whose keys each query sees; less than 1 for none.
      kv_ids: int32[T]. Segment of each key; 0 for padding.
      block: Number of tokens of a block.
      causal: Whether the keys after each query are masked.

    Returns:
      bool[T / block, T / block], by block of queries and block of keys.
    """
    largest = jnp.iinfo(jnp.int32).max

    def id_ranges(ids):
        ids = ids.reshape(-1, block)
        return jnp.where(ids > 0, ids, largest).min(axis=1), ids.max(axis=1)

    (q_low, q_high), (kv_low, kv_high) = id_ranges(q_ids), id_ranges(kv_ids)
    visible = (q_low[:, None] <= kv_high) & (kv_low <= q_high[:, None])
    return jnp.tril(visible) if causal else visible


def _mask_info(visited: jax.Array, *, by_key: bool = False) -> MaskInfo:
    """Return a table of visited blocks in the form of the kernel.

    Args:
      visited: bool[T / block, T / block], by block of queries and block of keys.
      by_key: Whether the kernel visits the queries of one block of keys after those of another,
        instead of the keys of one block of queries.
    """
    rows = visited.T if by_key else visited
    blocks = rows.shape[1]
    # A step without a visit names the block of the next visit, which is fetched in the meantime.
    index = jnp.where(rows, jnp.arange(blocks), blocks)
    following = jax.lax.cummin(index, axis=1, reverse=True)
    following = jnp.where(following < blocks, following, index.min(axis=1, keepdims=True)) % blocks
    small = jnp.int8 if blocks <= 128 else jnp.int16  # scalar memory is scarce
    return MaskInfo(
        data_next=(following.T if by_key else following).astype(small)[None],
        mask_next=None,
        block_mask=visited.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=None,
    )


def _kernel(q_ids, kv_ids, *, own: bool, causal: bool, save_residuals: bool, interpret: bool):
    """Return the kernel for a row, with the blocks that it visits.

    Args:
      q_ids, kv_ids: int32[T]. Segments that queries see and those of keys.
      own: Whether queries see their own segment, so that each sees a key, padding included.
      causal: Whether to mask the keys after each query.
      save_residuals: Whether to return the log-sum-exp too.
      interpret: Whether to run the kernel in Pallas' interpreter.
    """
    T = len(q_ids)
    block = BLOCK if T % BLOCK == 0 else ROW_MULTIPLE
    visited = visible_blocks(q_ids, kv_ids, block, causal=causal)
    if own:
        visited |= jnp.eye(len(visited), dtype=bool)  # for padding, whose output must be finite
    order = jnp.arange(T, dtype=jnp.int32) if causal else None
    by_query = _mask_info(visited)._replace(q_sequence=order)
    by_key = _mask_info(visited, by_key=True)._replace(q_sequence=order)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash_attention_kernel.SplashAttentionKernel(
        by_query, by_query, by_key, block_sizes=sizes, is_mqa=False, save_residuals=save_residuals,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
        residual_checkpoint_name=None, mask_function=_not_after if causal else None,
        interpret=interpret,
    )  # fmt: skip


def _not_after(query: jax.Array, key: jax.Array) -> jax.Array:
    """Return whether keys are not after queries, by their indices."""
    return query >= key


def _rows(q, k, v, q_ids, kv_ids, **options) -> Any:
    """Run the kernel for each row."""

    def row(q, k, v, q_ids, kv_ids):
        return _kernel(q_ids, kv_ids, **options)(q, k, v, splash.SegmentIds(q=q_ids, kv=kv_ids))

    return jax.vmap(row)(q, k, v, q_ids, kv_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, seen, causal: bool, interpret: bool) -> jax.Array:
    """Compute attention of queries to their own segment and, with two `seen`, to their prefix.

    q: [B, N, T, H]; k, v: [B, K, T, H]; seen: the ids of the segments that each query sees,
    int32[B, T] each, first its own.
    """
    if len(seen) > 1:
        return _forward(q, k, v, seen, causal, interpret)[0]
    options = {"causal": causal, "save_residuals": False, "interpret": interpret}
    return _rows(q, k, v, *seen, *seen, own=True, **options)


def _forward(q, k, v, seen, causal: bool, interpret: bool):
    options = {"causal": causal, "save_residuals": True, "interpret": interpret}
    outs, sums = [], []
    for index, ids in enumerate(seen):
        out, (logsumexp,) = _rows(q, k, v, ids, seen[0], own=index == 0, **options)
        outs.append(out)
        sums.append(logsumexp)
    if len(seen) == 1:
        return outs[0], (q, k, v, seen, outs[0], sums[0])
    # The sum of a query without a visible key is -inf, and its output NaN, where no block of keys
    # was visited, and otherwise that of masked scores, which weighs nothing. Every query sees a key
    # of its own segment.
    (own, prefix), (own_sum, prefix_sum) = outs, sums
    logsumexp = jnp.logaddexp(own_sum, prefix_sum)
    # The barrier: one array of weights is spread over the elements of a head, which takes a TPU
    # several times as long as all else here.
    weight = jax.lax.optimization_barrier(jnp.exp(prefix_sum - logsumexp))[..., None]
    out = (1 - weight) * own + jnp.where(weight > 0, weight * prefix, 0)
    out = out.astype(q.dtype)
    return out, (q, k, v, seen, out, logsumexp)


def _backward(causal: bool, interpret: bool, saved, g):
    q, k, v, seen, out, logsumexp = saved

    def row(own, q, k, v, q_ids, kv_ids, out, logsumexp, g):
        options = {"causal": causal, "save_residuals": False, "interpret": interpret}
        kernel = _kernel(q_ids, kv_ids, own=own, **options)
        segments = splash.SegmentIds(q=q_ids, kv=kv_ids)
        masks = kernel.dq_mask_info, kernel.dkv_mask_info
        residuals = (q, k, v, segments, None, out, logsumexp, *masks)
        results = splash_attention_kernel._splash_attention_bwd(
            res=residuals, do=g, **kernel.kwargs
        )
        return results[3:6]

    parts = [
        jax.vmap(functools.partial(row, index == 0))(q, k, v, ids, seen[0], out, logsumexp, g)
        for index, ids in enumerate(seen)
    ]
    return (*(functools.reduce(jnp.add, x) for x in zip(*parts, strict=True)), None)


_attend.defvjp(_forward, _backward)
