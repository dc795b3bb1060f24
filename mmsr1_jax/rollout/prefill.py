"""Chunked prefill: splitting of tokens and images into the chunks that `Device.extend` writes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mmsr1_jax.models.positions import mrope_positions
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Prompt


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """A chunk of tokens to write into one lane.

    Attributes:
      lane: Lane to write to.
      length: Number of tokens in the lane before the chunk.
      tokens: Token ids, int32[n]; n is at most the longest of `prefill_buckets`.
      positions: M-RoPE positions, int32[3, n].
      images: Images with at least one token in the chunk.
      image_index: Index into the concatenated merged tokens of `images`, int32[n]; -1 for text.
    """

    lane: int
    length: int
    tokens: np.ndarray
    positions: np.ndarray
    images: tuple[Patches, ...]
    image_index: np.ndarray


def chunk_length(remaining: int, buckets: Sequence[int]) -> int:
    """Return the number of tokens of the next chunk.

    Return all of them if they fill at least three quarters of the smallest bucket that holds them,
    or if no bucket is smaller. Otherwise return the largest bucket below `remaining`.

    Args:
      remaining: Number of tokens still to write.
      buckets: Lengths of chunks in ascending order, `rollout.prefill_buckets`.
    """
    for bucket in buckets:
        if remaining <= bucket:
            smaller = [length for length in buckets if length < remaining]
            return remaining if not smaller or 4 * remaining >= 3 * bucket else smaller[-1]
    return buckets[-1]


def make_chunks(
    prompt: Prompt,
    lane: int,
    length: int,
    start: int,
    *,
    buckets: Sequence[int],
    image_token: int,
    merge_size: int,
) -> tuple[list[PrefillChunk], int]:
    """Split tokens with their images into chunks for one lane.

    Args:
      prompt: Tokens and images.
      lane: Lane to write to.
      length: Number of tokens in the lane.
      start: M-RoPE position of the first token.
      buckets: Lengths of chunks, `rollout.prefill_buckets`.
      image_token: Token id of the image placeholder.
      merge_size: Number of patches along each side of a merged image token.

    Returns:
      The chunks in order, and the M-RoPE position after the last token.
    """
    tokens = prompt.tokens
    positions, next_position = mrope_positions(
        tokens, prompt.grids, image_token_id=image_token, merge_size=merge_size, start=start
    )
    sizes = [len(image.values) // merge_size**2 for image in prompt.images]
    owner = np.repeat(np.arange(len(sizes)), sizes)  # image of each image token
    is_image = tokens == image_token
    chunks, begin = [], 0
    while begin < len(tokens):
        end = begin + chunk_length(len(tokens) - begin, buckets)
        num_before, in_chunk = int(is_image[:begin].sum()), is_image[begin:end]
        images = np.unique(owner[num_before : num_before + in_chunk.sum()])
        # Tokens of the chunk's first image that are in earlier chunks.
        offset = num_before - sum(sizes[: images[0]]) if len(images) else 0
        chunks.append(
            PrefillChunk(
                lane=lane,
                length=length + begin,
                tokens=tokens[begin:end],
                positions=positions[:, begin:end],
                images=tuple(prompt.images[index] for index in images),
                image_index=np.where(in_chunk, np.cumsum(in_chunk) - 1 + offset, -1),
            )
        )
        begin = end
    return chunks, next_position
