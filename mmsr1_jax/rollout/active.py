"""State of a scheduler's episodes: groups that wait for lanes, and active episodes."""

import collections
import concurrent.futures
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.rollout.decode import SampledTokens
from mmsr1_jax.rollout.device import DecodeRow
from mmsr1_jax.rollout.prefill import PrefillChunk

# Source of examples: returns up to the given number of next examples with their indices, possibly
# none for now. It is called in each round of the loop, and may raise an exception to end it.
NextExamples = Callable[[int], list[tuple[int, Example]]]


class RolloutStopped(Exception):
    """The caller of a rollout wants no more of its episodes."""


# Callback for newly sampled tokens, int32[n]: the next tokens of the episode's current turn. They
# become part of the episode when the turn ends.
OnTokens = Callable[[Episode, np.ndarray], None]

STOP_INTERVAL = 0.5  # seconds between two questions whether to stop while nothing else happens
SAMPLED = ("tokens", "logprobs", "sampling_logprobs")
NO_TOKENS = np.zeros(0, np.int32)


@dataclasses.dataclass(eq=False)
class Group:
    """An example and its episodes.

    Attributes:
      index: Index of the example.
      example: The example.
      waiting: Indices of the episodes that have no lane yet.
      prompt: Future of the tokenized prompt, computed in the pool.
      lane: Lane of the episode for which the prompt is written.
      is_written: Whether it has been written.
      position: M-RoPE position of the token after the prompt.
    """

    index: int
    example: Example
    waiting: collections.deque[int]
    prompt: concurrent.futures.Future[Prompt]
    lane: int = -1
    is_written: bool = False
    position: int = 0


class WaitingGroups:
    """Groups with episodes that have no lane yet, in order, and their prompts.

    Args:
      next_examples: Source of examples.
      group_size: Number of episodes per example.
      lanes: Number of lanes of the engine.
      make_prompt: Returns the prompt of an example; called in the pool.
      pool: Threads that prepare prompts.
    """

    def __init__(
        self,
        next_examples: NextExamples,
        group_size: int,
        lanes: int,
        make_prompt: Callable[[Example], Prompt],
        pool: concurrent.futures.ThreadPoolExecutor,
    ):
        self._next_examples, self._group_size = next_examples, group_size
        self._make_prompt, self._pool = make_prompt, pool
        # Number of examples to prepare in advance: enough for all lanes, and one more.
        self._num_prefetched = math.ceil(lanes / group_size) + 1
        self._groups: collections.deque[Group] = collections.deque()

    def __len__(self) -> int:
        return len(self._groups)

    def prefetch(self) -> None:
        """Start preparing the prompts of the next examples in the pool."""
        for index, example in self._next_examples(self._num_prefetched - len(self._groups)):
            episodes = range(index * self._group_size, (index + 1) * self._group_size)
            prompt = self._pool.submit(self._make_prompt, example)
            self._groups.append(Group(index, example, collections.deque(episodes), prompt))

    def first(self) -> Group:
        """Return the first group."""
        return self._groups[0]

    def pop(self) -> None:
        """Remove the first group."""
        self._groups.popleft()
        self.prefetch()


@dataclasses.dataclass(eq=False)
class ActiveEpisode:
    """An active episode and its lane.

    Attributes:
      episode: Record of the episode so far.
      group: Group of the episode.
      lane: Lane of the episode.
      chunks: Chunks still to be written into the lane, in reverse order.
      position: M-RoPE position of the next token.
      length: Number of tokens in the lane.
      num_sampled: Number of tokens sampled in all turns.
      budget: Remaining token budget of the current turn.
      stop_state: State of the stop automaton.
      sampled: Outputs of the decoding calls of the current turn, by the names in `SAMPLED`.
      forced_prefix: Tokens of the current turn up to a forced opening tag, int32[n]; None if no tag
        was forced.
      unwritten: Forced tokens at the end of the episode that are not in the lane yet, int32[n].
      tool_seconds: Seconds spent on tools.
      search_start: Start time of the current search, for the timeline.
    """

    episode: Episode
    group: Group
    lane: int
    chunks: list[PrefillChunk] = dataclasses.field(default_factory=list)
    position: int = 0
    length: int = 0
    num_sampled: int = 0
    budget: int = 0
    stop_state: int = 0
    sampled: dict[str, list[np.ndarray]] = dataclasses.field(
        default_factory=lambda: {name: [] for name in SAMPLED}
    )
    forced_prefix: np.ndarray | None = None
    unwritten: np.ndarray = dataclasses.field(default_factory=lambda: NO_TOKENS)
    tool_seconds: float = 0.0
    search_start: float = 0.0

    def decode_row(self) -> DecodeRow:
        """Return the state of the turn, to decode the next tokens."""
        return DecodeRow(
            lane=self.lane,
            length=self.length,
            stop_state=self.stop_state,
            position=self.position,
            episode=self.episode.index,
            num_sampled=self.num_sampled,
            budget=self.budget,
        )

    def add_sampled(self, output: SampledTokens, row: int) -> None:
        """Add the tokens of one row of a decoding call to the turn."""
        n = int(output.count[row])
        for name in SAMPLED:
            self.sampled[name].append(getattr(output, name)[row, :n])
        self.position += n
        self.length += n
        self.num_sampled += n
        self.budget -= n
        self.stop_state = int(output.stop_state[row])
