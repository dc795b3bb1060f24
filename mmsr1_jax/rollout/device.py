"""The device side of the engine: a few programs over one parameter tree and the lanes.

    encode    pictures -> image tokens, kept in a store for all episodes that show them
    extend    tokens (and image tokens from the store) into some lanes
    fork      a prompt that one lane holds, into others
    decode    a chunk of steps of some lanes
    load      the trainer's parameters, in the layout of the engine

Shapes come from the tables of the settings. A program has a fixed number of rows for each length,
so what a row holds is computed in a shape that depends on that row alone; the rest is padding.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mmsr1_jax.config import settings
from mmsr1_jax.models.qwen2_5_vl import ModelConfig, Qwen2_5_VL
from mmsr1_jax.models.qwen2_5_vl.vision import num_windows, pack_images
from mmsr1_jax.models.sharding import partition_spec
from mmsr1_jax.processing.batching import TooLongError, smallest
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.rollout import cache, decode
from mmsr1_jax.rollout.sampler import Sampling
from mmsr1_jax.rollout.stop import StopTable


@dataclasses.dataclass
class Counts:
    """What the device has done since the engine was made.

    Attributes:
      extended: tokens written by `extend`; extended_padded: the same with padding.
      decoded: tokens sampled.
      decode_slots: rows times steps in which they were.
      images: pictures that went through the vision tower.
    """

    extended: int = 0
    extended_padded: int = 0
    decoded: int = 0
    decode_slots: int = 0
    images: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens to be written into one lane.

    Attributes:
      lane: which.
      tokens: int32[n], n at most the longest of `prefill_buckets`.
      positions: int32[3, n].
      images: whose tokens are among them, whole or in part.
      image_index: int32[n]: which merged token of `images`, one after the other; -1 for text.
    """

    lane: int
    tokens: np.ndarray
    positions: np.ndarray
    images: tuple[Patches, ...]
    image_index: np.ndarray


