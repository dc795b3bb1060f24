"""State of a scheduler's episodes: groups that wait for lanes, and active episodes."""

import collections
import concurrent.futures
import dataclasses

import jax
import numpy as np

from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.rollout.prefill import PrefillChunk

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
      hidden: Final hidden state of the last prompt token, set after prefill.
      position: M-RoPE position of the token after the prompt.
    """

    index: int
    example: Example
    waiting: collections.deque[int]
    prompt: concurrent.futures.Future[Prompt]
    hidden: jax.Array | None = None
    position: int = 0


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
