"""Text decoder: GQA, M-RoPE, SwiGLU, pre-norm.

`TextConfig` says what differs between families: biases, norms of queries and keys, and the order of
M-RoPE's frequencies.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from mmsr1_jax.config.choices import Attention
from mmsr1_jax.models.attention import attention
from mmsr1_jax.models.config import TextConfig
from mmsr1_jax.models.layers import Linear, RMSNorm, SwiGLU, rotate, scan_layers, unstack
from mmsr1_jax.models.paged_attention import PagedRows, append, paged_attention
from mmsr1_jax.models.sharding import constrain, param
from mmsr1_jax.utils.arrays import AnyArray

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v -> output


def mrope_angles(
    positions: Int32[AnyArray, "B 3 T"], config: TextConfig
) -> tuple[Float32[jax.Array, "B T half_H"], Float32[jax.Array, "B T half_H"]]:
    """Compute cosines and sines of M-RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1).

    The H/2 frequencies are those of standard RoPE. The first `mrope_section[0]` of them rotate with
    the temporal position, the next `mrope_section[1]` with the height and the rest with the width.
    If they are interleaved (arXiv 2511.21631), every third frequency, from the second, rotates with
    the height, and every third, from the third, with the width, as many as their sections have; all
    others rotate with the temporal position.

    Args:
      positions: int32[B, 3, T]. Temporal, height and width positions.
      config: Configuration of the text decoder.

    Returns:
      Cosines and sines of the angles, float32[B, T, H/2] each.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(np.arange(half, dtype=np.float32) / half)
    section = np.repeat(np.arange(3), config.mrope_section)  # position axis of each frequency
    if config.mrope_interleaved:
        section = np.zeros(half, int)
        for axis in (1, 2):
            section[axis : 3 * config.mrope_section[axis] : 3] = axis
    per_frequency = positions.swapaxes(1, 2)[..., section].astype(jnp.float32)  # [B, T, H/2]
    angles = per_frequency * frequency.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


