"""The device side of the engine: batches in the shapes of the bucket table, pages and images.

Shapes come from the bucket tables of the config. A program has a fixed number of rows for each
length, so the shape in which a row is computed depends on that row alone; the rest is padding.
Programs run in the order of the calls, and only `finish_decode` and moves to host memory wait for
their result.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.image_rows import ImageRows
from mmsr1_jax.models.paged_attention import PagedRows
from mmsr1_jax.processing.batching import smallest_bucket
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.rollout import cache, decode
from mmsr1_jax.rollout.image_cache import ImageCache, check_image
from mmsr1_jax.rollout.pages import Contents, PageTable
from mmsr1_jax.rollout.prefill import PrefillChunk
from mmsr1_jax.rollout.programs import PAGES_PER_MOVE
from mmsr1_jax.rollout.runner import Runner
from mmsr1_jax.rollout.sampler import Sampling
from mmsr1_jax.rollout.timeline import DECODE, ENCODE, PREFILL, EngineTimeline, Execution
from mmsr1_jax.utils import fallbacks


@dataclasses.dataclass
class EngineStats:
    """Counters of the device's work since the engine was created.

    Attributes:
      prefill_tokens: Tokens written by `extend`.
      prefill_slots: Tokens written by `extend`, padding included.
      decoded_tokens: Tokens sampled.
      decode_slots: Decoding capacity in tokens: rows times steps run.
      images: Images encoded by the vision tower.
      offloaded_pages: Pages of the KV cache moved to host memory because it was full.
    """

    prefill_tokens: int = 0
    prefill_slots: int = 0
    decoded_tokens: int = 0
    decode_slots: int = 0
    images: int = 0
    offloaded_pages: int = 0


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """State of the turn that a row decodes, see `decode.Rows`."""

    lane: int
    length: int
    stop_state: int
    position: int
    episode: int
    num_sampled: int
    budget: int


@dataclasses.dataclass
class RunningDecode:
    """A decoding program that was started.

    Attributes:
      sampled: Its future results.
      execution: Its times, if a timeline is recorded.
    """

    sampled: Any
    execution: Execution | None


class Device:
    """Lanes of an engine: batches of the bucket tables, pages, images, and the calls of programs.

    Args:
      runner: Device state of the engine, with the initial parameters.
      model: Configuration of the policy.
      config: All settings; only `rollout`, `buckets` and `turns` are used.

    Attributes:
      config: Settings of the engine, `config.rollout`.
      runner: Device state of the engine.
      stats: Counters of the device's work.
      pages: Pages of each lane, and of a group's prompt.
    """

    def __init__(self, runner: Runner, model: ModelConfig, config: settings.Config):
        self.stats = EngineStats()
        self.config, self.runner = config.rollout, runner
        self._timeline: EngineTimeline | None = None
        self._programs = programs = runner.programs
        self._model_config = model
        self._windows = config.buckets.image_windows
        self._images = ImageCache(model, self.config, self._windows, self._encode)
        self._num_releases = runner.num_releases
        self.pages = PageTable(
            programs.num_lanes,
            programs.num_pages,
            self.config.page_size,
            config.turns.max_episode_tokens,
            self.config.decode_steps,
            self._offload_pages,
            self._write_pages,
        )

    # Memory

    def release(self) -> None:
        """Free parameters and caches. `install` allocates parameters again."""
        self.release_caches()
        self.runner.release()

    def release_caches(self) -> None:
        """Free KV cache and image tokens. The next rollout allocates empty ones."""
        self.runner.release_caches()
        self._images.clear()
        self.pages.clear()

    # Rollouts

    @contextlib.contextmanager
    def rollout(self, timeline: EngineTimeline | None) -> Iterator[None]:
        """Enter a rollout: allocate the caches, and clear lanes of an abandoned rollout.

        Args:
          timeline: Recorder of the programs' times; None: they are not measured. It is complete at
            the end of the block, which waits for the programs.

        Raises:
          RuntimeError: There are no parameters.
        """
        if not self.runner.has_params():
            raise RuntimeError(
                "the engine has no parameters: it was released, or loading failed; call `load` "
                "before the next rollout"
            )
        self.pages.clear()
        with self.runner.rollout():
            if self._num_releases != self.runner.num_releases:  # freed by another engine
                self._images.clear()
                self._num_releases = self.runner.num_releases
            self._timeline = timeline
            if timeline is not None:
                timeline.begin()
            try:
                yield
            finally:
                self._timeline = None
                if timeline is not None:
                    timeline.finish()

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the engine waits for something else than its programs."""
        return self.runner.waiting()

    def warm_up(self) -> None:
        """Compile the programs for all bucket shapes by running them on padding."""
        with self.runner.rollout():
            for length in self.config.prefill_buckets:
                self._extend(length, [])
            self._images.warm_up()
            sampling = Sampling.uniform(self.config.decode_batch_size)
            self.finish_decode(self.start_decode([], sampling, seed=0, leave_at=0))
            self.fork(0, 0, self.pages.prompt, self.pages.prompt)
            self._write_pages([0], self._read_pages([0]))

    # Parameters

    def load(self, params: nnx.State) -> None:
        """Load the trainer's parameters, converted to the engine's layout and dtype in one program.

        The old parameters and both caches are freed before. The next rollout allocates caches, so
        that until then they take no memory beside the trainer's state.

        Args:
          params: Parameter tree in any layout and dtype.
        """
        self.release()
        self.install(self.runner.prepare(params))

    def install(self, prepared: nnx.State) -> None:
        """Install parameters from `Runner.prepare`.

        Both caches are freed, since the old parameters produced their contents.
        """
        self.release_caches()
        self.runner.install(prepared)

    # Images

    def check_image(self, image: Patches) -> None:
        """Raise TooLongError if the image exceeds the largest bucket or the image cache."""
        check_image(image, self._model_config, self.config, self._windows)

    def _encode(self, images: ImageRows, slots: np.ndarray) -> None:
        """Encode images, and write their tokens to slots of the store, int32[B, M]."""
        self._record(ENCODE, self.runner.encode(images, slots), rows=len(slots))

    # Lanes

    def extend(self, chunks: Sequence[PrefillChunk]) -> list[Execution | None]:
        """Write chunks, at most one per lane, into lanes that have pages for them.

        Returns:
          For each chunk, the times of its program if a timeline is recorded.
        """
        by_length: dict[int, list[int]] = {}
        for index, chunk in enumerate(chunks):
            length = smallest_bucket(
                "tokens", len(chunk.tokens), self.config.prefill_buckets, "rollout.prefill_buckets"
            )
            by_length.setdefault(length, []).append(index)
        executions: list[Execution | None] = [None] * len(chunks)
        for length, indices in by_length.items():
            batches: list[list[int]] = [[]]
            for index in indices:
                larger = [chunks[i] for i in (*batches[-1], index)]
                images = [image for chunk in larger for image in chunk.images]
                if len(larger) > self._programs.extend_rows(length) or not self._images.fits(
                    images
                ):
                    batches.append([])
                batches[-1].append(index)
            for batch in batches:
                execution = self._extend(length, [chunks[index] for index in batch])
                for index in batch:
                    executions[index] = execution
        return executions

    def _extend(self, length: int, chunks: Sequence[PrefillChunk]) -> Execution | None:
        """Write one batch of chunks of a bucket."""
        B = self._programs.extend_rows(length)
        lane = np.full(B, self._programs.num_lanes, np.int32)
        tokens = np.zeros((B, length), np.int32)
        table = np.zeros((B, self.pages.table.shape[1]), np.int32)
        filled, count = np.zeros((2, B), np.int32)
        positions = np.zeros((B, 3, length), np.int32)
        image_index = np.full((B, length), -1, np.int32)
        slots = self._images.slots([chunk.images for chunk in chunks])
        self.stats.images = self._images.num_encoded
        for row, chunk in enumerate(chunks):
            n, is_image = len(chunk.tokens), chunk.image_index >= 0
            lane[row], filled[row], count[row] = chunk.lane, chunk.length, n
            table[row] = self.pages.table[chunk.lane]
            tokens[row, :n] = chunk.tokens
            positions[row, :, :n] = chunk.positions
            image_index[row, :n][is_image] = slots[row][chunk.image_index[is_image]]
            self.stats.prefill_tokens += n
            self.stats.prefill_slots += length
        rows = PagedRows(table=table, start=filled, count=count)
        new = cache.PrefillBatch(
            lane=lane, rows=rows, tokens=tokens, positions=positions, image_index=image_index
        )
        return self._record(PREFILL, self.runner.extend(new), rows=len(chunks), length=length)

    def fork(self, source: int, target: int, from_lane: int, to_lane: int) -> None:
        """Copy the last page of a prompt for a lane that begins with it.

        Args:
          source, target: Page to copy and its copy.
          from_lane: Lane whose last token is that of the prompt.
          to_lane: Lane to start.
        """
        self.runner.fork(source, target, from_lane, to_lane)

    def keep_hidden(self, lane: int) -> None:
        """Keep a lane's hidden state with the pages of the prompt, for later forks."""
        page = int(self.pages.table[lane, 0])
        self.runner.fork(page, page, lane, self.pages.prompt)

    def _offload_pages(self, pages: Sequence[int]) -> list[Contents]:
        """Return the contents of pages that another lane needs, and count that."""
        fallbacks.count(
            "rollout/offloaded",
            "rollout: the KV cache is full, and episodes wait in host memory until there is room; "
            "larger rollout.cache_tokens or fewer rollout.lanes avoid that",
        )
        return self._read_pages(pages)

    def _read_pages(self, pages: Sequence[int]) -> list[Contents]:
        """Return the contents of some pages."""
        contents: list[Contents] = []
        for first in range(0, len(pages), PAGES_PER_MOVE):
            part = pages[first : first + PAGES_PER_MOVE]
            index = np.zeros(PAGES_PER_MOVE, np.int32)
            index[: len(part)] = part
            layers = self.runner.read_pages(index)
            contents += [[layer[n].copy() for layer in layers] for n in range(len(part))]
        return contents

    def _write_pages(self, pages: Sequence[int], contents: list[Contents]) -> None:
        """Write the contents of some pages."""
        for first in range(0, len(pages), PAGES_PER_MOVE):
            part = contents[first : first + PAGES_PER_MOVE]
            index = np.full(PAGES_PER_MOVE, self._programs.num_pages, np.int32)
            index[: len(part)] = pages[first : first + len(part)]
            part = part + part[:1] * (PAGES_PER_MOVE - len(part))
            layers = tuple(np.stack(layer) for layer in zip(*part, strict=True))
            self.runner.write_pages(index, layers)

    def start_decode(
        self, rows: Sequence[DecodeRow], sampling: Sampling, *, seed: int, leave_at: int
    ) -> RunningDecode:
        """Start decoding up to `decode_steps` tokens for some lanes, which have pages for them.

        Args:
          rows: State of each lane's turn, at most `decode_batch_size`.
          sampling: Sampling parameters of `decode_batch_size` rows, host arrays.
          seed, leave_at: As in `decode.decode`.

        Returns:
          The running program, for `finish_decode`. Programs called in the meantime run after it.
        """
        B, lanes = self.config.decode_batch_size, self._programs.num_lanes
        fields = {
            field.name: np.full(B, lanes if field.name == "lane" else 0, np.int32)
            for field in dataclasses.fields(DecodeRow)
        }
        table = np.zeros((B, self.pages.table.shape[1]), np.int32)
        for index, row in enumerate(rows):
            table[index] = self.pages.table[row.lane]
            for name, values in fields.items():
                values[index] = getattr(row, name)
        active = np.arange(B) < len(rows)
        sampled = self.runner.decode(
            decode.Rows(table=table, active=active, sampling=sampling, **fields), seed, leave_at
        )
        self.stats.offloaded_pages = self.pages.num_offloaded
        return RunningDecode(sampled, self._record(DECODE, sampled, rows=len(rows)))

    def finish_decode(self, running: RunningDecode) -> decode.SampledTokens:
        """Wait for a decoding program.

        Returns:
          Numpy arrays with one row for each of the program's rows, followed by padding rows.
        """
        sampled = self.runner.fetch(running.sampled)
        if running.execution is not None:
            running.execution.has_ended()
            running.execution.args["steps"] = int(sampled.steps)
        self.stats.decoded_tokens += int(sampled.count.sum())
        self.stats.decode_slots += self.config.decode_batch_size * int(sampled.steps)
        return sampled

    def _record(self, program: str, output: Any, **args: int) -> Execution | None:
        """Record a program that was just called on the timeline, if there is one."""
        if self._timeline is None:
            return None
        return self._timeline.record_program(program, output, **args)
