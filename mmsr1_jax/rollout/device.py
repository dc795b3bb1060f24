"""The device side of the engine: parameters, KV cache and image store, and calls of the programs.

Shapes come from the bucket tables of the config. A program has a fixed number of rows for each
length, so the shape in which a row is computed depends on that row alone; the rest is padding.
Host arrays reach the programs by `Device.put`, in one explicit transfer per call. Programs run in
the order of the calls, and only `decode` and moves to host memory wait for their result.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mmsr1_jax.config import settings
from mmsr1_jax.models.paged_attention import PagedRows
from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.models.qwen2_5_vl.vision import ImageRows
from mmsr1_jax.processing.batching import smallest_bucket
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.rollout import cache, decode, placement
from mmsr1_jax.rollout.image_cache import ImageCache, check_image
from mmsr1_jax.rollout.pages import Contents, PageTable
from mmsr1_jax.rollout.prefill import PrefillChunk
from mmsr1_jax.rollout.programs import PAGES_PER_MOVE, Programs
from mmsr1_jax.rollout.sampler import Sampling
from mmsr1_jax.rollout.stop import StopTable
from mmsr1_jax.rollout.timeline import DECODE, ENCODE, PREFILL, EngineTimeline
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
      num_rows: Number of rows.
      start: Time of the call, from `time.perf_counter`.
      end: Time at which it ended, once a timeline has recorded it.
    """

    sampled: decode.SampledTokens
    num_rows: int
    start: float
    end: float = 0.0


