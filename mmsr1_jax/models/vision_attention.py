"""Self-attention of vision towers."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from mmsr1_jax.config.choices import Attention
from mmsr1_jax.models.attention import attention
from mmsr1_jax.models.config import VisionConfig
from mmsr1_jax.models.layers import Linear, rotate
from mmsr1_jax.utils.arrays import AnyArray


class VisionAttention(nnx.Module):
    """Self-attention over whole images.

    The kernels are stacked: qkv [L, 3, N, H, D], out [L, D, N, H].

    Families with windows override the call.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        D, H = (config.hidden_size, "embed"), (config.head_dim, "head_dim")
        N = (config.num_heads, "heads")
        linear = functools.partial(
            Linear, bias=True, rngs=rngs, layers=config.num_layers, dtype=dtype
        )
        self.qkv = linear([D], [(3, None), N, H])
        self.out = linear([N, H], [D])

    def project(
        self,
        x: Float[jax.Array, "B P D"],
        cos: Float32[jax.Array, "B P half_H"],
        sin: Float32[jax.Array, "B P half_H"],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return rotated queries and keys, and values, float[B, P, N, H] each."""
        q, k, v = (part.squeeze(2) for part in jnp.split(self.qkv(x), 3, axis=2))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def __call__(
        self,
        x: Float[jax.Array, "B P D"],
        cos: Float32[jax.Array, "B P half_H"],
        sin: Float32[jax.Array, "B P half_H"],
        segment_ids: Int32[AnyArray, "B P"],
        implementation: Attention,
    ) -> Float[jax.Array, "B P D"]:
        q, k, v = self.project(x, cos, sin)
        return self.out(
            attention(q, k, v, segment_ids, causal=False, implementation=implementation)
        )
