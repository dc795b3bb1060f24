"""Batching of conversations into rows of bucketed shapes.

The batch shape for a conversation depends on that conversation alone: its length bucket, its image
bucket, and the number of rows that the table gives for that pair. Its result therefore does not
depend on the rest of the batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.config.settings import Buckets
from mmsr1_jax.models.qwen2_5_vl import ModelConfig, Rows, mrope_positions
from mmsr1_jax.models.qwen2_5_vl.vision import num_windows, pack_images
from mmsr1_jax.processing.processor import Prompt


class TooLongError(UserError):
    """Error for a conversation that exceeds the largest bucket."""


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Batch shape: rows x length tokens, and rows x windows of patches (0 windows: no images)."""

    length: int
    windows: int
    rows: int


def select_bucket(
    prompt: Prompt, config: ModelConfig, table: Buckets, row_multiple: int = 1
) -> Bucket:
    """Return the bucket of a conversation.

    Args:
      prompt: Conversation.
      config: Model configuration, which defines the size of a window.
      table: Table of bucket sizes.
      row_multiple: Divisor of the number of rows: the number of devices along the mesh's batch
        axes.

    Raises:
      TooLongError: If the conversation's tokens or images exceed the largest bucket.
    """
    windows = sum(num_windows(grid, config.vision) for grid in prompt.grids)
    length = smallest_bucket("tokens", len(prompt.tokens), table.lengths, "buckets.lengths")
    windows = windows and smallest_bucket(
        "image windows", windows, table.image_windows, "buckets.image_windows"
    )
    rows = table.batch_tokens // length
    if windows:
        rows = min(rows, table.batch_windows // windows)
    return Bucket(length, windows, max(1, -(-rows // row_multiple)) * row_multiple)


def smallest_bucket(unit: str, size: int, sizes: Sequence[int], field: str) -> int:
    """Return the first of the ascending `sizes` that is at least `size`.

    Raises:
      TooLongError: If none is. The message names the unit of the size and the field of `sizes`.
    """
    for candidate in sizes:
        if size <= candidate:
            return candidate
    raise TooLongError(f"{size} {unit}, more than the largest of {field}, {sizes[-1]}")


def make_rows(
    rows: Sequence[Sequence[Prompt]], bucket: Bucket, config: ModelConfig, image_token_id: int
) -> Rows:
    """Pack the conversations `rows[i]` one after another into row i, padded to the bucket's shape.

    Returns:
      Rows of numpy arrays in the bucket's shape.

    Raises:
      ValueError: If the conversations of a row do not fit.
    """
    shape = (bucket.rows, bucket.length)
    tokens = np.zeros(shape, np.int32)
    positions = np.zeros((bucket.rows, 3, bucket.length), np.int32)
    segment_ids = np.zeros(shape, np.int32)
    image_index = np.full(shape, -1, np.int32)
    for row, prompts in enumerate(rows):
        start = 0
        for segment, prompt in enumerate(prompts, start=1):
            end = start + len(prompt.tokens)
            if end > bucket.length:
                raise ValueError(f"row {row}: more than {bucket.length} tokens")
            tokens[row, start:end] = prompt.tokens
            positions[row, :, start:end], _ = mrope_positions(
                prompt.tokens,
                prompt.grids,
                image_token_id=image_token_id,
                merge_size=config.vision.merge_size,
            )
            segment_ids[row, start:end] = segment
            start = end
    images = None
    if bucket.windows:
        patches = [[(i.values, i.grid) for p in prompts for i in p.images] for prompts in rows]
        patches += [[]] * (bucket.rows - len(rows))
        images, indices = pack_images(patches, bucket.windows, config.vision)
        for row, index in enumerate(indices):
            image_index[row, tokens[row] == image_token_id] = index
    arrays: dict[str, Any] = {  # of numpy, until a program takes them
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segment_ids,
        "image_index": image_index,
    }
    return Rows(
        **arrays,
        images=images,
        single_segment=all(len(prompts) <= 1 for prompts in rows),
    )
