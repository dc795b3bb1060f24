"""Episodes and rewards with given turns, calls and outcomes; their tokens are random."""

from collections.abc import Sequence

import numpy as np

from mmsr1_jax.episodes.episode import Episode, Example, Segment, ToolCall
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.rewards.reward_function import Reward

PROMPT_TOKENS, RESULT_TOKENS = 5, 2  # lengths of a prompt, and of a tool result
TEXT = {  # turns by what they do
    "image": "<reason>r</reason><search><img></search>",
    "text": "<reason>r</reason><text_search>q</text_search>",
    "nonsense": "r",
}


def answer(text: str) -> str:
    """Return a turn that answers with `text`."""
    return f"<reason>r</reason><answer>{text}</answer>"


def episode_of(
    *texts: str,
    sampled: int = 3,
    seed: int = 0,
    calls: Sequence[tuple[str, str, float]] = (),
    end: str = "answer",
    group: int = 0,
    index: int = 0,
    error: str | None = None,
    images: Sequence = (),
    example: Example | None = None,
) -> Episode:
    """Return an episode with given turns.

    Args:
      texts: Texts of the turns.
      sampled: Number of random tokens of each turn. Between two turns are a forced token and
        `RESULT_TOKENS` of a tool.
      seed: Seed of tokens and log-probs.
      calls: (kind, status, seconds) of the searches, one in each of the first turns.
      end, group, index, error, images, example: Fields of the episode.
    """
    rng = np.random.default_rng(seed)
    segments = [Segment("prompt", rng.integers(8, 500, PROMPT_TOKENS, np.int32))]
    for turn in range(len(texts)):
        if turn:
            segments.append(Segment("forced", rng.integers(8, 500, 1, np.int32)))
            segments.append(Segment("tool", rng.integers(8, 500, RESULT_TOKENS, np.int32)))
        logprobs = rng.normal(-6.2, 0.3, (2, sampled)).astype(np.float32)
        segments.append(Segment("model", rng.integers(8, 500, sampled, np.int32), *logprobs))
    return Episode(
        example=example or Example(question="?"), group=group, index=index, segments=segments,
        images=list(images), turns=[parse(text) for text in texts],
        calls=[ToolCall(turn=i, action=f"{kind}_search", query=None, status=status, seconds=s)
               for i, (kind, status, s) in enumerate(calls)],
        end=end, error=error,
    )  # fmt: skip


def reward_of(value: float, correct: float = False, format: bool = True) -> Reward:
    """Return a reward with its components."""
    return Reward(value, correct, format, 0, 1.0)
