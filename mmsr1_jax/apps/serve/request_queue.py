"""Request queue between the page's server and the engines.

    server's asyncio loop                   one thread for each engine
    ask ──► waiting questions ──► take ──► lanes
        ◄── happened (a queue each) ◄── watch, drawn

An episode equals that of `infer` for the same question: its number is 0 regardless of concurrent
requests.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import threading
from typing import Any

import numpy as np

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool

# Interval in seconds at which an engine that only waits for tools polls for new questions.
_LOOK_AGAIN = 0.02


@dataclasses.dataclass(eq=False)
class Question:
    """One request. Create it on the asyncio loop that reads its events.

    Attributes:
      text: Text of the question.
      picture: Bytes of the image file.
      client: Address of the client.
      happened: Queue of events, tuples of a name and its data: `begun`; `drawn` (tokens); `turn` (a
        `Turn`); `reply` (tokens of the user turn, all images so far, the `ToolCall` or None); and
        finally `end` (the episode), `failed`, or `gave way` (see `RequestQueue.ask`).
      gone: Whether the client has disconnected.
    """

    text: str
    picture: bytes
    client: str = ""
    happened: asyncio.Queue[tuple] = dataclasses.field(default_factory=asyncio.Queue)
    gone: bool = False
    _loop: asyncio.AbstractEventLoop = dataclasses.field(default_factory=asyncio.get_running_loop)

    def tell(self, *what: Any) -> None:
        """Add an event to `happened`; may be called from any thread."""
        if not self.gone:
            with contextlib.suppress(RuntimeError):  # the loop is closed, as the server has stopped
                self._loop.call_soon_threadsafe(self.happened.put_nowait, what)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked(Example):
    """An example with a reference to its request."""

    by: Question


class RequestQueue:
    """First-in first-out queue that gives each question to the least loaded engine.

    Args:
      engine: Engine or pool, for the exclusive use of this object until `close`.
      sampling: Sampling settings of all episodes.
    """

    def __init__(self, engine: Engine | EnginePool, sampling: settings.Sampling):
        self._engines = engine.engines if isinstance(engine, EnginePool) else [engine]
        self._lanes, self._sampling = engine.config.rollout.lanes, sampling
        self._changed = threading.Condition()
        self._waiting: collections.deque[Question] = collections.deque()
        self._under_way: list[set[Question]] = [set() for _ in self._engines]
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"desk {number}", daemon=True)
            for number in range(len(self._engines))
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """Return the number of questions that wait for a lane."""
        return len(self._waiting)

    def has_room(self, client: str, most: int) -> bool:
        """Return whether the queue, with at most `most` questions, accepts one from a client."""
        with self._changed:
            return len(self._waiting) < most or self._to_give_way(client) is not None

    def ask(self, question: Question, most: int | None = None) -> None:
        """Append a question to the queue.

        Args:
          question: Question to answer.
          most: Maximum number of waiting questions; None: no limit. If the queue is full, the last
            question of the client with the most waiting questions is evicted. The new question
            itself is rejected if its client would then have at least as many.
        """
        with self._changed:
            if most is not None and len(self._waiting) >= most:
                last = self._to_give_way(question.client) or question
                last.tell("gave way")
                if last is question:
                    return
                self._waiting.remove(last)
            self._waiting.append(question)
            self._changed.notify_all()

    def _to_give_way(self, client: str) -> Question | None:
        """Return the question to evict: the last one of the client with the most waiting ones.

        Return None if `client`, with one more question, would have at least as many.
        """
        counts = collections.Counter(question.client for question in self._waiting)
        largest = max(counts, key=counts.__getitem__, default=client)
        if counts[client] + 1 >= counts[largest]:
            return None
        return next(q for q in reversed(self._waiting) if q.client == largest)

    def ahead(self, question: Question) -> int | None:
        """Return the number of questions ahead of this one, or None if it is not waiting."""
        with self._changed:
            return self._waiting.index(question) if question in self._waiting else None

    def leave(self, question: Question) -> None:
        """Drop a question whose client has disconnected.

        A waiting question is removed. One that has a lane runs to its end, which is bounded, since
        a lane cannot be preempted.
        """
        question.gone = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(question)

    def close(self) -> None:
        """Stop the threads, after the device programs that are running."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        """Run an engine's thread: roll out while questions arrive, then wait for more."""
        while self._wait(number):
            episodes = self._engines[number].rollout_part(
                functools.partial(self._take, number),
                rollouts=1,
                sampling=self._sampling,
                on_event=functools.partial(self._watch, number),
                look_again=_LOOK_AGAIN,
                on_tokens=_drawn,
            )
            try:
                collections.deque(episodes, maxlen=0)
            except _Stopped:
                return
            except Exception:  # an engine failure affects only the questions in its lanes
                logging.exception("the engine failed; waiting requests are not affected")
                with self._changed:
                    lost, self._under_way[number] = self._under_way[number], set()
                for question in lost:
                    question.tell("failed")
                self._engines[number].device.reset()

    def _wait(self, number: int) -> bool:
        """Block until an engine may take a question. Return False if the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._may_take(number))
            return not self._stopped

    def _may_take(self, number: int) -> bool:
        loads = [len(questions) for questions in self._under_way]
        return bool(self._waiting) and loads[number] < self._lanes and loads[number] == min(loads)

    def _take(self, number: int, count: int) -> list[tuple[int, Example]]:
        """Take questions (a `NextExamples`).

        A question stays in the queue, and can be withdrawn from it, until a lane is free.
        """
        taken: list[tuple[int, Example]] = []
        with self._changed:
            if self._stopped:
                raise _Stopped
            while len(taken) < count and self._may_take(number):
                question = self._waiting.popleft()
                self._under_way[number].add(question)
                asked = _Asked(question=question.text, images=(question.picture,), by=question)
                taken.append((0, asked))
                question.tell("begun")
        return taken

    def _watch(self, number: int, episode: Episode, event: str) -> None:
        """Forward an episode's events to its question (an `OnEvent`)."""
        question = episode.example.by
        if event == "turn":
            question.tell("turn", episode.turns[-1])
        elif event == "reply":
            last = episode.calls[-1] if episode.calls else None
            call = last if last is not None and last.turn == len(episode.turns) - 1 else None
            question.tell("reply", episode.segments[-1].tokens, tuple(episode.images), call)
        else:
            with self._changed:
                self._under_way[number].discard(question)
                self._changed.notify_all()  # another engine may be the least loaded one now
            question.tell("end", episode)


class _Stopped(Exception):
    """Raised to end the rollout loop of an engine."""


def _drawn(episode: Episode, tokens: np.ndarray) -> None:
    episode.example.by.tell("drawn", tokens)
