"""Forward kernel of attention over packed rows, for NVIDIA GPUs; see `gpu_packed_attention`.

A thread block takes a block of queries of one head. Two warpgroups run FlashAttention (arXiv
2205.14135) for half of its queries each, over the blocks of keys that some of the queries see, and
a third copies these.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmsr1_jax.models import mosaic_gpu, packed_blocks

_BLOCK = packed_blocks.BLOCK
_ROWS = mosaic_gpu.WGMMA_ROWS  # queries of a warpgroup
_WARPGROUPS = _BLOCK // _ROWS  # that compute; one more copies
_STEPS = 2  # steps in flight: 128 KiB, as one thread block fits on a multiprocessor


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, q_ids: jax.Array, k_ids: jax.Array,
    order: jax.Array, counts: jax.Array, *, causal: bool, scale: float, interpret: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Compute softmax(scale q k^T) v over the keys that each query sees.

    Args:
      q: bfloat16[B, T, N, H].
      k, v: bfloat16[B, T, K, H].
      q_ids: int32[B, ids, T]. Segments whose keys each query sees.
      k_ids: int32[B, T]. Segment of each key.
      order, counts: Blocks of keys that each block of queries visits (`visiting_order`).
      causal: Whether queries see no keys after them.
      scale: Factor of the scores.
      interpret: Whether to run in Pallas' interpreter, on a CPU.

    Returns:
      bfloat16[B, T, N, H], 0 for a query that sees no key.
      float32[B, N, T], the logarithm to base 2 of the sum of exp(scores); 0 without a key.
    """
    B, T, N, H = q.shape
    kernel = plgpu.kernel(
        functools.partial(_kernel, causal=causal, scale=scale, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ),
        scratch_types=_scratch(H, q_ids.shape[1]),
        # Heads that run together share keys.
        grid=(T // _BLOCK, B, N),
        grid_names=("block", "row", "head"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="packed_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=mosaic_gpu.interpreter() if interpret else None,
    )
    return kernel(q, k, v, q_ids, k_ids, order, counts)


def _scratch(H: int, num_ids: int) -> dict:
    """Return the shared memory and the barriers of a thread block; index 0 is keys, 1 values."""
    kv = mosaic_gpu.tiles(_STEPS, _BLOCK, H)
    emptied = plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STEPS)
    return {
        "q_smem": mosaic_gpu.tiles(_WARPGROUPS, _ROWS, H),
        "q_ids_smem": plgpu.SMEM((_WARPGROUPS, num_ids, _ROWS), jnp.int32),
        "logsumexp_smem": plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
        "kv_smem": (kv, kv),
        "k_ids_smem": plgpu.SMEM((_STEPS, _BLOCK), jnp.int32),
        "q_barriers": plgpu.Barrier(num_arrivals=1 + num_ids, num_barriers=_WARPGROUPS),
        "filled": (
            plgpu.Barrier(num_arrivals=2, num_barriers=_STEPS),  # keys with their ids
            plgpu.Barrier(num_barriers=_STEPS),
        ),
        "emptied": (emptied, emptied),
    }


def _kernel(
    q, k, v, q_ids, k_ids, order, counts, out, logsumexp, *,
    q_smem, q_ids_smem, logsumexp_smem, kv_smem, k_ids_smem, q_barriers, filled, emptied,
    causal: bool, scale: float, interpret: bool,
) -> None:  # fmt: skip
    """Compute one block of queries of one row and head, on `_WARPGROUPS + 1` warpgroups."""
    row, head, warpgroup = (jax.lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    # If causal, later blocks take longer, so they start first.
    block = order.shape[1] - 1 - jax.lax.axis_index("block")
    steps = counts[row, block, 1]

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = head // (q.shape[2] // k.shape[2])

        def copy(kind, step, slot):
            keys = pl.ds(order[row, block, step] * _BLOCK, _BLOCK)
            source = (k, v)[kind].at[row, keys, kv_head]
            plgpu.copy_gmem_to_smem(source, kv_smem[kind].at[slot], filled[kind].at[slot])
            if kind == 0:
                ids = k_ids.at[row, keys]
                plgpu.copy_gmem_to_smem(ids, k_ids_smem.at[slot], filled[0].at[slot])

        copies = [functools.partial(copy, kind) for kind in range(2)]
        mosaic_gpu.fill_slots(steps, emptied, copies)

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first = block * _BLOCK + warpgroup * _ROWS
        own, barrier = pl.ds(first, _ROWS), q_barriers.at[warpgroup]
        tile, ids_smem = q_smem.at[warpgroup], q_ids_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[row, own, head], tile, barrier)
        for i in range(q_ids.shape[1]):
            plgpu.copy_gmem_to_smem(q_ids.at[row, i, own], ids_smem.at[i], barrier)
        plgpu.barrier_wait(barrier)
        own_ids = [mosaic_gpu.load(ids_smem.at[i], 0, interpret) for i in range(q_ids.shape[1])]

        def read(kind, step):
            plgpu.barrier_wait(filled[kind].at[step % _STEPS])
            return kv_smem[kind].at[step % _STEPS]

        def visible(step, query, key):
            ids = mosaic_gpu.load(k_ids_smem.at[step % _STEPS], 1, interpret)
            key += order[row, block, step] * _BLOCK
            return packed_blocks.visible_pairs(own_ids, ids, query + first, key, 0, causal)

        acc, m, total = mosaic_gpu.attend(
            tile, steps, read, lambda kind, step: plgpu.barrier_arrive(
                emptied[kind].at[step % _STEPS]
            ), visible, interpret, scale=scale, unmasked=counts[row, block, 0],
        )  # fmt: skip
        sees = total > 0
        total = jnp.where(sees, total, 1.0)
        tile[...] = (acc / mosaic_gpu.along(total, acc.shape, 0)).astype(out.dtype)
        logsumexp_smem[warpgroup] = jnp.where(
            sees, m + jnp.log(total) * mosaic_gpu.LOG2_E, jnp.zeros_like(m)
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[row, own, head])
        plgpu.copy_smem_to_gmem(logsumexp_smem.at[warpgroup], logsumexp.at[row, head, own])
        plgpu.wait_smem_to_gmem(0)
