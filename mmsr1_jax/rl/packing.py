"""Sequence packing: episodes are concatenated into rows, and rows grouped into micro-batches.

    row 0   | episode 3 ........ | episode 0 ... | padding
    row 1   | prompt of 4, 5 and 6 | rest of 5 .. | rest of 4 .. | rest of 6 .. | padding
            both tokens and image windows of a row are bounded

The episodes of a group begin with the same prompt. A row holds it once, and the rest of each
episode attends to it; equal images of a row are encoded once. So nothing is computed twice in a
row. A group that does not fit into a row repeats its prompt in each of its rows.

All micro-batches of an update have the same shape, and few shapes exist in total, so that few
programs are compiled.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import flax.struct
import numpy as np
from jaxtyping import Bool, Float32, Int32

from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.policy import Rows
from mmsr1_jax.processing.batching import (
    Bucket,
    Segment,
    TooLongError,
    distinct_images,
    make_segment_rows,
    num_image_windows,
    num_prompt_windows,
    smallest_bucket,
)
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.utils import processes
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
      prefix: Number of tokens of the prompt, which carry no loss and which other samples may share.
    """

    prompt: Prompt
    mask: Bool[np.ndarray, "T"]
    weights: Float32[np.ndarray, "T"]
    advantages: Float32[np.ndarray, "T"]
    rollout_logprobs: Float32[np.ndarray, "T"]
    prefix: int = 0


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Shape of a micro-batch.

    Attributes:
      rows: Number of rows, in each process.
      length: Number of tokens per row.
      windows: Number of windows of 64 patches per row.
      shares_prompts: Whether the samples of a row share their prompts, for which the implementation
        of attention needs `prefix_ids`.
    """

    rows: int
    length: int
    windows: int
    shares_prompts: bool = False


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


def check_fits(prompt: Prompt, config: ModelConfig, shape: RowShape) -> None:
    """Raise TooLongError if an episode does not fit into a row."""
    for unit, size, max_size, field in (
        ("tokens", len(prompt.tokens), shape.length, "pack_length"),
        ("image windows", num_prompt_windows(prompt, config), shape.windows, "pack_windows"),
    ):
        if size > max_size:
            raise TooLongError(f"{size} {unit}, more than update.{field}={max_size}")


def first_fit(
    items: Sequence[tuple[int, Mapping[str, Patches]]], config: ModelConfig, shape: RowShape
) -> list[list[int]]:
    """Pack items into rows by first-fit decreasing (Johnson, Near-optimal bin packing, 1973).

    Args:
      items: Number of tokens, and images by digest, of each item, none larger than a row.
      config: Model configuration of the policy.
      shape: Shape of a row.

    Returns:
      The indices of the items in each row.
    """
    order = sorted(
        range(len(items)), key=lambda i: (-items[i][0], -num_image_windows(items[i][1], config), i)
    )
    rows: list[list[int]] = []
    contents: list[tuple[int, dict[str, Patches]]] = []  # tokens and images of each row
    for item in order:
        tokens, images = items[item]
        for row, (used, row_images) in enumerate(contents):
            if used + tokens <= shape.length:
                both = {**row_images, **images}
                if len(both) == len(row_images) or _images_fit(both, config, shape):
                    contents[row] = used + tokens, both
                    rows[row].append(item)
                    break
        else:
            rows.append([item])
            contents.append((tokens, dict(images)))
    return rows


def _images_fit(images: Mapping[str, Patches], config: ModelConfig, shape: RowShape) -> bool:
    """Return whether distinct images, by digest, fit into a row."""
    patches = sum(len(image.values) for image in images.values())
    if patches > shape.windows * config.vision.window_patches:
        return False  # most rows are rejected here, without placing windows
    return num_image_windows(images, config) <= shape.windows


class _Cluster:
    """Samples with the same prompt that are in the same row.

    Attributes:
      members: Indices of the samples.
      tokens: Number of tokens, the common prefix once.
      images: Their distinct images by digest.
    """

    def __init__(self, config: ModelConfig):
        self._config = config
        self.members: list[int] = []
        self.tokens, self.images = 0, dict[str, Patches]()

    def add(self, index: int, sample: Sample, shape: RowShape) -> bool:
        """Add a sample if it fits into a row; return whether it does."""
        tokens = self.tokens + len(sample.prompt.tokens) - (sample.prefix if self.members else 0)
        images = self.images | distinct_images([sample.prompt])
        if tokens > shape.length or not _images_fit(images, self._config, shape):
            return False
        self.tokens, self.images = tokens, images
        self.members.append(index)
        return True


def _prompt_key(sample: Sample, config: ModelConfig) -> tuple[bytes, ...] | None:
    """Return a key that is equal for equal prompts; None without a prompt."""
    if not sample.prefix:
        return None
    tokens = sample.prompt.tokens[: sample.prefix]
    num_image_tokens, merged, digests = 0, config.vision.merge_size**2, []
    for image in sample.prompt.images:
        if num_image_tokens == (tokens == config.image_token_id).sum():
            break
        num_image_tokens += math.prod(image.grid) // merged
        digests.append(image.digest.encode())
    return (tokens.tobytes(), *digests)


def _clusters(samples: Sequence[Sample], config: ModelConfig, shape: RowShape) -> list[_Cluster]:
    """Return the samples in clusters, found by first-fit decreasing for each prompt."""
    by_prompt: dict[Hashable, list[int]] = {}
    for index, sample in enumerate(samples):
        key = _prompt_key(sample, config) if shape.shares_prompts else None
        by_prompt.setdefault(key or index, []).append(index)
    clusters: list[_Cluster] = []
    for members in by_prompt.values():
        own: list[_Cluster] = []
        for index in sorted(members, key=lambda i: -len(samples[i].prompt.tokens)):
            if not any(cluster.add(index, samples[index], shape) for cluster in own):
                own.append(_Cluster(config))
                added = own[-1].add(index, samples[index], shape)
                assert added  # `check_fits`
        clusters += own
    return clusters


def pack(samples: Sequence[Sample], config: ModelConfig, shape: RowShape) -> list[TrainBatch]:
    """Pack samples into micro-batches of NumPy arrays.

    `old_logprobs` and `ref_logprobs` are zeros, to be filled in by the trainer.

    With several processes, each packs its own samples, and all must call this together: they get
    equally many micro-batches of the same shape, the last ones without samples where others have
    more.

    Args:
      samples: Samples, each of which fits into a row (`check_fits`).
      config: Model configuration of the policy.
      shape: Shape of every micro-batch.
    """
    clusters = _clusters(samples, config, shape)
    items = [(cluster.tokens, cluster.images) for cluster in clusters]
    packed = first_fit(items, config, shape)
    rows = [[[samples[i] for i in clusters[c].members] for c in row] for row in packed]
    loss_tokens = (
        sum(int(sample.mask[1:].sum()) for cluster in row for sample in cluster) for row in rows
    )
    count = -(-len(rows) // shape.rows)
    has_images = any(images for _, images in items)
    own = [count, max(loss_tokens, default=0), has_images]
    count, most, has_images = map(max, zip(*processes.exchange("micro-batches", own), strict=True))
    columns = smallest_bucket(
        "loss tokens", most, _column_sizes(shape.length), "update.pack_length"
    )
    if not has_images:
        shape = dataclasses.replace(shape, windows=0)
    return [
        _make_batch(rows[i * shape.rows : (i + 1) * shape.rows], shape, columns, config)
        for i in range(count)
    ]


def efficiency(batches: Sequence[TrainBatch]) -> float:
    """Return the fraction of row positions that hold tokens, over all processes."""
    size = sum(batch.rows.tokens.size for batch in batches)
    return num_tokens(batches) / max(1, sum(processes.exchange("positions", size)))


def num_tokens(batches: Sequence[TrainBatch]) -> int:
    """Return the number of row positions that hold tokens, over all processes."""
    own = sum(int((batch.rows.segment_ids > 0).sum()) for batch in batches)
    return sum(processes.exchange("packed tokens", own))


def _column_sizes(length: int) -> list[int]:
    """Return the allowed numbers of loss columns; few sizes mean few compiled programs."""
    return sorted({-(-length * n // 4) for n in (1, 2, 3, 4)})


def _segments(row: Sequence[Sequence[Sample]]) -> list[Segment]:
    """Return the segments of a row: for each cluster its prefix and the rest of its samples."""
    segments: list[Segment] = []
    for cluster in row:
        first, shared = cluster[0], len(cluster) > 1 and cluster[0].prefix > 0
        prefix = len(segments) if shared else None
        if shared:
            segments.append(Segment(first.prompt, 0, first.prefix))
        for sample in cluster:
            start = sample.prefix if shared else 0
            segments.append(Segment(sample.prompt, start, len(sample.prompt.tokens), prefix))
    return segments


def _make_batch(
    packed: Sequence[Sequence[Sequence[Sample]]],
    shape: RowShape,
    columns: int,
    config: ModelConfig,
) -> TrainBatch:
    """Return the micro-batch of these rows of clusters of samples, with C = `columns`."""
    bucket = Bucket(shape.length, shape.windows, shape.rows)
    segments = [_segments(row) for row in packed]
    rows = make_segment_rows(segments, bucket, config, config.image_token_id)
    # The same program is used whether or not rows hold a single episode or share prompts.
    rows = rows.replace(single_segment=False)
    if shape.shares_prompts and rows.prefix_ids is None:
        rows = rows.replace(prefix_ids=np.zeros_like(rows.segment_ids))
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
    for row, (clusters, parts) in enumerate(zip(packed, segments, strict=True)):
        starts = np.cumsum([0] + [part.end - part.start for part in parts])
        samples = iter(sample for cluster in clusters for sample in cluster)
        offset = number = prefix_start = 0
        for start, part in zip(starts[:-1], parts, strict=True):
            if part.end < len(part.conversation.tokens):
                prefix_start = start
                continue  # a prefix
            number, sample = number + 1, next(samples)
            loss_columns = np.flatnonzero(sample.mask[1:]) + 1  # nothing predicts the first token
            previous = loss_columns - 1  # columns of the conversation
            slots = (row, slice(offset, offset + len(loss_columns)))
            batch.logit_columns[slots] = np.where(
                previous < part.start, prefix_start + previous, start + previous - part.start
            )
            batch.targets[slots] = sample.prompt.tokens[loss_columns]
            batch.segment_ids[slots] = number
            batch.mask[slots] = True
            for name in ("weights", "advantages", "rollout_logprobs"):
                getattr(batch, name)[slots] = getattr(sample, name)[loss_columns]
            offset += len(loss_columns)
    return batch
