"""The gated feed-forward layer `(silu(x Wg^T) * (x Wu^T)) Wd^T`, for inference.

XLA writes its hidden units out, on a GPU even before they are gated. For bfloat16, the kernel of
`gpu_gated_linear` computes the gated product and writes nothing else, and that of `tpu_gated_mlp`
computes the whole layer. They have no gradient.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float

from mmsr1_jax.models import sharding


def gated_linear(
    x: Float[jax.Array, "B T D"], gate: Float[jax.Array, "F D"], up: Float[jax.Array, "F D"]
) -> Float[jax.Array, "B T F"]:
    """Compute silu(x gate^T) * (x up^T); a row's result depends on that row alone.

    Args:
      x: float[B, T, D].
      gate, up: float[F, D], split over the tensor axis by F.

    Returns:
      float[B, T, F]. The kernel computes in float32 up to the rounding of the result.
    """
    kernel = _gpu if sharding.is_hopper() else _xla
    if sharding.num_devices() == 1:
        return kernel(x, gate, up)
    mesh = jax.sharding.get_abstract_mesh()
    weights = sharding.partition_spec(("ffn", None), gate.shape, mesh)
    out = PartitionSpec(None, None, weights[0])
    return sharding.per_device(kernel, (PartitionSpec(), weights, weights), out)(x, gate, up)


def gated_mlp(
    x: Float[jax.Array, "B T D"],
    gate: Float[jax.Array, "F D"],
    up: Float[jax.Array, "F D"],
    down: Float[jax.Array, "D F"],
) -> Float[jax.Array, "B T D"]:
    """Compute (silu(x gate^T) * (x up^T)) down^T; a row's result depends on that row alone.

    Args:
      x: float[B, T, D].
      gate, up: float[F, D], split over the tensor axis by F.
      down: float[D, F], split in the same way.

    Returns:
      float[B, T, D]. The kernel rounds the hidden units and the result only.
    """
    if sharding.num_devices() == 1:
        return _tpu(x, gate, up, down)
    mesh = jax.sharding.get_abstract_mesh()
    rows = sharding.partition_spec(("ffn", None), gate.shape, mesh)
    columns = sharding.partition_spec((None, "ffn"), down.shape, mesh)

    def part(x, gate, up, down):
        y = _tpu(x, gate, up, down)
        return y if rows[0] is None else jax.lax.psum(y, rows[0])

    specs = (PartitionSpec(), rows, rows, columns)
    return sharding.per_device(part, specs, PartitionSpec())(x, gate, up, down)


def _tpu(x, gate, up, down) -> jax.Array:
    from mmsr1_jax.models import tpu_gated_mlp  # Pallas for TPUs takes long to import

    flat = x.reshape(-1, x.shape[-1])
    if not tpu_gated_mlp.supported(flat, gate):
        return jnp.einsum("btf,df->btd", _xla(x, gate, up), down)
    return tpu_gated_mlp.gated_mlp(flat, gate, up, down).reshape(x.shape)


def _gpu(x, gate, up) -> jax.Array:
    from mmsr1_jax.models import gpu_gated_linear  # Pallas for GPUs takes long to import

    flat = x.reshape(-1, x.shape[-1])
    if not gpu_gated_linear.supported(flat, gate):
        return _xla(x, gate, up)
    return gpu_gated_linear.gated_linear(flat, gate, up).reshape(*x.shape[:-1], -1)


def _xla(x, gate, up) -> jax.Array:
    return jax.nn.silu(jnp.einsum("btd,fd->btf", x, gate)) * jnp.einsum("btd,fd->btf", x, up)
