"""Batching of conversations into rows of bucketed shapes.

The batch shape for a conversation depends on that conversation alone: its length bucket, its image
bucket, and the number of rows that the table gives for that pair. Its result therefore does not
depend on the rest of the batch.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.config.settings import Buckets
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.image_rows import num_windows, pack_images
from mmsr1_jax.models.policy import Rows
from mmsr1_jax.models.positions import mrope_positions
from mmsr1_jax.processing.images import Patches
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
    windows = num_prompt_windows(prompt, config)
    length = smallest_bucket("tokens", len(prompt.tokens), table.lengths, "buckets.lengths")
    windows = windows and smallest_bucket(
        "image windows", windows, table.image_windows, "buckets.image_windows"
    )
    rows = table.batch_tokens // length
    if windows:
        rows = min(rows, table.batch_windows // windows)
    return Bucket(length, windows, max(1, -(-rows // row_multiple)) * row_multiple)


def num_prompt_windows(prompt: Prompt, config: ModelConfig) -> int:
    """Return the number of windows that the images of a conversation take in a row of their own."""
    return num_image_windows(distinct_images([prompt]), config)


def num_image_windows(images: Mapping[str, Patches], config: ModelConfig) -> int:
    """Return the number of windows that distinct images, by digest, take together in a row."""
    return num_windows((image.grid for image in images.values()), config.vision)


def smallest_bucket(unit: str, size: int, sizes: Sequence[int], field: str) -> int:
    """Return the first of the ascending `sizes` that is at least `size`.

    Raises:
      TooLongError: If none is. The message names the unit of the size and the field of `sizes`.
    """
    for candidate in sizes:
        if size <= candidate:
            return candidate
    raise TooLongError(f"{size} {unit}, more than the largest of {field}, {sizes[-1]}")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Part of a conversation in a row.

    Attributes:
      conversation: The whole conversation.
      start, end: Range of its tokens.
      prefix: Index in the row of the segment with the tokens before `start`; None without any.
    """

    conversation: Prompt
    start: int
    end: int
    prefix: int | None = None


def make_rows(
    rows: Sequence[Sequence[Prompt]], bucket: Bucket, config: ModelConfig, image_token_id: int
) -> Rows:
    """Pack the conversations `rows[i]` one after another into row i, padded to the bucket's shape.

    Returns:
      Rows of numpy arrays in the bucket's shape.

    Raises:
      ValueError: If the conversations of a row do not fit.
    """
    segments = [[Segment(prompt, 0, len(prompt.tokens)) for prompt in row] for row in rows]
    return make_segment_rows(segments, bucket, config, image_token_id)


def make_segment_rows(
    rows: Sequence[Sequence[Segment]], bucket: Bucket, config: ModelConfig, image_token_id: int
) -> Rows:
    """Pack the segments `rows[i]` one after another into row i, padded to the bucket's shape.

    Equal images of a row are stored once.

    Returns:
      Rows of numpy arrays in the bucket's shape. `prefix_ids` is None if no segment has a prefix.

    Raises:
      ValueError: If the segments of a row, or their images, do not fit.
    """
    shape = (bucket.rows, bucket.length)
    tokens = np.zeros(shape, np.int32)
    positions = np.zeros((bucket.rows, 3, bucket.length), np.int32)
    segment_ids = np.zeros(shape, np.int32)
    prefix_ids = np.zeros(shape, np.int32)
    image_index = np.full(shape, -1, np.int32)
    images, indices = None, [{} for _ in rows]
    if bucket.windows:
        distinct = [distinct_images(s.conversation for s in row) for row in rows]
        patches = [[(i.values, i.grid) for i in row.values()] for row in distinct]
        patches += [[]] * (bucket.rows - len(rows))
        images, packed = pack_images(patches, bucket.windows, config.vision)
        pairs = zip(packed, distinct, strict=False)  # without empty rows
        indices = [_split_by_image(index, row, config) for index, row in pairs]
    for row, segments in enumerate(rows):
        start = 0
        for number, segment in enumerate(segments, start=1):
            prompt, taken = segment.conversation, slice(segment.start, segment.end)
            end = start + segment.end - segment.start
            if end > bucket.length:
                raise ValueError(f"row {row}: more than {bucket.length} tokens")
            place = slice(start, end)
            tokens[row, place] = prompt.tokens[taken]
            all_positions, _ = mrope_positions(
                prompt.tokens,
                prompt.grids,
                image_token_id=image_token_id,
                merge_size=config.vision.merge_size,
            )
            positions[row, :, place] = all_positions[:, taken]
            segment_ids[row, place] = number
            if segment.prefix is not None:
                prefix_ids[row, place] = 1 + segment.prefix
            if prompt.images and bucket.windows:
                index = np.full(len(prompt.tokens), -1, np.int32)
                index[prompt.tokens == image_token_id] = np.concatenate(
                    [indices[row][image.digest] for image in prompt.images]
                )
                image_index[row, place] = index[taken]
            start = end
    arrays: dict[str, Any] = {  # of numpy, until a program takes them
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segment_ids,
        "image_index": image_index,
        "prefix_ids": prefix_ids if prefix_ids.any() else None,
    }
    return Rows(
        **arrays,
        images=images,
        single_segment=all(len(segments) <= 1 for segments in rows),
    )


def distinct_images(conversations: Iterable[Prompt]) -> dict[str, Patches]:
    """Return the images of some conversations by digest, in order of appearance."""
    return {image.digest: image for prompt in conversations for image in prompt.images}


def _split_by_image(
    index: np.ndarray, images: Mapping[str, Patches], config: ModelConfig
) -> dict[str, np.ndarray]:
    """Return the part of a row's indices, int32[M], that belongs to each of its images."""
    parts, start, merged = {}, 0, config.vision.merge_size**2
    for digest, image in images.items():
        end = start + math.prod(image.grid) // merged
        parts[digest], start = index[start:end], end
    return parts
