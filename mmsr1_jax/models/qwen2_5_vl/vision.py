"""Vision tower of Qwen2.5-VL: windows, and some blocks that attend to whole images."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int32

from mmsr1_jax.config.choices import Attention
from mmsr1_jax.models.attention import attention, choose
from mmsr1_jax.models.image_rows import ImageRows
from mmsr1_jax.models.layers import Linear, RMSNorm, SwiGLU, axial_angles, rotate, scan_layers
from mmsr1_jax.models.qwen2_5_vl.config import VisionConfig
from mmsr1_jax.models.sharding import constrain
from mmsr1_jax.models.vision_attention import VisionAttention
from mmsr1_jax.utils.arrays import AnyArray

_LANES = 128  # of a TPU's registers


class WindowAttention(VisionAttention):
    """Self-attention over whole images or over windows, as each block's flag says."""

    def __call__(
        self,
        x: Float[jax.Array, "B P D"],
        cos: Float32[jax.Array, "B P half_H"],
        sin: Float32[jax.Array, "B P half_H"],
        segment_ids: Int32[AnyArray, "B P"],
        window_ids: Int32[AnyArray, "B P"],
        full_attention: Bool[AnyArray, ""] | np.bool_,
        window: int,
        implementation: Attention,
    ) -> Float[jax.Array, "B P D"]:
        """Compute attention over each image if `full_attention`, else over each window."""
        if choose(implementation, x.shape[1], x.dtype, single_segment=False) == "splash":
            # The kernel visits blocks of one window or image, as the ids say: no branches needed.
            # It needs heads of a multiple of 128 elements, and divides scores by their root.
            H = 2 * cos.shape[-1]
            size = -(-H // _LANES) * _LANES
            q, k, v = self.qkv.split(x, size)
            scale = (size / H) ** 0.5
            q, k = rotate(q, cos * scale, sin * scale), rotate(k, cos, sin)
            ids = jnp.where(full_attention, segment_ids, window_ids)
            return self.out(attention(q, k, v, ids, causal=False, implementation=implementation))
        q, k, v = self.project(x, cos, sin)

        def over_image(q, k, v):
            return attention(q, k, v, segment_ids, causal=False, implementation=implementation)

        def over_windows(q, k, v):
            B, P = window_ids.shape
            dense = (a.reshape(B * P // window, window, *a.shape[2:]) for a in (q, k, v))
            dense_q, dense_k, dense_v = dense
            ids = window_ids.reshape(B * P // window, window)
            out = attention(dense_q, dense_k, dense_v, ids, causal=False, implementation="xla")
            return out.reshape(q.shape)

        if isinstance(full_attention, np.bool_):  # the layers are not scanned
            return self.out((over_image if full_attention else over_windows)(q, k, v))
        return self.out(jax.lax.cond(full_attention, over_image, over_windows, q, k, v))


class VisionBlock(nnx.Module):
    """Pre-norm attention and SwiGLU, each with a residual connection."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        norm = functools.partial(
            RMSNorm, config.hidden_size, config.norm_eps, rngs=rngs, layers=config.num_layers,
            dtype=dtype,
        )  # fmt: skip
        self.attention_norm = norm()
        self.attention = WindowAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = norm()
        self.mlp = SwiGLU(
            config.hidden_size, config.intermediate_size, bias=True, rngs=rngs,
            layers=config.num_layers, dtype=dtype,
        )  # fmt: skip

    def __call__(
        self, x: Float[jax.Array, "B P D"], *attention_inputs: Any
    ) -> Float[jax.Array, "B P D"]:
        """Apply the block; `attention_inputs` are those of `WindowAttention`."""
        x = x + self.attention(self.attention_norm(x), *attention_inputs)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", None, None)


class Merger(nnx.Module):
    """Patch merger: norm, concatenation of a square of patches, two-layer MLP to one text token."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        merged = config.hidden_size * config.merge_size**2
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, rngs=rngs, dtype=dtype)
        linear = functools.partial(Linear, bias=True, rngs=rngs, dtype=dtype)
        self.fc1 = linear([(merged, "embed")], [(merged, "ffn")])
        self.fc2 = linear([(merged, "ffn")], [(config.out_hidden_size, "embed")])
        self.unit = config.merge_size**2

    def __call__(self, x: Float[jax.Array, "B P D"]) -> Float[jax.Array, "B M text_D"]:
        B, P, D = x.shape
        x = self.norm(x).reshape(B, P // self.unit, self.unit * D)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, blocks and merger."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.patch_embed = Linear(
            [(config.patch_dim, None)], [(config.hidden_size, "embed")], bias=False, rngs=rngs,
            dtype=dtype,
        )  # fmt: skip
        self.blocks: nnx.Module = VisionBlock(config, rngs=rngs, dtype=dtype)
        self.merger = Merger(config, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(
        self,
        images: ImageRows,
        dtype: DTypeLike,
        *,
        implementation: Attention = "auto",
        remat: str = "none",
    ) -> Float[jax.Array, "B M text_D"]:
        """Return merged tokens, float[B, M, D of the text decoder], in slot order.

        M is P divided by the number of patches of a merged token.
        """
        config = self.config
        cos, sin = axial_angles(images.positions, config)
        full_attention = np.isin(np.arange(config.num_layers), config.full_attention_layers)
        if implementation == "cudnn":  # it cannot separate the images of a row
            implementation = "auto"
        x = self.patch_embed(jnp.asarray(images.patches).astype(dtype))

        def call(block, x, full):
            return block(
                x, cos, sin, images.segment_ids, images.window_ids, full, config.window_patches,
                implementation,
            )  # fmt: skip

        x = constrain(x, "batch", None, None)
        x = scan_layers(self.blocks, x, call, full_attention, remat)
        return self.merger(x)
