"""Engines that run their programs as one over a whole slice.

TPU v5e and v6e refuse programs on some parts of a slice, so an engine of several chips cannot run
there alone. Here every program is compiled for all devices, manual over the engines and automatic
over `tensor`:

    engine 0 ──► extend 256 ─┐                              ┌► extend 256 with its tokens
    engine 1 ──► decode      ├─► the next program of all ───┤► the same with padding
    engine 2     (waits)     │   is `extend 256`            ├► the same with padding
    engine 3 ──► extend 256 ─┘                              └► extend 256 with its tokens

The schedulers of the engines do not know of each other: they call a `Runner`, whose calls wait
until their program is the next one. Between two programs the processes exchange which programs
their engines have called; a fixed rule (`choose`) names the next. An engine that waits for a tool
calls none, so it delays no other: its rows are padding. As programs have no collectives between
engines, neither do devices wait for those of others.
"""

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.image_rows import ImageRows
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.rollout import cache
from mmsr1_jax.rollout.active import RolloutStopped
from mmsr1_jax.rollout.decode import Rows, SampledTokens
from mmsr1_jax.rollout.lockstep_programs import LockstepPrograms, Stacked
from mmsr1_jax.rollout.programs import Programs
from mmsr1_jax.utils import processes

# Short programs are first, so that their lanes take part in the next decoding.
_ORDER = ("write_pages", "read_pages", "fork", "encode", "extend", "decode")
_MAX_OVERTAKEN = 8  # programs that a call waits for before it is the next in any case
_NOTHING = Stacked.of(())
_POLL_SECONDS = 0.01  # between two exchanges while no engine calls a program


def choose(calls: Sequence[tuple[str, int]], now: int) -> str | None:
    """Return the program to run next; None: no engine has called one.

    It is the first by `_ORDER`, unless a call has been overtaken by `_MAX_OVERTAKEN` programs.

    Args:
      calls: Name of the program that an engine has called, and number of the program that was the
        next one then.
      now: Number of the next program.
    """
    overdue = [(since, name) for name, since in calls if now - since >= _MAX_OVERTAKEN]
    if overdue:
        return min(overdue)[1]
    return min((name for name, _ in calls), key=_rank, default=None)


def _rank(name: str) -> tuple[int, str]:
    return _ORDER.index(name.partition(" ")[0]), name


@dataclasses.dataclass(eq=False)
class _Engine:
    """What the scheduler of an engine is doing.

    Attributes:
      state: `absent`: not in a rollout; `busy`: it will soon call a program or wait; `waiting`: for
        something else; `calling`: a program, which has not started.
      name, arguments: Program that it calls, and its host arrays.
      since: Number of the program that was the next one when it called.
      result: Its outputs.
      error: Failure of a program that took the contents of its lanes; None: there was none.
    """

    state: Literal["absent", "busy", "waiting", "calling"] = "absent"
    name: str = ""
    arguments: Any = None
    since: int = 0
    result: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)
    error: BaseException | None = None


