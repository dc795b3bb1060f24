"""The gated product `silu(x Wg^T) * (x Wu^T)` of a feed-forward layer, for inference.

On a GPU, XLA computes it by three kernels, two of which write out a product. For bfloat16, the
kernel of `gpu_gated_linear` writes the result only. It has no gradient.
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


def _gpu(x, gate, up) -> jax.Array:
    from mmsr1_jax.models import gpu_gated_linear  # Pallas for GPUs takes long to import

    flat = x.reshape(-1, x.shape[-1])
    if not gpu_gated_linear.supported(flat, gate):
        return _xla(x, gate, up)
    return gpu_gated_linear.gated_linear(flat, gate, up).reshape(*x.shape[:-1], -1)


def _xla(x, gate, up) -> jax.Array:
    return jax.nn.silu(jnp.einsum("btd,fd->btf", x, gate)) * jnp.einsum("btd,fd->btf", x, up)
