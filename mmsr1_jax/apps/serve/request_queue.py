"""Request queue between the page's server and the engines.

    server's asyncio loop                        one thread per engine (`rollout/dispatcher.py`)
    submit ──► waiting questions ──► dispatcher ──► lanes
           ◄── events (a queue per question) ◄── on_event, on_tokens

An episode equals that of `infer` for the same question: its index is 0 regardless of concurrent
requests.
"""

import asyncio
import collections
import contextlib
import dataclasses
from typing import Any

import numpy as np

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.episodes.turn_machine import Event
from mmsr1_jax.rollout.dispatcher import Dispatcher
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool, running_programs
from mmsr1_jax.utils.logs import log


@dataclasses.dataclass(eq=False)
class Question:
    """One request. Create it on the asyncio loop that reads its events.

    Attributes:
      text: Text of the question.
      image: Bytes of the image file.
      client: Address of the client.
      events: Queue of events, tuples of a name and its data: `begun`; `drawn` (tokens); `turn` (a
        `Turn`); `reply` (tokens of the user turn, all images so far, the `ToolCall` or None); and
        finally `end` (the episode), `failed`, or `evicted` (see `RequestQueue.submit`).
      disconnected: Whether the client has disconnected.
    """

    text: str
    image: bytes
    client: str = ""
    events: asyncio.Queue[tuple] = dataclasses.field(default_factory=asyncio.Queue)
    disconnected: bool = False
    _loop: asyncio.AbstractEventLoop = dataclasses.field(default_factory=asyncio.get_running_loop)

    def emit(self, *event: Any) -> None:
        """Add an event to `events`; may be called from any thread."""
        if not self.disconnected:
            with contextlib.suppress(RuntimeError):  # the loop is closed, as the server has stopped
                self._loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RequestExample(Example):
    """An example with a reference to its request."""

    request: Question


class RequestQueue:
    """First-in first-out queue that gives each question to the least loaded engine.

    If the queue is full, it is shared fairly: a client with few waiting questions evicts one of the
    client with the most.

    Args:
      engine: Engine or pool, for the exclusive use of this object until `close`.
      sampling: Sampling settings of all episodes.
    """

    def __init__(self, engine: Engine | EnginePool, sampling: settings.Sampling):
        self._engines = engine.engines if isinstance(engine, EnginePool) else [engine]
        self._waiting: collections.deque[Question] = collections.deque()
        self._active: list[set[Question]] = [set() for _ in self._engines]
        # A question stays in the queue, and can be withdrawn from it, until a lane is free.
        self._dispatcher = Dispatcher(
            self._engines, self, max_load=engine.config.rollout.lanes - 1, sampling=sampling
        )
        self._changed = self._dispatcher.changed
        self._programs = contextlib.ExitStack()
        self._programs.enter_context(running_programs(self._engines))
        self._dispatcher.start()

    def __len__(self) -> int:
        """Return the number of questions that wait for a lane."""
        return len(self._waiting)

    def has_capacity(self, client: str, max_waiting: int) -> bool:
        """Return whether a queue of at most `max_waiting` questions accepts one from a client."""
        with self._changed:
            return len(self._waiting) < max_waiting or self._evictable(client) is not None

    def submit(self, question: Question, max_waiting: int | None = None) -> None:
        """Append a question to the queue.

        Args:
          question: Question to answer.
          max_waiting: Maximum number of waiting questions; None: no limit. If the queue is full,
            the last question of the client with the most waiting questions is evicted. The new
            question itself is rejected if its client would then have at least as many.
        """
        with self._changed:
            if max_waiting is not None and len(self._waiting) >= max_waiting:
                evicted = self._evictable(question.client) or question
                evicted.emit("evicted")
                if evicted is question:
                    return
                self._waiting.remove(evicted)
            self._waiting.append(question)
            self._changed.notify_all()

    def _evictable(self, client: str) -> Question | None:
        """Return the question to evict: the last one of the client with the most waiting ones.

        Return None if `client`, with one more question, would have at least as many.
        """
        counts = collections.Counter(question.client for question in self._waiting)
        largest = max(counts, key=counts.__getitem__, default=client)
        if counts[client] + 1 >= counts[largest]:
            return None
        return next(q for q in reversed(self._waiting) if q.client == largest)

    def position(self, question: Question) -> int | None:
        """Return the number of questions ahead of this one, or None if it is not waiting."""
        with self._changed:
            return self._waiting.index(question) if question in self._waiting else None

    def withdraw(self, question: Question) -> None:
        """Drop a question whose client has disconnected.

        A waiting question is removed. One that has a lane runs to its end, which is bounded, since
        a lane cannot be preempted.
        """
        question.disconnected = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(question)

    def close(self) -> None:
        """Stop the threads, after the device programs that are running."""
        self._dispatcher.stop()
        self._programs.close()

    # Source of the dispatcher

    def has_next(self) -> bool:
        return bool(self._waiting)

    def is_exhausted(self) -> bool:
        return False

    def next_example(self, engine: int) -> tuple[int, Example] | None:
        if not self._waiting:
            return None
        question = self._waiting.popleft()
        self._active[engine].add(question)
        question.emit("started")
        return 0, _RequestExample(
            question=question.text, images=(question.image,), request=question
        )

    def on_event(self, engine: int, episode: Episode, event: Event) -> None:
        question = _request(episode)
        if event == "turn":
            question.emit("turn", episode.turns[-1])
        elif event == "reply":
            tokens, images = episode.segments[-1].tokens, tuple(episode.images)
            question.emit("reply", tokens, images, episode.last_call)
        else:
            with self._changed:
                self._active[engine].discard(question)
            question.emit("end", episode)

    def on_tokens(self, episode: Episode, tokens: np.ndarray) -> None:
        _request(episode).emit("tokens", tokens)

    def on_episode(self, engine: int, episode: Episode) -> None:
        pass

    def on_failure(self, engine: int, error: BaseException) -> bool:
        """Fail the questions in the engine's lanes and free its caches; no others are affected."""
        if not isinstance(error, Exception):
            raise error
        log.error(
            "engine %d failed; its questions in progress fail, waiting ones are not affected",
            engine, exc_info=error,
        )  # fmt: skip
        with self._changed:
            failed, self._active[engine] = self._active[engine], set()
        for question in failed:
            question.emit("failed")
        # The program that failed may have lost them, since they are donated.
        self._engines[engine].device.release_caches()
        return True

    def on_thread_end(self, engine: int) -> None:
        pass


def _request(episode: Episode) -> Question:
    assert isinstance(episode.example, _RequestExample)
    return episode.example.request
