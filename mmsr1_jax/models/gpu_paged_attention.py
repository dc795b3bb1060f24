"""Attention of one new token per row over a paged KV cache, as a kernel for NVIDIA GPUs.

Pages of `page` tokens are shared by all rows. Keys of kv head k are at index 2k, values at 2k + 1:

    kv: [pages, 2K, page, H]      table[b]: 7 2 9 0      length[b]: 2 * page + 5

    row b attends to all of pages 7 and 2 and to the first 5 tokens of page 9; page 0 is not read

The kernel is FlashAttention (arXiv 2205.14135) with keys split over thread blocks (flash-decoding):
each thread block reads up to `_SPLIT` tokens of one row and kv head, in steps of `_BLOCK` tokens,
and writes its maximum, its sum of weights and its weighted sum of values. `_combine` adds them up.
A thread block without tokens exits at once. Which tokens a thread block reads, and in which order,
depends only on its row's length, so a row's result is bit-identical whatever the other rows are.

Written in Mosaic GPU for Hopper (WGMMA and TMA): bfloat16 only, because the tensor cores have no
float32.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int32

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import mosaic_gpu

# Tokens per step. Keys and values of a step take 32 KiB of shared memory. A page of 64 is one step,
# a page of 128 two.
_BLOCK = 64
# Steps in flight. Two thread blocks fit on a multiprocessor with two steps each: 128 KiB in flight,
# against the 30 KiB that hide a latency of one microsecond at an H100's bandwidth.
_STEPS = 2
# Tokens per thread block. A long row is shared by many multiprocessors, and the partial sums in
# float32 are under 1 % of the keys and values that they stand for.
_SPLIT = 1024
_ROWS = mosaic_gpu.WGMMA_ROWS  # the query heads of a kv head, then unused ones
_HEAD_MULTIPLE = 8  # rows of a tile in shared memory; query heads are padded to this
_OUT_COLUMNS = 32  # columns of the output stored at a time: 128 bytes, the widest swizzle


def paged_decode(
    q: Float[jax.Array, "B N H"],
    kv: Float[jax.Array, "pages two_K page H"],
    table: Int32[jax.Array, "B pages_per_lane"],
    length: Int32[jax.Array, "B"],
    *,
    interpret: bool = False,
) -> Float[jax.Array, "B N H"]:
    """Compute softmax(q k^T / sqrt(H)) v over the first `length` tokens of each row's pages.

    Args:
      q: bfloat16[B, N, H]. Query of each row's newest token, N a multiple of K.
      kv: bfloat16[pages, 2K, page, H]. Cache, with the newest token already in it.
      table: int32[B, pages_per_lane]. Pages of each row, in order. Pages after the last one with
        tokens are not read. Pages may be shared by rows.
      length: int32[B]. Number of tokens of each row, the newest included. Rows of length 0 are
        padding and read the first token of `table[b, 0]`; their output is finite but undefined.
      interpret: Whether to run in Pallas' interpreter, on a CPU.

    Returns:
      bfloat16[B, N, H]. Softmax and sums are computed in float32.

    Raises:
      UserError: If the dtype, the page size or the head dimension is not supported.
    """
    B, N, H = q.shape
    K, page = kv.shape[1] // 2, kv.shape[2]
    check(q, kv)
    heads = -(-N // K // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
    padded = jnp.pad(q.reshape(B, K, N // K, H), ((0, 0), (0, 0), (0, heads - N // K), (0, 0)))
    length = jnp.clip(length, 1, table.shape[1] * page)
    splits = -(-table.shape[1] * page // _SPLIT)
    kernel = plgpu.kernel(
        functools.partial(_kernel, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct((B, splits, K, heads, H), jnp.float32),
            jax.ShapeDtypeStruct((B, splits, K, 2, heads), jnp.float32),
        ),
        scratch_types=_scratch(H),
        grid=(B, K, splits),
        grid_names=("row", "kv_head", "split"),
        kernel_name="paged_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=mosaic_gpu.interpreter() if interpret else None,
    )
    sums, stats = kernel(padded, kv, table, length)
    out = _combine(sums, stats, length)
    return out[:, :, : N // K].reshape(B, N, H).astype(q.dtype)


def decode_cost(q: Sequence[int], kv: Sequence[int], length: int) -> tuple[float, float]:
    """Return the bytes that one call of the kernel moves and the FLOPs that it computes.

    Args:
      q: Shape of its queries, [B, K, heads, H].
      kv: Shape of the cache, [pages, 2K, page, H].
      length: Number of tokens of every row, at least 1.
    """
    B, K, heads, H = q
    tokens, splits = -(-length // _BLOCK) * _BLOCK, -(-length // _SPLIT)
    queries = 2.0 * B * splits * K * heads * H
    partial_sums = 4.0 * B * splits * K * heads * (H + 2)
    fetched = 2.0 * B * kv[1] * tokens * H
    return queries + fetched + partial_sums, 4.0 * B * K * _ROWS * H * tokens


def check(q, kv) -> None:
    """Raise UserError where the kernel does not support the arrays."""
    kernel, (page, H) = "the paged attention kernel for GPUs", kv.shape[2:]
    if q.dtype != jnp.bfloat16 or kv.dtype != jnp.bfloat16:
        raise UserError(
            f"{kernel} needs bfloat16, not queries of {q.dtype} and a cache of {kv.dtype}"
        )
    if page % _BLOCK or _SPLIT % page:
        raise UserError(
            f"{kernel} needs pages of 64, 128, 256, 512 or 1024 tokens, not {page}: set "
            "rollout.page_size"
        )
    if H not in (64, 128):
        raise UserError(f"{kernel} needs a head dimension of 64 or 128, not {H}")


def _num_blocks(length, split):
    """Return the number of blocks that a split reads of a row of `length` tokens."""
    blocks = pl.cdiv(jnp.maximum(length - split * _SPLIT, 0), _BLOCK)
    return jnp.minimum(blocks, _SPLIT // _BLOCK)


def _scratch(H: int) -> dict:
    """Return the shared memory and the barriers of a thread block; index 0 is keys, 1 values."""
    swizzle = plgpu.SwizzleTransform(128)
    bfloat16_tiles = (plgpu.TilingTransform((8, 64)), swizzle)
    float32_tiles = (plgpu.TilingTransform((8, 32)), swizzle)
    kv = plgpu.SMEM((_STEPS, _BLOCK, H), jnp.bfloat16, transforms=bfloat16_tiles)
    return {
        "q_smem": plgpu.SMEM((_ROWS, H), jnp.bfloat16, transforms=bfloat16_tiles),
        "kv_smem": (kv, kv),
        "sums_smem": plgpu.SMEM((_ROWS, _OUT_COLUMNS), jnp.float32, transforms=float32_tiles),
        "stats_smem": plgpu.SMEM((2, _ROWS), jnp.float32),
        "q_barrier": plgpu.Barrier(),
        "kv_barriers": (plgpu.Barrier(num_barriers=_STEPS), plgpu.Barrier(num_barriers=_STEPS)),
    }


def _kernel(
    q, kv, table, length, sums, stats, *,
    q_smem, kv_smem, sums_smem, stats_smem, q_barrier, kv_barriers, interpret: bool,
) -> None:  # fmt: skip
    """Compute one split of one row and kv head, on one warpgroup.

    q: [B, K, heads, H]; sums: [B, splits, K, heads, H]; stats: [B, splits, K, 2, heads]. Tiles have
    `_ROWS` rows; those after `heads` are never initialised. They do not affect the others and are
    not stored.
    """
    row, kv_head, split = (jax.lax.axis_index(name) for name in ("row", "kv_head", "split"))
    heads, page = q.shape[2], kv.shape[2]
    blocks = _num_blocks(length[row], split)

    def copy(kind, block):
        """Start the copy of a block of keys (kind 0) or values (1), if the split has that block.

        All warps have finished reading the slot: the copy waits for them (`auto_barriers`).
        """

        @pl.when(block < blocks)
        def _():
            token, slot = split * _SPLIT + block * _BLOCK, block % _STEPS
            tokens = pl.ds(token % page, _BLOCK)
            source = kv.at[table[row, token // page], 2 * kv_head + kind, tokens]
            plgpu.copy_gmem_to_smem(source, kv_smem[kind].at[slot], kv_barriers[kind].at[slot])

    def read(kind, block):
        slot = block % _STEPS
        plgpu.barrier_wait(kv_barriers[kind].at[slot])
        return kv_smem[kind].at[slot]

    @pl.when(blocks > 0)
    def _():
        plgpu.copy_gmem_to_smem(q.at[row, kv_head], q_smem.at[pl.ds(0, heads)], q_barrier)
        for step in range(_STEPS):
            copy(0, step)
            copy(1, step)
        plgpu.barrier_wait(q_barrier)
        tokens = length[row] - split * _SPLIT
        acc, m, total = mosaic_gpu.attend(
            q_smem, blocks, read, lambda kind, block: copy(kind, block + _STEPS),
            lambda block, query, key: key < tokens - block * _BLOCK, interpret,
        )  # fmt: skip
        own = (row, split, kv_head)
        _store(acc, m, total, sums_smem, stats_smem, sums.at[own], stats.at[own])


def _store(acc, m, total, sums_smem, stats_smem, sums, stats) -> None:
    """Write the results of a split; sums: [heads, H], stats: [2, heads]."""
    heads, H = sums.shape
    stats_smem[0] = m
    stats_smem[1] = total
    for start in range(0, H, _OUT_COLUMNS):
        sums_smem[...] = acc[:, start : start + _OUT_COLUMNS]
        plgpu.commit_smem()
        source = sums_smem.at[pl.ds(0, heads)]
        plgpu.copy_smem_to_gmem(source, sums.at[:, pl.ds(start, _OUT_COLUMNS)])
        if start == 0:
            for i in range(2):
                plgpu.copy_smem_to_gmem(stats_smem.at[i, pl.ds(0, heads)], stats.at[i])
        # The tile is reused; the last copies must finish before the thread block ends.
        plgpu.wait_smem_to_gmem(0, wait_read_only=start + _OUT_COLUMNS < H)


def _combine(sums, stats, length):
    """Return the attention of each row from its splits, float32[B, K, heads, H]."""
    splits = sums.shape[1]
    filled = jnp.arange(splits) * _SPLIT < length[:, None]  # the others were not written
    m = jnp.where(filled[:, :, None, None], stats[:, :, :, 0], -jnp.inf)
    weights = jnp.exp2(m - m.max(axis=1, keepdims=True))  # [B, splits, K, heads]
    total = jnp.where(filled[:, :, None, None], stats[:, :, :, 1], 0.0)
    sums = jnp.where(filled[:, :, None, None, None], sums, 0.0)
    total = (weights * total).sum(axis=1)
    return (weights[..., None] * sums).sum(axis=1) / total[..., None]
