"""M-RoPE positions, shared by prompts, tool results, training and scoring."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32


def mrope_positions(
    tokens: Int[np.ndarray, "T"],
    grids: Sequence[Sequence[int]],
    *,
    image_token_id: int,
    merge_size: int = 2,
    start: int = 0,
) -> tuple[Int32[np.ndarray, "3 T"], int]:
    """Return M-RoPE positions of text and image tokens (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text advances all three positions by one per token. The tokens of an image that starts at
    position p have temporal position p + frame, height p + row and width p + column. The token
    after it has position p + max(rows, columns). Example: an image of 2 x 3 merged tokens after two
    text tokens:

        tokens     a  b  I  I  I  I  I  I  c
        temporal   0  1  2  2  2  2  2  2  5
        height     0  1  2  2  2  3  3  3  5
        width      0  1  2  3  4  2  3  4  5

    Args:
      tokens: int[T]. Token ids, with one `image_token_id` per merged token of an image.
      grids: Size (frames, rows, columns) of each image in patches, in order of appearance.
      image_token_id: Id of the image placeholder.
      merge_size: Number of patches along each side of a merged token.
      start: Position of the first token. To continue a conversation, pass the second result of the
        previous call.

    Returns:
      Positions (temporal, height, width), int32[3, T], and the position of the next token.

    Raises:
      ValueError: If the placeholders do not match the grids, or the placeholders of an image are
        not contiguous.
    """
    is_image = tokens == image_token_id
    sizes = [t * (h // merge_size) * (w // merge_size) for t, h, w in grids]
    if is_image.sum() != sum(sizes):
        raise ValueError(
            f"{int(is_image.sum())} image placeholders in the tokens, but the {len(grids)} images "
            f"have {sum(sizes)} merged tokens"
        )
    positions = np.empty((3, len(tokens)), np.int32)
    end, position = 0, start
    for (t, h, w), size in zip(grids, sizes, strict=True):
        image_start = end + int(np.argmax(is_image[end:]))
        if not is_image[image_start : image_start + size].all():
            raise ValueError(
                f"the {size} placeholders of the image at token {image_start} are not contiguous"
            )
        positions[:, end:image_start] = position + np.arange(image_start - end)
        position += image_start - end
        rows, columns = h // merge_size, w // merge_size
        positions[:, image_start : image_start + size] = position + np.indices(
            (t, rows, columns)
        ).reshape(3, -1)
        position += max(rows, columns)
        end = image_start + size
    positions[:, end:] = position + np.arange(len(tokens) - end)
    return positions, position + len(tokens) - end
