"""Vision tower of Qwen3-VL: learned positions, full attention, and DeepStack features."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from mmsr1_jax.config.choices import Attention
from mmsr1_jax.models.image_rows import ImageRows
from mmsr1_jax.models.layers import LayerNorm, Linear, axial_angles, scan_layers
from mmsr1_jax.models.qwen3_vl.config import VisionConfig
from mmsr1_jax.models.sharding import constrain, param
from mmsr1_jax.models.vision_attention import VisionAttention
from mmsr1_jax.utils.arrays import AnyArray


class FeedForward(nnx.Module):
    """Two linear maps with a GELU between them (arXiv 1606.08415)."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        approximate: bool,
        rngs: nnx.Rngs,
        layers: int | None,
        dtype: DTypeLike,
    ):
        linear = functools.partial(Linear, bias=True, rngs=rngs, layers=layers, dtype=dtype)
        self.fc1 = linear([(inputs, "embed")], [(hidden, "ffn")])
        self.fc2 = linear([(hidden, "ffn")], [(outputs, "embed")])
        self.approximate = approximate

    def __call__(self, x: Float[jax.Array, "*rows D"]) -> Float[jax.Array, "*rows out"]:
        return self.fc2(_gelu(self.fc1(x), self.approximate))


@functools.partial(jax.checkpoint, static_argnums=1, prevent_cse=False)
def _gelu(x: jax.Array, approximate: bool) -> jax.Array:
    """Return GELU, by the approximation with tanh or exactly. Backward passes recompute it."""
    return jax.nn.gelu(x, approximate=approximate)


class VisionBlock(nnx.Module):
    """Pre-norm attention and feed-forward layer, each with a residual connection."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        common: dict[str, Any] = dict(rngs=rngs, layers=config.num_layers, dtype=dtype)
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps, **common)
        self.attention = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps, **common)
        D, F = config.hidden_size, config.intermediate_size
        self.mlp = FeedForward(D, F, D, approximate=True, **common)

    def __call__(
        self,
        x: Float[jax.Array, "B P D"],
        cos: Float32[jax.Array, "B P half_H"],
        sin: Float32[jax.Array, "B P half_H"],
        segment_ids: Int32[AnyArray, "B P"],
        implementation: Attention,
    ) -> Float[jax.Array, "B P D"]:
        x = x + self.attention(self.attention_norm(x), cos, sin, segment_ids, implementation)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", None, None)


class Merger(FeedForward):
    """Patch merger: norm, concatenation of a square of patches, two-layer MLP to one text token.

    Those of DeepStack features normalise after the concatenation, and are stacked.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        norm_merged: bool,
        rngs: nnx.Rngs,
        layers: int | None,
        dtype: DTypeLike,
    ):
        self.unit = config.merge_size**2
        merged = config.hidden_size * self.unit
        super().__init__(
            merged, merged, config.out_hidden_size, approximate=False, rngs=rngs, layers=layers,
            dtype=dtype,
        )  # fmt: skip
        normed = merged if norm_merged else config.hidden_size
        self.norm = LayerNorm(normed, config.norm_eps, rngs=rngs, layers=layers, dtype=dtype)
        self.norm_merged = norm_merged

    def __call__(self, x: Float[jax.Array, "B P D"]) -> Float[jax.Array, "B M text_D"]:
        B, P, D = x.shape
        x = x if self.norm_merged else self.norm(x)
        x = x.reshape(B, P // self.unit, self.unit * D)
        return super().__call__(self.norm(x) if self.norm_merged else x)


class VisionTower(nnx.Module):
    """Patch embedding with learned positions, blocks, and mergers."""

    deepstack: Merger | None = None

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.patch_embed = Linear(
            [(config.patch_dim, None)], [(config.hidden_size, "embed")], bias=True, rngs=rngs,
            dtype=dtype,
        )  # fmt: skip
        shape, axes = (config.num_position_embeddings, config.hidden_size), (None, "embed")
        small = jax.nn.initializers.normal(0.02)
        self.position_embedding = param(rngs, shape, axes, small, dtype)
        self.blocks: nnx.Module = VisionBlock(config, rngs=rngs, dtype=dtype)
        self.merger = Merger(config, norm_merged=False, rngs=rngs, layers=None, dtype=dtype)
        if deep := len(config.deepstack_indexes):
            self.deepstack = Merger(config, norm_merged=True, rngs=rngs, layers=deep, dtype=dtype)
        self.config = config

    def __call__(
        self,
        images: ImageRows,
        dtype: DTypeLike,
        *,
        implementation: Attention = "auto",
        remat: str = "none",
    ) -> Float[jax.Array, "B M image_D"]:
        """Return merged tokens with their DeepStack features, float[B, M, image_D], in slot order.

        M is P divided by the number of patches of a merged token, and image_D is D of the text
        decoder times one more than the number of features.
        """
        cos, sin = axial_angles(images.positions, self.config)
        if implementation == "cudnn":  # it cannot separate the images of a row
            implementation = "auto"
        x = self.patch_embed(jnp.asarray(images.patches).astype(dtype))
        x = constrain(x + self._learned_positions(images).astype(dtype), "batch", None, None)

        # Each block writes its output over that of the block before, up to one whose output becomes
        # a feature; the blocks after it write to the next place. The last place is for the result.
        indexes = self.config.deepstack_indexes
        places = np.searchsorted(indexes, np.arange(self.config.num_layers)).astype(np.int32)
        outputs = jnp.zeros((len(indexes) + 1, *x.shape), x.dtype)

        def call(block, carry, place):
            x, outputs = carry
            x = block(x, cos, sin, images.segment_ids, implementation)
            return x, jax.lax.dynamic_update_index_in_dim(outputs, x, place, 0)

        x, outputs = scan_layers(self.blocks, (x, outputs), call, places, remat)
        tokens = self.merger(x)
        if self.deepstack is None:
            return tokens
        graph, params = nnx.split(self.deepstack)

        def merge(_, merger_and_output):
            params, output = merger_and_output
            return None, nnx.merge(graph, params)(output)

        _, features = jax.lax.scan(merge, None, (params, outputs[: len(indexes)]))
        return jnp.concatenate([tokens, *features], axis=-1)

    def _learned_positions(self, images: ImageRows) -> Float32[jax.Array, "B P D"]:
        """Return the learned positions, interpolated bilinearly to the grid of each image.

        The corners of the two grids coincide.
        """
        side = self.config.position_side
        assert images.sizes is not None
        position = jnp.asarray(images.positions).astype(jnp.float32)
        size = jnp.asarray(images.sizes)
        source = position * (side - 1) / jnp.maximum(size - 1, 1)  # [B, P, 2]: row, column
        low = jnp.floor(source)
        weight = source - low
        low = low.astype(jnp.int32)
        high = jnp.minimum(low + 1, side - 1)
        table = self.position_embedding.get_value().astype(jnp.float32)
        total = jnp.zeros((*position.shape[:2], table.shape[1]), jnp.float32)
        for rows, row_weight in ((low, 1 - weight), (high, weight)):
            for columns, column_weight in ((low, 1 - weight), (high, weight)):
                index = rows[..., 0] * side + columns[..., 1]
                share = row_weight[..., 0] * column_weight[..., 1]
                total += share[..., None] * jnp.take(table, index, axis=0)
        return total
