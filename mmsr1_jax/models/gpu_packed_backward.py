"""Backward kernels of attention over packed rows, for NVIDIA GPUs; see `gpu_packed_attention`.

With s = scale q k^T, p = exp(s - logsumexp) and delta = sum(out g):

    dp = g v^T    ds = p (dp - delta)    dq = scale ds k    dk = scale ds^T q    dv = p^T g

Two warpgroups compute half of a block's gradients each, and a third copies what they read.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmsr1_jax.models import mosaic_gpu, packed_blocks

_BLOCK = packed_blocks.BLOCK
_ROWS = mosaic_gpu.WGMMA_ROWS  # queries or keys of a warpgroup
_WARPGROUPS = _BLOCK // _ROWS  # that compute; one more copies
_DQ_STEPS = 2  # steps in flight: 128 KiB beside the 64 KiB of the queries and their gradients
_DKV_STEPS = 3  # 96 KiB beside the 64 KiB of keys and values
# Queries of a step of `dkv`: with more, the two sums and the two products of a step do not fit into
# registers.
_QUERIES = 64


def dq(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, logsumexp: jax.Array,
    delta: jax.Array, q_ids: jax.Array, k_ids: jax.Array, order: jax.Array, counts: jax.Array, *,
    causal: bool, scale: float, interpret: bool,
) -> jax.Array:  # fmt: skip
    """Return the gradient of the queries, bfloat16[B, T, N, H].

    Args:
      q, g: bfloat16[B, T, N, H]. Queries, and the gradient of the output.
      k, v: bfloat16[B, T, K, H].
      logsumexp: float32[B, N, T], from the forward kernel.
      delta: float32[B, N, T], the sums of out * g over H.
      q_ids: int32[B, ids, T]. Segments whose keys each query sees.
      k_ids: int32[B, T]. Segment of each key.
      order, counts: Blocks of keys that each block of queries visits (`visiting_order`).
      causal: Whether queries see no keys after them.
      scale: Factor of the scores.
      interpret: Whether to run in Pallas' interpreter, on a CPU.
    """
    B, T, N, H = q.shape
    kernel = plgpu.kernel(
        functools.partial(_dq_kernel, causal=causal, scale=scale, interpret=interpret),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_dq_scratch(H, q_ids.shape[1]),
        grid=(T // _BLOCK, B, N),
        grid_names=("block", "row", "head"),
        kernel_name="packed_dq",
        **_options(interpret),
    )
    return kernel(q, k, v, g, logsumexp, delta, q_ids, k_ids, order, counts)


def dkv(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, logsumexp: jax.Array,
    delta: jax.Array, q_ids: jax.Array, k_ids: jax.Array, order: jax.Array, counts: jax.Array, *,
    causal: bool, scale: float, interpret: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Return the gradients of keys and values, bfloat16[B, T, K, H] each.

    Arguments are those of `dq`, but `order` and `counts` are the blocks of queries that each block
    of keys visits.
    """
    B, T, K, H = k.shape
    kernel = plgpu.kernel(
        functools.partial(_dkv_kernel, causal=causal, scale=scale, interpret=interpret),
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
        scratch_types=_dkv_scratch(H, q_ids.shape[1]),
        # If causal, earlier blocks take longer, so they start first.
        grid=(T // _BLOCK, B, K),
        grid_names=("block", "row", "kv_head"),
        kernel_name="packed_dkv",
        **_options(interpret),
    )
    return kernel(q, k, v, g, logsumexp, delta, q_ids, k_ids, order, counts)


def _options(interpret: bool) -> dict:
    return {
        "num_threads": _WARPGROUPS + 1,
        "thread_name": "warpgroup",
        "compiler_params": plgpu.CompilerParams(approx_math=True),
        "interpret": mosaic_gpu.interpreter() if interpret else None,
    }


def _dq_scratch(H: int, num_ids: int) -> dict:
    """Return the shared memory and the barriers of a thread block."""
    own, other = mosaic_gpu.tiles(_WARPGROUPS, _ROWS, H), mosaic_gpu.tiles(_DQ_STEPS, _BLOCK, H)
    return {
        "own": (own, own),
        "own_stats": (plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),) * 2,
        "own_ids": plgpu.SMEM((_WARPGROUPS, num_ids, _ROWS), jnp.int32),
        "kv": (other, other),
        "kv_ids": plgpu.SMEM((_DQ_STEPS, _BLOCK), jnp.int32),
        "loaded": plgpu.Barrier(num_arrivals=4 + num_ids, num_barriers=_WARPGROUPS),
        "filled": plgpu.Barrier(num_arrivals=3, num_barriers=_DQ_STEPS),
        "emptied": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_DQ_STEPS),
    }


