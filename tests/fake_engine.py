"""A stand-in for the rollout engine that returns given answers, for tests of training steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from mmsr1_jax.config import settings
from mmsr1_jax.data import Question
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.rollout.active import RolloutStopped
from tests.episode_factory import answer, episode_of


class FakeEngine:
    """Engine whose episodes have given answers, in random order.

    Args:
      answers: Answers of each question's episodes, by the question's ID; None is an episode that
        could not be run.

    Attributes:
      seeds: Sampling seeds of all calls of `rollout`.
    """

    def __init__(self, answers: Mapping[str, Sequence[str | None]]):
        self.answers, self.seeds = answers, []
        self._rng = np.random.default_rng(0)

    def rollout(
        self,
        examples: Sequence[Example],
        *,
        group_size: int,
        sampling: settings.Sampling,
        indices: Iterable[int],
        timeline: None = None,
        must_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Episode]:
        if must_stop is not None and must_stop():
            raise RolloutStopped
        self.seeds.append(sampling.seed)
        episodes = []
        for group, example in zip(indices, examples, strict=True):
            assert len(self.answers[example.id]) == group_size
            for i, text in enumerate(self.answers[example.id]):
                turns = [] if text is None else [answer(text)]
                outcome = {"end": "error", "error": "no image"} if text is None else {}
                episodes.append(
                    episode_of(*turns, group=group, index=group * group_size + i, example=example,
                               **outcome)
                )  # fmt: skip
        return iter([episodes[i] for i in self._rng.permutation(len(episodes))])


def question_batches(ids: Sequence[str] | Mapping, size: int) -> Iterator[list[Question]]:
    """Yield batches of `size` questions, whose gold answers are "right" and "correct"."""
    questions = [
        Question(id=name, question=f"Which {name}?", images=(b"",), answers=("right", "correct"))
        for name in ids
    ]
    return iter([questions[i : i + size] for i in range(0, len(questions), size)])


def step_config(
    prompts_per_step: int = 3,
    group_size: int = 2,
    rewards: settings.Rewards | None = None,
    **objective,
) -> settings.Config:
    """Return the settings of a training step; keywords are fields of `objective`."""
    return settings.Config(
        objective=settings.Objective(**objective),
        run=settings.Run(prompts_per_step=prompts_per_step, group_size=group_size),
        rewards=rewards or settings.Rewards(),
    )
