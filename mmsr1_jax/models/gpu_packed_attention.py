"""Attention over packed rows as kernels for NVIDIA GPUs, with segments that continue others.

A block of 128 queries visits only the blocks of keys that some of its queries can see
(`packed_blocks`); blocks that all of its queries see whole come first and need no mask. Queries of
padding see no key, and their output is 0.

| kernel    | computes, in a thread block      | of                         | visits            |
|-----------|----------------------------------|----------------------------|-------------------|
| `forward` | the output and its logsumexp     | a block of queries, a head | blocks of keys    |
| `dq`      | the gradient of queries          | a block of queries, a head | blocks of keys    |
| `dkv`     | the gradients of keys and values | a block of keys, a kv head | blocks of queries |

The backward kernels compute the weights again, from the scores and the saved logsumexp (algorithm 4
of FlashAttention, arXiv 2205.14135). Each result is summed by one thread block in one order, so
results are deterministic, and those of a row depend on that row alone. Keys and values are read in
place, whatever the number of query heads that share them.

Written in Mosaic GPU for Hopper (WGMMA and TMA): bfloat16 only.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import gpu_packed_backward, gpu_packed_forward, packed_blocks

ROW_MULTIPLE = packed_blocks.BLOCK
_HEAD_DIMS = (64, 96, 128)  # others are padded: copies take whole tiles of 32 or 64 columns
_PADDING = -2  # id of queries that see no key
_IN_FLIGHT = 132  # thread blocks that run together: one a multiprocessor of an H100
# Products of a block of queries and one of keys, and arrays of a thread block's own block.
_COSTS = {"packed_forward": (2, 2), "packed_dq": (3, 3), "packed_dkv": (4, 4)}


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
      q: bfloat16[B, T, N, H], N a multiple of K.
      k, v: bfloat16[B, T, K, H].
      segment_ids: int32[B, T], 0 for padding.
      prefix_ids: int32[B, T], -1 for none; None: no segment continues another.
      causal: Whether to mask the keys after each query.
      interpret: Whether to run the kernels in Pallas' interpreter.

    Returns:
      bfloat16[B, T, N, H]; 0 at padding. Softmax and sums are computed in float32.

    Raises:
      UserError: If the dtype or the head dimension is not supported.
    """
    H = q.shape[-1]
    _check(q)
    padding = min(size for size in _HEAD_DIMS if size >= H) - H
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))) for x in (q, k, v))
    q_ids = [segment_ids] if prefix_ids is None else [segment_ids, prefix_ids]
    q_ids = jnp.where(segment_ids[:, None] > 0, jnp.stack(q_ids, axis=1), _PADDING)
    out = _attention(q, k, v, q_ids, segment_ids, causal, H**-0.5, interpret)
    return jnp.asarray(out)[..., :H]


def kernel_cost(
    kernel: str, q: Sequence[int], kv_heads: int, causal: bool, segment: int = 0
) -> tuple[float, float]:
    """Return the bytes that one call of a kernel fetches from memory and the FLOPs it computes.

    Thread blocks that run together visit the same blocks in the same order, so that one fetches
    what the others find in the L2 cache. What remains there for later ones is not counted.

    Args:
      kernel: `packed_forward`, `packed_dq` or `packed_dkv`.
      q: Shape of the kernel's queries, [B, T, N, H].
      kv_heads: Number of kv heads, K.
      causal: Whether queries see no keys after them.
      segment: Tokens of a segment that is not causal; 0: those of a row. Causal rows are taken to
        hold one segment, the most work that they can.
    """
    products, own_arrays = _COSTS[kernel]
    B, T, N, H = q
    blocks = T // ROW_MULTIPLE
    seen = min(blocks, -(-segment // ROW_MULTIPLE) + 1) if segment else blocks
    visits = B * N * (blocks * (blocks + 1) // 2 if causal else blocks * seen)
    together = max(1.0, _IN_FLIGHT / (B * kv_heads))
    visited = 2.0 * 2 * ROW_MULTIPLE * H * visits / together  # keys and values, or queries and g
    own = 2.0 * own_arrays * B * T * (kv_heads if kernel == "packed_dkv" else N) * H
    return visited + own, 2.0 * products * ROW_MULTIPLE**2 * H * visits


def _check(q) -> None:
    """Raise UserError where the kernels do not support the arrays."""
    if q.dtype != jnp.bfloat16:
        raise UserError(f"attention: mosaic needs bfloat16, not {q.dtype}")
    if q.shape[-1] > _HEAD_DIMS[-1]:
        raise UserError(
            f"attention: mosaic needs a head dimension of at most {_HEAD_DIMS[-1]}, not "
            f"{q.shape[-1]}; set model.attention=blockwise"
        )


def _forward(q, k, v, q_ids, k_ids, causal, scale, interpret):
    visibility = packed_blocks.block_visibility(q_ids, k_ids, causal)
    order, counts = packed_blocks.visiting_order(visibility)
    out, logsumexp = gpu_packed_forward.forward(
        q, k, v, q_ids, k_ids, order, counts, causal=causal, scale=scale, interpret=interpret
    )
    return out, (q, k, v, q_ids, k_ids, visibility, out, logsumexp)


def _backward(causal, scale, interpret, saved, g):
    q, k, v, q_ids, k_ids, visibility, out, logsumexp = saved
    delta = jnp.einsum("btnh,btnh->bnt", out, g, preferred_element_type=jnp.float32)
    arrays = (q, k, v, g, logsumexp, delta, q_ids, k_ids)
    options = {"causal": causal, "scale": scale, "interpret": interpret}
    of_queries = packed_blocks.visiting_order(visibility)
    dq = gpu_packed_backward.dq(*arrays, *of_queries, **options)
    # Thread blocks that run together then start with the same queries, also if causal.
    of_keys = packed_blocks.visiting_order(visibility.swapaxes(1, 2), last_first=True)
    dk, dv = gpu_packed_backward.dkv(*arrays, *of_keys, **options)
    return dq, dk, dv, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, q_ids, k_ids, causal, scale, interpret):
    return _forward(q, k, v, q_ids, k_ids, causal, scale, interpret)[0]


_attention.defvjp(_forward, _backward)