class Device:
    """Parameters, lanes and the store of image tokens, with the programs over them.

    Args of the constructor:
      model: the policy; its parameters are the first that are loaded.
      config: `rollout` and `buckets` are read.
      capacity: tokens of a lane.
      stops: where turns end.
      allowed: bool[V]: tokens that may be sampled.
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
        self.counts = Counts()
        self.config = config.rollout
        self.model_config = model.config
        self.stops = stops
        self._windows = config.buckets.image_windows
        self._graph, params = nnx.split(model)
        self._layout = jax.tree.map(lambda x: x.sharding, params)
        self._dtype = model.dtype

        # Without the arrays, which are not to be kept once others are loaded.
        like = nnx.merge(self._graph, jax.eval_shape(lambda: params))

        def empty():
            store = (self.config.image_cache_tokens, like.config.text.hidden_size)
            return (
                cache.allocate(like, self.config.lanes, capacity),
                jnp.zeros(store, like.dtype),
            )

        self._place = _places(jax.eval_shape(empty)[0], jax.tree.leaves(self._layout)[0])
        everywhere = self._place.length
        self._compile()
        # All of it is made in its place (another engine may fill the first device), and pinned to
        # it, as what the programs return is: else each would be compiled twice. Where nothing has
        # to be changed, the model's own arrays are used.
        self._empty = jax.jit(empty, out_shardings=(self._place, everywhere))
        self.reset()
        self._allowed = jax.device_put(allowed, everywhere)
        self._next_state = jax.device_put(stops.next_state, everywhere)
        self._params = jax.device_put(params, self._layout)
        if any(x.dtype != self._dtype for x in jax.tree.leaves(params)):
            self.load(params)

    def reset(self) -> None:
        """Empty lanes and an empty store, as at the beginning: a program that failed may have left
        neither behind."""
        self._lanes = self._store = None  # their memory is free before it is taken again
        self._lanes, self._store = self._empty()
        self._forget()

    def _compile(self) -> None:
        """Makes the programs; each compiles when it first meets a shape."""
        graph, precision = self._graph, "highest" if self._dtype == jnp.float32 else None

        def program(function, *, donate=(), static=()):
            def run(params, *args, **keywords):
                with jax.default_matmul_precision(precision):  # see `score`
                    return function(nnx.merge(graph, params), *args, **keywords)

            return jax.jit(run, donate_argnums=donate, static_argnames=static)

        def encode(model, store, images, slots):
            tokens = model.encode_images(images)
            flat = tokens.reshape(-1, tokens.shape[-1])
            return store.at[slots.reshape(-1)].set(flat.astype(store.dtype), mode="drop")

        def extend(model, lanes, new, store):
            hidden, lanes = cache.extend(model, lanes, new, store)
            return tuple(hidden), lanes  # an array a row: none has to be cut out later

        self._encode_program = program(encode, donate=1)
        self._extend_program = program(extend, donate=1)
        self._decode_program = program(decode.decode, donate=1, static=("steps", "running"))
        self._fork_program = jax.jit(cache.fork, donate_argnums=0)
        self._cut_program = jax.jit(cache.cut, donate_argnums=0)
        self._clear_program = jax.jit(cache.clear, donate_argnums=0)
        self._wipe_program = jax.jit(
            cache.wipe, donate_argnums=0, keep_unused=True, out_shardings=self._place
        )
        self._load_programs = {}

    def load(self, params: nnx.State) -> None:
        """Takes parameters (the trainer's tree: any layout, any dtype) into the engine's own layout
        and dtype, in one program. Encoded images are forgotten: they are of the old ones."""
        self.take(self.prepare(params))

    def prepare(self, params: nnx.State) -> nnx.State:
        """Parameters from which each engine like this one can `take` its own: in the engine's
        dtype, cut as engines cut them. Never the arrays that were given, which the trainer gives
        away.

        A trainer with more devices than the engine puts a whole on each group of them, by one
        program: where an engine is on such a group, nothing remains to be copied.
        """
        first, ours = jax.tree.leaves(params)[0], jax.tree.leaves(self._layout)[0].device_set
        theirs = first.sharding.device_set if isinstance(first, jax.Array) else set()
        if theirs == ours:
            return self._relayout(None)(params)
        if len(theirs) > 1:
            return self._relayout(first.sharding.mesh)(params)
        return self._relayout(None)(jax.device_put(params, self._layout))

    def take(self, prepared: nnx.State) -> None:
        """The second half of `load`; memory is shared where the engine's devices have it all."""
        self._params = place(prepared, self._layout)
        self._lanes = self._wipe_program(self._lanes)
        self._forget()

    def _forget(self) -> None:
        """All encoded images."""
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._free = list(range(self.config.image_cache_tokens))

    def _relayout(self, mesh: Mesh | None):
        """The program that gives parameters the engine's dtype and layout: on a trainer's mesh, or
        (None) on the engine's own devices."""

        def cast(params):
            # Copied even where nothing changes: the trainer gives its own away.
            return jax.tree.map(lambda x: jnp.array(x, self._dtype, copy=True), params)

        if mesh not in self._load_programs:
            layout = self._layout if mesh is None else _layout_on(mesh, self._layout)
            self._load_programs[mesh] = jax.jit(cast, out_shardings=layout)
        return self._load_programs[mesh]

    def warm_up(self) -> None:
        """Compiles every program of the tables, by running it on padding."""
        for length in self.config.prefill_buckets:
            self._extend(length, [])
        for windows in self._windows:
            self._encode(windows, [])
        nothing = Sampling.uniform(self.config.decode_batch_size)
        self.decode([], jax.tree.map(np.asarray, nothing), seed=0, leave_at=0)
        hidden = self._extend(self.config.prefill_buckets[0], [])[0]
        self.fork(0, self.config.lanes, 0, hidden)
        self.fork(self.config.lanes, self.config.lanes, 0, hidden)
        self.clear(self.config.lanes)

    # Pictures

    def check_image(self, image: Patches) -> None:
        """Raises TooLongError where the picture fits no program or not into the store."""
        check_image(image, self.model_config, self.config, self._windows)

    def _slots_of(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Where in the store each piece's image tokens are, int32[M], one image after the other.
        Images that are not there are encoded, each once."""
        wanted = {image.digest: image for piece in pieces for image in piece.images}
        missing = [digest for digest in wanted if digest not in self._kept]
        for digest in wanted:
            if digest in self._kept:
                self._kept.move_to_end(digest)
        by_windows: dict[int, list[tuple[Patches, np.ndarray]]] = {}
        for digest in missing:
            image = wanted[digest]
            while len(self._free) < self._size(image):
                self._free += self._kept.popitem(last=False)[1].tolist()  # the longest unused
            slots = np.array([self._free.pop() for _ in range(self._size(image))], np.int32)
            windows = num_windows(image.grid, self.model_config.vision)
            windows = smallest("image windows", windows, self._windows, "image_windows")
            by_windows.setdefault(windows, []).append((image, slots))
        for windows, found in by_windows.items():
            rows = self._encode_rows(windows)
            for first in range(0, len(found), rows):
                self._encode(windows, found[first : first + rows])
                self._kept |= {image.digest: slots for image, slots in found[first : first + rows]}
        self.counts.images += len(missing)
        nothing = np.zeros(0, np.int32)
        return [
            np.concatenate([nothing, *(self._kept[image.digest] for image in piece.images)])
            for piece in pieces
        ]

    def _fits_store(self, pieces: Sequence[Piece]) -> bool:
        wanted = {image.digest: image for piece in pieces for image in piece.images}
        return sum(map(self._size, wanted.values())) <= self.config.image_cache_tokens

    def _size(self, image: Patches) -> int:
        return len(image.values) // self.model_config.vision.merge_size**2

    def _encode_rows(self, windows: int) -> int:
        return max(1, self.config.encode_windows // windows)

    def _encode(self, windows: int, found: Sequence[tuple[Patches, np.ndarray]]) -> None:
        """Images with as many windows, and where in the store their tokens go."""
        vision = self.model_config.vision
        pictures = [[(image.values, image.grid)] for image, _ in found]
        pictures += [[]] * (self._encode_rows(windows) - len(found))
        images, indices = pack_images(pictures, windows, vision)
        M = images.patches.shape[1] // vision.merge_size**2
        slots = np.full((len(pictures), M), self.config.image_cache_tokens, np.int32)
        for row, (_, place) in enumerate(found):
            slots[row, indices[row]] = place
        self._store = self._encode_program(self._params, self._store, images, slots)

    # Lanes

    def piece_length(self, left: int) -> int:
        """How many of `left` tokens are written at a time: all that are left where they fill most
        of a program's length, else as many as fill a shorter one."""
        lengths = self.config.prefill_buckets
        for length in lengths:
            if left <= length:
                shorter = [n for n in lengths if n < left]
                return left if not shorter or 4 * left >= 3 * length else shorter[-1]
        return lengths[-1]

    def extend(self, pieces: Sequence[Piece]) -> list[jax.Array]:
        """Writes pieces, at most one for each lane, and returns the hidden state of each one's last
        token, float[D]."""
        by_length: dict[int, list[int]] = {}
        for number, piece in enumerate(pieces):
            length = smallest("tokens", len(piece.tokens), self.config.prefill_buckets, "extend")
            by_length.setdefault(length, []).append(number)
        hidden: dict[int, jax.Array] = {}
        for length, numbers in by_length.items():
            batches: list[list[int]] = [[]]
            for number in numbers:
                larger = [pieces[n] for n in (*batches[-1], number)]
                if len(larger) > self._extend_rows(length) or not self._fits_store(larger):
                    batches.append([])
                batches[-1].append(number)
            for batch in batches:
                found = self._extend(length, [pieces[number] for number in batch])
                hidden |= dict(zip(batch, found, strict=False))
        return [hidden[number] for number in range(len(pieces))]

    def _extend_rows(self, length: int) -> int:
        return max(1, self.config.prefill_tokens // length)

    def _extend(self, length: int, pieces: Sequence[Piece]) -> Sequence[jax.Array]:
        R = self._extend_rows(length)
        new = cache.Extension(
            lane=np.full(R, self.config.lanes, np.int32),
            tokens=np.zeros((R, length), np.int32),
            count=np.zeros(R, np.int32),
            positions=np.zeros((R, 3, length), np.int32),
            image_index=np.full((R, length), -1, np.int32),
        )
        for row, (piece, slots) in enumerate(zip(pieces, self._slots_of(pieces), strict=True)):
            n, is_image = len(piece.tokens), piece.image_index >= 0
            new.lane[row], new.count[row] = piece.lane, n
            new.tokens[row, :n] = piece.tokens
            new.positions[row, :, :n] = piece.positions
            new.image_index[row, :n][is_image] = slots[piece.image_index[is_image]]
            self.counts.extended += n
            self.counts.extended_padded += length
        hidden, self._lanes = self._extend_program(self._params, self._lanes, new, self._store)
        return hidden

    def fork(self, source: int, target: int, length: int, hidden: jax.Array) -> None:
        """Makes lane `target` hold the first `length` tokens of lane `source`, which may be itself;
        `hidden`: of the last of them."""
        where, length = np.array([target], np.int32), np.int32(length)
        if source == target:
            self._lanes = self._cut_program(self._lanes, where, length, hidden)
        else:
            self._lanes = self._fork_program(self._lanes, np.int32(source), where, length, hidden)

    def clear(self, lane: int) -> None:
        self._lanes = self._clear_program(self._lanes, np.array([lane], np.int32))

    def decode(
        self, rows: Sequence[dict], sampling: Sampling, *, seed: int, leave_at: int
    ) -> decode.Drawn:
        """Draws a chunk.

        Args:
          rows: for each lane that draws, the fields of `decode.Rows` but `active` and `sampling`.
          sampling: how, for every row (numpy).
          seed, leave_at: see `decode.decode`.

        Returns:
          numpy arrays, a row for each of `rows` and then padding.
        """
        R = self.config.decode_batch_size
        fields = {
            name: np.full(R, self.config.lanes if name == "lane" else 0, np.int32)
            for name in ("lane", "stop_state", "position", "episode", "drawn", "left")
        }
        for number, row in enumerate(rows):
            for name, value in row.items():
                fields[name][number] = value
        drawn, self._lanes = self._decode_program(
            self._params,
            self._lanes,
            decode.Rows(active=np.arange(R) < len(rows), sampling=sampling, **fields),
            self._next_state,
            self._allowed,
            np.int32(seed),
            np.int32(leave_at),
            steps=self.config.decode_steps,
            running=self.stops.running,
        )
        drawn = jax.device_get(drawn)
        self.counts.decoded += int(drawn.count.sum())
        self.counts.decode_slots += R * int(drawn.steps)
        return drawn


def check_image(
    image: Patches, model: ModelConfig, rollout: settings.Rollout, windows: Sequence[int]
) -> None:
    """Raises TooLongError where an engine with these settings cannot show a picture; `windows`:
    those of the buckets."""
    smallest("image windows", num_windows(image.grid, model.vision), windows, "image_windows")
    size = len(image.values) // model.vision.merge_size**2
    most = (rollout.image_cache_tokens - rollout.prefill_buckets[-1]) // 2
    if size > most:  # a piece may hold the ends of two of them
        raise TooLongError(
            f"a picture of {size} tokens, "
            f"rollout.image_cache_tokens={rollout.image_cache_tokens} leaves room for {most}"
        )


def _places(lanes: cache.Lanes, of_params: Sharding) -> cache.Lanes:
    """Where the arrays of the lanes lie: kv heads along the tensor axis, the rest everywhere."""
    if not isinstance(of_params, NamedSharding):
        return jax.tree.map(lambda _: of_params, lanes)
    mesh = of_params.mesh
    kv = NamedSharding(
        mesh, partition_spec((None, None, "kv_heads", None, None), lanes.k.shape, mesh)
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return cache.Lanes(k=kv, v=kv, length=everywhere, hidden=everywhere)


def _layout_on(mesh: Mesh, layout: nnx.State) -> nnx.State:
    """An engine's layout on a trainer's mesh: cut along the tensor axis alone, or not at all if the
    trainer's has not as many parts."""

    def ways(of: Mesh) -> int:
        return of.shape.get("tensor", 1)

    def one(ours: Sharding) -> NamedSharding:
        same = isinstance(ours, NamedSharding) and ways(ours.mesh) == ways(mesh)
        return NamedSharding(mesh, ours.spec if same else PartitionSpec())

    return jax.tree.map(one, layout)


def place(arrays: nnx.State, layout: nnx.State) -> nnx.State:
    """The same arrays in the layout of other devices, or of some of theirs, without the host. What
    a device has already is not copied but shared; what it has not comes from one that has it."""
    return jax.tree.map(_place_one, arrays, layout)


def _place_one(x: jax.Array, layout: Sharding) -> jax.Array:
    def key(index: tuple[slice, ...]) -> tuple[tuple[int, int, int], ...]:
        return tuple(part.indices(size) for part, size in zip(index, x.shape, strict=True))

    held: dict[tuple, dict[jax.Device, jax.Array]] = {}
    for shard in x.addressable_shards:
        held.setdefault(key(shard.index), {})[shard.device] = shard.data
    parts = []
    for device, index in layout.addressable_devices_indices_map(x.shape).items():
        found = held.get(key(index))
        if found is None:  # cut in other places: from a whole copy, where there is one
            whole = x.addressable_shards[0].data if x.is_fully_replicated else x
            return jax.device_put(whole, layout)
        same = found.get(device)
        parts.append(jax.device_put(next(iter(found.values())), device) if same is None else same)
    return jax.make_array_from_single_device_arrays(x.shape, layout, parts)
