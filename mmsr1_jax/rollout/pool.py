"""Engines on all devices of a node, as one.

    examples ──► the engine that has least left to do ──► its lanes, in a thread of its own
             ◄── episodes, as they end on any of them

An episode is what it would be on a single engine: its number is that of its example's place in the
whole call, and nothing else of it depends on who rolls it out.
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
from mmsr1_jax.rollout.device import Counts
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.scheduler import Watch
from mmsr1_jax.tools import Tool

# Seconds after which an engine that only waits for tools looks whether there is something else:
# little beside the time of a search, and long beside the time that looking takes.
_LOOK_AGAIN = 0.02


class EnginePool:
    """Rolls out episodes on several engines, to be used like an `Engine`.

    Each engine calls the tools in a loop of its own, so limits that a tool keeps for each asyncio
    loop (`Service`: calls at a time and in a second, identical calls made once) count for each
    engine; `make_engine` gives each its share of the settings'.

    Args of the constructor:
      models: the same policy on disjoint groups of devices, one for each engine. The engines are
        made in threads, so that they compile at the same time.
      processor, config, tools: as of `Engine`; lanes and rows are of each engine.

    Attributes:
      engines: as the models.
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
    def counts(self) -> Counts:
        """What all devices have done together."""
        every = [dataclasses.asdict(engine.counts) for engine in self.engines]
        return Counts(**{name: sum(one[name] for one in every) for name in every[0]})

    def load(self, params: nnx.State) -> None:
        """Takes the trainer's parameters, as `Engine.load`, by one program for all engines. Beside
        the engines' old parameters each device holds one more copy meanwhile, in their dtype.

        Raises:
          RuntimeError: while a rollout is under way.
        """
        if self._busy:
            raise RuntimeError("EnginePool.load: a rollout is under way")
        prepared = self.engines[0].device.prepare(params)
        for engine in self.engines:
            engine.device.take(prepared)

    def make_rules(
        self, limits: settings.Turns, texts: Mapping[str, str], forced: Sequence[Action] = ()
    ) -> Rules:
        """As `Engine.make_rules`."""
        return self.engines[0].make_rules(limits, texts, forced)

    def close(self) -> None:
        """Ends the threads of tools and preparation."""
        for engine in self.engines:
            engine.close()

    def rollout(
        self,
        examples: Iterable[Example],
        *,
        rollouts: int = 1,
        sampling: settings.Sampling | None = None,
        watch: Watch = lambda episode, event: None,
        rules: Rules | None = None,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[Episode]:
        """Yields episodes as they end, as `Engine.rollout` does.

        `examples` is read, and `watch` called, in the engines' threads, one at a time. Engines do
        not wait for who takes the episodes. Where one of them fails, or the iterator is closed
        early, all stop after what their devices are just at.

        Raises:
          RuntimeError: another rollout of this pool is under way.
          ValueError: settings of sampling that cannot be.
          Whatever an engine, `examples` or `watch` raised.
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
                watch(episode, event)

        def work(number: int) -> None:
            try:
                episodes = self.engines[number].rollout_part(
                    functools.partial(shared.take, number),
                    rollouts=rollouts,
                    sampling=sampling,
                    watch=watch_in_turn,
                    rules=rules,
                    look_again=_LOOK_AGAIN,
                )
                for episode in episodes:
                    shared.ended(number)
                    shared.found.put(episode)
                shared.found.put(None)
            except _Stopped:
                pass
            except BaseException as error:  # it belongs to who takes the episodes
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
    """What ended an engine's thread."""

    error: BaseException


class _Stopped(Exception):
    """Ends the loop of an engine: nobody wants its episodes any more."""


class _Shared:
    """What the engines of one rollout share: examples, handed out one by one, and episodes.

    Args of the constructor:
      examples, numbers: as of `EnginePool.rollout`.
      engines: how many.
      rollouts: episodes of each example.
      lanes: of each engine.

    Attributes:
      found: episodes that have ended; None where an engine has done its part; or a `_Failure`.
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
        self._left = [0] * engines  # episodes that each has still to end
        self._lock = threading.Lock()
        self._stopped = False

    def take(self, engine: int, count: int) -> list[tuple[int, Example]]:
        """A `Take`. An engine gets the next example while no other has less left to do, and up to
        one more than its lanes hold; one that has nothing to do gets one if there is any."""
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
        """One episode of an engine."""
        with self._lock:
            self._left[engine] -= 1

    def stop(self) -> None:
        """Ends all loops at their next `take`."""
        with self._lock:
            self._stopped = True
