"""The gated product `silu(x Wg^T) * (x Wu^T)` as one kernel for NVIDIA GPUs.

XLA computes it by three kernels: each product is written out, and the third reads both. Here a
thread block keeps a tile of both products in registers and writes only their gated product:

    x: [rows, D]    Wg, Wu: [F, D]    tile: _ROWS rows, _COLUMNS columns of F

Two warpgroups compute half of the tile's rows each; a third copies tiles of x, Wg and Wu, `_DEPTH`
of D at a time, into a ring of `_STEPS` slots in shared memory. A row's result depends on that row
alone: tiles have one size, and a product is summed in one order.

Written in Mosaic GPU for Hopper (WGMMA and TMA), for bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from mmsr1_jax.models import mosaic_gpu

# A tile of 128 x 128 of both products takes 128 registers of each computing thread, and 4 steps of
# 48 KiB fill the shared memory: the shape of a product of 128 x 256 tiles.
_ROWS = 128
_COLUMNS = 128
_DEPTH = 64  # 128 bytes, the widest swizzle
_STEPS = 4
_WARPGROUPS = 2  # that compute; one more copies
_WARPGROUP_ROWS = _ROWS // _WARPGROUPS  # rows of a WGMMA


def supported(x: jax.Array, kernel: jax.Array) -> bool:
    """Return whether `gated_linear` can take x, [rows, D], with kernels like `kernel`, [F, D]."""
    (rows, D), F = x.shape, len(kernel)
    whole = rows % _ROWS == 0 and F % _COLUMNS == 0 and D % _DEPTH == 0
    return x.dtype == kernel.dtype == jnp.bfloat16 and whole and D >= _DEPTH * _STEPS


def gated_linear(
    x: Float[jax.Array, "rows D"],
    gate: Float[jax.Array, "F D"],
    up: Float[jax.Array, "F D"],
    *,
    interpret: bool = False,
) -> Float[jax.Array, "rows F"]:
    """Compute silu(x gate^T) * (x up^T), in float32 up to the rounding of the result.

    Args:
      x: bfloat16[rows, D]. The arrays must be `supported`.
      gate, up: bfloat16[F, D].
      interpret: Whether to run in Pallas' interpreter, on a CPU.

    Returns:
      bfloat16[rows, F].
    """
    rows, F = len(x), len(gate)
    kernel = plgpu.kernel(
        functools.partial(_kernel, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((rows, F), x.dtype),
        scratch_types=_scratch(),
        # Thread blocks that run together share the weights, which are larger than x.
        grid=(F // _COLUMNS, rows // _ROWS),
        grid_names=("column", "row"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="gated_linear",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=mosaic_gpu.interpreter() if interpret else None,
    )
    return kernel(x, gate, up)


def _scratch() -> dict:
    """Return the shared memory and the barriers of a thread block."""
    tiles = (plgpu.TilingTransform((8, _DEPTH)), plgpu.SwizzleTransform(128))
    weights = plgpu.SMEM((_STEPS, _COLUMNS, _DEPTH), jnp.bfloat16, transforms=tiles)
    return {
        "x_smem": plgpu.SMEM((_STEPS, _ROWS, _DEPTH), jnp.bfloat16, transforms=tiles),
        "gate_smem": weights,
        "up_smem": weights,
        "out_smem": plgpu.SMEM((_ROWS, _COLUMNS), jnp.bfloat16, transforms=tiles),
        "filled": plgpu.Barrier(num_arrivals=3, num_barriers=_STEPS),
        "emptied": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STEPS),
    }


def _kernel(
    x, gate, up, out, *, x_smem, gate_smem, up_smem, out_smem, filled, emptied, interpret: bool
) -> None:
    """Compute one tile of the result, on `_WARPGROUPS + 1` warpgroups."""
    row, column = jax.lax.axis_index("row") * _ROWS, jax.lax.axis_index("column") * _COLUMNS
    warpgroup = jax.lax.axis_index("warpgroup")
    own = pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)
    steps = x.shape[1] // _DEPTH

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def copy(step, slot):
            depth = pl.ds(step * _DEPTH, _DEPTH)
            for source, start, size, tiles in (
                (x, row, _ROWS, x_smem),
                (gate, column, _COLUMNS, gate_smem),
                (up, column, _COLUMNS, up_smem),
            ):
                tile = source.at[pl.ds(start, size), depth]
                plgpu.copy_gmem_to_smem(tile, tiles.at[slot], filled.at[slot])

        mosaic_gpu.fill_slots(steps, [emptied], [copy])

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")

        def operands(step):
            slot = step % _STEPS
            plgpu.barrier_wait(filled.at[slot])
            return x_smem.at[slot, own], (gate_smem.at[slot], up_smem.at[slot])

        def release(step):
            plgpu.barrier_arrive(emptied.at[step % _STEPS])

        gated, raw = mosaic_gpu.sum_products(
            [_COLUMNS, _COLUMNS], steps, operands, release, interpret
        )
        out_smem[own] = (gated * jax.nn.sigmoid(gated) * raw).astype(out.dtype)
        plgpu.commit_smem()
        target = out.at[pl.ds(row + warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)]
        plgpu.copy_smem_to_gmem(out_smem.at[own], target.at[:, pl.ds(column, _COLUMNS)])
        plgpu.wait_smem_to_gmem(0)
