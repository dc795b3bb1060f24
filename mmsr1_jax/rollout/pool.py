"""Data-parallel rollout: engines on all devices of a node behind one interface.

    examples ──► the least loaded engine ──► its lanes, in a thread of its own
             ◄── episodes, as they end on any engine

An episode is identical to one from a single engine: its number follows from the position of its
example in the whole call, and nothing else in it depends on the engine.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.turns import Action
from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout.device import EngineStats
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.scheduler import OnEvent
from mmsr1_jax.tools import Tool

# Seconds after which an engine that only waits for tools looks for other work: short compared with
# a search, and long compared with the cost of looking.
_LOOK_AGAIN = 0.02


class EnginePool:
    """Pool of rollout engines with the interface of `Engine`.

    Each engine calls tools in its own asyncio loop. State that a tool keeps per loop (in `Service`:
    concurrency, rate limit, merging of identical calls) therefore applies to each engine
    separately; `make_engine` gives each engine its share of the configured limits.

    Args:
      models: The same policy on disjoint groups of devices, one for each engine. The engines are
        created in threads, so that they compile concurrently.
      processor, config, tools: As for `Engine`; the numbers of lanes and rows are per engine.

    Attributes:
      engines: Engines, in the order of `models`.
    """

    def __init__(
        self,
        models: Sequence[Qwen2_5_VL],
        processor: Processor,
        config: settings.Config,
        tools: Mapping[str, Tool] | None = None,
    ):
        self.config = config
        self.processor = processor
        with concurrent.futures.ThreadPoolExecutor(len(models)) as threads:
            make = functools.partial(Engine, processor=processor, config=config, tools=tools)
            self.engines = list(threads.map(make, models))
        self._busy = False

    @property
    def stats(self) -> EngineStats:
        """Counters of the work of all engines, summed."""
        every = [dataclasses.asdict(engine.stats) for engine in self.engines]
        return EngineStats(**{name: sum(one[name] for one in every) for name in every[0]})

    def load(self, params: nnx.State) -> None:
        """Load the trainer's parameters, as `Engine.load` does, with one program for all engines.

        While it runs, each device holds a second copy of the parameters in the engine's dtype.

        Raises:
          RuntimeError: A rollout is in progress.
        """
        if self._busy:
            raise RuntimeError("EnginePool.load: a rollout is under way")
        prepared = self.engines[0].device.prepare(params)
        for engine in self.engines:
            engine.device.take(prepared)

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
        rollouts: int = 1,
        sampling: settings.Sampling | None = None,
        on_event: OnEvent = lambda episode, event: None,
        rules: Rules | None = None,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[Episode]:
        """Yield episodes as they end, as `Engine.rollout` does.

        The engines' threads read `examples` and call `on_event`, one thread at a time. Engines
        do not
        wait for the consumer of the episodes. If one fails, or the iterator is closed early, all
        engines stop after their current round.

        Raises:
          RuntimeError: Another rollout of this pool is in progress.
          ValueError: The sampling settings are invalid.
          Exception: Any exception raised by an engine, `examples` or `on_event`.
        """
        sampling = sampling or self.config.sampling
        settings.validate_sampling(sampling)
        if self._busy:
            raise RuntimeError("EnginePool.rollout: another rollout is under way")
        self._busy = True
        lanes = self.config.rollout.lanes
        shared = _Shared(examples, len(self.engines), rollouts, lanes, numbers)
        watching = threading.Lock()

        def watch_in_turn(episode: Episode, event: str) -> None:
            with watching:
                on_event(episode, event)

        def work(number: int) -> None:
            try:
                episodes = self.engines[number].rollout_part(
                    functools.partial(shared.take, number),
                    rollouts=rollouts,
                    sampling=sampling,
                    on_event=watch_in_turn,
                    rules=rules,
                    look_again=_LOOK_AGAIN,
                )
                for episode in episodes:
                    shared.ended(number)
                    shared.found.put(episode)
                shared.found.put(None)
            except _Stopped:
                pass
            except BaseException as error:  # re-raised in the consumer's thread
                shared.found.put(_Failure(error))

        threads = [
            threading.Thread(target=work, args=(number,), name=f"engine {number}", daemon=True)
            for number in range(len(self.engines))
        ]
        try:
            for thread in threads:
                thread.start()
            under_way = len(threads)
            while under_way:
                found = shared.found.get()
                if isinstance(found, _Failure):
                    raise found.error
                if found is None:
                    under_way -= 1
                else:
                    yield found
        finally:
            shared.stop()
            for thread in threads:
                thread.join()
            self._busy = False


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Exception that ended an engine's thread."""

    error: BaseException


class _Stopped(Exception):
    """Signal that ends an engine's loop because its episodes are no longer needed."""


class _Shared:
    """State shared by the engines of one rollout: the examples to hand out and the ended episodes.

    Args:
      examples, numbers: As in `EnginePool.rollout`.
      engines: Number of engines.
      rollouts: Number of episodes per example.
      lanes: Number of lanes of each engine.

    Attributes:
      found: Queue of ended episodes. It also holds None for each engine that has finished, and a
        `_Failure` for each that failed.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        engines: int,
        rollouts: int,
        lanes: int,
        numbers: Iterable[int] | None = None,
    ):
        self.found: queue.SimpleQueue[Episode | _Failure | None] = queue.SimpleQueue()
        numbers = itertools.count() if numbers is None else numbers
        self._numbered = zip(numbers, examples, strict=False)
        self._rollouts, self._lanes = rollouts, lanes
        self._left = [0] * engines  # unfinished episodes of each engine
        self._lock = threading.Lock()
        self._stopped = False

    def take(self, engine: int, count: int) -> list[tuple[int, Example]]:
        """Return the next examples for an engine, at most `count` (a `NextExamples`).

        An engine gets examples while no other has fewer unfinished episodes, up to one example more
        than its lanes hold. An idle engine always gets an example if any remain.
        """
        taken = []
        with self._lock:
            if self._stopped:
                raise _Stopped
            while len(taken) < count and self._left[engine] <= min(self._lanes, *self._left):
                numbered = next(self._numbered, None)
                if numbered is None:
                    break
                taken.append(numbered)
                self._left[engine] += self._rollouts
        return taken

    def ended(self, engine: int) -> None:
        """Record that one episode of an engine has ended."""
        with self._lock:
            self._left[engine] -= 1

    def stop(self) -> None:
        """End the loops of all engines at their next `take`."""
        with self._lock:
            self._stopped = True
