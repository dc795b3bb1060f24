"""Sequence packing: episodes are concatenated into rows, and rows grouped into micro-batches.

    row 0   | episode 3 ........ | episode 0 ... | padding
    row 1   | episode 1 ........................ | padding
            both tokens and image windows of a row are bounded

All micro-batches of an update have the same shape, and few shapes exist in total, so that few
programs are compiled.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from mmsr1_jax.models.qwen2_5_vl import ModelConfig, Rows
from mmsr1_jax.models.qwen2_5_vl.vision import num_windows
from mmsr1_jax.processing.batching import Bucket, TooLongError, make_rows, smallest_bucket
from mmsr1_jax.processing.processor import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Training data of one episode.

    Attributes:
      prompt: All tokens and images of the episode.
      mask: bool[T], True for tokens that carry loss.
      weights: float32[T], weight of each token's loss; the loss is the weighted sum over all
        samples.
      advantages: float32[T], advantage of each token.
      rollout_logprobs: float32[T], log-probs of the tokens under the policy that sampled them.
    """

    prompt: Prompt
    mask: np.ndarray
    weights: np.ndarray
    advantages: np.ndarray
    rollout_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Shape of a micro-batch.

    Attributes:
      rows: Number of rows.
      length: Number of tokens per row.
      windows: Number of windows of 64 patches per row.
    """

    rows: int
    length: int
    windows: int


@flax.struct.dataclass
class TrainBatch:
    """Micro-batch of packed rows.

    Tokens that carry loss are gathered into C columns, so that the output head is computed only for
    them.

    Attributes:
      rows: All tokens and images.
      logit_columns: int32[B, C], column in `rows` of the preceding token, whose logits predict the
        target.
      targets: int32[B, C], tokens that carry loss.
      mask: bool[B, C], False for padding.
      segment_ids: int32[B, C], index of the episode within its row, from 1; 0 for padding.
      weights, advantages, rollout_logprobs: float32[B, C], see `Sample`.
      old_logprobs: float32[B, C], log-probs in the denominator of the importance ratio.
      ref_logprobs: float32[B, C], log-probs under the reference policy.
    """

    rows: Rows
    logit_columns: jax.Array
    targets: jax.Array
    mask: jax.Array
    segment_ids: jax.Array
    weights: jax.Array
    advantages: jax.Array
    rollout_logprobs: jax.Array
    old_logprobs: jax.Array
    ref_logprobs: jax.Array


def windows_of(prompt: Prompt, config: ModelConfig) -> int:
    """Return the number of patch windows of a conversation's images."""
    return sum(num_windows(grid, config.vision) for grid in prompt.grids)


def check_fits(prompt: Prompt, config: ModelConfig, shape: RowShape) -> None:
    """Raise TooLongError if an episode does not fit into a row."""
    for what, size, most, field in (
        ("tokens", len(prompt.tokens), shape.length, "pack_length"),
        ("image windows", windows_of(prompt, config), shape.windows, "pack_windows"),
    ):
        if size > most:
            raise TooLongError(f"{size} {what}, more than update.{field}={most}")


def first_fit(sizes: Sequence[tuple[int, int]], length: int, windows: int) -> list[list[int]]:
    """Pack items into rows by first-fit decreasing (Johnson, Near-optimal bin packing, 1973).

    Args:
      sizes: (tokens, windows) of each item, none larger than a row.
      length, windows: Capacity of a row.

    Returns:
      The indices of the items in each row.
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
    """Pack samples into micro-batches of NumPy arrays.

    `old_logprobs` and `ref_logprobs` are zeros, to be filled in by the trainer.

    Args:
      samples: Samples, each of which fits into a row (`check_fits`).
      config: Model configuration of the policy.
      shape: Shape of every micro-batch.
    """
    sizes = [(len(s.prompt.tokens), windows_of(s.prompt, config)) for s in samples]
    packed = first_fit(sizes, shape.length, shape.windows)
    most = max((sum(int(samples[i].mask[1:].sum()) for i in row) for row in packed), default=0)
    loss = smallest_bucket("tokens with loss", most, _quarters(shape.length), "update.pack_length")
    if not any(windows for _, windows in sizes):
        shape = dataclasses.replace(shape, windows=0)
    return [
        _batch(
            [[samples[i] for i in row] for row in packed[n : n + shape.rows]], shape, loss, config
        )
        for n in range(0, len(packed), shape.rows)
    ]


def efficiency(batches: Sequence[TrainBatch]) -> float:
    """Return the fraction of row positions that hold tokens."""
    held = sum(int((batch.rows.segment_ids > 0).sum()) for batch in batches)
    return held / max(1, sum(batch.rows.tokens.size for batch in batches))


def _quarters(length: int) -> list[int]:
    """Return the allowed numbers of loss columns; few sizes mean few compiled programs."""
    return sorted({-(-length * n // 4) for n in (1, 2, 3, 4)})


def _batch(
    packed: Sequence[Sequence[Sample]], shape: RowShape, loss: int, config: ModelConfig
) -> TrainBatch:
    bucket = Bucket(shape.length, shape.windows, shape.rows)
    prompts = [[sample.prompt for sample in row] for row in packed]
    rows = make_rows(prompts, bucket, config, config.image_token_id)
    # The same program is used whether or not every row holds a single episode.
    rows = rows.replace(single_segment=False)
    size = (shape.rows, loss)
    floats = ("weights", "advantages", "rollout_logprobs")
    arrays = {
        name: np.zeros(size, np.int32) for name in ("logit_columns", "targets", "segment_ids")
    }
    arrays |= {
        name: np.zeros(size, np.float32) for name in (*floats, "old_logprobs", "ref_logprobs")
    }
    arrays["mask"] = np.zeros(size, bool)
    for row, samples in enumerate(packed):
        start = place = 0
        for segment, sample in enumerate(samples, start=1):
            columns = np.flatnonzero(sample.mask[1:]) + 1  # nothing predicts the first token
            here = (row, slice(place, place + len(columns)))
            arrays["logit_columns"][here] = start + columns - 1
            arrays["targets"][here] = sample.prompt.tokens[columns]
            arrays["segment_ids"][here] = segment
            arrays["mask"][here] = True
            for name in floats:
                arrays[name][here] = getattr(sample, name)[columns]
            start += len(sample.prompt.tokens)
            place += len(columns)
    return TrainBatch(rows=rows, **arrays)