class Device:
    """Parameters, KV cache and the store of image tokens, with the programs that use them.

    Args:
      model: The policy, with the initial parameters.
      config: All settings; only `rollout`, `buckets` and `turns` are used.
      stops: Stop strings and end tokens of a turn.
      allowed: Tokens that may be sampled, bool[V].

    Attributes:
      config: Settings of the engine, `config.rollout`.
      stats: Counters of the device's work.
      stops: Stop strings and end tokens of a turn.
      pages: Pages of each lane, and of a group's prompt.
      timeline: Recorder of the programs' durations; None: they are not measured.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        config: settings.Config,
        *,
        stops: StopTable,
        allowed: np.ndarray,
    ):
        self.stats = EngineStats()
        self.timeline: EngineTimeline | None = None
        self._running: RunningDecode | None = None
        self.config = config.rollout
        self.stops = stops
        self._model_config = model.config
        self._windows = config.buckets.image_windows
        self._programs = programs = Programs(
            model, config, states=len(stops.next_state), running=stops.running
        )
        self._images = ImageCache(model.config, self.config, self._windows, self._encode)
        self.pages = PageTable(
            self.config.lanes + 1,
            programs.num_pages,
            self.config.page_size,
            config.turns.max_episode_tokens,
            self._offload_pages,
            self._write_pages,
        )
        # Everything is created on its final devices, since another engine may fill the first one.
        # It is committed to them like the outputs of the programs; otherwise each program would be
        # compiled twice.
        self._allowed = self.put(allowed)
        self._next_state = self.put(stops.next_state)
        with programs.context():
            self._params: nnx.State | None = programs.load(None)(nnx.split(model)[1])
        self.reset()

    def put(self, arrays: Any) -> Any:
        """Return a tree of host arrays as arrays on the engine's devices, replicated."""
        return jax.device_put(arrays, self._programs.replicated)

    def reset(self) -> None:
        """Reallocate both caches, since a failed program may have lost donated arrays."""
        self._cache = self._image_tokens = None  # free the memory before allocating it again
        with self._programs.context():
            self._cache, self._image_tokens = self._programs.empty()
        self._images.clear()
        self.pages.clear()

    def release(self) -> None:
        """Free parameters, KV cache and image tokens; the next `install` allocates them again."""
        self._params = self._cache = self._image_tokens = None

    def begin(self, timeline: EngineTimeline | None) -> None:
        """Prepare for a rollout; one that was abandoned may have left its lanes.

        Args:
          timeline: Recorder of the programs' durations; None: they are not measured.
        """
        self.pages.clear()
        self.timeline, self._running = timeline, None

    def warm_up(self) -> None:
        """Compile the programs for all bucket shapes by running them on padding."""
        for length in self.config.prefill_buckets:
            self._extend(length, [])
        self._images.warm_up()
        sampling = self.put(Sampling.uniform(self.config.decode_batch_size))
        self.finish_decode(self.start_decode([], sampling, seed=0, leave_at=0))
        hidden = self._extend(self.config.prefill_buckets[0], [])[0]
        self.fork(0, 0, 0, hidden)
        self._write_pages([0], self._read_pages([0]))

    # Parameters

    def load(self, params: nnx.State) -> None:
        """Load the trainer's parameters, converted to the engine's layout and dtype in one program.

        Cached image tokens are discarded, since the old parameters produced them. The engine's old
        parameters and its KV cache are freed before, so that they take no memory beside the new
        ones.

        Args:
          params: Parameter tree in any layout and dtype.
        """
        self.release()
        self.install(self.prepare(params))

    def prepare(self, params: nnx.State) -> nnx.State:
        """Convert parameters for `install` by this engine and others like it.

        The result has the engine's dtype and is sharded the way engines shard it. It never aliases
        `params`, since the trainer donates its arrays.

        If the trainer has more devices than the engine, one program places a full copy on each
        tensor group of the trainer's mesh. An engine on such a group has nothing left to copy.
        """
        programs, layout = self._programs, self._programs.layout
        first, engine = jax.tree.leaves(params)[0], jax.tree.leaves(layout)[0].device_set
        trainer = first.sharding.device_set if isinstance(first, jax.Array) else set()
        if len(trainer) > 1 and trainer != engine:
            assert isinstance(first.sharding, NamedSharding)
            mesh = first.sharding.mesh
            assert isinstance(mesh, Mesh)
            return programs.load(mesh)(params)
        if trainer != engine:
            params = jax.device_put(params, programs.trainer_layout)
        with programs.context():
            return programs.load(None)(params)

    def install(self, prepared: nnx.State) -> None:
        """Install parameters from `prepare`; buffers already on the engine's devices are shared."""
        self._params = placement.transfer(prepared, self._programs.layout)
        self.reset()

    # Images

    def check_image(self, image: Patches) -> None:
        """Raise TooLongError if the image exceeds the largest bucket or the image cache."""
        check_image(image, self._model_config, self.config, self._windows)

    def _encode(self, images: ImageRows, slots: np.ndarray) -> None:
        """Encode images, and write their tokens to slots of the store, int32[B, M]."""
        images, slots = self.put((images, slots))
        start = self._next_start()
        with self._programs.context():
            self._image_tokens = self._programs.encode(
                self._params, self._image_tokens, images, slots
            )
        self._record(ENCODE, start, self._image_tokens, rows=len(slots))

    # Lanes

    def extend(self, chunks: Sequence[PrefillChunk]) -> list[jax.Array]:
        """Write chunks, at most one per lane, into lanes that have pages for them.

        Returns:
          The hidden state of the last token of each chunk, float[D].
        """
        by_length: dict[int, list[int]] = {}
        for index, chunk in enumerate(chunks):
            length = smallest_bucket(
                "tokens", len(chunk.tokens), self.config.prefill_buckets, "rollout.prefill_buckets"
            )
            by_length.setdefault(length, []).append(index)
        hidden: dict[int, jax.Array] = {}
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
                states = self._extend(length, [chunks[index] for index in batch])
                hidden |= dict(zip(batch, states, strict=False))
        return [hidden[index] for index in range(len(chunks))]

    def _extend(self, length: int, chunks: Sequence[PrefillChunk]) -> Sequence[jax.Array]:
        """Write one batch of chunks of a bucket; return the hidden state of each row."""
        B = self._programs.extend_rows(length)
        lane = np.full(B, self.config.lanes, np.int32)
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
        new = self.put(
            cache.PrefillBatch(
                lane=lane,
                rows=rows,
                tokens=tokens,
                positions=positions,
                image_index=image_index,
            )
        )
        start = self._next_start()
        with self._programs.context():
            hidden, self._cache = self._programs.extend(
                self._params, self._cache, new, self._image_tokens
            )
        self._record(PREFILL, start, hidden, rows=len(chunks), length=length)
        return hidden

    def fork(self, source: int, target: int, lane: int, hidden: jax.Array) -> None:
        """Copy the last page of a prompt for a lane that begins with it.

        Args:
          source, target: Page to copy and its copy.
          lane: Lane to start.
          hidden: Hidden state of the last token of the prompt, float[D].
        """
        args = self.put((np.int32(source), np.int32(target), np.int32(lane)))
        with self._programs.context():
            self._cache = self._programs.fork(self._cache, *args, hidden)

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
            with self._programs.context():
                layers = self._programs.read_pages(self._cache, self.put(index))
            layers = jax.device_get(layers)
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
            with self._programs.context():
                self._cache = self._programs.write_pages(
                    self._cache, self.put(index), self._programs.put_pages(layers)
                )

    def start_decode(
        self, rows: Sequence[DecodeRow], sampling: Sampling, *, seed: int, leave_at: int
    ) -> RunningDecode:
        """Start decoding up to `decode_steps` tokens for some lanes, which have pages for them.

        Args:
          rows: State of each lane's turn, at most `decode_batch_size`.
          sampling: Sampling parameters of `decode_batch_size` rows, from `put`.
          seed, leave_at: As in `decode.decode`.

        Returns:
          The running program, for `finish_decode`. Programs called in the meantime run after it.
        """
        B = self.config.decode_batch_size
        fields = {
            field.name: np.full(B, self.config.lanes if field.name == "lane" else 0, np.int32)
            for field in dataclasses.fields(DecodeRow)
        }
        table = np.zeros((B, self.pages.table.shape[1]), np.int32)
        for index, row in enumerate(rows):
            table[index] = self.pages.table[row.lane]
            for name, values in fields.items():
                values[index] = getattr(row, name)
        fields, table, active, *scalars = self.put(
            (fields, table, np.arange(B) < len(rows), np.int32(seed), np.int32(leave_at))
        )
        start = time.perf_counter()
        with self._programs.context():
            sampled, self._cache = self._programs.decode(
                self._params,
                self._cache,
                decode.Rows(table=table, active=active, sampling=sampling, **fields),
                self._next_state,
                self._allowed,
                *scalars,
                steps=self.config.decode_steps,
                running=self.stops.running,
            )
        self.stats.offloaded_pages = self.pages.num_offloaded
        self._running = RunningDecode(sampled, len(rows), start)
        return self._running

    def finish_decode(self, running: RunningDecode) -> decode.SampledTokens:
        """Wait for a decoding program.

        Returns:
          Numpy arrays with one row for each of the program's rows, followed by padding rows.
        """
        self._record_decode()
        sampled = jax.device_get(running.sampled)
        self.stats.decoded_tokens += int(sampled.count.sum())
        self.stats.decode_slots += self.config.decode_batch_size * int(sampled.steps)
        return sampled

    # Timeline

    def _next_start(self) -> float:
        """Return the start time of the next program; a timeline waits for the decoding one."""
        self._record_decode()
        return time.perf_counter()

    def _record_decode(self) -> None:
        """Record the running decoding program on the timeline, if there are both."""
        running, self._running = self._running, None
        if running is not None and self.timeline is not None:
            steps = int(running.sampled.steps)
            running.end = self._record(
                DECODE, running.start, running.sampled, rows=running.num_rows, steps=steps
            )

    def _record(self, program: str, start: float, output: Any, **args: int) -> float:
        """Record a program on the timeline, if there is one, after waiting for its output.

        Returns:
          The time at which it ended.
        """
        end = time.perf_counter()
        if self.timeline is not None:
            jax.block_until_ready(output)
            end = time.perf_counter()
            self.timeline.record(program, program, start, end, **args)
        return end
