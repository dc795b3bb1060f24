"""Which blocks of keys the blocks of queries of a packed row see, for kernels that visit no others.

A row of four blocks, in which segments 2 and 3 continue segment 1, causal:

    block        0  1  2  3         keys of block       0  1  2  3
    segment      1  2  2  3         queries of block 0  s  .  .  .      a: all are seen
    prefix       -  1  1  1                          1  a  s  .  .      s: some may be seen
                                                     2  a  a  s  .      .: none is seen
                                                     3  a  .  .  s

Blocks are compared by the least and the largest id in them. These tell exactly which blocks see
none of each other if ids increase along a row; else `s` may stand where `.` would do.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from mmsr1_jax.models import mosaic_gpu

BLOCK = 128  # queries or keys of a block
_ALL, _SOME, _NONE = range(3)


def block_visibility(
    q_ids: Int32[jax.Array, "B ids T"], k_ids: Int32[jax.Array, "B T"], causal: bool
) -> Int32[jax.Array, "B q_blocks k_blocks"]:
    """Return how much of each block of keys each block of queries sees.

    Args:
      q_ids: int32[B, ids, T]. Segments whose keys each query sees, negative for none.
      k_ids: int32[B, T]. Segment of each key, 0 for padding.
      causal: Whether queries see no keys after them.

    Returns:
      int32[B, T / BLOCK, T / BLOCK]: 0 if all of its queries see all of its keys, 2 if none sees
      any, else 1.
    """
    q = [x[..., :, None] for x in _extremes(q_ids)]  # [B, ids, blocks, 1]
    k = [x[:, None, None, :] for x in _extremes(k_ids)]  # [B, 1, 1, blocks]
    (q_min, q_max, q_first, q_last), (k_min, k_max, k_first, k_last) = q, k
    some = ((q_first <= k_last) & (k_first <= q_last)).any(axis=1)
    every = ((q_min == q_max) & (k_min == k_max) & (q_min == k_min)).any(axis=1)
    if causal:
        block = jnp.arange(some.shape[-1])
        some &= block[:, None] >= block
        every &= block[:, None] > block
    return jnp.where(every, _ALL, jnp.where(some, _SOME, _NONE)).astype(jnp.int32)


def visiting_order(
    visibility: Int32[jax.Array, "B blocks others"], *, last_first: bool = False
) -> tuple[Int32[jax.Array, "B blocks others"], Int32[jax.Array, "B blocks 2"]]:
    """Return the blocks that each block visits, those without a mask first.

    Args:
      visibility: int32[B, blocks, others], from `block_visibility`, or transposed.
      last_first: Whether to visit later blocks before earlier ones.

    Returns:
      int32[B, blocks, others]. Indices of the blocks to visit, in order, then of all others.
      int32[B, blocks, 2]. Number of blocks to visit without a mask, and of all blocks to visit.
    """
    others = visibility.shape[-1]
    rank = jnp.arange(others, dtype=jnp.int32)
    order = jnp.sort(visibility * others + (rank[::-1] if last_first else rank), axis=-1) % others
    order = others - 1 - order if last_first else order
    counts = [(visibility <= kind).sum(axis=-1) for kind in (_ALL, _SOME)]
    return order, jnp.stack(counts, axis=-1).astype(jnp.int32)


def visible_pairs(
    q_ids: list[jax.Array],
    k_ids: jax.Array,
    q_index: jax.Array,
    k_index: jax.Array,
    q_axis: int,
    causal: bool,
) -> jax.Array:
    """Return the mask of a block of scores, bool[shape], in a kernel.

    Args:
      q_ids: Segments whose keys each query sees, int32[queries] each.
      k_ids: Segment of each key, int32[keys].
      q_index, k_index: Index in the row of each score's query and key, int32[shape].
      q_axis: Axis of `shape` along which queries lie.
      causal: Whether queries see no keys after them.
    """
    shape = q_index.shape
    k_ids = mosaic_gpu.along(k_ids, shape, 1 - q_axis)
    seen = mosaic_gpu.along(q_ids[0], shape, q_axis) == k_ids
    for ids in q_ids[1:]:
        seen |= mosaic_gpu.along(ids, shape, q_axis) == k_ids
    return seen & (q_index >= k_index) if causal else seen


def _extremes(ids: jax.Array) -> tuple[jax.Array, ...]:
    """Return the least and largest id of each block, then those of the ids over 0.

    Without an id over 0 the last two are a range that overlaps no other.
    """
    ids = ids.reshape(*ids.shape[:-1], -1, BLOCK)
    first = jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(axis=-1)
    last = jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).min).max(axis=-1)
    return ids.min(axis=-1), ids.max(axis=-1), first, last
