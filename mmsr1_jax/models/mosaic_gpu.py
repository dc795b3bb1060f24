"""What the kernels for NVIDIA GPUs share: products on the tensor cores, and their interpreter.

The kernels are written in Mosaic GPU for Hopper. Pallas' interpreter runs them on a CPU. It has no
products of transposed operands or of registers, and registers without layouts, so that these have
two forms.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any  # a reference, for which Pallas has no public type

WGMMA_ROWS = 64  # rows of a product on the tensor cores
LOG2_E = math.log2(math.e)


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
    *,
    scale: float | None = None,
    unmasked: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run FlashAttention over blocks of keys; see algorithm 1 of arXiv 2205.14135.

    Args:
      q: Queries, bfloat16[64, H], in shared memory.
      blocks: Number of blocks.
      read: Returns the keys (kind 0) or values (1) of a block when they are there,
        bfloat16[block, H], in shared memory.
      release: Called with a kind and a block which have been read.
      visible: Returns which keys the queries see, from a block and the indices of queries and of
        keys in it, int32[64, block] each. Called before the block's keys are released.
      interpret: Whether Pallas' interpreter runs the kernel.
      scale: Factor of the scores; None: 1 / sqrt(H).
      unmasked: Number of blocks, the first ones, whose keys all queries see.

    Returns:
      float32[64, H], the sums of 2^(s - m) v, with s = scale q k^T / log(2).
      float32[64], the largest s, called m.
      float32[64], the sums of 2^(s - m), 0 for a query that sees no key.
    """
    H = q.shape[1]
    factor = LOG2_E * (1 / math.sqrt(H) if scale is None else scale)
    layout = _no_layout if interpret else plgpu.layout_cast

    def step(block, carry, masked):
        acc, m, total = carry
        (scores,) = products([(q, read(0, block))], interpret)
        shape, scores = scores.shape, scores * factor
        if masked:
            query, key = (index(shape, axis, interpret) for axis in (0, 1))
            scores = jnp.where(visible(block, query, key), scores, -jnp.inf)
        release(0, block)
        m_new = jnp.maximum(m, scores.max(axis=1))
        weights = jnp.exp2(scores - along(m_new, shape, 0))
        rescale = jnp.exp2(m - m_new)
        total = total * rescale + weights.sum(axis=1)
        acc *= along(rescale, acc.shape, 0)
        (acc,) = add_products([(acc, weights.astype(jnp.bfloat16), read(1, block))], interpret)
        release(1, block)
        return acc, m_new, total

    per_row = plgpu.Layout.WGMMA.reduce(1)
    acc = zeros((WGMMA_ROWS, H), interpret)
    # Finite, so that weights are 0, not NaN, until a query sees a key.
    m = layout(jnp.full((WGMMA_ROWS,), -1e30, jnp.float32), per_row)
    total = layout(jnp.zeros((WGMMA_ROWS,), jnp.float32), per_row)
    return in_two_phases(unmasked, blocks, step, (acc, m, total))


def in_two_phases(
    unmasked: jax.Array | int, steps: jax.Array, step: Callable[..., Any], carry: Any
) -> Any:
    """Run a loop whose first steps need no mask; `step` takes a step, the carry, and `masked`."""
    if not isinstance(unmasked, int) or unmasked:
        carry = jax.lax.fori_loop(0, unmasked, functools.partial(step, masked=False), carry)
    return jax.lax.fori_loop(unmasked, steps, functools.partial(step, masked=True), carry)


def products(pairs: Sequence[tuple[Ref, Ref]], interpret: bool) -> Sequence[jax.Array]:
    """Return a b^T in float32 for each pair (a, b), in shared memory."""
    if interpret:
        return [_product(a[...], b[...].T) for a, b in pairs]

    def compute(*sums):
        for acc, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)))
        return [acc[...] for acc in sums]

    shapes = [(a.shape[0], b.shape[0]) for a, b in pairs]
    return pl.run_scoped(compute, *(plgpu.WGMMAAccumulatorRef(s, jnp.float32) for s in shapes))


def add_products(
    terms: Sequence[tuple[jax.Array, jax.Array, Ref]], interpret: bool
) -> Sequence[Any]:
    """Return acc + a b in float32 for each (acc, a, b), with a in registers, b in shared memory."""
    if interpret:
        return [acc + _product(a, b[...]) for acc, a, b in terms]

    def compute(sums):
        for ref, (_, a, b) in zip(sums, terms, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(compute)([plgpu.WGMMAAccumulatorRef.init(acc) for acc, _, _ in terms])


def fill_slots(
    steps: jax.Array | int,
    emptied: Sequence[Ref],
    copies: Sequence[Callable[[jax.Array, jax.Array], None]],
) -> None:
    """Copy the operands of each step into a ring of slots, on a warpgroup of its own.

    Args:
      steps: Number of steps.
      emptied: Barriers of each kind of operand, one a slot, that other warpgroups arrive at when
        they have read the slot.
      copies: Functions of each kind that start the copies of a step to a slot.
    """
    slots = emptied[0].shape[0]

    @pl.loop(0, steps + slots)
    def _(step):
        slot = step % slots
        for barriers, copy in zip(emptied, copies, strict=True):

            @pl.when(step >= slots)
            def _():
                plgpu.barrier_wait(barriers.at[slot])

            @pl.when(step < steps)
            def _():
                copy(step, slot)


def tiles(*shape: int) -> Any:
    """Return an array of bfloat16 in shared memory, in tiles that copies write and WGMMA reads."""
    columns = 64 if shape[-1] % 64 == 0 else 32
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def index(shape: Sequence[int], axis: int, interpret: bool) -> jax.Array:
    """Return the index of each entry of a product along an axis, int32[shape]."""
    layout = _no_layout if interpret else plgpu.layout_cast
    return layout(jax.lax.broadcasted_iota(jnp.int32, shape, axis), plgpu.Layout.WGMMA)


def along(x: jax.Array, shape: Sequence[int], axis: int) -> jax.Array:
    """Return a vector repeated to the shape of a product, along whose `axis` it lies."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def load(ref: Ref, axis: int, interpret: bool) -> jax.Array:
    """Load a vector that lies along an axis of a product, from shared memory."""
    if interpret:
        return ref[...]
    return plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(1 - axis))


def zeros(shape: Sequence[int], interpret: bool) -> jax.Array:
    """Return an empty sum of products, float32[shape]."""
    layout = _no_layout if interpret else plgpu.layout_cast
    return layout(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b in float32, in the interpreter."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _no_layout(x: jax.Array, layout: Any) -> jax.Array:
    """Return `x`: registers have no layout in the interpreter."""
    del layout
    return x