def _dq_kernel(
    q, k, v, g, logsumexp, delta, q_ids, k_ids, order, counts, out, *,
    own, own_stats, own_ids, kv, kv_ids, loaded, filled, emptied,
    causal: bool, scale: float, interpret: bool,
) -> None:  # fmt: skip
    """Compute one block of queries of one row and head, on `_WARPGROUPS + 1` warpgroups."""
    row, head, warpgroup = (jax.lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    # If causal, later blocks take longer, so they start first.
    block = order.shape[1] - 1 - jax.lax.axis_index("block")
    steps = counts[row, block, 1]

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        kv_head = head // (q.shape[2] // k.shape[2])

        def copy(step, slot):
            keys = pl.ds(order[row, block, step] * _BLOCK, _BLOCK)
            for source, target in (
                (k.at[row, keys, kv_head], kv[0]),
                (v.at[row, keys, kv_head], kv[1]),
                (k_ids.at[row, keys], kv_ids),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], filled.at[slot])

        mosaic_gpu.fill_slots(steps, [emptied], [copy])

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        first = block * _BLOCK + warpgroup * _ROWS
        queries = pl.ds(first, _ROWS)
        (q_tile, g_tile), stats = ([x.at[warpgroup] for x in refs] for refs in (own, own_stats))
        ids = [own_ids.at[warpgroup, i] for i in range(q_ids.shape[1])]
        sources = [x.at[row, queries, head] for x in (q, g)]
        sources += [x.at[row, head, queries] for x in (logsumexp, delta)]
        sources += [q_ids.at[row, i, queries] for i in range(q_ids.shape[1])]
        for source, target in zip(sources, [q_tile, g_tile, *stats, *ids], strict=True):
            plgpu.copy_gmem_to_smem(source, target, loaded.at[warpgroup])
        plgpu.barrier_wait(loaded.at[warpgroup])
        lse, of_query = (mosaic_gpu.load(x, 0, interpret) for x in stats)
        ids = [mosaic_gpu.load(x, 0, interpret) for x in ids]

        def step(i, acc, masked):
            slot = i % _DQ_STEPS
            plgpu.barrier_wait(filled.at[slot])
            keys, values = kv[0].at[slot], kv[1].at[slot]
            pairs = [(q_tile, keys), (g_tile, values)]
            scores, *dp = mosaic_gpu.products(pairs[:1] if masked else pairs, interpret)
            shape, scores = scores.shape, scores * (scale * mosaic_gpu.LOG2_E)
            if masked:
                query, key = (mosaic_gpu.index(shape, axis, interpret) for axis in (0, 1))
                key += order[row, block, i] * _BLOCK
                of_keys = mosaic_gpu.load(kv_ids.at[slot], 1, interpret)
                seen = packed_blocks.visible_pairs(ids, of_keys, query + first, key, 0, causal)
                scores = jnp.where(seen, scores, -jnp.inf)
            weights = jnp.exp2(scores - mosaic_gpu.along(lse, shape, 0))
            (dp,) = dp or mosaic_gpu.products(pairs[1:], interpret)
            ds = weights * (dp - mosaic_gpu.along(of_query, shape, 0))
            (acc,) = mosaic_gpu.add_products([(acc, ds.astype(q.dtype), keys)], interpret)
            plgpu.barrier_arrive(emptied.at[slot])
            return acc

        acc = mosaic_gpu.zeros(q_tile.shape, interpret)
        acc = mosaic_gpu.in_two_phases(counts[row, block, 0], steps, step, acc)
        q_tile[...] = (acc * scale).astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, out.at[row, queries, head])
        plgpu.wait_smem_to_gmem(0)


def _dkv_scratch(H: int, num_ids: int) -> dict:
    """Return the shared memory and the barriers of a thread block."""
    own, other = mosaic_gpu.tiles(_WARPGROUPS, _ROWS, H), mosaic_gpu.tiles(_DKV_STEPS, _QUERIES, H)
    return {
        "own": (own, own),
        "own_ids": plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.int32),
        "qg": (other, other),
        "stats": (plgpu.SMEM((_DKV_STEPS, _QUERIES), jnp.float32),) * 2,
        "qg_ids": plgpu.SMEM((_DKV_STEPS, num_ids, _QUERIES), jnp.int32),
        "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=_WARPGROUPS),
        "filled": plgpu.Barrier(num_arrivals=4 + num_ids, num_barriers=_DKV_STEPS),
        "emptied": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_DKV_STEPS),
    }


