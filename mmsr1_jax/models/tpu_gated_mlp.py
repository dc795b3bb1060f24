"""The gated feed-forward layer of an extend on TPUs, in one kernel.

The kernel goes through the hidden units block by block: the tokens and the sum of the result stay
in on-chip memory, so that main memory is read once for the weights and for the tokens, and no
hidden unit is written to it.

    for each block of hidden units:
        hidden = silu(x gate[block]^T) * (x up[block]^T)
        y += hidden down[:, block]^T
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

_UNITS = 256  # hidden units of a block
_TOKENS = 256  # tokens of a product
_MEMORY = 60 * 2**20  # bytes of on-chip memory


def supported(x: Float[jax.Array, "T D"], gate: Float[jax.Array, "F D"]) -> bool:
    """Return whether the kernel takes these shapes and dtypes."""
    (T, D), F = x.shape, len(gate)
    aligned = T % _TOKENS == D % 128 == F % _UNITS == 0
    used = T * D * (2 + 2 * 2 + 4)  # x, two buffers of the result, and its sum
    used += 2 * 3 * _UNITS * D * 2 + 4 * _TOKENS * (3 * _UNITS + D)
    return x.dtype == gate.dtype == jnp.bfloat16 and aligned and used <= _MEMORY


@functools.partial(jax.jit, static_argnames="interpret")
def gated_mlp(
    x: Float[jax.Array, "T D"],
    gate: Float[jax.Array, "F D"],
    up: Float[jax.Array, "F D"],
    down: Float[jax.Array, "D F"],
    *,
    interpret: bool = False,
) -> Float[jax.Array, "T D"]:
    """Compute (silu(x gate^T) * (x up^T)) down^T.

    Args:
      x: bfloat16[T, D], for which `supported` holds.
      gate, up: bfloat16[F, D].
      down: bfloat16[D, F].
      interpret: Whether to run the kernel in Pallas' interpreter.

    Returns:
      bfloat16[T, D]. Products and sums are float32; hidden units are rounded to bfloat16.
    """
    (T, D), F = x.shape, len(gate)
    whole = pl.BlockSpec((T, D), lambda block: (0, 0), pipeline_mode=pl.Buffered(1))
    rows = pl.BlockSpec((_UNITS, D), lambda block: (block, 0))
    columns = pl.BlockSpec((D, _UNITS), lambda block: (0, block))
    operands = (x, gate, up, down)
    return pl.pallas_call(
        _kernel,
        grid=(F // _UNITS,),
        in_specs=[whole, rows, rows, columns],
        out_specs=pl.BlockSpec((T, D), lambda block: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((T, D), x.dtype),
        scratch_shapes=[pltpu.VMEM((T, D), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_MEMORY
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * T * D * F, transcendentals=T * F,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*operands, x)),
        ),
        name="gated_mlp",
        interpret=interpret,
    )(*operands)  # fmt: skip


def _kernel(x_ref, gate_ref, up_ref, down_ref, y_ref, sum_ref):
    block, last = pl.program_id(0), pl.num_programs(0) - 1

    def product(a, b):
        dimensions = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

    def step(index, _):
        tokens = pl.ds(pl.multiple_of(index * _TOKENS, _TOKENS), _TOKENS)
        x = x_ref[tokens, :]
        hidden = jax.nn.silu(product(x, gate_ref[...])) * product(x, up_ref[...])
        part = product(hidden.astype(x.dtype), down_ref[...])

        @pl.when(block == 0)
        def _():
            sum_ref[tokens, :] = part

        @pl.when(block > 0)
        def _():
            sum_ref[tokens, :] += part

        @pl.when(block == last)
        def _():
            y_ref[tokens, :] = sum_ref[tokens, :].astype(y_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[0] // _TOKENS, step, None)