class Lockstep:
    """The device state of all engines, and the thread that runs their programs.

    Args:
      model: The policy on the mesh of all devices, each tensor group of which is an engine.
      config: All settings.
      donate: Whether to delete the model's parameters after conversion.

    Attributes:
      num_local: Number of engines of this process.
      num_releases: Number of times that the caches were freed.
    """

    def __init__(self, model: Policy, config: settings.Config, *, donate: bool = False):
        self._model, self._config, self._donate = model, config, donate
        (first, *_) = jax.tree.leaves(nnx.state(model))
        self.num_local = sharding.num_local_batch_shards(first.sharding.mesh)
        self.num_releases = self._num_programs = 0
        self.programs: LockstepPrograms | None = None
        self._engines: list[_Engine] = []
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = RuntimeError("no rollout is in progress")
        self._cache: Stacked | None = None
        self._store: Stacked | None = None
        self._params: nnx.State | None = None

    def join(self, *, next_state: np.ndarray, allowed: np.ndarray, running: int) -> "_Runner":
        """Return the runner of the next engine of this process.

        Args:
          next_state: Transition table of the stop automaton, int16[states, V].
          allowed: Tokens that may be sampled, bool[V].
          running: `stop.StopTable.running`.
        """
        with self._changed:
            if self.programs is None:
                self.programs = LockstepPrograms(
                    self._model, self._config, states=len(next_state), running=running
                )
                self._padding = self.programs.padding()
                self._tables = tuple(
                    jax.make_array_from_callback(x.shape, self.programs.replicated, x.__getitem__)
                    for x in (next_state, allowed)
                )
                params = nnx.split(self._model)[1]
                self._params = self.prepare(params)
                if self._donate:
                    jax.tree.map(lambda x: x.delete(), params)
            self._engines.append(_Engine())
            return _Runner(self, len(self._engines) - 1)

    # Memory

    def release(self) -> None:
        self.release_caches()
        self._params = None

    def release_caches(self) -> None:
        """Free the caches of all engines, unless some are in a rollout, which need theirs."""
        with self._changed:
            if all(engine.state == "absent" for engine in self._engines):
                self._drop_caches()

    def _drop_caches(self) -> None:
        self._cache = self._store = None
        self.num_releases += 1

    def has_params(self) -> bool:
        return self._params is not None

    def prepare(self, params: nnx.State) -> nnx.State:
        assert self.programs is not None
        with self.programs.context():
            return self.programs.load(None)(params)

    def install(self, prepared: nnx.State) -> None:
        self._params = prepared

    # Rollouts

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run programs during a block, and at its end those of other processes until theirs end.

        All processes must enter it. If the block raises, they are not waited for.
        """
        self._closing, self._error = False, None
        thread = threading.Thread(target=self._run, name="lockstep", daemon=True)
        thread.start()
        failed = True
        try:
            yield
            failed = False
        except (GeneratorExit, RolloutStopped):  # the caller needs no more episodes
            failed = False
            raise
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            if not failed:
                thread.join()
                if self._error is not None:
                    raise self._error
            self._error = RuntimeError("no rollout is in progress")

    @contextlib.contextmanager
    def state(self, engine: int, state: Literal["busy", "waiting"]) -> Iterator[None]:
        """Set the state of an engine in a block, and restore it afterwards."""
        before = self._set_state(engine, state)
        try:
            yield
        finally:
            self._set_state(engine, before)

    def _set_state(self, engine: int, state: Any) -> Any:
        with self._changed:
            own = self._engines[engine]
            before, own.state = own.state, state
            if state == "absent":
                own.error = None
            self._changed.notify_all()
            return before

    def call(self, engine: int, name: str, arguments: Any) -> Any:
        """Wait until a program of this name has started with the arguments of an engine.

        Args:
          engine: Index of the engine in this process.
          name: Name of the program, see `Programs.calls`.
          arguments: Its host arrays.

        Returns:
          Its outputs of this engine, see `_part`.
        """
        with self._changed:
            own = self._engines[engine]
            if error := self._error or own.error:
                raise error
            own.name, own.arguments, own.since = name, arguments, self._num_programs
            own.result, own.state = concurrent.futures.Future(), "calling"
            self._changed.notify_all()
        return own.result.result()

    # The thread

    def _run(self) -> None:
        try:
            while True:
                name = processes.decide("next program", self._settled_calls(), self._decide)
                if name == "end":
                    return
                if name:
                    self._start_or_fail(name)
                elif processes.count() > 1:
                    with self._changed:
                        self._changed.wait(_POLL_SECONDS)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._fail_engines(error)

    def _settled_calls(self) -> list[list[Any]] | None:
        """Wait until no engine of this process is busy, and return their calls; None: at the end.

        A process that runs alone also waits for a call, or the end.
        """

        def is_settled() -> bool:
            states = {engine.state for engine in self._engines}
            if "busy" in states:
                return False
            return processes.count() > 1 or "calling" in states or self._closing

        with self._changed:
            self._changed.wait_for(is_settled)
            if self._closing and all(engine.state == "absent" for engine in self._engines):
                return None
            return [[e.name, e.since] for e in self._engines if e.state == "calling"]

    def _decide(self, values: Sequence[list[list[Any]] | None]) -> str | None:
        """Return the next program by the calls of all processes; `end`: all are at the end."""
        if all(calls is None for calls in values):
            return "end"
        calls = [(name, since) for calls in values if calls for name, since in calls]
        return choose(calls, self._num_programs)

    def _start_or_fail(self, name: str) -> None:
        """Start a program. If that fails, all engines have lost their caches, which it may have
        taken; with several processes, this one ends.
        """
        try:
            self._start(name)
        except Exception as error:
            if processes.count() > 1:
                raise
            with self._changed:
                self._fail_engines(error)

    def _fail_engines(self, error: BaseException) -> None:
        self._drop_caches()
        for engine in self._engines:
            if engine.state != "absent":
                engine.error = error
            if engine.state == "calling":
                engine.state = "busy"
            if not engine.result.done():
                engine.result.set_exception(error)

    def _start(self, name: str) -> None:
        """Start a program for the engines that have called it, and give them its outputs."""
        padding = self._padding[name]
        with self._changed:
            callers = {
                index: engine for index, engine in enumerate(self._engines)
                if engine.state == "calling" and engine.name == name
            }  # fmt: skip
            arguments = [
                callers[index].arguments if index in callers else padding
                for index in range(self.num_local)
            ]
            outputs = self._start_program(name.partition(" ")[0], self._put(arguments))
            self._num_programs += 1
            for index, engine in callers.items():
                engine.state, engine.arguments = "busy", None
                engine.result.set_result(_part(outputs, self._first + index))
            self._changed.notify_all()

    def _start_program(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        """Start a program on all devices; return its outputs, which are not donated to another."""
        programs = self.programs
        assert programs is not None
        with programs.context():
            if self._cache is None:
                self._cache, self._store = programs.empty()
            match kind:
                case "encode":
                    self._store, output = programs.encode(self._params, self._store, *arguments)
                case "extend":
                    output, self._cache = programs.extend(
                        self._params, self._cache, *arguments, self._store
                    )
                case "decode":
                    rows, *scalars = arguments
                    output, self._cache = programs.decode(
                        self._params, self._cache, rows, *self._tables, *scalars,
                        **programs.decode_settings,
                    )  # fmt: skip
                case "read_pages":
                    output = programs.read_pages(self._cache, *arguments)
                case "fork":
                    self._cache, output = programs.fork(self._cache, *arguments), _NOTHING
                case "write_pages":
                    self._cache, output = programs.write_pages(self._cache, *arguments), _NOTHING
        return output

    @property
    def _first(self) -> int:
        """Index of the first engine of this process in the mesh."""
        return processes.index() * self.num_local

    def _put(self, arguments: Sequence[Any]) -> Any:
        """Return host arrays of this process's engines as arrays of all engines."""
        programs = self.programs
        assert programs is not None

        def put(*parts):
            local = np.stack(parts)
            shape = (programs.num_engines, *local.shape[1:])
            return jax.make_array_from_process_local_data(programs.per_engine, local, shape)

        structures = [jax.tree.structure(argument) for argument in arguments[0]]
        leaves = [[jax.tree.leaves(argument) for argument in engine] for engine in arguments]
        return tuple(
            Stacked([put(*parts) for parts in zip(*engines, strict=True)], structure)
            for structure, *engines in zip(structures, *leaves, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Part of an array that an engine has.

    Attributes:
      index: Place of the part in the array of the engine.
      data: The part, with an axis of size 1 for the engine.
    """

    index: tuple[slice, ...]
    data: jax.Array


def _part(outputs: Any, engine: int) -> Any:
    """Return `Stacked` outputs with the shards of one engine, a list of them for each array."""

    def part(x: jax.Array) -> list[_Shard]:
        shards = {}  # by index, as devices may have copies
        for shard in x.addressable_shards:
            if (shard.index[0].start or 0) == engine:
                shards[str(shard.index)] = _Shard(shard.index[1:], shard.data)
        return list(shards.values())

    return _map_stacked(lambda output: output.map(part), outputs)


def _fetch(outputs: Any) -> Any:
    """Return outputs from `_part` as trees of host arrays, after waiting for them."""

    def fetch(shards: list[_Shard]) -> np.ndarray:
        parts = [(shard.index, np.asarray(shard.data)) for shard in shards]
        parts = [(index, data.reshape(data.shape[1:])) for index, data in parts]
        if len(parts) == 1:
            return parts[0][1]
        ends = [[i.stop or n for i, n in zip(index, x.shape, strict=True)] for index, x in parts]
        result = np.empty(np.max(ends, axis=0), parts[0][1].dtype)
        for index, data in parts:
            result[index] = data
        return result

    return _map_stacked(lambda output: output.map(fetch).tree(), outputs)


def _map_stacked(function: Callable[[Stacked], Any], outputs: Any) -> Any:
    return jax.tree.map(function, outputs, is_leaf=lambda x: isinstance(x, Stacked))


class _Runner:
    """Runner of one engine, see `runner.Runner`."""

    def __init__(self, lockstep: Lockstep, engine: int):
        assert lockstep.programs is not None
        self.programs: Programs = lockstep.programs
        self._lockstep, self._engine = lockstep, engine
        self.release, self.release_caches = lockstep.release, lockstep.release_caches
        self.has_params, self.prepare = lockstep.has_params, lockstep.prepare
        self.install = lockstep.install

    @property
    def num_releases(self) -> int:
        return self._lockstep.num_releases

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        with self._lockstep.state(self._engine, "busy"):
            yield

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        return self._lockstep.state(self._engine, "waiting")

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._lockstep.call(self._engine, name, arguments)

    def fetch(self, sampled: Any) -> SampledTokens:
        return _fetch(sampled)

    def encode(self, images: ImageRows, slots: np.ndarray) -> Any:
        return self._call(self.programs.encode_name(images), images, slots)

    def extend(self, new: cache.PrefillBatch) -> Any:
        return self._call(self.programs.extend_name(new), new)

    def decode(self, rows: Rows, seed: int, leave_at: int) -> Any:
        return self._call("decode", rows, np.int32(seed), np.int32(leave_at))

    def fork(self, source: int, target: int, from_lane: int, to_lane: int) -> None:
        self._call("fork", *map(np.int32, (source, target, from_lane, to_lane)))

    def read_pages(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        return _fetch(self._call("read_pages", index))

    def write_pages(self, index: np.ndarray, contents: tuple[np.ndarray, ...]) -> None:
        self._call("write_pages", index, contents)
