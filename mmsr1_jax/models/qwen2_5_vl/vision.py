"""Vision tower and the layout of its inputs.

A row of `ImageRows` holds the patches of any number of images, window by window. A window has
`window_patches` slots (64 in the released models), and a window at the edge of an image that has
fewer patches is padded. Window attention is thus a dense batch of windows, and full attention
separates the images of a row by segment id. An image of 10 x 6 patches with windows of 8 x 8:

    8x6 | 2x6      two windows of 48 and 12 patches; the rest of their 64 slots is padding
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmsr1_jax.models.attention import attention
from mmsr1_jax.models.qwen2_5_vl.config import VisionConfig
from mmsr1_jax.models.qwen2_5_vl.layers import Linear, RMSNorm, SwiGLU, rotate, scan_layers
from mmsr1_jax.models.sharding import constrain


@flax.struct.dataclass
class ImageRows:
    """Image patches, one row for each row of text.

    Attributes:
      patches: float32[B, P, C]. Patches, C = channels x frames x patch x patch; P is a whole number
        of windows.
      positions: int32[B, P, 2]. Row and column of each patch in its image.
      segment_ids: int32[B, P]. Number of each patch's image (and frame) in its row, from 1; 0 for
        padding.
    """

    patches: jax.Array
    positions: jax.Array
    segment_ids: jax.Array


def window_order(grid: Sequence[int], config: VisionConfig) -> np.ndarray:
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


def num_windows(grid: Sequence[int], config: VisionConfig) -> int:
    """Return the number of windows that an image with this grid occupies in a row."""
    t, h, w = grid
    side = config.window_side * config.merge_size
    return t * -(-h // side) * -(-w // side)


def patch_positions(grid: Sequence[int], merge: int) -> np.ndarray:
    """Return row and column of each patch, int32[t*h*w, 2], in the processor's order."""
    t, h, w = grid
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    both = np.stack([rows, columns], axis=-1).reshape(h // merge, merge, w // merge, merge, 2)
    both = both.transpose(0, 2, 1, 3, 4).reshape(h * w, 2)
    return np.tile(both, (t, 1)).astype(np.int32)


def pack_images(
    rows: Sequence[Sequence[tuple[np.ndarray, Sequence[int]]]], windows: int, config: VisionConfig
) -> tuple[ImageRows, list[np.ndarray]]:
    """Pack the images of each row into windows for the tower.

    Args:
      rows: Images of each row: (patches float32[t*h*w, C], grid (t, h, w)).
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
        start, segment, index = 0, 1, [np.zeros(0, np.int32)]
        for image_patches, grid in images:
            slot_patch = window_order(grid, config)
            end = start + len(slot_patch)
            if end > windows * size:
                need = sum(num_windows(g, config) for _, g in images)
                raise ValueError(f"row {row}: its images take {need} windows, there are {windows}")
            taken = np.flatnonzero(slot_patch >= 0)
            source = slot_patch[taken]
            patches[row, start + taken] = image_patches[source]
            positions[row, start + taken] = patch_positions(grid, config.merge_size)[source]
            frame = source // (grid[1] * grid[2])
            segment_ids[row, start + taken] = segment + frame
            segment += grid[0]
            # A merged token covers `unit` adjacent slots; sort tokens into the processor's order.
            unit = config.merge_size**2
            merged = taken[np.argsort(source)][::unit] // unit
            index.append((start // unit + merged).astype(np.int32))
            start = end
        indices.append(np.concatenate(index))
    return ImageRows(patches, positions, segment_ids), indices


class VisionAttention(nnx.Module):
    """Self-attention with stacked kernels: qkv [L, 3, N, H, D], out [L, D, N, H]."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype):
        D, H = (config.hidden_size, "embed"), (config.head_dim, "head_dim")
        N = (config.num_heads, "heads")
        keywords = dict(bias=True, rngs=rngs, layers=config.num_layers, dtype=dtype)
        self.qkv = Linear([D], [(3, None), N, H], **keywords)
        self.out = Linear([N, H], [D], **keywords)

    def __call__(self, x, cos, sin, segment_ids, whole_image, window: int, implementation: str):
        """Compute attention over each image if `whole_image` (bool[]), else over each window.

        x: [B, P, D] -> [B, P, D].
        """
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        def over_image(q, k, v):
            return attention(q, k, v, segment_ids, causal=False, implementation=implementation)

        def over_windows(q, k, v):
            B, P = segment_ids.shape
            dense = [a.reshape(B * P // window, window, *a.shape[2:]) for a in (q, k, v)]
            ids = segment_ids.reshape(B * P // window, window)
            out = attention(*dense, ids, causal=False, implementation="xla")
            return out.reshape(q.shape)

        return self.out(jax.lax.cond(whole_image, over_image, over_windows, q, k, v))


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype):
        keywords = dict(rngs=rngs, layers=config.num_layers, dtype=dtype)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, **keywords)
        self.attention = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, **keywords)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True, **keywords)

    def __call__(self, x, *attention_inputs):
        x = x + self.attention(self.attention_norm(x), *attention_inputs)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", None, None)


class Merger(nnx.Module):
    """Patch merger: norm, concatenation of a square of patches, two-layer MLP to one text token."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype):
        wide = config.hidden_size * config.merge_size**2
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, rngs=rngs, dtype=dtype)
        keywords = dict(bias=True, rngs=rngs, dtype=dtype)
        self.fc1 = Linear([(wide, "embed")], [(wide, "ffn")], **keywords)
        self.fc2 = Linear([(wide, "ffn")], [(config.out_hidden_size, "embed")], **keywords)
        self.unit = config.merge_size**2

    def __call__(self, x: jax.Array) -> jax.Array:
        B, P, D = x.shape
        x = self.norm(x).reshape(B, P // self.unit, self.unit * D)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype):
        self.patch_embed = Linear(
            [(config.patch_dim, None)], [(config.hidden_size, "embed")], bias=False, rngs=rngs,
            dtype=dtype,
        )  # fmt: skip
        self.blocks = VisionBlock(config, rngs=rngs, dtype=dtype)
        self.merger = Merger(config, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(
        self, images: ImageRows, dtype, *, implementation: str = "auto", remat: str = "none"
    ) -> jax.Array:
        """Return merged tokens, [B, P / merge^2, D of the text decoder], in slot order."""
        config = self.config
        # 2-D rotary embedding: half of the frequencies rotate with the row, half with the column.
        quarter = config.head_dim // 4
        frequency = config.rope_theta ** -(np.arange(quarter, dtype=np.float32) / quarter)
        angles = images.positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)
        angles = angles.reshape(*angles.shape[:2], 2 * quarter)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        whole_image = np.isin(np.arange(config.num_layers), config.full_attention_layers)
        if implementation == "cudnn":  # it cannot separate the images of a row
            implementation = "auto"
        x = self.patch_embed(images.patches.astype(dtype))

        def call(block, x, whole):
            return block(
                x, cos, sin, images.segment_ids, whole, config.window_patches, implementation
            )

        x = scan_layers(self.blocks, constrain(x, "batch", None, None), call, whole_image, remat)
        return self.merger(x)
