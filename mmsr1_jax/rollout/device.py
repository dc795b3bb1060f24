"""The device side of the engine: parameters, KV cache and image store, and calls of the programs.

Shapes come from the bucket tables of the config. A program has a fixed number of rows for each
length, so the shape in which a row is computed depends on that row alone; the rest is padding.
Host arrays reach the programs by `Device.put`, in one explicit transfer per call. Programs run in
the order of the calls, and only `decode` and moves to host memory wait for their result.
"""

import dataclasses
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

    sampled: decode.SampledTokens
    execution: Execution | None


class Device:
    """Parameters, KV cache and the store of image tokens, with the programs that use them.

    Args:
      model: The policy, with the initial parameters.
      config: All settings; only `rollout`, `buckets` and `turns` are used.
      stops: Stop strings and end tokens of a turn.
      allowed: Tokens that may be sampled, bool[V].
      donate: Whether to delete the model's parameters, of which the engine has a converted copy.

    Attributes:
      config: Settings of the engine, `config.rollout`.
      stats: Counters of the device's work.
      stops: Stop strings and end tokens of a turn.
      pages: Pages of each lane, and of a group's prompt.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        config: settings.Config,
        *,
        stops: StopTable,
        allowed: np.ndarray,
        donate: bool = False,
    ):
        self.stats = EngineStats()
        self._timeline: EngineTimeline | None = None
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
            self.config.decode_steps,
            self._offload_pages,
            self._write_pages,
        )
        # Everything is created on its final devices, since another engine may fill the first one.
        # It is committed to them like the outputs of the programs; otherwise each program would be
        # compiled twice.
        self._allowed = self.put(allowed)
        self._next_state = self.put(stops.next_state)
        params = nnx.split(model)[1]
        with programs.context():
            self._params: nnx.State | None = programs.load(None)(params)
        if donate:
            jax.tree.map(lambda x: x.delete(), params)
        self._cache: cache.Cache | None = None
        self._image_tokens: jax.Array | None = None

    def put(self, arrays: Any) -> Any:
        """Return a tree of host arrays as arrays on the engine's devices, replicated."""
        return jax.device_put(arrays, self._programs.replicated)

    # Memory

    def release(self) -> None:
        """Free parameters and caches. `install` allocates parameters again."""
        self.release_caches()
        self._params = None

    def release_caches(self) -> None:
        """Free KV cache and image tokens. The next `begin` allocates empty ones."""
        self._cache = self._image_tokens = None
        self._images.clear()
        self.pages.clear()

    def _allocate_caches(self) -> None:
        if self._cache is None:
            with self._programs.context():
                self._cache, self._image_tokens = self._programs.empty()

    # Rollouts

    def begin(self, timeline: EngineTimeline | None) -> None:
        """Prepare for a rollout: allocate the caches, and clear lanes of an abandoned rollout.

        Args:
          timeline: Recorder of the programs' times; None: they are not measured.

        Raises:
          RuntimeError: There are no parameters.
        """
        if self._params is None:
            raise RuntimeError(
                "the engine has no parameters: it was released, or loading failed; call `load` "
                "before the next rollout"
            )
        self.pages.clear()
        self._allocate_caches()
        self._timeline = timeline
        if timeline is not None:
            timeline.begin()

    def finish(self) -> None:
        """End a rollout: complete the timeline, which waits for the programs."""
        timeline, self._timeline = self._timeline, None
        if timeline is not None:
            timeline.finish()

    def warm_up(self) -> None:
        """Compile the programs for all bucket shapes by running them on padding."""
        self._allocate_caches()
        for length in self.config.prefill_buckets:
            self._extend(length, [])
        self._images.warm_up()
        sampling = self.put(Sampling.uniform(self.config.decode_batch_size))
        self.finish_decode(self.start_decode([], sampling, seed=0, leave_at=0))
        hidden, _ = self._extend(self.config.prefill_buckets[0], [])
        self.fork(0, 0, 0, hidden[0])
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
        """Install parameters from `prepare`; buffers already on the engine's devices are shared.

        Both caches are freed, since the old parameters produced their contents.
        """
        self.release_caches()
        self._params = placement.transfer(prepared, self._programs.layout)

    # Images

    def check_image(self, image: Patches) -> None:
        """Raise TooLongError if the image exceeds the largest bucket or the image cache."""
        check_image(image, self._model_config, self.config, self._windows)

    def _encode(self, images: ImageRows, slots: np.ndarray) -> None:
        """Encode images, and write their tokens to slots of the store, int32[B, M]."""
        images, slots = self.put((images, slots))
        with self._programs.context():
            self._image_tokens, output = self._programs.encode(
                self._params, self._image_tokens, images, slots
            )
        self._record(ENCODE, output, rows=len(slots))

    # Lanes

    def extend(self, chunks: Sequence[PrefillChunk]) -> list[tuple[jax.Array, Execution | None]]:
        """Write chunks, at most one per lane, into lanes that have pages for them.

        Returns:
          For each chunk, the hidden state of its last token, float[D], and the times of its program
          if a timeline is recorded.
        """
        by_length: dict[int, list[int]] = {}
        for index, chunk in enumerate(chunks):
            length = smallest_bucket(
                "tokens", len(chunk.tokens), self.config.prefill_buckets, "rollout.prefill_buckets"
            )
            by_length.setdefault(length, []).append(index)
        written: dict[int, tuple[jax.Array, Execution | None]] = {}
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
                hidden, execution = self._extend(length, [chunks[index] for index in batch])
                written |= {index: (hidden[row], execution) for row, index in enumerate(batch)}
        return [written[index] for index in range(len(chunks))]

    def _extend(
        self, length: int, chunks: Sequence[PrefillChunk]
    ) -> tuple[Sequence[jax.Array], Execution | None]:
        """Write one batch of chunks of a bucket; return the hidden states of all rows."""
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
        with self._programs.context():
            hidden, self._cache = self._programs.extend(
                self._params, self._cache, new, self._image_tokens
            )
        execution = self._record(PREFILL, hidden, rows=len(chunks), length=length)
        return hidden, execution

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
        return RunningDecode(sampled, self._record(DECODE, sampled, rows=len(rows)))

    def finish_decode(self, running: RunningDecode) -> decode.SampledTokens:
        """Wait for a decoding program.

        Returns:
          Numpy arrays with one row for each of the program's rows, followed by padding rows.
        """
        sampled = jax.device_get(running.sampled)
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
