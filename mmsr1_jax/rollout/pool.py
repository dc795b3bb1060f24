"""Data-parallel rollout: engines on all devices of a node behind one interface.

    examples ──► dispatcher ──► the least loaded engine ──► its lanes, in its own thread
             ◄── episodes, as they end on any engine

An episode is identical to one from a single engine: its index follows from the position of its
example in the whole call, and nothing else in it depends on the engine.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.turn_machine import Event, OnEvent
from mmsr1_jax.episodes.turns import Action
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout.active import STOP_INTERVAL, RolloutStopped
from mmsr1_jax.rollout.device import EngineStats
from mmsr1_jax.rollout.dispatcher import Dispatcher
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.lockstep import Lockstep
from mmsr1_jax.rollout.timeline import Timeline
from mmsr1_jax.tools import Tool


class EnginePool:
    """Pool of rollout engines with the interface of `Engine`.

    Each engine calls tools in its own asyncio loop. State that a tool keeps per loop (in `Service`:
    concurrency, rate limit, merging of identical calls) therefore applies to each engine
    separately; `build.make_engine` gives each engine an equal part of the configured limits.

    Args:
      models: The same policy on disjoint groups of devices, one for each engine. The engines are
        created in threads, so that they compile concurrently.
      processor, config, tools, donate: As for `Engine`; the numbers of lanes and rows are per
        engine.
      lockstep: Engines of a slice that run their programs together, those of this process among
        them; `models` then has the policy on the whole slice for each of those.

    Attributes:
      engines: Engines, in the order of `models`.
    """

    def __init__(
        self,
        models: Sequence[Policy],
        processor: Processor,
        config: settings.Config,
        tools: Mapping[str, Tool] | None = None,
        *,
        donate: bool = False,
        lockstep: Lockstep | None = None,
    ):
        self.config = config
        self.processor = processor
        with (
            contextlib.nullcontext() if lockstep is None else lockstep.running(),
            concurrent.futures.ThreadPoolExecutor(len(models)) as threads,
        ):
            make_engine = functools.partial(
                Engine, processor=processor, config=config, tools=tools, donate=donate,
                lockstep=lockstep,
            )  # fmt: skip
            self.engines = list(threads.map(make_engine, models))
        self._busy = False

    @property
    def stats(self) -> EngineStats:
        """Counters of the work of all engines, summed."""
        stats = [dataclasses.asdict(engine.stats) for engine in self.engines]
        return EngineStats(**{name: sum(counts[name] for counts in stats) for name in stats[0]})

    def load(self, params: nnx.State) -> None:
        """Load the trainer's parameters, as `Engine.load` does, with one program for all engines.

        The memory of the old ones, and of the caches, is freed before.

        Raises:
          RuntimeError: A rollout is in progress.
        """
        self.release()
        prepared = self.engines[0].device.runner.prepare(params)
        for engine in self.engines:
            engine.device.install(prepared)

    def release(self) -> None:
        """Free the memory of all engines, as `Engine.release` does.

        Raises:
          RuntimeError: A rollout is in progress.
        """
        self._check_idle()
        for engine in self.engines:
            engine.release()

    def release_caches(self) -> None:
        """Free the caches of all engines, as `Engine.release_caches` does.

        Raises:
          RuntimeError: A rollout is in progress.
        """
        self._check_idle()
        for engine in self.engines:
            engine.release_caches()

    def _check_idle(self) -> None:
        if self._busy:
            raise RuntimeError("EnginePool: a rollout is in progress")

    def make_rules(
        self, limits: settings.Turns, texts: Mapping[str, str], forced: Sequence[Action] = ()
    ) -> Rules:
        """Return rules for a `rollout`, as `Engine.make_rules` does."""
        return self.engines[0].make_rules(limits, texts, forced)

    def close(self) -> None:
        """Shut down the threads that call tools and prepare prompts."""
        for engine in self.engines:
            engine.close()

    def rollout(
        self,
        examples: Iterable[Example],
        *,
        group_size: int = 1,
        sampling: settings.Sampling | None = None,
        on_event: OnEvent = lambda episode, event: None,
        rules: Rules | None = None,
        indices: Iterable[int] | None = None,
        timeline: Timeline | None = None,
        must_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Episode]:
        """Yield episodes as they end, as `Engine.rollout` does.

        The engines' threads read `examples` and call `on_event`, one thread at a time. Engines do
        not wait for the consumer of the episodes. If one fails, or the iterator is closed early,
        all engines stop after their current round.

        Raises:
          RuntimeError: Another rollout of this pool is in progress, or it has no parameters.
          ConfigError: The sampling settings are invalid.
          RolloutStopped: `must_stop` has returned True.
          Exception: Any exception raised by an engine, `examples` or `on_event`.
        """
        sampling = sampling or self.config.sampling
        settings.validate_sampling(sampling)
        if self._busy:
            raise RuntimeError("EnginePool.rollout: another rollout is in progress")
        self._busy = True
        timelines = None
        if timeline is not None:
            timelines = [timeline.engine(i, self.config) for i in range(len(self.engines))]
        source = _Examples(examples, itertools.count() if indices is None else indices, on_event)
        dispatcher = Dispatcher(
            self.engines,
            source,
            max_load=self.config.rollout.lanes,
            group_size=group_size,
            sampling=sampling,
            rules=rules,
            timelines=timelines,
        )
        try:
            with running_programs(self.engines):
                try:
                    dispatcher.start()
                    running = len(self.engines)
                    while running:
                        if must_stop is not None and must_stop():
                            raise RolloutStopped
                        try:
                            result = source.results.get(timeout=STOP_INTERVAL)
                        except queue.Empty:
                            continue
                        if isinstance(result, _Failure):
                            raise result.error
                        if result is None:
                            running -= 1
                        else:
                            yield result
                finally:
                    dispatcher.stop()
        finally:
            self._busy = False


def running_programs(engines: Sequence[Engine]) -> contextlib.AbstractContextManager[None]:
    """Return the context in which engines may run programs, see `Lockstep.running`."""
    lockstep = engines[0].lockstep
    return contextlib.nullcontext() if lockstep is None else lockstep.running()


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Exception that ended an engine's thread."""

    error: BaseException


class _Examples:
    """Examples of one rollout, as a `Source`.

    Args:
      examples, indices, on_event: As in `EnginePool.rollout`.

    Attributes:
      results: Queue of ended episodes. It also holds None for each engine that has finished, and a
        `_Failure` for each that failed.
    """

    def __init__(self, examples: Iterable[Example], indices: Iterable[int], on_event: OnEvent):
        self.results: queue.SimpleQueue[Episode | _Failure | None] = queue.SimpleQueue()
        self._indexed = zip(indices, examples, strict=False)
        self._exhausted = False
        self._on_event, self._event_lock = on_event, threading.Lock()

    def has_next(self) -> bool:
        return not self._exhausted

    def is_exhausted(self) -> bool:
        return self._exhausted

    def next_example(self, engine: int) -> tuple[int, Example] | None:
        indexed = next(self._indexed, None)
        self._exhausted = indexed is None
        return indexed

    def on_event(self, engine: int, episode: Episode, event: Event) -> None:
        with self._event_lock:
            self._on_event(episode, event)

    def on_tokens(self, episode: Episode, tokens: np.ndarray) -> None:
        pass

    def on_episode(self, engine: int, episode: Episode) -> None:
        self.results.put(episode)

    def on_failure(self, engine: int, error: BaseException) -> bool:
        self.results.put(_Failure(error))  # raised in the consumer's thread
        return False

    def on_thread_end(self, engine: int) -> None:
        self.results.put(None)
