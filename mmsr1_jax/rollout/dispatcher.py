"""Dispatcher of examples to engines: each engine runs in its own thread, and takes the next example
while no other has fewer unfinished episodes.

    source ──► next_examples ──► engine.rollout_part ──► on_event, on_tokens, on_episode

The source supplies the examples in order, and handles episodes and failures: a rollout of a fixed
set of examples (`pool.py`), or requests that arrive at any time (`apps/serve/request_queue.py`).
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.turn_machine import Event, OnEvent
from mmsr1_jax.rollout.active import NextExamples, OnTokens
from mmsr1_jax.rollout.timeline import EngineTimeline

# Seconds after which an engine that only waits for tools requests further examples: short compared
# with a search, and long compared with the cost of a request.
_POLL_INTERVAL = 0.02


class Engine(Protocol):
    """Interface of `rollout.engine.Engine` that the dispatcher uses."""

    def rollout_part(
        self,
        next_examples: NextExamples,
        *,
        group_size: int,
        sampling: settings.Sampling,
        on_event: OnEvent,
        on_tokens: OnTokens,
        rules: Rules | None,
        poll_interval: float | None,
        timeline: EngineTimeline | None,
    ) -> Iterator[Episode]: ...


class Source(Protocol):
    """Supply of examples, and receiver of what the engines report.

    The first three methods are called with `Dispatcher.changed` held. The others are called by the
    engines' threads, possibly several at the same time.
    """

    def has_next(self) -> bool:
        """Return whether an example may be available."""
        ...

    def is_exhausted(self) -> bool:
        """Return whether the source has ended; the threads then end too."""
        ...

    def next_example(self, engine: int) -> tuple[int, Example] | None:
        """Return the next example and its index; None if no example is available."""
        ...

    def on_event(self, engine: int, episode: Episode, event: Event) -> None:
        """Handle an event of an episode, see `OnEvent`."""
        ...

    def on_tokens(self, episode: Episode, tokens: np.ndarray) -> None:
        """Handle sampled tokens, see `OnTokens`."""
        ...

    def on_episode(self, engine: int, episode: Episode) -> None:
        """Handle an ended episode."""
        ...

    def on_failure(self, engine: int, error: BaseException) -> bool:
        """Handle an exception of an engine; return whether its thread continues."""
        ...

    def on_thread_end(self, engine: int) -> None:
        """Handle the end of an engine's thread without an exception."""
        ...


class _Stopped(Exception):
    """Raised from `next_examples` to end the loop of an engine that is no longer needed."""


class Dispatcher:
    """Threads that roll out the examples of a source on several engines.

    Args:
      engines: Engines, for the exclusive use of this object until `stop`.
      source: Examples, and receiver of episodes.
      max_load: Maximum number of unfinished episodes of an engine that takes an example.
      group_size: Number of episodes per example.
      sampling: Sampling settings.
      rules: Rules from `make_rules`; None: those of the config.
      timelines: Recorder of each engine; None: nothing is recorded.

    Attributes:
      changed: Lock of the loads and the source. Notify it when the source has new examples.
      loads: Number of unfinished episodes of each engine.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        source: Source,
        *,
        max_load: int,
        group_size: int = 1,
        sampling: settings.Sampling,
        rules: Rules | None = None,
        timelines: Sequence[EngineTimeline] | None = None,
    ):
        self._engines, self._source, self._max_load = engines, source, max_load
        self._group_size, self._sampling, self._rules = group_size, sampling, rules
        self._timelines = timelines
        self.changed = threading.Condition()
        self.loads = [0] * len(engines)
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, args=(index,), name=f"engine {index}", daemon=True)
            for index in range(len(engines))
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads after the device programs that are running, and wait for them."""
        with self.changed:
            self._stopped = True
            self.changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:  # started
                thread.join()

    def next_examples(self, engine: int, count: int) -> list[tuple[int, Example]]:
        """Return the next examples for an engine, at most `count` (a `NextExamples`).

        An engine gets examples while it has at most `max_load` unfinished episodes and no other
        engine has fewer. An engine without any gets an example if the source has one.
        """
        taken: list[tuple[int, Example]] = []
        with self.changed:
            if self._stopped:
                raise _Stopped
            while len(taken) < count and self._may_take(engine):
                indexed = self._source.next_example(engine)
                if indexed is None:
                    break
                taken.append(indexed)
                self.loads[engine] += self._group_size
        return taken

    def finish_episode(self, engine: int) -> None:
        """Record that one episode of an engine has ended."""
        with self.changed:
            self.loads[engine] -= 1
            self.changed.notify_all()  # another engine may have the lowest load now

    def _may_take(self, engine: int) -> bool:
        load = self.loads[engine]
        return load <= self._max_load and load == min(self.loads) and self._source.has_next()

    def _run(self, engine: int) -> None:
        """Run an engine's thread: roll out while the source has examples, then wait for more."""
        while self._wait(engine):
            try:
                self._roll_out(engine)
            except _Stopped:
                return
            except BaseException as error:
                if not self._source.on_failure(engine, error):
                    return
                with self.changed:
                    self.loads[engine] = 0
                    self.changed.notify_all()
        self._source.on_thread_end(engine)

    def _wait(self, engine: int) -> bool:
        """Block until an engine may take an example. Return False if its thread should end."""

        def is_over() -> bool:
            return self._stopped or self._source.is_exhausted()

        with self.changed:
            self.changed.wait_for(lambda: is_over() or self._may_take(engine))
            return not is_over()

    def _roll_out(self, engine: int) -> None:
        def on_event(episode: Episode, event: Event) -> None:
            self._source.on_event(engine, episode, event)
            if event == "end":
                self.finish_episode(engine)

        episodes = self._engines[engine].rollout_part(
            functools.partial(self.next_examples, engine),
            group_size=self._group_size,
            sampling=self._sampling,
            on_event=on_event,
            on_tokens=self._source.on_tokens,
            rules=self._rules,
            poll_interval=_POLL_INTERVAL,
            timeline=None if self._timelines is None else self._timelines[engine],
        )
        for episode in episodes:
            self._source.on_episode(engine, episode)
