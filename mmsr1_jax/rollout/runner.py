"""What an engine keeps on its devices, and the calls of its programs with host arrays.

    parameters, KV cache, store of image tokens, tables of the sampler
        ▲
    encode, extend, decode, fork, read_pages, write_pages

`LocalRunner` runs the programs on the devices of one engine. Where a TPU slice cannot run a program
on a part of itself, `lockstep.Lockstep` runs those of all engines as one.
"""

import contextlib
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mmsr1_jax.models.image_rows import ImageRows
from mmsr1_jax.rollout import cache, placement
from mmsr1_jax.rollout.decode import Rows, SampledTokens
from mmsr1_jax.rollout.programs import Programs


class Runner(Protocol):
    """The device state of one engine. Calls return once a program has been started."""

    programs: Programs

    @property
    def num_releases(self) -> int:
        """Number of times that the caches were freed, with all that they contained."""
        ...

    def release(self) -> None:
        """Free parameters and caches."""
        ...

    def release_caches(self) -> None:
        """Free KV cache and image tokens."""
        ...

    def has_params(self) -> bool:
        """Return whether there are parameters."""
        ...

    def prepare(self, params: nnx.State) -> nnx.State:
        """Convert the trainer's parameters for `install`."""
        ...

    def install(self, prepared: nnx.State) -> None:
        """Install parameters from `prepare`."""
        ...

    def rollout(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for a rollout, which allocates the caches; programs run inside it."""
        ...

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the engine waits for something else than its programs."""
        ...

    def encode(self, images: ImageRows, slots: np.ndarray) -> Any:
        """Encode images, and write their tokens to slots of the store, int32[B, M]."""
        ...

    def extend(self, new: cache.PrefillBatch) -> Any:
        """Write tokens into lanes."""
        ...

    def decode(self, rows: Rows, seed: int, leave_at: int) -> Any:
        """Start decoding some steps; the arguments are those of `decode.decode`."""
        ...

    def fetch(self, sampled: Any) -> SampledTokens:
        """Wait for the outputs of `decode`, and return them as host arrays."""
        ...

    def fork(self, source: int, target: int, from_lane: int, to_lane: int) -> None:
        """Copy a page and a lane's hidden state, see `cache.fork`."""
        ...

    def read_pages(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the contents of some pages, int32[n], of each layer."""
        ...

    def write_pages(self, index: np.ndarray, contents: tuple[np.ndarray, ...]) -> None:
        """Write the contents of some pages, int32[n]."""
        ...


class LocalRunner:
    """Runner of an engine that is independent of all others.

    Args:
      programs: Programs of the engine.
      params: Initial parameters, as the trainer has them.
      next_state: Transition table of the stop automaton, int16[states, V].
      allowed: Tokens that may be sampled, bool[V].
      donate: Whether to delete `params`, of which the runner has a converted copy.

    Attributes:
      programs: Programs of the engine.
      num_releases: Number of times that the caches were freed.
    """

    def __init__(
        self,
        programs: Programs,
        params: nnx.State,
        *,
        next_state: np.ndarray,
        allowed: np.ndarray,
        donate: bool = False,
    ):
        self.programs = programs
        # Everything is created on its final devices, since another engine may fill the first one.
        # It is committed to them like the outputs of the programs; otherwise each program would be
        # compiled twice.
        self._tables = self._put((next_state, allowed))
        with programs.context():
            self._params: nnx.State | None = programs.load(None)(params)
        if donate:
            jax.tree.map(lambda x: x.delete(), params)
        self.num_releases = 0
        self._cache: cache.Cache | None = None
        self._image_tokens: jax.Array | None = None

    def _put(self, arrays: Any) -> Any:
        """Return a tree of host arrays as arrays on the engine's devices, replicated."""
        return jax.device_put(arrays, self.programs.replicated)

    # Memory

    def release(self) -> None:
        self.release_caches()
        self._params = None

    def release_caches(self) -> None:
        self._cache = self._image_tokens = None
        self.num_releases += 1

    def has_params(self) -> bool:
        return self._params is not None

    def prepare(self, params: nnx.State) -> nnx.State:
        """Convert the trainer's parameters for `install` by this engine and others like it.

        The result has the engine's dtype and is sharded the way engines shard it. It never aliases
        `params`, since the trainer donates its arrays.

        If the trainer has more devices than the engine, one program places a full copy on each
        tensor group of the trainer's mesh. An engine on such a group has nothing left to copy.
        """
        programs, layout = self.programs, self.programs.layout
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
        """Install parameters; buffers already on the engine's devices are shared."""
        self._params = placement.transfer(prepared, self.programs.layout)

    @contextlib.contextmanager
    def rollout(self):
        if self._cache is None:
            with self.programs.context():
                self._cache, self._image_tokens = self.programs.empty()
        yield

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    # Programs

    def encode(self, images: ImageRows, slots: np.ndarray) -> jax.Array:
        images, slots = self._put((images, slots))
        with self.programs.context():
            self._image_tokens, output = self.programs.encode(
                self._params, self._image_tokens, images, slots
            )
        return output

    def extend(self, new: cache.PrefillBatch) -> jax.Array:
        new = self._put(new)
        with self.programs.context():
            output, self._cache = self.programs.extend(
                self._params, self._cache, new, self._image_tokens
            )
        return output

    def decode(self, rows: Rows, seed: int, leave_at: int) -> SampledTokens:
        rows, *scalars = self._put((rows, np.int32(seed), np.int32(leave_at)))
        with self.programs.context():
            sampled, self._cache = self.programs.decode(
                self._params, self._cache, rows, *self._tables, *scalars,
                **self.programs.decode_settings,
            )  # fmt: skip
        return sampled

    def fetch(self, sampled: SampledTokens) -> SampledTokens:
        return jax.device_get(sampled)

    def fork(self, source: int, target: int, from_lane: int, to_lane: int) -> None:
        arguments = self._put(tuple(map(np.int32, (source, target, from_lane, to_lane))))
        with self.programs.context():
            self._cache = self.programs.fork(self._cache, *arguments)

    def read_pages(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        with self.programs.context():
            return jax.device_get(self.programs.read_pages(self._cache, self._put(index)))

    def write_pages(self, index: np.ndarray, contents: tuple[np.ndarray, ...]) -> None:
        layers = self.programs.put_pages(contents)
        with self.programs.context():
            self._cache = self.programs.write_pages(self._cache, self._put(index), layers)
