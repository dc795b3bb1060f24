"""Episodes of a training step: their rewards, their record on disk, and validation."""

import asyncio
import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence

from mmsr1_jax.config import settings
from mmsr1_jax.data import Question, QuestionSource, validation
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.rewards.reward_function import Reward, episode_reward
from mmsr1_jax.rl import train_batch
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.training import metrics
from mmsr1_jax.training.sft_dataset import to_line
from mmsr1_jax.utils import fallbacks, outputs
from mmsr1_jax.utils.logs import log

# Log text for answers without a verdict, by `Verdict.outcome`.
_OUTCOME_MESSAGES = {
    "failed": "could not be judged; their episodes are skipped",
    "unreadable": "got a reply without a verdict and count as wrong",
}


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Episodes of a training step.

    Attributes:
      groups: Groups to train on, without episodes that could not be run or judged.
      episodes: All episodes of the step, with their rewards.
      questions: Questions of the episodes, indexed by `Episode.group`.
      num_groups_with_variance: Number of sampled groups whose rewards differ.
    """

    groups: list[train_batch.Group]
    episodes: list[tuple[Episode, Reward]]
    questions: list[Question]
    num_groups_with_variance: int

    @property
    def training_episodes(self) -> train_batch.Group:
        """All episodes of `groups`, with their rewards."""
        return list(itertools.chain(*self.groups))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the episodes, and of their groups."""
        episodes, rewards = zip(*self.episodes, strict=True)
        categories = [self.questions[episode.group].category for episode in episodes]
        return metrics.episode_metrics(episodes, rewards, categories) | {
            "tool/partial": metrics.partial_search_fraction(episodes),
            "groups/sampled": float(len(self.questions)),
            "groups/with_variance": self.num_groups_with_variance / len(self.questions),
        }

    def warn_of_failed_searches(self, step: int) -> None:
        """Log the first search in this process that failed or lacked results."""
        for episode, _ in self.episodes:
            for call in episode.calls:
                if call.notes and call.status in ("ok", "failed"):
                    message = f"searches fail or lack results, the first one: {call.notes[0]}"
                    fallbacks.warn_once(
                        "tool", f"step {step}: {message}; see tool/failed and tool/partial"
                    )


def compute_rewards(
    episodes: Sequence[Episode], questions: Sequence[Question], config: settings.Config,
    judge: Judge | None, *, step: int,
) -> list[Reward]:  # fmt: skip
    """Return the rewards of episodes at a training step, counted from 0.

    `Episode.group` is the index of an episode's question. If a judge request fails, the reward is
    not `known`; the number of such episodes is logged.

    Raises:
      ServiceRefusedError: The judge refuses all requests.
    """
    pairs = [(episode, questions[episode.group]) for episode in episodes]
    if judge is None:
        return [
            episode_reward(episode, question.answers, config.rewards, step)
            for episode, question in pairs
        ]

    async def judge_all():
        return await asyncio.gather(*(
            judge.judge(question.question, question.answers, episode.answer)
            for episode, question in pairs
        ))  # fmt: skip

    verdicts = asyncio.run(judge_all())
    for outcome, consequence in _OUTCOME_MESSAGES.items():
        reasons = collections.Counter(v.reason for v in verdicts if v.outcome == outcome)
        if reasons:
            log.warning(
                "step %d: %d of %d answers %s (%s)",
                step + 1, reasons.total(), len(verdicts), consequence, reasons.most_common(1)[0][0],
            )  # fmt: skip
    rewards = []
    for (episode, question), verdict in zip(pairs, verdicts, strict=True):
        correct = bool(verdict.correct)
        reward = episode_reward(episode, question.answers, config.rewards, step, correct)
        rewards.append(dataclasses.replace(reward, judge=verdict.outcome))
    return rewards


def validate(
    engine: Engine | EnginePool,
    source: QuestionSource,
    config: settings.Config,
    judge: Judge | None,
) -> dict[str, float]:
    """Answer each held-out question once, greedily, and return the metrics.

    Raises:
      ServiceRefusedError: The judge refuses all requests.
    """
    greedy = dataclasses.replace(config.sampling, temperature=0.0)
    questions = list(validation(source, config.data.validation_rows or None))
    examples = [question.example() for question in questions]
    episodes = sorted(engine.rollout(examples, sampling=greedy), key=lambda e: e.index)
    rewards = compute_rewards(episodes, questions, config, judge, step=config.run.steps)
    categories = [questions[episode.group].category for episode in episodes]
    values = metrics.episode_metrics(episodes, rewards, categories)
    return {f"validation/{name}": value for name, value in values.items()}


def write_episodes(
    workdir: pathlib.Path, step: int, pairs: train_batch.Group, questions: Sequence[Question],
    engine: Engine | EnginePool,
) -> None:  # fmt: skip
    """Write episodes of a step as JSONL, with gold answers and rewards.

    Their images go to `workdir/images`.
    """
    path = workdir / "episodes" / f"{step:06d}.jsonl"
    with outputs.new_text_file(path) as file:
        for episode, reward in pairs:
            question = questions[episode.group]
            line = to_line(episode, engine.processor, path.parent, workdir / "images")
            line |= {"answers": question.answers, "category": question.category}
            line |= {"source": question.source, "reward": dataclasses.asdict(reward)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
