"""What the kernels for NVIDIA GPUs share: products on the tensor cores, and their interpreter.

The kernels are written in Mosaic GPU for Hopper. Pallas' interpreter runs them on a CPU. It has no
products of transposed operands or of registers, and registers without layouts, so that these have
two forms.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any  # a reference, for which Pallas has no public type

WGMMA_ROWS = 64  # rows of a product on the tensor cores
_LOG2_E = math.log2(math.e)


def interpreter():
    """Return the settings of Pallas' interpreter of Mosaic GPU kernels."""
    # JAX has no public name for it.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def sum_products(
    columns: Sequence[int],
    steps: jax.Array | int,
    operands: Callable[[jax.Array], tuple[Ref, Sequence[Ref]]],
    release: Callable[[jax.Array], None],
    interpret: bool,
) -> Sequence[jax.Array]:
    """Return the sums over steps of a b^T for several b, float32[64, columns] each.

    Args:
      columns: Number of columns of each result.
      steps: Number of steps.
      operands: Returns a and each b of a step, in shared memory, when they are there.
      release: Called when a step's operands have been read.
      interpret: Whether Pallas' interpreter runs the kernel.
    """
    shapes = [(WGMMA_ROWS, n) for n in columns]
    if interpret:

        def add(step, sums):
            a, bs = operands(step)
            a = a[...]
            sums = tuple(acc + _product(a, b[...].T) for acc, b in zip(sums, bs, strict=True))
            release(step)
            return sums

        return jax.lax.fori_loop(0, steps, add, tuple(jnp.zeros(s, jnp.float32) for s in shapes))

    def accumulate(*sums):
        @pl.loop(0, steps)
        def _(step):
            a, bs = operands(step)
            for acc, b in zip(sums, bs, strict=True):
                plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)))
            plgpu.wgmma_wait(0)
            release(step)

        return [acc[...] for acc in sums]

    return pl.run_scoped(accumulate, *(plgpu.WGMMAAccumulatorRef(s, jnp.float32) for s in shapes))


def attend(
    q: Ref,
    blocks: jax.Array,
    read: Callable[[int, jax.Array], Ref],
    release: Callable[[int, jax.Array], None],
    visible: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run FlashAttention over blocks of keys; see algorithm 1 of arXiv 2205.14135.

    Args:
      q: Queries, bfloat16[64, H], in shared memory.
      blocks: Number of blocks, at least 1.
      read: Returns the keys (kind 0) or values (1) of a block when they are there,
        bfloat16[block, H], in shared memory.
      release: Called with a kind and a block which have been read.
      visible: Returns which keys the queries see, from a block and the indices of queries and of
        keys in it, int32[64, block] each. Each query sees a key of the first block.
      interpret: Whether Pallas' interpreter runs the kernel.

    Returns:
      float32[64, H], the sums of 2^(s - m) v, with s = q k^T / sqrt(H) / log(2).
      float32[64], the largest s, called m.
      float32[64], the sums of 2^(s - m).
    """
    H = q.shape[1]
    scale = _LOG2_E / math.sqrt(H)
    layout = _no_layout if interpret else plgpu.layout_cast

    def step(block, carry):
        acc, m, total = carry
        scores = _scores(q, read(0, block), interpret)
        release(0, block)
        shape = scores.shape
        query, key = (
            layout(jax.lax.broadcasted_iota(jnp.int32, shape, axis), plgpu.Layout.WGMMA)
            for axis in (0, 1)
        )
        scores = jnp.where(visible(block, query, key), scores * scale, -jnp.inf)
        m_new = jnp.maximum(m, scores.max(axis=1))
        weights = jnp.exp2(scores - jax.lax.broadcast_in_dim(m_new, shape, [0]))
        rescale = jnp.exp2(m - m_new)
        total = total * rescale + weights.sum(axis=1)
        acc *= jax.lax.broadcast_in_dim(rescale, acc.shape, [0])
        acc = _add_values(acc, weights.astype(jnp.bfloat16), read(1, block), interpret)
        release(1, block)
        return acc, m_new, total

    per_row = plgpu.Layout.WGMMA.reduce(1)
    acc = layout(jnp.zeros((WGMMA_ROWS, H), jnp.float32), plgpu.Layout.WGMMA)
    m = layout(jnp.full((WGMMA_ROWS,), -jnp.inf, jnp.float32), per_row)
    total = layout(jnp.zeros((WGMMA_ROWS,), jnp.float32), per_row)
    return jax.lax.fori_loop(0, blocks, step, (acc, m, total))


def _scores(q: Ref, k: Ref, interpret: bool) -> jax.Array:
    """Return q k^T, float32[64, block]."""
    if interpret:
        return _product(q[...], k[...].T)

    def compute(acc):
        plgpu.wgmma(acc, q, plgpu.transpose_ref(k, (1, 0)))
        return acc[...]

    return pl.run_scoped(compute, plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, k.shape[0]), jnp.float32))


def _add_values(acc: jax.Array, weights: jax.Array, v: Ref, interpret: bool) -> Any:
    """Return acc + weights v, float32[64, H]."""
    if interpret:
        return acc + _product(weights, v[...])
    multiply = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v))
    return multiply(plgpu.WGMMAAccumulatorRef.init(acc))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b in float32, in the interpreter."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _no_layout(x: jax.Array, layout: Any) -> jax.Array:
    """Return `x`: registers have no layout in the interpreter."""
    del layout
    return x