class SelfAttention(nnx.Module):
    """Self-attention with stacked kernels: q [L, N, H, D], k, v [L, K, H, D], out [L, D, N, H].

    With `qk_norm`, `q_norm` and `k_norm` normalise each head's query and key.
    """

    # Class attributes: NNX rejects arrays in an instance attribute that was None.
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        D, H = (config.hidden_size, "embed"), (config.head_dim, "head_dim")
        N, K = (config.num_heads, "heads"), (config.num_kv_heads, "kv_heads")
        linear = functools.partial(Linear, rngs=rngs, layers=config.num_layers, dtype=dtype)
        self.q = linear([D], [N, H], bias=config.qkv_bias)
        self.k = linear([D], [K, H], bias=config.qkv_bias)
        self.v = linear([D], [K, H], bias=config.qkv_bias)
        self.out = linear([N, H], [D], bias=False)
        if config.qk_norm:
            norm = functools.partial(
                RMSNorm, config.head_dim, config.rms_norm_eps, rngs=rngs,
                layers=config.num_layers, dtype=dtype,
            )  # fmt: skip
            self.q_norm, self.k_norm = norm(), norm()

    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        cos: Float32[jax.Array, "B T half_H"],
        sin: Float32[jax.Array, "B T half_H"],
        attend: Attend,
    ) -> Float[jax.Array, "B T D"]:
        q, k = self.q(x), self.k(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = constrain(rotate(q, cos, sin), "batch", None, "heads", None)
        return self.out(attend(q, rotate(k, cos, sin), self.v(x)))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and SwiGLU, each with a residual connection."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        norm = functools.partial(
            RMSNorm, config.hidden_size, config.rms_norm_eps, rngs=rngs, layers=config.num_layers,
            dtype=dtype,
        )  # fmt: skip
        self.attention_norm = norm()
        self.attention = SelfAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = norm()
        self.mlp = SwiGLU(
            config.hidden_size, config.intermediate_size, bias=False, rngs=rngs,
            layers=config.num_layers, dtype=dtype,
        )  # fmt: skip

    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        cos: Float32[jax.Array, "B T half_H"],
        sin: Float32[jax.Array, "B T half_H"],
        attend: Attend,
    ) -> Float[jax.Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", None, None)


class TextDecoder(nnx.Module):
    """Embedding table, decoder layers, final norm and the output head."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        table = ((config.vocab_size, config.hidden_size), ("vocab", "embed"))
        small = jax.nn.initializers.normal(0.02)
        self.embedding = param(rngs, *table, small, dtype)
        self.layers: nnx.Module = DecoderLayer(config, rngs=rngs, dtype=dtype)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs, dtype=dtype)
        self.head = None if config.tie_embeddings else param(rngs, *table, small, dtype)
        self.config = config

    @property
    def head_table(self) -> Float[jax.Array, "V D"]:
        """Output head, [V, D]; row v produces the logit of token v."""
        return (self.embedding if self.head is None else self.head).get_value()

    def embed(self, tokens: Int32[AnyArray, "B T"], dtype: DTypeLike) -> Float[jax.Array, "B T D"]:
        """Return the embeddings of tokens, int32[B, T] -> float[B, T, D]."""
        return jnp.take(self.embedding.get_value(), tokens, axis=0).astype(dtype)

    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        positions: Int32[AnyArray, "B 3 T"],
        segment_ids: Int32[AnyArray, "B T"],
        prefix_ids: Int32[AnyArray, "B T"] | None = None,
        *,
        deepstack: Float[jax.Array, "deep B T D"] | None = None,
        single_segment: bool = False,
        implementation: Attention = "auto",
        remat: str = "none",
    ) -> Float[jax.Array, "B T D"]:
        """Compute hidden states from embedded tokens.

        Args:
          x: float[B, T, D]. Embedded tokens.
          positions: int32[B, 3, T]. M-RoPE positions.
          segment_ids, prefix_ids: int32[B, T]. Segments and their prefixes, see
            `models.attention`.
          deepstack: float[deep, B, T, D]. Features to add to the outputs of the first `deep`
            layers, 0 at text (DeepStack, arXiv 2406.04334); None without any.
          single_segment, implementation: Arguments of `models.attention`.
          remat: Rematerialisation of the layers, see `scan_layers`.

        Returns:
          Hidden states after the final norm, float[B, T, D].
        """
        cos, sin = mrope_angles(positions, self.config)
        attend = functools.partial(
            attention, segment_ids=segment_ids, prefix_ids=prefix_ids, causal=True,
            single_segment=single_segment, implementation=implementation,
        )  # fmt: skip
        x = constrain(x, "batch", None, None)

        def call(layer, x, index):
            x = layer(x, cos, sin, attend)
            return x if deepstack is None else x + _features(deepstack, index)

        x = scan_layers(self.layers, x, call, np.arange(self.config.num_layers), remat)
        return self.norm(x)

    def cached(
        self,
        x: Float[jax.Array, "B T D"],
        positions: Int32[AnyArray, "B 3 T"],
        pages: Sequence[Float[jax.Array, "..."]],
        rows: PagedRows,
        deepstack: Float[jax.Array, "deep B T D"] | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], tuple[Float[jax.Array, "..."], ...]]:
        """Compute hidden states of tokens that extend sequences of a paged KV cache.

        Args:
          x: float[B, T, D]. Embedded tokens.
          positions: int32[B, 3, T]. M-RoPE positions.
          pages: Pages of each layer, see `models.paged_attention`.
          rows: The sequences that the rows extend.
          deepstack: See `__call__`.

        Returns:
          Hidden states after the final norm, float[B, T, D], and the pages with the new tokens.
        """
        cos, sin = mrope_angles(positions, self.config)
        written = []
        layers = self.layers if isinstance(self.layers, nnx.List) else unstack(self.layers)
        # Jitted so that equal layers are traced once, not inside a `shard_map`: the compiler for
        # TPUs (jax 0.10) aborts if a function with another one inside is called twice.
        manual = jax.sharding.get_abstract_mesh().manual_axes
        apply = _cached_layer if manual else _jitted_cached_layer
        deep = [] if deepstack is None else list(deepstack)
        for index, (layer, layer_pages) in enumerate(zip(layers, pages, strict=True)):
            graph, params = nnx.split(layer)
            x, layer_pages = apply(graph, params, x, cos, sin, layer_pages, rows)
            x = x + deep[index] if index < len(deep) else x
            written.append(layer_pages)
        return self.norm(x), tuple(written)


def _features(deepstack, index) -> jax.Array | float:
    """Return the features to add after layer `index`, float[B, T, D]; 0 beyond the last of them."""
    if isinstance(index, np.integer):  # the layers are not scanned
        return deepstack[index] if index < len(deepstack) else 0.0
    features = jax.lax.dynamic_index_in_dim(deepstack, index, keepdims=False)  # clamps the index
    return jnp.where(index < len(deepstack), features, 0)


def _cached_layer(graph, params, x, cos, sin, pages, rows: PagedRows):
    """Apply one layer of `TextDecoder.cached`."""

    def attend(q, k, v):
        nonlocal pages
        pages = append(pages, k, v, rows)
        return paged_attention(q, pages, rows)

    return nnx.merge(graph, params)(x, cos, sin, attend), pages


_jitted_cached_layer = jax.jit(_cached_layer, static_argnums=0)
