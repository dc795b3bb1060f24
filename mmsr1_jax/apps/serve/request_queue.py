"""Where questions wait for the engines' lanes, and what happens to them is told to who asked.

    the page's asyncio loop                 a thread for each engine
    ask ──► waiting questions ──► take ──► lanes
        ◄── happened (a queue each) ◄── watch, drawn

An episode is what `infer` makes of the same question: its number is 0, whoever else asks meanwhile.
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

# Seconds after which an engine that only waits for tools looks whether someone has asked.
_LOOK_AGAIN = 0.02


@dataclasses.dataclass(eq=False)
class Question:
    """What one asks, once. To be made on the asyncio loop on which it is answered.

    Attributes:
      text: of the question.
      picture: a file's bytes.
      client: who asks, by address.
      happened: what has happened to it: `begun`; `drawn` (tokens); `turn` (a `Turn`); `reply`
        (tokens of the user turn, all pictures so far, the `ToolCall` or None); and at last `end`
        (the episode), `failed`, or `gave way` (see `Desk.ask`). Tuples, the name first.
      gone: nobody listens any more.
    """

    text: str
    picture: bytes
    client: str = ""
    happened: asyncio.Queue[tuple] = dataclasses.field(default_factory=asyncio.Queue)
    gone: bool = False
    _loop: asyncio.AbstractEventLoop = dataclasses.field(default_factory=asyncio.get_running_loop)

    def tell(self, *what: Any) -> None:
        """Adds to `happened`, from any thread."""
        if not self.gone:
            with contextlib.suppress(RuntimeError):  # the loop is over, and so is the server
                self._loop.call_soon_threadsafe(self.happened.put_nowait, what)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked(Example):
    """An example that knows whose it is."""

    by: Question


class Desk:
    """Hands questions to engines, the first come first, each to the engine with least to do.

    Args of the constructor:
      engine: nobody else may use it meanwhile.
      sampling: of all episodes.
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
        """Questions that wait for a lane."""
        return len(self._waiting)

    def has_room(self, client: str, most: int) -> bool:
        """Whether a client's next question could wait, with at most so many that do."""
        with self._changed:
            return len(self._waiting) < most or self._to_give_way(client) is not None

    def ask(self, question: Question, most: int | None = None) -> None:
        """Puts a question at the end of those that wait.

        Args:
          question: to be answered.
          most: that may wait; None: any number. Where there are more, the last one of the client
            with most of them gives way.
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
        """The last question of the client with most that wait; None: this client would have as
        many."""
        counts = collections.Counter(question.client for question in self._waiting)
        largest = max(counts, key=counts.__getitem__, default=client)
        if counts[client] + 1 >= counts[largest]:
            return None
        return next(q for q in reversed(self._waiting) if q.client == largest)

    def ahead(self, question: Question) -> int | None:
        """How many wait before this one; None: it does not wait."""
        with self._changed:
            return self._waiting.index(question) if question in self._waiting else None

    def leave(self, question: Question) -> None:
        """Nobody listens any more: it is dropped if it waits; if it is under way it goes on to its
        end, which is bounded, as a lane cannot be taken away."""
        question.gone = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(question)

    def close(self) -> None:
        """Ends the threads, after what the devices are just at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        """An engine's thread: rolls out while there are questions, then waits for some."""
        while self._wait(number):
            episodes = self._engines[number].rollout_part(
                functools.partial(self._take, number),
                rollouts=1,
                sampling=self._sampling,
                watch=functools.partial(self._watch, number),
                look_again=_LOOK_AGAIN,
                drawn=_drawn,
            )
            try:
                collections.deque(episodes, maxlen=0)
            except _Stopped:
                return
            except Exception:  # of the engine: it costs those who are in it, nobody after them
                logging.exception("the engine failed; it goes on with those who wait")
                with self._changed:
                    lost, self._under_way[number] = self._under_way[number], set()
                for question in lost:
                    question.tell("failed")
                self._engines[number].device.reset()

    def _wait(self, number: int) -> bool:
        """Until there is a question for an engine; False: there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._may_take(number))
            return not self._stopped

    def _may_take(self, number: int) -> bool:
        loads = [len(questions) for questions in self._under_way]
        return bool(self._waiting) and loads[number] < self._lanes and loads[number] == min(loads)

    def _take(self, number: int, count: int) -> list[tuple[int, Example]]:
        """A `Take`. Only what has a lane leaves those that wait, as long as one may leave them."""
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
        """A `Watch`."""
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
                self._changed.notify_all()  # another engine may have least to do now
            question.tell("end", episode)


class _Stopped(Exception):
    """Ends the loop of an engine."""


def _drawn(episode: Episode, tokens: np.ndarray) -> None:
    episode.example.by.tell("drawn", tokens)
