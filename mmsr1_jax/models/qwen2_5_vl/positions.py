"""M-RoPE positions: the one implementation, used by prompts, tool results, training and scoring."""

from collections.abc import Sequence

import numpy as np


def mrope_positions(
    tokens: np.ndarray,
    grids: Sequence[Sequence[int]],
    *,
    image_token_id: int,
    merge_size: int = 2,
    start: int = 0,
) -> tuple[np.ndarray, int]:
    """Positions of tokens that may hold images (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text advances all three positions by one a token. An image that begins at position p has
    temporal p for all its tokens, height p + row and width p + column, and what follows it goes on
    at p + max(rows, columns). Example, an image of 2 x 3 merged tokens after two tokens of text:

        tokens     a  b  I  I  I  I  I  I  c
        temporal   0  1  2  2  2  2  2  2  5
        height     0  1  2  2  2  3  3  3  5
        width      0  1  2  3  4  2  3  4  5

    Args:
      tokens: int[T], with one `image_token_id` for each merged token of an image.
      grids: (frames, rows, columns) in patches of each image, in order of appearance.
      image_token_id: the placeholder's id.
      merge_size: patches on a side of a merged token.
      start: position of the first token: the second result of the call before, when a conversation
        goes on.

    Returns:
      int32[3, T] (temporal, height, width) and the position that the next token would have.

    Raises:
      ValueError: the placeholders do not match the grids; an image's tokens are cut or interrupted.
    """
    tokens = np.asarray(tokens)
    is_image = tokens == image_token_id
    sizes = [t * (h // merge_size) * (w // merge_size) for t, h, w in grids]
    if is_image.sum() != sum(sizes):
        raise ValueError(
            f"{int(is_image.sum())} image placeholders in the tokens, but the {len(grids)} images "
            f"have {sum(sizes)} merged tokens"
        )
    positions = np.empty((3, len(tokens)), np.int32)
    done, position = 0, start
    for (t, h, w), size in zip(grids, sizes, strict=True):
        begin = done + int(np.argmax(is_image[done:]))
        if not is_image[begin : begin + size].all():
            raise ValueError(f"the {size} placeholders of the image at token {begin} are not a run")
        positions[:, done:begin] = position + np.arange(begin - done)
        position += begin - done
        rows, columns = h // merge_size, w // merge_size
        positions[:, begin : begin + size] = position + np.indices((t, rows, columns)).reshape(
            3, -1
        )
        position += max(rows, columns)
        done = begin + size
    positions[:, done:] = position + np.arange(len(tokens) - done)
    return positions, position + len(tokens) - done
