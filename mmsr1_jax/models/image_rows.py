"""The layout of images in rows of patches, the input of vision towers.

A row of `ImageRows` holds the patches of any number of images, and is divided into groups of slots,
`window_patches` each (64 in the released models), the unit in which rows are sized.

Towers with window attention read their patches window by window. A group has as many slots as a
full window has patches. A window at the edge of an image has fewer, so several such windows share a
group, and no window is split between groups. Window attention is thus a dense batch of groups that
separates windows by their ids, and full attention separates the images of a row by segment id. Two
images, of 10 x 6 and 4 x 4 patches, with windows of 8 x 8:

    8x6 | 2x6         segment ids   1 .. 1 2 .. 2 | 1 .. 1 0 .. 0
    4x4               window ids    1 .. 1 2 .. 2 | 3 .. 3 0 .. 0
                      patches           48     16       12     52 (padding)

Towers without windows read images one after another, in the processor's order.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Float32, Int32

from mmsr1_jax.models.config import VisionConfig
from mmsr1_jax.utils.arrays import AnyArray


class ImageRows(flax.struct.PyTreeNode):
    """Image patches, one row for each row of text.

    Attributes:
      patches: float32[B, P, patch_dim]. Patches, patch_dim = channels x frames x patch x patch; P
        is a multiple of the number of slots in a group.
      positions: int32[B, P, 2]. Row and column of each patch in its image.
      segment_ids: int32[B, P]. Index of each patch's image (and frame) in its row, from 1; 0 for
        padding.
      window_ids: int32[B, P]. Index of each patch's window in its row, from 1, ascending; 0 for
        padding. None for a tower without windows.
      sizes: int32[B, P, 2]. Numbers of rows and columns of each patch's image, in patches; 1 for
        padding. None for a tower with windows, which needs no absolute positions.
    """

    patches: Float32[AnyArray, "B P patch_dim"]
    positions: Int32[AnyArray, "B P 2"]
    segment_ids: Int32[AnyArray, "B P"]
    window_ids: Int32[AnyArray, "B P"] | None = None
    sizes: Int32[AnyArray, "B P 2"] | None = None


def abstract_images(rows: int, windows: int, config: VisionConfig) -> ImageRows:
    """Return the shapes and dtypes of packed rows, as abstract arrays."""
    P, has_windows = windows * config.window_patches, config.window_side is not None

    def integers(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct((rows, P, *sizes), np.int32)

    patches: Any = jax.ShapeDtypeStruct((rows, P, config.patch_dim), np.float32)
    return ImageRows(
        patches=patches,
        positions=integers(2),
        segment_ids=integers(),
        window_ids=integers() if has_windows else None,
        sizes=None if has_windows else integers(2),
    )


def window_order(grid: Sequence[int], config: VisionConfig) -> Int32[np.ndarray, "P"]:
    """Return the indices of the patches of an image, window by window, int32[P].

    Patches are numbered in the processor's order: by frame, then merge block by merge block in
    row-major order, then row-major within a block. The result is ordered by frame, then window,
    then merge block; for a tower without windows, in the processor's order.

    Args:
      grid: Numbers (frames, rows, columns) of patches; rows and columns are multiples of
        `merge_size`.
      config: Configuration of the vision tower.
    """
    t, h, w = grid
    unit, side = config.merge_size**2, config.window_side
    if side is None:
        return np.arange(t * h * w, dtype=np.int32)
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

    Windows are in the order of `window_order`, image after image. A tower without windows has one
    for each image here.
    """
    if config.window_side is None:
        return np.array([t * h * w for t, h, w in grids], np.int32)
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
    image. Without windows, images are placed one after another, across groups.

    Args:
      sizes: int32[windows], number of patches of each window.
      config: Configuration of the vision tower.

    Returns:
      int32[windows], the first slot of each window, and the number of groups.
    """
    capacity = config.window_patches
    if config.window_side is None:
        return np.cumsum(sizes, dtype=np.int32) - sizes, -(-int(sizes.sum()) // capacity)
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
    """Return the number of groups of slots into which images with these grids fit in a row."""
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
    positions, image_sizes = np.zeros((2, *shape, 2), np.int32)
    segment_ids, window_ids = np.zeros((2, *shape), np.int32)
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
            image_sizes[row, own] = grid[1:]
            segment_ids[row, own] = segment + source // (grid[1] * grid[2])
            # A merged token covers `unit` adjacent slots; sort tokens into the processor's order.
            merged = own[np.argsort(source)][::unit] // unit
            merged_index.append(merged.astype(np.int32))
            first, segment = first + len(source), segment + grid[0]
        indices.append(np.concatenate(merged_index))
    if config.window_side is None:
        images = ImageRows(patches, positions, segment_ids, sizes=np.maximum(image_sizes, 1))
    else:
        images = ImageRows(patches, positions, segment_ids, window_ids)
    return images, indices
