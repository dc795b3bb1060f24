"""Causal attention of many new tokens per row over a paged KV cache, for NVIDIA GPUs.

The layout is that of `gpu_paged_attention`, which computes one new token per row. Here a thread
block takes 64 or 128 new tokens of one query head and reads the keys and values that they see, in
place, `_KEYS` at a time; the query heads of a kv head and the blocks of a row read the same ones,
which the L2 cache holds. Each computing warpgroup runs FlashAttention (arXiv 2205.14135) for 64
tokens, and another warpgroup copies. A row's result depends on that row alone.

Written in Mosaic GPU for Hopper (WGMMA and TMA): bfloat16 only.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int32

from mmsr1_jax.models import gpu_paged_attention, mosaic_gpu

_QUERIES = mosaic_gpu.WGMMA_ROWS  # new tokens of a warpgroup
_KEYS = 128  # tokens per step; with fewer, products wait for the queries in shared memory
_COPY = 64  # tokens per copy: the smallest page
_STEPS = 2  # steps in flight: 128 KiB, as one thread block fits on a multiprocessor


def paged_prefill(
    q: Float[jax.Array, "B T N H"],
    kv: Float[jax.Array, "pages two_K page H"],
    table: Int32[jax.Array, "B pages_per_lane"],
    start: Int32[jax.Array, "B"],
    count: Int32[jax.Array, "B"],
    *,
    interpret: bool = False,
) -> Float[jax.Array, "B T N H"]:
    """Compute softmax(q k^T / sqrt(H)) v over the tokens of each row up to the query's own.

    Args:
      q: bfloat16[B, T, N, H]. Queries of each row's new tokens, N a multiple of K.
      kv: bfloat16[pages, 2K, page, H]. Cache, with the new tokens already in it.
      table: int32[B, pages_per_lane]. Pages of each row, in order. Those after the last one with
        tokens must be valid but are not read.
      start: int32[B]. Number of tokens of each row before the new ones.
      count: int32[B]. Number of new tokens of each row, at most T.
      interpret: Whether to run in Pallas' interpreter, on a CPU.

    Returns:
      bfloat16[B, T, N, H]; undefined for tokens from `count` on. Softmax and sums are computed in
      float32.

    Raises:
      UserError: If the dtype, the page size or the head dimension is not supported.
    """
    B, T, N, H = q.shape
    gpu_paged_attention.check(q, kv)
    padded = -(-T // _QUERIES) * _QUERIES
    q = jnp.pad(q, ((0, 0), (0, padded - T), (0, 0), (0, 0)))
    warpgroups = 2 if padded % (2 * _QUERIES) == 0 else 1
    kernel = plgpu.kernel(
        functools.partial(_kernel, interpret=interpret),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_scratch(H, warpgroups),
        grid=(B, N, padded // (warpgroups * _QUERIES)),
        grid_names=("row", "head", "block"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="paged_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=mosaic_gpu.interpreter() if interpret else None,
    )
    return kernel(q, kv, table, start, count)[:, :T]


def prefill_cost(q: Sequence[int], start: int) -> tuple[float, float]:
    """Return the bytes that one call of the kernel copies and the FLOPs that it computes.

    Each thread block copies all keys and values that it sees. Those of the query heads of a kv head
    run at the same time, so most of these bytes come from the L2 cache.

    Args:
      q: Shape of the kernel's queries, [B, T, N, H], all of them new tokens.
      start: Number of tokens of every row before them.
    """
    B, T, N, H = q
    size = _QUERIES * (2 if T % (2 * _QUERIES) == 0 else 1)
    seen = [-(-(start + end) // _KEYS) * _KEYS for end in range(size, T + 1, size)]
    copied = 2.0 * 2 * B * N * H * sum(seen)
    return copied + 2.0 * 2 * B * T * N * H, 4.0 * B * N * H * size * sum(seen)


def _scratch(H: int, warpgroups: int) -> dict:
    """Return the shared memory and the barriers of a thread block; index 0 is keys, 1 values."""
    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    kv = plgpu.SMEM((_STEPS, _KEYS, H), jnp.bfloat16, transforms=tiles)
    filled = plgpu.Barrier(num_arrivals=_KEYS // _COPY, num_barriers=_STEPS)
    emptied = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=_STEPS)
    return {
        "q_smem": plgpu.SMEM((warpgroups, _QUERIES, H), jnp.bfloat16, transforms=tiles),
        "kv_smem": (kv, kv),
        "q_barriers": plgpu.Barrier(num_barriers=warpgroups),
        "filled": (filled, filled),
        "emptied": (emptied, emptied),
    }


def _kernel(
    q, kv, table, start, count, out, *, q_smem, kv_smem, q_barriers, filled, emptied,
    interpret: bool,
) -> None:  # fmt: skip
    """Compute the new tokens of one block of a row, for one query head."""
    row, head, block = (jax.lax.axis_index(name) for name in ("row", "head", "block"))
    warpgroup, warpgroups = jax.lax.axis_index("warpgroup"), q_smem.shape[0]
    first = block * warpgroups * _QUERIES
    new = jnp.minimum(count[row], first + warpgroups * _QUERIES)
    # A block of padding reads the first keys, so that its result is finite.
    steps = pl.cdiv(jnp.where(first < new, start[row] + new, 1), _KEYS)

    @pl.when(warpgroup == warpgroups)
    def _():
        if warpgroups == 2:
            plgpu.set_max_registers(40, action="decrease")
        kv_head = head // (2 * q.shape[2] // kv.shape[1])

        copies = [
            functools.partial(
                _copy, kv, table, row, 2 * kv_head + kind, slots=kv_smem[kind], filled=filled[kind]
            )
            for kind in range(2)
        ]
        mosaic_gpu.fill_slots(steps, emptied, copies)

    @pl.when(warpgroup < warpgroups)
    def _():
        if warpgroups == 2:
            plgpu.set_max_registers(232, action="increase")
        own = first + warpgroup * _QUERIES
        tile, barrier = q_smem.at[warpgroup], q_barriers.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[row, pl.ds(own, _QUERIES), head], tile, barrier)
        plgpu.barrier_wait(barrier)

        def read(kind, step):
            plgpu.barrier_wait(filled[kind].at[step % _STEPS])
            return kv_smem[kind].at[step % _STEPS]

        def release(kind, step):
            plgpu.barrier_arrive(emptied[kind].at[step % _STEPS])

        last = start[row] + own
        acc, _, total = mosaic_gpu.attend(
            tile, steps, read, release,
            lambda step, query, key: key + step * _KEYS <= query + last, interpret,
        )  # fmt: skip
        tile[...] = (acc / jax.lax.broadcast_in_dim(total, acc.shape, [0])).astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[row, pl.ds(own, _QUERIES), head])
        plgpu.wait_smem_to_gmem(0)


def _copy(kv, table, row, index, step, slot, *, slots, filled) -> None:
    """Copy the keys or values of a step to a slot."""
    page = kv.shape[2]
    for offset in range(0, _KEYS, _COPY):
        token = step * _KEYS + offset
        which = table[row, jnp.minimum(token // page, table.shape[1] - 1)]
        source = kv.at[which, index, pl.ds(token % page, _COPY)]
        plgpu.copy_gmem_to_smem(source, slots.at[slot, pl.ds(offset, _COPY)], filled.at[slot])
