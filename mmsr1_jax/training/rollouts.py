"""Episodes of a training step: their rewards, their record on disk, and validation."""

import asyncio
import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice

from mmsr1_jax.config import settings
from mmsr1_jax.data import Question, QuestionSource, validation
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.rewards.reward_function import Reward, episode_reward
from mmsr1_jax.rl import train_batch
from mmsr1_jax.rollout.active import RolloutStopped
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.service import ServiceRefusedError
from mmsr1_jax.training import metrics
from mmsr1_jax.training.sft_dataset import to_line
from mmsr1_jax.training.workdir import Workdir
from mmsr1_jax.utils import fallbacks, outputs, processes
from mmsr1_jax.utils.logs import log

# Log text for answers without a verdict, by `Verdict.outcome`.
_OUTCOME_MESSAGES = {
    "failed": "could not be judged; their episodes are skipped",
    "unreadable": "got a reply without a verdict and count as wrong",
}


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Episodes of a training step in this process.

    Attributes:
      groups: Groups to train on, without episodes that could not be run or judged.
      positions: Position of each group among those of all processes, ascending.
      num_groups: Number of the groups of all processes.
      episodes: All episodes of the step, with their rewards.
      questions: Questions of the episodes, by `Episode.group`.
      num_sampled, num_with_variance: Number of sampled groups of all processes, and of those whose
        rewards differ.
    """

    groups: list[train_batch.Group]
    positions: list[int]
    num_groups: int
    episodes: list[tuple[Episode, Reward]]
    questions: dict[int, Question]
    num_sampled: int
    num_with_variance: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the episodes of this process."""
        return sum(len(episode) for episode, _ in self.episodes)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the episodes of all processes, and of their groups."""
        own = metrics.episode_facts(
            [episode for episode, _ in self.episodes],
            [reward for _, reward in self.episodes],
            [self.questions[episode.group].category for episode, _ in self.episodes],
        )
        facts = metrics.gather_facts(own)
        return metrics.episode_metrics(facts) | {
            "tool/partial": metrics.partial_search_fraction(facts),
            "groups/sampled": float(self.num_sampled),
            "groups/with_variance": self.num_with_variance / self.num_sampled,
        }

    def saved_episodes(self, limit: int) -> list[tuple[int, Episode, Reward]]:
        """Return those of the first `limit` training episodes that this process has.

        Returns:
          The position of each among the training episodes of all processes, episode and reward.
        """
        own = [[p, len(group)] for p, group in zip(self.positions, self.groups, strict=True)]
        sizes = dict(chain(*processes.exchange("sizes of groups", own)))
        starts, total = {}, 0
        for position in sorted(sizes):
            starts[position], total = total, total + sizes[position]
        return [
            (starts[position] + i, episode, reward)
            for position, group in zip(self.positions, self.groups, strict=True)
            for i, (episode, reward) in enumerate(group)
            if starts[position] + i < limit
        ]

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
    episodes: Sequence[Episode], questions: Mapping[int, Question] | Sequence[Question],
    config: settings.Config, judge: Judge | None, *, step: int,
) -> list[Reward]:  # fmt: skip
    """Return the rewards of episodes at a training step, counted from 0.

    `questions` has the question of each episode by `Episode.group`. If a judge request fails, the
    reward is not `known`; the number of such episodes is logged.

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


def collect_episodes(rollout: Iterable[Episode]) -> list[Episode]:
    """Return the episodes of a rollout by index. All processes must call it together.

    Raises:
      RolloutStopped: The rollout was stopped in a process.
    """
    stopped, episodes = False, []
    try:
        episodes = sorted(rollout, key=lambda episode: episode.index)
    except RolloutStopped:
        stopped = True
    if any(processes.exchange("rollout stopped", stopped)):
        raise RolloutStopped
    return episodes


def validate(
    engine: Engine | EnginePool,
    source: QuestionSource,
    config: settings.Config,
    judge: Judge | None,
    *,
    must_stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Answer each held-out question once, greedily, and return the metrics.

    Raises:
      RolloutStopped: `must_stop` returns True in a process.
      ServiceRefusedError: The judge refuses all requests.
    """
    greedy = dataclasses.replace(config.sampling, temperature=0.0)
    everywhere = enumerate(validation(source, config.data.validation_rows or None))
    questions = dict(islice(everywhere, processes.index(), None, processes.count()))
    examples = [question.example() for question in questions.values()]
    rollout = engine.rollout(examples, sampling=greedy, indices=questions, must_stop=must_stop)
    episodes = collect_episodes(rollout)
    judged = partial(compute_rewards, episodes, questions, config, judge, step=config.run.steps)
    rewards = processes.call_together("validation rewards", judged, ServiceRefusedError)
    categories = [questions[episode.group].category for episode in episodes]
    facts = metrics.gather_facts(metrics.episode_facts(episodes, rewards, categories))
    return {f"validation/{name}": value for name, value in metrics.episode_metrics(facts).items()}


def write_episodes(
    workdir: Workdir, step: int, rollouts: RolloutBatch, limit: int,
    engine: Engine | EnginePool,
) -> None:  # fmt: skip
    """Write the first training episodes of a step as JSONL, with gold answers and rewards.

    Their images go to `workdir/images`. With several processes, each writes its part, and process 0
    the file.

    Args:
      workdir: Directory of the run.
      step: Step, counted from 1.
      rollouts: Episodes of the step.
      limit: Number of episodes to write, over all processes.
      engine: Engine that sampled them.
    """
    path = workdir.path / "episodes" / f"{step:06d}.jsonl"
    lines: dict[int, str] = {}
    for position, episode, reward in rollouts.saved_episodes(limit):
        question = rollouts.questions[episode.group]
        line = to_line(episode, engine.processor, path.parent, workdir.path / "images")
        line |= {"answers": question.answers, "category": question.category}
        line |= {"source": question.source, "reward": dataclasses.asdict(reward)}
        lines[position] = json.dumps(line, ensure_ascii=False)
    if processes.count() > 1:
        parts = [
            outputs.partial_path(path.with_name(f"{path.stem}.{process}.json"))
            for process in range(processes.count())
        ]
        names = [str(part.relative_to(workdir.path)) for part in parts]
        parts[processes.index()].write_text(json.dumps(lines), encoding="utf-8")
        workdir.push(names[processes.index()])
        processes.barrier("episodes written")
        if processes.main():
            workdir.pull(*names)
            for part in parts:
                lines |= {int(k): v for k, v in json.loads(part.read_text("utf-8")).items()}
            workdir.remove(*names)
    if processes.main():
        with outputs.new_text_file(path) as file:
            file.writelines(f"{lines[position]}\n" for position in sorted(lines))
