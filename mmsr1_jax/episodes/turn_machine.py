"""State machine of an episode: its transitions after each turn of the policy, and its record.

    start ──► [turn] ──► finish_turn ──┬──► Search ──► tool ──► add_reply ──┬──► [turn] ..
                                       ├──► a notice, added at once ────────┤
                                       └──► end                             └──► end (out of budget)

`rollout/scheduler.py` samples the turns and `scripted.py` replays given ones; they also differ in
how they wait for tools. All other transitions are implemented here: the order of the segments,
images and searches, the token budgets, the events, and the reason why the episode ends.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from mmsr1_jax.episodes.episode import EndReason, Episode, Example, Segment
from mmsr1_jax.episodes.rules import Reply, Rules
from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.tools import Observation, Query, Tool

# Progress of an episode: the policy's turn has ended, the user turn after it has been added, or the
# episode has ended.
Event = Literal["turn", "reply", "end"]
# Callback for the progress of an episode, called after the episode has been updated.
OnEvent = Callable[[Episode, Event], None]


@dataclasses.dataclass(frozen=True)
class Search:
    """Search that a turn requested. `TurnMachine.call` executes it, `reply` formats its result.

    Attributes:
      query: Query for the tool.
      example: Question of the episode.
      turn: Index of the turn.
      closing: Tokens that close the turn, int32[n].
      budget: Token budget of the user turn with the results.
    """

    query: Query
    example: Example
    turn: int
    closing: np.ndarray
    budget: int


class TurnMachine:
    """Transitions of episodes under given rules.

    Args:
      rules: Rules of the episodes.
      processor: Processor of the policy.
      on_event: Callback for the progress of episodes.
    """

    def __init__(
        self,
        rules: Rules,
        processor: Processor,
        on_event: OnEvent = lambda episode, event: None,
    ):
        self.rules = rules
        self._processor, self._on_event = processor, on_event

    def start(self, example: Example, prompt: Prompt, *, group: int, index: int) -> Episode:
        """Return a new episode with its prompt, from `Rules.initial_prompt`."""
        episode = Episode(example=example, group=group, index=index)
        episode.segments.append(Segment("prompt", prompt.tokens))
        episode.images += prompt.images
        return episode

    def fail(self, example: Example, error: Exception, *, group: int, index: int) -> Episode:
        """Return an episode that has ended because its question or an image is unusable."""
        episode = Episode(example=example, group=group, index=index)
        episode.error = f"{type(error).__name__}: {error}"
        self.end(episode, "error")
        return episode

    def finish_turn(
        self, episode: Episode, turn: Turn, *, has_end_token: bool = False, truncated: bool = False
    ) -> Search | Prompt | None:
        """Record a turn of the policy, and take the next step.

        Args:
          episode: The episode, whose segments already contain the turn's tokens.
          turn: The parsed turn.
          has_end_token: Whether the turn's last token is the one that ends a chat message.
          truncated: Whether the turn reached its token limit.

        Returns:
          A search to execute, whose result is passed to `add_reply`; or the tokens added after
          the turn, with their images; or None if the episode has ended.
        """
        episode.turns.append(turn)
        self._on_event(episode, "turn")
        step = self.rules.next_step(episode.turns, episode.calls, truncated)
        if step.kind == "end":
            assert step.end is not None
            self.end(episode, step.end)
            return None
        closing = np.array(self._processor.closing()[int(has_end_token) :], np.int32)
        budget = self.rules.token_budget(episode, len(closing))
        if step.kind == "search":
            return self._search(episode, closing, budget)
        return self._add(episode, closing, self.rules.notice(step, episode, budget))

    def _search(self, episode: Episode, closing: np.ndarray, budget: int) -> Search:
        example, turn = episode.example, episode.turns[-1]
        assert turn.action is not None
        query = Query(
            action=turn.action,
            text=turn.payload,
            question=example.question,
            images=tuple(example.images),
            example=example.id,
        )
        return Search(query, example, len(episode.turns) - 1, closing, budget)

    async def call(self, search: Search, tool: Tool | None, timeout: float) -> Observation:
        """Call the tool of a search. Raises the exceptions of `Rules.call_tool`."""
        return await self.rules.call_tool(tool, search.query, timeout)

    def reply(
        self,
        search: Search,
        observation: Observation | None,
        error: BaseException | None,
        seconds: float,
    ) -> Reply:
        """Return the user turn after a search. Thread-safe, since it does not change the episode.

        Args:
          search: The search.
          observation: Result of `call`; None if it raised `error`.
          error: Exception that `call` raised.
          seconds: Seconds that the call took.
        """

        def reply(observation: Observation | None, error: BaseException | None) -> Reply:
            return self.rules.tool_reply(
                search.query, search.example, search.turn, search.budget, observation, error,
                seconds,
            )  # fmt: skip

        try:
            return reply(observation, error)
        except Exception as unforeseen:  # a tool may return objects that raise
            return reply(None, unforeseen)

    def add_reply(self, episode: Episode, search: Search, reply: Reply) -> Prompt | None:
        """Add the user turn after a search, or end the episode if it does not fit.

        Returns:
          The tokens added after the policy's turn, with their images; None if the episode has
          ended.
        """
        return self._add(episode, search.closing, reply)

    def _add(self, episode: Episode, closing: np.ndarray, reply: Reply) -> Prompt | None:
        if reply.call is not None:
            episode.calls.append(reply.call)
        if reply.prompt is None:
            self.end(episode, "tokens")
            return None
        episode.segments.append(Segment("forced", closing))
        episode.segments.append(Segment("tool", reply.prompt.tokens))
        episode.images += reply.prompt.images
        self._on_event(episode, "reply")
        return Prompt(np.concatenate([closing, reply.prompt.tokens]), reply.prompt.images)

    def end(self, episode: Episode, reason: EndReason) -> None:
        """End an episode."""
        episode.end = reason
        self._on_event(episode, "end")
