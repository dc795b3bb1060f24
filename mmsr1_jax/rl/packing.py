"""Episodes to rows: several in a row, one after the other, and rows to micro-batches.

    row 0   | episode 3 ........ | episode 0 ... | padding
    row 1   | episode 1 ........................ | padding
            tokens and image windows are both bounded

All micro-batches of an update have one shape, and there are few shapes in all, so that the programs
over them are compiled once.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from mmsr1_jax.models.qwen2_5_vl import ModelConfig, Rows
from mmsr1_jax.models.qwen2_5_vl.vision import num_windows
from mmsr1_jax.processing.batching import Bucket, TooLongError, make_rows, smallest
from mmsr1_jax.processing.processor import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What an episode brings to an update.

    Attributes:
      prompt: all of its tokens, and its pictures.
      mask: bool[T]: the tokens that carry loss.
      weights: float32[T]: factor of each token's loss; the loss is the sum over all samples.
      advantages: float32[T].
      behaviour: float32[T]: log-probs of what drew the tokens.
    """

    prompt: Prompt
    mask: np.ndarray
    weights: np.ndarray
    advantages: np.ndarray
    behaviour: np.ndarray


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Of a micro-batch: `rows` of `length` tokens and `windows` of 64 patches."""

    rows: int
    length: int
    windows: int


@flax.struct.dataclass
class TrainBatch:
    """A micro-batch. The tokens that carry loss stand in C columns of their own, so that the output
    head is computed for no others.

    Attributes:
      rows: all tokens.
      before: int32[B, C]: the column in `rows` of the token before, which predicts the token.
      targets: int32[B, C]: the tokens.
      mask: bool[B, C]: False: padding.
      segment_ids: int32[B, C]: which of the row's episodes, from 1; 0: padding.
      weights, advantages, behaviour: float32[B, C], see `Sample`.
      old: float32[B, C]: log-probs that the ratio is taken against.
      reference: float32[B, C]: log-probs under the reference policy.
    """

    rows: Rows
    before: jax.Array
    targets: jax.Array
    mask: jax.Array
    segment_ids: jax.Array
    weights: jax.Array
    advantages: jax.Array
    behaviour: jax.Array
    old: jax.Array
    reference: jax.Array


def windows_of(prompt: Prompt, config: ModelConfig) -> int:
    """Windows of patches that a conversation's pictures take."""
    return sum(num_windows(grid, config.vision) for grid in prompt.grids)


def check_fits(prompt: Prompt, config: ModelConfig, shape: RowShape) -> None:
    """Raises TooLongError where no row has room for an episode."""
    for what, size, most, field in (
        ("tokens", len(prompt.tokens), shape.length, "pack_length"),
        ("image windows", windows_of(prompt, config), shape.windows, "pack_windows"),
    ):
        if size > most:
            raise TooLongError(f"{size} {what}, more than update.{field}={most}")


def first_fit(sizes: Sequence[tuple[int, int]], length: int, windows: int) -> list[list[int]]:
    """Rows of items, by first fit in decreasing order (Johnson, Near-optimal bin packing, 1973).

    Args:
      sizes: (tokens, windows) of each item, none larger than a row.
      length, windows: of a row.

    Returns:
      The items of each row, by number.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], -sizes[i][1], i))
    room = np.tile(np.array([length, windows]), (len(sizes), 1))
    rows: list[list[int]] = []
    for item in order:
        row = int(np.argmax((room >= sizes[item]).all(axis=1)))
        room[row] -= sizes[item]
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
    return rows


def pack(samples: Sequence[Sample], config: ModelConfig, shape: RowShape) -> list[TrainBatch]:
    """Micro-batches of numpy arrays that hold all samples; `old` and `reference` are zeros.

    Args:
      samples: each fits into a row (`check_fits`).
      shape: of every micro-batch.
    """
    sizes = [(len(s.prompt.tokens), windows_of(s.prompt, config)) for s in samples]
    packed = first_fit(sizes, shape.length, shape.windows)
    most = max((sum(int(samples[i].mask[1:].sum()) for i in row) for row in packed), default=0)
    loss = smallest("tokens with loss", most, _quarters(shape.length), "length")
    if not any(windows for _, windows in sizes):
        shape = dataclasses.replace(shape, windows=0)
    return [
        _batch(
            [[samples[i] for i in row] for row in packed[n : n + shape.rows]], shape, loss, config
        )
        for n in range(0, len(packed), shape.rows)
    ]


def efficiency(batches: Sequence[TrainBatch]) -> float:
    """Share of the places in the rows that hold tokens."""
    held = sum(int((batch.rows.segment_ids > 0).sum()) for batch in batches)
    return held / max(1, sum(batch.rows.tokens.size for batch in batches))


def _quarters(length: int) -> list[int]:
    """Columns for tokens with loss: few sizes, that there be few programs."""
    return sorted({-(-length * n // 4) for n in (1, 2, 3, 4)})


def _batch(
    packed: Sequence[Sequence[Sample]], shape: RowShape, loss: int, config: ModelConfig
) -> TrainBatch:
    bucket = Bucket(shape.length, shape.windows, shape.rows)
    prompts = [[sample.prompt for sample in row] for row in packed]
    rows = make_rows(prompts, bucket, config, config.image_token_id)
    # One program for all, however many a row happens to hold.
    rows = rows.replace(single_segment=False)
    size = (shape.rows, loss)
    floats = ("weights", "advantages", "behaviour")
    arrays = {name: np.zeros(size, np.int32) for name in ("before", "targets", "segment_ids")}
    arrays |= {name: np.zeros(size, np.float32) for name in (*floats, "old", "reference")}
    arrays["mask"] = np.zeros(size, bool)
    for row, samples in enumerate(packed):
        start = place = 0
        for segment, sample in enumerate(samples, start=1):
            columns = np.flatnonzero(sample.mask[1:]) + 1  # nothing predicts the first token
            here = (row, slice(place, place + len(columns)))
            arrays["before"][here] = start + columns - 1
            arrays["targets"][here] = sample.prompt.tokens[columns]
            arrays["segment_ids"][here] = segment
            arrays["mask"][here] = True
            for name in floats:
                arrays[name][here] = getattr(sample, name)[columns]
            start += len(sample.prompt.tokens)
            place += len(columns)
    return TrainBatch(rows=rows, **arrays)
