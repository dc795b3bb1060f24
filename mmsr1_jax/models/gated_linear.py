"""The gated product `silu(x Wg^T) * (x Wu^T)` of a feed-forward layer, for inference.

XLA computes it by two or three kernels, which write out the first product or both. For bfloat16 on
an accelerator, the kernels of this module and of `gpu_gated_linear` write the result only. They
have no gradient.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Float

from mmsr1_jax.models import gpu_gated_linear, sharding

_LANES = 128
# Tile of the TPU kernel: x is read once for 1,024 rows, the weights once for each such tile. Both
# and their double buffers take 22 MiB of on-chip memory at D = 3,584.
_TPU_ROWS = 1024
_TPU_COLUMNS = 256
_TPU_VMEM = 32 * 2**20


def gated_linear(
    x: Float[jax.Array, "B T D"], gate: Float[jax.Array, "F D"], up: Float[jax.Array, "F D"]
) -> Float[jax.Array, "B T F"]:
    """Compute silu(x gate^T) * (x up^T); a row's result depends on that row alone.

    Args:
      x: float[B, T, D].
      gate, up: float[F, D], split over the tensor axis by F.

    Returns:
      float[B, T, F]. The kernels compute in float32 up to the rounding of the result.
    """
    kernels = {"gpu": _gpu, "tpu": _tpu}
    kernel = kernels.get(sharding.platform(), _xla)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(x, gate, up)
    weights = sharding.partition_spec(("ffn", None), gate.shape, mesh)
    return jax.shard_map(
        kernel, mesh=mesh, in_specs=(PartitionSpec(), weights, weights),
        out_specs=PartitionSpec(None, None, weights[0]), check_vma=False,
    )(x, gate, up)  # fmt: skip


def _gpu(x, gate, up) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    if not gpu_gated_linear.supported(flat, gate):
        return _xla(x, gate, up)
    return gpu_gated_linear.gated_linear(flat, gate, up).reshape(*x.shape[:-1], -1)


def _tpu(x, gate, up) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype != jnp.bfloat16 or x.shape[-1] % _LANES or len(gate) % _LANES or len(flat) % 16:
        return _xla(x, gate, up)
    return tpu_gated_linear(flat, gate, up).reshape(*x.shape[:-1], -1)


def _xla(x, gate, up) -> jax.Array:
    return jax.nn.silu(jnp.einsum("btd,fd->btf", x, gate)) * jnp.einsum("btd,fd->btf", x, up)


def tpu_gated_linear(
    x: Float[jax.Array, "rows D"],
    gate: Float[jax.Array, "F D"],
    up: Float[jax.Array, "F D"],
    *,
    interpret: bool = False,
) -> Float[jax.Array, "rows F"]:
    """Compute silu(x gate^T) * (x up^T) by a kernel for TPUs; bfloat16, D a multiple of 128."""
    (rows, D), F = x.shape, len(gate)
    tile = min(rows, _TPU_ROWS)
    weights = pl.BlockSpec((_TPU_COLUMNS, D), lambda row, column: (column, 0))
    return pl.pallas_call(
        _tpu_kernel,
        out_shape=jax.ShapeDtypeStruct((rows, F), x.dtype),
        grid=(pl.cdiv(rows, tile), pl.cdiv(F, _TPU_COLUMNS)),
        in_specs=[
            pl.BlockSpec((tile, D), lambda row, column: (row, 0), pipeline_mode=pl.Buffered(1)),
            weights,
            weights,
        ],
        out_specs=pl.BlockSpec((tile, _TPU_COLUMNS), lambda row, column: (row, column)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_TPU_VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * rows * F * D,
            bytes_accessed=2 * (x.size + 2 * gate.size * pl.cdiv(rows, tile) + rows * F),
            transcendentals=rows * F,
        ),
        interpret=interpret,
        name="gated_linear",
    )(x, gate, up)


def _tpu_kernel(x, gate, up, out) -> None:
    """Compute one tile; x: [tile, D], gate, up: [columns, D]."""

    def product(weights):
        last = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(x[...], weights[...], last, preferred_element_type=jnp.float32)

    gated = product(gate)
    out[...] = (gated * jax.nn.sigmoid(gated) * product(up)).astype(out.dtype)
