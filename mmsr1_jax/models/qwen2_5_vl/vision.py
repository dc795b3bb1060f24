"""Vision tower and the layout of its inputs.

A row of `ImageRows` holds the patches of any number of images, window by window. A window has
`window_patches` slots (64 in the released models), and a window at the edge of an image that has
fewer patches is padded. Window attention is thus a dense batch of windows, and full attention
separates the images of a row by segment id. An image of 10 x 6 patches with windows of 8 x 8:

    8x6 | 2x6      two windows of 48 and 12 patches; the rest of their 64 slots is padding
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int32

from mmsr1_jax.config.choices import Attention
from mmsr1_jax.models.attention import attention, choose
from mmsr1_jax.models.qwen2_5_vl.config import VisionConfig
from mmsr1_jax.models.qwen2_5_vl.layers import Linear, RMSNorm, SwiGLU, rotate, scan_layers
from mmsr1_jax.models.sharding import constrain
from mmsr1_jax.utils.arrays import AnyArray


class ImageRows(flax.struct.PyTreeNode):
    """Image patches, one row for each row of text.

    Attributes:
      patches: float32[B, P, patch_dim]. Patches, patch_dim = channels x frames x patch x patch; P
        is a multiple of the number of patches in a window.
      positions: int32[B, P, 2]. Row and column of each patch in its image.
      segment_ids: int32[B, P]. Index of each patch's image (and frame) in its row, from 1; 0 for
        padding.
    """

    patches: Float32[AnyArray, "B P patch_dim"]
    positions: Int32[AnyArray, "B P 2"]
    segment_ids: Int32[AnyArray, "B P"]


def window_order(grid: Sequence[int], config: VisionConfig) -> Int32[np.ndarray, "slots"]:
    """Return the patch index of each slot of an image, int32[slots], -1 for padding.

    Patches are in the processor's order: by frame, then merge block by merge block in row-major
    order, then row-major within a block. Slots are ordered by frame, then window, then merge block.

    Args:
      grid: Numbers (frames, rows, columns) of patches; rows and columns are multiples of
        `merge_size`.
      config: Configuration of the vision tower.
    """
    t, h, w = grid
    unit, side = config.merge_size**2, config.window_side
    blocks = np.arange(t * (h // config.merge_size) * (w // config.merge_size))
    blocks = blocks.reshape(t, h // config.merge_size, w // config.merge_size)
    blocks = np.pad(
        blocks,
        ((0, 0), (0, -blocks.shape[1] % side), (0, -blocks.shape[2] % side)),
        constant_values=-1,
    )
    windows = blocks.reshape(t, blocks.shape[1] // side, side, blocks.shape[2] // side, side)
    blocks = windows.transpose(0, 1, 3, 2, 4).reshape(-1)
    slots = blocks[:, None] * unit + np.arange(unit)
    return np.where(blocks[:, None] < 0, -1, slots).reshape(-1).astype(np.int32)


def window_ids(segment_ids: Int32[AnyArray, "B P"], window: int) -> Int32[jax.Array, "B P"]:
    """Return the index of each patch's window in its row, from 1; 0 for padding.

    Args:
      segment_ids: int32[B, P], 0 for padding.
      window: Number of patches of a window.
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32) // window + 1
    return jnp.where(jnp.asarray(segment_ids) > 0, index, 0)


