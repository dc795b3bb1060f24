"""Vision tower and the layout of its inputs.

A row of `ImageRows` holds the patches of any number of images, window by window. A row is divided
into groups of `window_patches` slots (64 in the released models), as many as a full window has
patches. A window at the edge of an image has fewer, so several such windows share a group, and no
window is split between groups. Window attention is thus a dense batch of groups that separates
windows by their ids, and full attention separates the images of a row by segment id. Two images, of
10 x 6 and 4 x 4 patches, with windows of 8 x 8:

    8x6 | 2x6         segment ids   1 .. 1 2 .. 2 | 1 .. 1 0 .. 0
    4x4               window ids    1 .. 1 2 .. 2 | 3 .. 3 0 .. 0
                      patches           48     16       12     52 (padding)
"""

import functools
from collections.abc import Iterable, Sequence
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

_LANES = 128  # of a TPU's registers


class ImageRows(flax.struct.PyTreeNode):
    """Image patches, one row for each row of text.

    Attributes:
      patches: float32[B, P, patch_dim]. Patches, patch_dim = channels x frames x patch x patch; P
        is a multiple of the number of patches in a window.
      positions: int32[B, P, 2]. Row and column of each patch in its image.
      segment_ids: int32[B, P]. Index of each patch's image (and frame) in its row, from 1; 0 for
        padding.
      window_ids: int32[B, P]. Index of each patch's window in its row, from 1, ascending; 0 for
        padding.
    """

    patches: Float32[AnyArray, "B P patch_dim"]
    positions: Int32[AnyArray, "B P 2"]
    segment_ids: Int32[AnyArray, "B P"]
    window_ids: Int32[AnyArray, "B P"]


def window_order(grid: Sequence[int], config: VisionConfig) -> Int32[np.ndarray, "P"]:
    """Return the indices of the patches of an image, window by window, int32[P].

    Patches are numbered in the processor's order: by frame, then merge block by merge block in
    row-major order, then row-major within a block. The result is ordered by frame, then window,
    then merge block.

    Args:
      grid: Numbers (frames, rows, columns) of patches; rows and columns are multiples of
        `merge_size`.
      config: Configuration of the vision tower.
    """
    t, h, w = grid
    unit, side = config.merge_size**2, config.window_side
    blocks = np.arange(t * h * w // unit, dtype=np.int32)
    blocks = blocks.reshape(t, h // config.merge_size, w // config.merge_size)
    blocks = np.pad(
        blocks,
        ((0, 0), (0, -blocks.shape[1] % side), (0, -blocks.shape[2] % side)),
        constant_values=-1,
    )
    windows = blocks.reshape(t, blocks.shape[1] // side, side, blocks.shape[2] // side, side)
    blocks = windows.transpose(0, 1, 3, 2, 4).reshape(-1)
    return (blocks[blocks >= 0, None] * unit + np.arange(unit, dtype=np.int32)).reshape(-1)


def window_sizes(
    grids: Iterable[Sequence[int]], config: VisionConfig
) -> Int32[np.ndarray, "windows"]:
    """Return the number of patches of each window of some images, int32[windows].

    Windows are in the order of `window_order`, image after image.
    """
    side, sizes = config.window_side * config.merge_size, [np.zeros(0, np.int32)]
    for t, h, w in grids:
        rows, columns = (np.minimum(side, n - np.arange(0, n, side)) for n in (h, w))
        sizes.append(np.tile(np.outer(rows, columns).reshape(-1), t))
    return np.concatenate(sizes).astype(np.int32)


def place_windows(
    sizes: Int32[np.ndarray, "windows"], config: VisionConfig
) -> tuple[Int32[np.ndarray, "windows"], int]:
    """Place windows into groups of slots by first-fit decreasing.

    Windows of equal size are placed in order of appearance, so full windows come first, image after
    image.

    Args:
      sizes: int32[windows], number of patches of each window.
      config: Configuration of the vision tower.

    Returns:
      int32[windows], the first slot of each window, and the number of groups.
    """
    capacity = config.window_patches
    starts, used = np.zeros(len(sizes), np.int32), np.zeros(0, np.int32)  # used slots of each group
    for size in np.unique(sizes)[::-1]:
        windows = np.flatnonzero(sizes == size)
        missing = len(windows) - int(((capacity - used) // size).sum())
        used = np.pad(used, (0, max(0, -(-missing // (capacity // size)))))
        # The first group takes as many windows of this size as it has room for, then the second ..
        ends = np.minimum(np.cumsum((capacity - used) // size), len(windows))
        counts = np.diff(ends, prepend=0)
        nth = np.arange(len(windows)) - np.repeat(ends - counts, counts)
        groups = np.repeat(np.arange(len(used)), counts)
        starts[windows] = groups * capacity + used[groups] + nth * size
        used = used + (counts * size).astype(np.int32)
    return starts, len(used)


def num_windows(grids: Iterable[Sequence[int]], config: VisionConfig) -> int:
    """Return the number of full windows in whose slots images with these grids fit in a row."""
    return place_windows(window_sizes(grids, config), config)[1]


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
    """Pack the images of each row into groups of slots for the tower.

    Args:
      rows: Images of each row: (patches float32[P, patch_dim], grid (t, h, w)).
      windows: Number of groups per row, each of the size of a full window (from the bucket table).
      config: Configuration of the vision tower.

    Returns:
      Packed rows of numpy arrays, and for each row int32[M], the indices of its merged tokens in
      that row of the tower's output, in order of appearance.

    Raises:
      ValueError: If the images of a row do not fit.
    """
    shape, unit = (len(rows), windows * config.window_patches), config.merge_size**2
    patches = np.zeros((*shape, config.patch_dim), np.float32)
    positions = np.zeros((*shape, 2), np.int32)
    segment_ids, window_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    indices = []
    for row, images in enumerate(rows):
        sizes = window_sizes((grid for _, grid in images), config)
        starts, required = place_windows(sizes, config)
        if required > windows:
            raise ValueError(f"row {row}: images of {required} windows, of at most {windows}")
        first, segment, merged_index = 0, 1, [np.zeros(0, np.int32)]
        # Slots of all patches, image after image, each window by window.
        slots = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        ranks = np.argsort(np.argsort(starts))  # ids ascend with slots, which kernels rely on
        window_ids[row, slots] = np.repeat(1 + ranks, sizes)
        for image_patches, grid in images:
            source = window_order(grid, config)
            own = slots[first : first + len(source)]
            patches[row, own] = image_patches[source]
            positions[row, own] = patch_positions(grid, config.merge_size)[source]
            segment_ids[row, own] = segment + source // (grid[1] * grid[2])
            # A merged token covers `unit` adjacent slots; sort tokens into the processor's order.
            merged = own[np.argsort(source)][::unit] // unit
            merged_index.append(merged.astype(np.int32))
            first, segment = first + len(source), segment + grid[0]
        indices.append(np.concatenate(merged_index))
    return ImageRows(patches, positions, segment_ids, window_ids), indices


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
        q, k, v = (part.squeeze(2) for part in jnp.split(self.qkv(x), 3, axis=2))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

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
                x, cos, sin, images.segment_ids, images.window_ids, full, config.window_patches,
                implementation,
            )  # fmt: skip

        x = constrain(x, "batch", None, None)
        x = scan_layers(self.blocks, x, call, full_attention, remat)
        return self.merger(x)