def _dkv_kernel(
    q, k, v, g, logsumexp, delta, q_ids, k_ids, order, counts, dk, dv, *,
    own, own_ids, qg, stats, qg_ids, loaded, filled, emptied,
    causal: bool, scale: float, interpret: bool,
) -> None:  # fmt: skip
    """Compute one block of keys of one row and kv head, on `_WARPGROUPS + 1` warpgroups.

    Products are transposed: keys are rows, queries are columns.
    """
    names = ("row", "kv_head", "block", "warpgroup")
    row, kv_head, block, warpgroup = (jax.lax.axis_index(name) for name in names)
    heads = q.shape[2] // k.shape[2]
    per_block = heads * (_BLOCK // _QUERIES)  # steps of a block of queries
    steps = counts[row, block, 1] * per_block

    def first_query(step):
        return order[row, block, step // per_block] * _BLOCK + step % per_block // heads * _QUERIES

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def copy(step, slot):
            queries, head = pl.ds(first_query(step), _QUERIES), kv_head * heads + step % heads
            copies = [
                (q.at[row, queries, head], qg[0].at[slot]),
                (g.at[row, queries, head], qg[1].at[slot]),
                (logsumexp.at[row, head, queries], stats[0].at[slot]),
                (delta.at[row, head, queries], stats[1].at[slot]),
            ]
            for i in range(q_ids.shape[1]):
                copies.append((q_ids.at[row, i, queries], qg_ids.at[slot, i]))
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, filled.at[slot])

        mosaic_gpu.fill_slots(steps, [emptied], [copy])

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        first = block * _BLOCK + warpgroup * _ROWS
        keys = pl.ds(first, _ROWS)
        k_tile, v_tile, ids = (x.at[warpgroup] for x in (*own, own_ids))
        for source, target in (
            (k.at[row, keys, kv_head], k_tile),
            (v.at[row, keys, kv_head], v_tile),
            (k_ids.at[row, keys], ids),
        ):
            plgpu.copy_gmem_to_smem(source, target, loaded.at[warpgroup])
        plgpu.barrier_wait(loaded.at[warpgroup])
        ids = mosaic_gpu.load(ids, 0, interpret)

        def step(i, carry, masked):
            slot = i % _DKV_STEPS
            plgpu.barrier_wait(filled.at[slot])
            queries, g_queries = qg[0].at[slot], qg[1].at[slot]
            pairs = [(k_tile, queries), (v_tile, g_queries)]
            scores, *dp = mosaic_gpu.products(pairs[:1] if masked else pairs, interpret)
            shape, scores = scores.shape, scores * (scale * mosaic_gpu.LOG2_E)
            if masked:
                key, query = (mosaic_gpu.index(shape, axis, interpret) for axis in (0, 1))
                query += first_query(i)
                of_queries = [
                    mosaic_gpu.load(qg_ids.at[slot, j], 1, interpret) for j in range(q_ids.shape[1])
                ]
                seen = packed_blocks.visible_pairs(of_queries, ids, query, key + first, 1, causal)
                scores = jnp.where(seen, scores, -jnp.inf)
            lse, of_query = (mosaic_gpu.load(x.at[slot], 1, interpret) for x in stats)
            weights = jnp.exp2(scores - mosaic_gpu.along(lse, shape, 1))
            (dp,) = dp or mosaic_gpu.products(pairs[1:], interpret)
            ds = weights * (dp - mosaic_gpu.along(of_query, shape, 1))
            dk, dv = carry
            carry = mosaic_gpu.add_products(
                [(dk, ds.astype(q.dtype), queries), (dv, weights.astype(q.dtype), g_queries)],
                interpret,
            )
            plgpu.barrier_arrive(emptied.at[slot])
            return tuple(carry)

        sums = (mosaic_gpu.zeros(k_tile.shape, interpret),) * 2
        unmasked = counts[row, block, 0] * per_block
        d_keys, d_values = mosaic_gpu.in_two_phases(unmasked, steps, step, sums)
        k_tile[...] = (d_keys * scale).astype(dk.dtype)
        v_tile[...] = d_values.astype(dv.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, dk.at[row, keys, kv_head])
        plgpu.copy_smem_to_gmem(v_tile, dv.at[row, keys, kv_head])
        plgpu.wait_smem_to_gmem(0)
