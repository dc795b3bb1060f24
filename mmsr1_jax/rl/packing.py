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
import numpy as np
from jaxtyping import Bool, Float32, Int32

from mmsr1_jax.models.qwen2_5_vl import ModelConfig, Rows
from mmsr1_jax.models.qwen2_5_vl.vision import num_windows
from mmsr1_jax.processing.batching import Bucket, TooLongError, make_rows, smallest_bucket
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.utils.arrays import AnyArray


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
    mask: Bool[np.ndarray, "T"]
    weights: Float32[np.ndarray, "T"]
    advantages: Float32[np.ndarray, "T"]
    rollout_logprobs: Float32[np.ndarray, "T"]


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


class TrainBatch(flax.struct.PyTreeNode):
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
    logit_columns: Int32[AnyArray, "B C"]
    targets: Int32[AnyArray, "B C"]
    mask: Bool[AnyArray, "B C"]
    segment_ids: Int32[AnyArray, "B C"]
    weights: Float32[AnyArray, "B C"]
    advantages: Float32[AnyArray, "B C"]
    rollout_logprobs: Float32[AnyArray, "B C"]
    old_logprobs: Float32[AnyArray, "B C"]
    ref_logprobs: Float32[AnyArray, "B C"]


def num_prompt_windows(prompt: Prompt, config: ModelConfig) -> int:
    """Return the number of patch windows of a conversation's images."""
    return sum(num_windows(grid, config.vision) for grid in prompt.grids)


def check_fits(prompt: Prompt, config: ModelConfig, shape: RowShape) -> None:
    """Raise TooLongError if an episode does not fit into a row."""
    for unit, size, max_size, field in (
        ("tokens", len(prompt.tokens), shape.length, "pack_length"),
        ("image windows", num_prompt_windows(prompt, config), shape.windows, "pack_windows"),
    ):
        if size > max_size:
            raise TooLongError(f"{size} {unit}, more than update.{field}={max_size}")


def first_fit(sizes: Sequence[tuple[int, int]], length: int, windows: int) -> list[list[int]]:
    """Pack items into rows by first-fit decreasing (Johnson, Near-optimal bin packing, 1973).

    Args:
      sizes: (tokens, windows) of each item, none larger than a row.
      length, windows: Capacity of a row.

    Returns:
      The indices of the items in each row.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], -sizes[i][1], i))
    remaining = np.tile(np.array([length, windows]), (len(sizes), 1))
    rows: list[list[int]] = []
    for item in order:
        row = int(np.argmax((remaining >= sizes[item]).all(axis=1)))
        remaining[row] -= sizes[item]
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
    sizes = [(len(s.prompt.tokens), num_prompt_windows(s.prompt, config)) for s in samples]
    packed = first_fit(sizes, shape.length, shape.windows)
    loss_tokens = (sum(int(samples[i].mask[1:].sum()) for i in row) for row in packed)
    columns = smallest_bucket(
        "loss tokens", max(loss_tokens, default=0), _column_sizes(shape.length),
        "update.pack_length",
    )  # fmt: skip
    if not any(windows for _, windows in sizes):
        shape = dataclasses.replace(shape, windows=0)
    rows = [[samples[i] for i in row] for row in packed]
    return [
        _make_batch(rows[start : start + shape.rows], shape, columns, config)
        for start in range(0, len(rows), shape.rows)
    ]


def efficiency(batches: Sequence[TrainBatch]) -> float:
    """Return the fraction of row positions that hold tokens."""
    used = sum(int((batch.rows.segment_ids > 0).sum()) for batch in batches)
    return used / max(1, sum(batch.rows.tokens.size for batch in batches))


def _column_sizes(length: int) -> list[int]:
    """Return the allowed numbers of loss columns; few sizes mean few compiled programs."""
    return sorted({-(-length * n // 4) for n in (1, 2, 3, 4)})


def _make_batch(
    packed: Sequence[Sequence[Sample]], shape: RowShape, columns: int, config: ModelConfig
) -> TrainBatch:
    """Return the micro-batch of these rows of samples, with C = `columns`."""
    bucket = Bucket(shape.length, shape.windows, shape.rows)
    prompts = [[sample.prompt for sample in row] for row in packed]
    rows = make_rows(prompts, bucket, config, config.image_token_id)
    # The same program is used whether or not every row holds a single episode.
    rows = rows.replace(single_segment=False)
    size = (shape.rows, columns)
    batch = TrainBatch(
        rows=rows,
        logit_columns=np.zeros(size, np.int32),
        targets=np.zeros(size, np.int32),
        mask=np.zeros(size, bool),
        segment_ids=np.zeros(size, np.int32),
        weights=np.zeros(size, np.float32),
        advantages=np.zeros(size, np.float32),
        rollout_logprobs=np.zeros(size, np.float32),
        old_logprobs=np.zeros(size, np.float32),
        ref_logprobs=np.zeros(size, np.float32),
    )
    for row, samples in enumerate(packed):
        start = offset = 0
        for segment, sample in enumerate(samples, start=1):
            loss_columns = np.flatnonzero(sample.mask[1:]) + 1  # nothing predicts the first token
            slots = (row, slice(offset, offset + len(loss_columns)))
            batch.logit_columns[slots] = start + loss_columns - 1
            batch.targets[slots] = sample.prompt.tokens[loss_columns]
            batch.segment_ids[slots] = segment
            batch.mask[slots] = True
            for name in ("weights", "advantages", "rollout_logprobs"):
                getattr(batch, name)[slots] = getattr(sample, name)[loss_columns]
            start += len(sample.prompt.tokens)
            offset += len(loss_columns)
    return batch
