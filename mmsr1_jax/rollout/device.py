"""The device side of the engine: compiled programs over one parameter tree and the lanes.

    encode    encode images into image tokens, kept in a store shared by all episodes
    extend    write tokens (and image tokens from the store) into some lanes
    fork      copy a prompt from one lane to others
    decode    run several decoding steps for some lanes
    load      convert the trainer's parameters to the engine's layout and dtype

Shapes come from the bucket tables of the config. A program has a fixed number of rows for each
length, so the shape in which a row is computed depends on that row alone; the rest is padding.
Host arrays reach the programs by `Device.put`, in one explicit transfer per call.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mmsr1_jax.config import settings
from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.models.qwen2_5_vl.vision import ImageRows
from mmsr1_jax.processing.batching import smallest_bucket
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.rollout import cache, decode, placement
from mmsr1_jax.rollout.image_cache import ImageCache, check_image
from mmsr1_jax.rollout.prefill import PrefillChunk
from mmsr1_jax.rollout.sampler import Sampling
from mmsr1_jax.rollout.stop import StopTable
from mmsr1_jax.rollout.timeline import DECODE, ENCODE, PREFILL, EngineTimeline


@dataclasses.dataclass
class EngineStats:
    """Counters of the device's work since the engine was created.

    Attributes:
      prefill_tokens: Tokens written by `extend`.
      prefill_slots: Tokens written by `extend`, padding included.
      decoded_tokens: Tokens sampled.
      decode_slots: Decoding capacity in tokens: rows times steps run.
      images: Images encoded by the vision tower.
    """

    prefill_tokens: int = 0
    prefill_slots: int = 0
    decoded_tokens: int = 0
    decode_slots: int = 0
    images: int = 0


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """State of the turn that a row decodes, see `decode.Rows`."""

    lane: int
    stop_state: int
    position: int
    episode: int
    num_sampled: int
    budget: int


class Device:
    """Parameters, lanes and the store of image tokens, with the programs that use them.

    Args:
      model: The policy, with the initial parameters.
      config: All settings; only `rollout` and `buckets` are used.
      capacity: Maximum number of tokens in a lane.
      stops: Stop strings and end tokens of a turn.
      allowed: Tokens that may be sampled, bool[V].

    Attributes:
      config: Settings of the engine, `config.rollout`.
      stats: Counters of the device's work.
      stops: Stop strings and end tokens of a turn.
      timeline: Recorder of the programs' durations; None: they are not measured.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        config: settings.Config,
        *,
        capacity: int,
        stops: StopTable,
        allowed: np.ndarray,
    ):
        self.stats = EngineStats()
        self.timeline: EngineTimeline | None = None
        self.config = config.rollout
        self.stops = stops
        self._model_config = model.config
        self._windows = config.buckets.image_windows
        self._graph, params = nnx.split(model)
        self._layout = jax.tree.map(lambda x: x.sharding, params)
        self._dtype = model.dtype

        # An abstract model: the closure must not keep the arrays alive once others are loaded.
        abstract_model = nnx.merge(self._graph, jax.eval_shape(lambda: params))

        def empty():
            shape = (self.config.image_cache_tokens, abstract_model.config.text.hidden_size)
            return (
                cache.allocate(abstract_model, self.config.lanes, capacity),
                jnp.zeros(shape, abstract_model.dtype),
            )

        param_sharding = jax.tree.leaves(self._layout)[0]
        self._lane_shardings = placement.lane_shardings(jax.eval_shape(empty)[0], param_sharding)
        self._replicated = placement.replicated(param_sharding)
        self._compile()
        self._images = ImageCache(model.config, self.config, self._windows, self._encode)
        # Everything is created on its final devices, since another engine may fill the first one.
        # It is committed to them like the outputs of the programs; otherwise each program would be
        # compiled twice. The model's own arrays are used if layout and dtype already match.
        self._empty = jax.jit(empty, out_shardings=(self._lane_shardings, self._replicated))
        self.reset()
        self._allowed = self.put(allowed)
        self._next_state = self.put(stops.next_state)
        self._params = jax.device_put(params, self._layout)
        if any(x.dtype != self._dtype for x in jax.tree.leaves(params)):
            self.load(params)

    def put(self, arrays: Any) -> Any:
        """Return a tree of host arrays as arrays on the engine's devices, replicated."""
        return jax.device_put(arrays, self._replicated)

    def reset(self) -> None:
        """Reallocate lanes and image cache, since a failed program may have lost donated arrays."""
        self._lanes = self._image_tokens = None  # free the memory before allocating it again
        self._lanes, self._image_tokens = self._empty()
        self._images.clear()

    def _compile(self) -> None:
        """Define the jitted programs; each is compiled on its first call with a shape."""
        graph, precision = self._graph, "highest" if self._dtype == jnp.float32 else None

        def program(function, *, donate=(), static=()):
            def run(params, *args, **keywords):
                with jax.default_matmul_precision(precision):  # accelerators reduce it by default
                    return function(nnx.merge(graph, params), *args, **keywords)

            return jax.jit(run, donate_argnums=donate, static_argnames=static)

        def encode(model, store, images, slots):
            tokens = model.encode_images(images)
            flat = tokens.reshape(-1, tokens.shape[-1])
            return store.at[slots.reshape(-1)].set(flat.astype(store.dtype), mode="drop")

        def extend(model, lanes, new, store):
            hidden, lanes = cache.extend(model, lanes, new, store)
            return tuple(hidden), lanes  # one array per row, so that none is sliced later

        self._encode_program = program(encode, donate=1)
        self._extend_program = program(extend, donate=1)
        self._decode_program = program(decode.decode, donate=1, static=("steps", "running"))
        self._fork_program = jax.jit(cache.fork, donate_argnums=0)
        self._truncate_program = jax.jit(cache.truncate, donate_argnums=0)
        self._clear_program = jax.jit(cache.clear, donate_argnums=0)
        self._reset_program = jax.jit(
            cache.reset, donate_argnums=0, keep_unused=True, out_shardings=self._lane_shardings
        )
        self._load_programs: dict[Mesh | None, Callable[[nnx.State], nnx.State]] = {}

    def warm_up(self) -> None:
        """Compile the programs for all bucket shapes by running them on padding."""
        for length in self.config.prefill_buckets:
            self._extend(length, [])
        self._images.warm_up()
        sampling = self.put(Sampling.uniform(self.config.decode_batch_size))
        self.decode([], sampling, seed=0, leave_at=0)
        hidden = self._extend(self.config.prefill_buckets[0], [])[0]
        self.fork(0, self.config.lanes, 0, hidden)
        self.fork(self.config.lanes, self.config.lanes, 0, hidden)
        self.clear(self.config.lanes)

    # Parameters

    def load(self, params: nnx.State) -> None:
        """Load the trainer's parameters, converted to the engine's layout and dtype in one program.

        Cached image tokens are discarded, since the old parameters produced them.

        Args:
          params: Parameter tree in any layout and dtype.
        """
        self.install(self.prepare(params))

    def prepare(self, params: nnx.State) -> nnx.State:
        """Convert parameters for `install` by this engine and others like it.

        The result has the engine's dtype and is sharded the way engines shard it. It never aliases
        `params`, since the trainer donates its arrays.

        If the trainer has more devices than the engine, one program places a full copy on each
        tensor group of the trainer's mesh. An engine on such a group has nothing left to copy.
        """
        first, engine = jax.tree.leaves(params)[0], jax.tree.leaves(self._layout)[0].device_set
        trainer = first.sharding.device_set if isinstance(first, jax.Array) else set()
        if trainer == engine:
            return self._load_program(None)(params)
        if len(trainer) > 1:
            assert isinstance(first.sharding, NamedSharding)
            mesh = first.sharding.mesh
            assert isinstance(mesh, Mesh)
            return self._load_program(mesh)(params)
        return self._load_program(None)(jax.device_put(params, self._layout))

    def install(self, prepared: nnx.State) -> None:
        """Install parameters from `prepare`; buffers already on the engine's devices are shared."""
        self._params = placement.transfer(prepared, self._layout)
        self._lanes = self._reset_program(self._lanes)
        self._images.clear()

    def _load_program(self, mesh: Mesh | None) -> Callable[[nnx.State], nnx.State]:
        """Return the program that converts parameters to the engine's dtype and layout.

        Args:
          mesh: Mesh of the trainer; None: the engine's own devices.
        """

        def cast(params):
            # Copy even if nothing changes, since the trainer donates its arrays.
            return jax.tree.map(lambda x: jnp.array(x, self._dtype, copy=True), params)

        if mesh not in self._load_programs:
            layout = self._layout
            if mesh is not None:
                layout = placement.engine_layout_on(mesh, layout)
            self._load_programs[mesh] = jax.jit(cast, out_shardings=layout)
        return self._load_programs[mesh]

    # Images

    def check_image(self, image: Patches) -> None:
        """Raise TooLongError if the image exceeds the largest bucket or the image cache."""
        check_image(image, self._model_config, self.config, self._windows)

    def _encode(self, images: ImageRows, slots: np.ndarray) -> None:
        """Encode images, and write their tokens to slots of the store, int32[B, M]."""
        start = time.perf_counter()
        images, slots = self.put((images, slots))
        self._image_tokens = self._encode_program(self._params, self._image_tokens, images, slots)
        self._record(ENCODE, start, self._image_tokens, rows=len(slots))

    # Lanes

    def extend(self, chunks: Sequence[PrefillChunk]) -> list[jax.Array]:
        """Write chunks, at most one per lane.

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
                if len(larger) > self._extend_rows(length) or not self._images.fits(images):
                    batches.append([])
                batches[-1].append(index)
            for batch in batches:
                states = self._extend(length, [chunks[index] for index in batch])
                hidden |= dict(zip(batch, states, strict=False))
        return [hidden[index] for index in range(len(chunks))]

    def _extend_rows(self, length: int) -> int:
        return max(1, self.config.prefill_tokens // length)

    def _extend(self, length: int, chunks: Sequence[PrefillChunk]) -> Sequence[jax.Array]:
        """Write one batch of chunks of a bucket; return the hidden state of each row."""
        B = self._extend_rows(length)
        lane = np.full(B, self.config.lanes, np.int32)
        tokens = np.zeros((B, length), np.int32)
        count = np.zeros(B, np.int32)
        positions = np.zeros((B, 3, length), np.int32)
        image_index = np.full((B, length), -1, np.int32)
        slots = self._images.slots([chunk.images for chunk in chunks])
        self.stats.images = self._images.num_encoded
        for row, chunk in enumerate(chunks):
            n, is_image = len(chunk.tokens), chunk.image_index >= 0
            lane[row], count[row] = chunk.lane, n
            tokens[row, :n] = chunk.tokens
            positions[row, :, :n] = chunk.positions
            image_index[row, :n][is_image] = slots[row][chunk.image_index[is_image]]
            self.stats.prefill_tokens += n
            self.stats.prefill_slots += length
        start = time.perf_counter()
        new = cache.PrefillBatch(*self.put((lane, tokens, count, positions, image_index)))
        hidden, self._lanes = self._extend_program(
            self._params, self._lanes, new, self._image_tokens
        )
        self._record(PREFILL, start, hidden, rows=len(chunks), length=length)
        return hidden

    def fork(self, source: int, target: int, length: int, hidden: jax.Array) -> None:
        """Copy the first `length` tokens of lane `source` to lane `target`.

        Args:
          source: Lane to copy from.
          target: Lane to overwrite; if it is `source`, the lane is truncated.
          length: Number of tokens to keep.
          hidden: Hidden state of the last of these tokens, float[D].
        """
        source_lane, targets, count = self.put(
            (np.int32(source), np.array([target], np.int32), np.int32(length))
        )
        if source == target:
            self._lanes = self._truncate_program(self._lanes, targets, count, hidden)
        else:
            self._lanes = self._fork_program(self._lanes, source_lane, targets, count, hidden)

    def clear(self, lane: int) -> None:
        """Empty a lane."""
        self._lanes = self._clear_program(self._lanes, self.put(np.array([lane], np.int32)))

    def decode(
        self, rows: Sequence[DecodeRow], sampling: Sampling, *, seed: int, leave_at: int
    ) -> decode.SampledTokens:
        """Decode up to `decode_steps` tokens for each of some lanes.

        Args:
          rows: State of each lane's turn, at most `decode_batch_size`.
          sampling: Sampling parameters of `decode_batch_size` rows, from `put`.
          seed, leave_at: As in `decode.decode`.

        Returns:
          Numpy arrays with one row for each of `rows`, followed by padding rows.
        """
        start = time.perf_counter()
        B = self.config.decode_batch_size
        fields = {
            field.name: np.full(B, self.config.lanes if field.name == "lane" else 0, np.int32)
            for field in dataclasses.fields(DecodeRow)
        }
        for index, row in enumerate(rows):
            for name, values in fields.items():
                values[index] = getattr(row, name)
        fields, active, *scalars = self.put(
            (fields, np.arange(B) < len(rows), np.int32(seed), np.int32(leave_at))
        )
        sampled, self._lanes = self._decode_program(
            self._params,
            self._lanes,
            decode.Rows(active=active, sampling=sampling, **fields),
            self._next_state,
            self._allowed,
            *scalars,
            steps=self.config.decode_steps,
            running=self.stops.running,
        )
        sampled = jax.device_get(sampled)
        steps = int(sampled.steps)
        self.stats.decoded_tokens += int(sampled.count.sum())
        self.stats.decode_slots += B * steps
        self._record(DECODE, start, sampled, rows=len(rows), steps=steps)
        return sampled

    def _record(self, program: str, start: float, output: Any, **args: int) -> None:
        """Record a program on the timeline, after waiting for its output; without one, return."""
        if self.timeline is not None:
            jax.block_until_ready(output)
            self.timeline.record(program, program, start, time.perf_counter(), **args)