def num_windows(grid: Sequence[int], config: VisionConfig) -> int:
    """Return the number of windows that an image with this grid occupies in a row."""
    t, h, w = grid
    side = config.window_side * config.merge_size
    return t * -(-h // side) * -(-w // side)


def patch_positions(grid: Sequence[int], merge: int) -> Int32[np.ndarray, "P 2"]:
    """Return row and column of each patch of an image, int32[P, 2], in the processor's order."""
    t, h, w = grid
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    both = np.stack([rows, columns], axis=-1).reshape(h // merge, merge, w // merge, merge, 2)
    both = both.transpose(0, 2, 1, 3, 4).reshape(h * w, 2)
    return np.tile(both, (t, 1)).astype(np.int32)


def pack_images(
    rows: Sequence[Sequence[tuple[Float32[np.ndarray, "..."], Sequence[int]]]],
    windows: int,
    config: VisionConfig,
) -> tuple[ImageRows, list[Int32[np.ndarray, "..."]]]:
    """Pack the images of each row into windows for the tower.

    Args:
      rows: Images of each row: (patches float32[P, patch_dim], grid (t, h, w)).
      windows: Number of windows per row (from the bucket table).
      config: Configuration of the vision tower.

    Returns:
      Packed rows of numpy arrays, and for each row int32[M], the indices of its merged tokens in
      that row of the tower's output, in order of appearance.

    Raises:
      ValueError: If the images of a row do not fit.
    """
    size = config.window_patches
    patches = np.zeros((len(rows), windows * size, config.patch_dim), np.float32)
    positions = np.zeros((len(rows), windows * size, 2), np.int32)
    segment_ids = np.zeros((len(rows), windows * size), np.int32)
    indices = []
    for row, images in enumerate(rows):
        start, segment, merged_index = 0, 1, [np.zeros(0, np.int32)]
        for image_patches, grid in images:
            slot_patch = window_order(grid, config)
            end = start + len(slot_patch)
            if end > windows * size:
                required = sum(num_windows(g, config) for _, g in images)
                raise ValueError(f"row {row}: images of {required} windows, of at most {windows}")
            used = np.flatnonzero(slot_patch >= 0)
            source = slot_patch[used]
            patches[row, start + used] = image_patches[source]
            positions[row, start + used] = patch_positions(grid, config.merge_size)[source]
            frame = source // (grid[1] * grid[2])
            segment_ids[row, start + used] = segment + frame
            segment += grid[0]
            # A merged token covers `unit` adjacent slots; sort tokens into the processor's order.
            unit = config.merge_size**2
            merged = used[np.argsort(source)][::unit] // unit
            merged_index.append((start // unit + merged).astype(np.int32))
            start = end
        indices.append(np.concatenate(merged_index))
    return ImageRows(patches, positions, segment_ids), indices


class VisionAttention(nnx.Module):
    """Self-attention with stacked kernels: qkv [L, 3, N, H, D], out [L, D, N, H]."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        D, H = (config.hidden_size, "embed"), (config.head_dim, "head_dim")
        N = (config.num_heads, "heads")
        linear = functools.partial(
            Linear, bias=True, rngs=rngs, layers=config.num_layers, dtype=dtype
        )
        self.qkv = linear([D], [(3, None), N, H])
        self.out = linear([N, H], [D])

    def __call__(
        self,
        x: Float[jax.Array, "B P D"],
        cos: Float32[jax.Array, "B P half_H"],
        sin: Float32[jax.Array, "B P half_H"],
        segment_ids: Int32[AnyArray, "B P"],
        full_attention: Bool[AnyArray, ""] | np.bool_,
        window: int,
        implementation: Attention,
    ) -> Float[jax.Array, "B P D"]:
        """Compute attention over each image if `full_attention`, else over each window."""
        q, k, v = (part.squeeze(2) for part in jnp.split(self.qkv(x), 3, axis=2))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if choose(implementation, q.shape[1], q.dtype, single_segment=False) == "splash":
            # The kernel visits blocks of one window or image, as the ids say: no branches needed.
            ids = jnp.where(full_attention, segment_ids, window_ids(segment_ids, window))
            return self.out(attention(q, k, v, ids, causal=False, implementation=implementation))

        def over_image(q, k, v):
            return attention(q, k, v, segment_ids, causal=False, implementation=implementation)

        def over_windows(q, k, v):
            B, P = segment_ids.shape
            dense = (a.reshape(B * P // window, window, *a.shape[2:]) for a in (q, k, v))
            dense_q, dense_k, dense_v = dense
            ids = segment_ids.reshape(B * P // window, window)
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
        self.attention = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = norm()
        self.mlp = SwiGLU(
            config.hidden_size, config.intermediate_size, bias=True, rngs=rngs,
            layers=config.num_layers, dtype=dtype,
        )  # fmt: skip

    def __call__(
        self, x: Float[jax.Array, "B P D"], *attention_inputs: Any
    ) -> Float[jax.Array, "B P D"]:
        """Apply the block; `attention_inputs` are those of `VisionAttention`."""
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
        # 2-D rotary embedding: half of the frequencies rotate with the row, half with the column.
        quarter = config.head_dim // 4
        frequency = config.rope_theta ** -(np.arange(quarter, dtype=np.float32) / quarter)
        angles = images.positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)
        angles = angles.reshape(*angles.shape[:2], 2 * quarter)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        full_attention = np.isin(np.arange(config.num_layers), config.full_attention_layers)
        if implementation == "cudnn":  # it cannot separate the images of a row
            implementation = "auto"
        x = self.patch_embed(jnp.asarray(images.patches).astype(dtype))

        def call(block, x, full):
            return block(
                x, cos, sin, images.segment_ids, full, config.window_patches, implementation
            )

        x = constrain(x, "batch", None, None)
        x = scan_layers(self.blocks, x, call, full_attention, remat)
        return self.merger(x)
