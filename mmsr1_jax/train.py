"""Train a policy when and how to search: GRPO with tools (arXiv 2506.20670, 2402.03300).

    python -m mmsr1_jax.train --config=configs/qwen7b.py [--model=DIR] [--workdir=RUN] \\
        [--config.field=value ..]
    python -m mmsr1_jax.train --workdir=RUN        resumes an existing run

A step:

    questions ─► episodes ─► rewards ─► advantages ─► packed rows ─► updates ─► engine
                 with tools             per group                              loads parameters

RUN contains `config.json`, `metrics.jsonl`, `episodes/` with their images in `pictures/`,
`checkpoints/`, and at the end `policy/`, an HF directory (with LoRA also `adapter/`). A run may be
killed at any time; a resumed run is bit-identical to an uninterrupted one.

Every web service receives a test request before the first step, and the run ends if one refuses it.
If the judge refuses requests later, the run saves its last completed step and ends. Episodes whose
judge request failed are excluded from the update and counted (`judge/failed`). All other degraded
operation is counted too (`utils/fallbacks.py`).
"""

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from tqdm import tqdm

from mmsr1_jax import cli
from mmsr1_jax.config import settings
from mmsr1_jax.data import Question, QuestionSource, batches, validation
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.models import sharding
from mmsr1_jax.rewards.reward_function import Reward, episode_reward
from mmsr1_jax.rl import packing, train_batch
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rollout.build import make_engine
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.tools.build import check_services, make_judge
from mmsr1_jax.tools.judge import Judge, Verdict
from mmsr1_jax.tools.service import ServiceRefusedError
from mmsr1_jax.training import metrics, run_config, train_utils
from mmsr1_jax.training.checkpoint import Checkpoints
from mmsr1_jax.training.sft_dataset import line_of
from mmsr1_jax.utils import compile_counter, fallbacks, outputs

# Log text for answers without a verdict, by `Verdict.outcome`.
_OUTCOMES = {
    "failed": "could not be judged; their episodes are left out",
    "unreadable": "got a reply without a verdict and count as wrong",
}


def main(argv) -> int:
    del argv
    try:
        workdir = train_utils.resolve_workdir(_WORKDIR.value)
        with outputs.lock(workdir):
            config, model_dir = train_utils.resolve_settings(workdir, _CONFIG.value, _MODEL.value)
            train_utils.check_matches_existing_run(workdir, config, model_dir)
            return train(config, model_dir, workdir)
    except (ValueError, OSError) as error:  # settings, checkpoint, data, tools: no traceback
        sys.exit(f"error: {error}")


def train(config: settings.Config, model_dir: str, workdir: pathlib.Path) -> int:
    """Train until the last step or SIGTERM, and return the exit code."""
    with contextlib.ExitStack() as resources:  # closed at every exit
        return _train(config, model_dir, workdir, resources)


def _train(
    config: settings.Config, model_dir: str, workdir: pathlib.Path, resources: contextlib.ExitStack
) -> int:
    run, objective, update = config.run, config.objective, config.update
    metrics.check(run.log_to)
    if not config.sampling.temperature > 0:
        raise ValueError("config.sampling.temperature=0: training needs episodes that differ")
    (workdir / "episodes").mkdir(parents=True, exist_ok=True)
    if not (workdir / "checkpoints" / str(run.steps)).is_dir():  # otherwise the run is complete
        check_services(config, [config.turns])

    # Policy and engine
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    model = train_utils.load_policy(config, model_dir, mesh)
    engine = resources.enter_context(contextlib.closing(make_engine(config, model_dir)))
    judge = make_judge(config)

    # Data
    source = QuestionSource(
        config.data.train,
        image_roots=config.data.image_roots,
        max_bad_rows=config.data.max_bad_rows,
        max_file_pixels=config.images.max_file_pixels,
    )
    questions = batches(source, run.prompts_per_step, run.seed)
    held_out = None
    if config.data.validation:
        held_out = QuestionSource(
            config.data.validation,
            image_roots=config.data.image_roots,
            max_bad_rows=config.data.max_bad_rows,
            max_file_pixels=config.images.max_file_pixels,
        )

    # Updates
    learner = Learner(
        model, train_batch.make_loss(objective), update, mesh,
        temperature=config.sampling.temperature, seed=run.seed,
    )  # fmt: skip
    memory = "pinned_host" if objective.reference == "host" else None
    reference = learner.snapshot(memory) if objective.kl_coef else None
    rate = train_utils.learning_rate(config)
    shape = train_utils.row_shape(update, mesh)

    # Restore checkpoint
    checkpoints = Checkpoints(workdir / "checkpoints", keep=run.keep_checkpoints)
    resources.callback(checkpoints.close)
    begin, bad = checkpoints.latest or 0, 0
    if begin:
        state = {"trained": learner.trained, "optimizer": learner.optimizer}
        state, notes = checkpoints.restore(begin, state)
        learner.trained, learner.optimizer = state["trained"], state["optimizer"]
        questions.restore(notes["questions"])
        bad = notes["bad"]
        print(f"{workdir}: resuming after step {begin}", file=sys.stderr)
    engine.load(learner.params)
    run_config.write(workdir / "config.json", config, model_dir)
    log = metrics.Log(workdir, run.log_to, step=begin, config=dataclasses.asdict(config))
    resources.callback(log.close)
    stop = train_utils.StopSignal()
    saved = begin
    fallbacks.take()  # events before the first step belong to no step

    def save(step: int, position: dict, score: float | None) -> None:
        state = {"trained": learner.trained, "optimizer": learner.optimizer}
        checkpoints.save(step, state, {"questions": position, "bad": bad}, score=score)

    bar = tqdm(range(begin + 1, run.steps + 1), initial=begin, total=run.steps, unit="step")
    for number in bar:
        clock = train_utils.Clock()

        with clock("rollout"):
            seed = (run.seed * 100_003 + number) % 2**31
            position = questions.state()
            try:
                rolled = roll_out(engine, questions, config, judge, seed=seed, number=number)
            except ServiceRefusedError as error:
                bar.close()
                if saved < number - 1:
                    save(number - 1, position, None)
                raise ServiceRefusedError(f"{error}; {_resumable(workdir, number - 1)}") from None

        with clock("pack"):
            parts = [
                rolled.groups[i :: objective.num_minibatches]
                for i in range(objective.num_minibatches)
            ]
            found = [
                train_batch.make_samples(
                    part, objective, config.turns.max_episode_tokens, model.config, shape
                )
                for part in parts
            ]
            left_out = list(itertools.chain(*(odd for _, odd in found)))
            for reason in left_out:
                print(f"step {number}: left out of the update, {reason}", file=sys.stderr)
            packed = [packing.pack(chosen, model.config, shape) for chosen, _ in found]

        with clock("score"):
            if reference is not None:
                packed = [_with(part, learner, "ref_logprobs", reference) for part in packed]
            if objective.old_logprobs == "trainer" and objective.num_minibatches > 1:
                packed = [_with(part, learner, "old_logprobs", None) for part in packed]

        with clock("update"):
            sums = [learner.update(part, float(rate(number - 1))) for part in packed if part]
        updates = [train_batch.update_metrics(one) for one in sums]
        for one in updates:
            bad = 0 if one["finite"] else bad + 1
            if bad == update.max_nonfinite_updates:
                break
        if bad >= update.max_nonfinite_updates:
            bar.close()
            path = train_utils.write_batch(workdir, number, packed)
            print(f"error: {bad} updates in a row were not finite; what they were made from is in "
                  f"{path}", file=sys.stderr)  # fmt: skip
            return 1

        with clock("load"):
            engine.load(learner.params)

        # Metrics
        episodes, rewards = zip(*rolled.episodes, strict=True)
        categories = [rolled.asked[episode.group].category for episode in episodes]
        figures = metrics.episode_metrics(episodes, rewards, categories)
        figures["tool/partial"] = metrics.partial_searches(episodes)
        for call in itertools.chain(*(episode.calls for episode in episodes)):
            if call.notes and call.status in ("ok", "failed"):
                words = f"searches fail or lack results, the first one: {call.notes[0]}"
                fallbacks.say("tool", f"step {number}: {words}; see tool/failed, tool/partial")
        figures["groups/sampled"] = float(len(rolled.asked))
        figures["groups/with_variance"] = rolled.spread / len(rolled.asked)
        for name in sorted({name for one in updates for name in one}):
            figures[f"update/{name}"] = float(np.mean([one[name] for one in updates]))
        figures["update/learning_rate"] = float(rate(number - 1))
        figures["update/nonfinite"] = float(sum(not one["finite"] for one in updates))
        figures["update/skipped"] = float(len(left_out))
        figures["update/packing_efficiency"] = packing.efficiency(list(itertools.chain(*packed)))
        write_episodes(workdir, number, rolled.usable[: run.saved_episodes], rolled.asked, engine)
        over, refused = number == run.steps, None
        if held_out and run.validate_every and (number % run.validate_every == 0 or over):
            with clock("validation"):
                try:
                    figures |= validate(engine, held_out, config, judge)
                except ServiceRefusedError as error:  # the step itself is complete
                    refused = error
        figures |= fallbacks.take()
        figures |= clock.figures(sum(len(episode) for episode in episodes))
        figures["time/compiles"] = float(compile_counter.count())
        log.write(number, figures)  # before saving: a resumed run has both or neither
        last = over or stop.is_set() or refused is not None
        if last or (run.save_every and number % run.save_every == 0):
            save(number, questions.state(), figures.get("validation/accuracy"))
            saved = number
        bar.set_postfix(
            reward=f"{figures.get('reward', 0):.3f}",
            accuracy=f"{figures.get('accuracy', 0):.2f}",
            search=f"{figures.get('search/any', 0):.2f}",
            tokens_s=f"{figures['time/tokens_per_second']:.0f}",
        )
        if refused is not None or (last and not over):
            bar.close()
            if refused is not None:
                raise ServiceRefusedError(f"{refused}; {_resumable(workdir, number)}")
            print(f"{workdir}: stopped after step {number}, which is saved; the same command "
                  "resumes the run", file=sys.stderr)  # fmt: skip
            return 0

    resources.close()  # waits for the last checkpoint
    train_utils.save_policy(learner, config, model_dir, workdir)
    return 0


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Episodes of a step.

    Attributes:
      groups: Groups to train on, without episodes that could not be run or judged.
      episodes: All episodes of the step, with their rewards.
      asked: Questions of the episodes, indexed by `Episode.group`.
      spread: Number of sampled groups whose rewards differ.
    """

    groups: list[train_batch.Group]
    episodes: list[tuple[Episode, Reward]]
    asked: list[Question]
    spread: int

    @property
    def usable(self) -> train_batch.Group:
        """All episodes of `groups`, with their rewards."""
        return list(itertools.chain(*self.groups))


def roll_out(
    engine: Engine, questions: Iterator[list[Question]], config: settings.Config,
    judge: Judge | None, *, seed: int, number: int,
) -> RolloutBatch:  # fmt: skip
    """Sample the episodes of a step and score them.

    With `objective.max_resample_rounds`, groups with zero reward variance are replaced by groups of
    further questions (DAPO, arXiv 2503.14476, section 3.2).
    """
    objective, run, limit = config.objective, config.run, config.turns.max_episode_tokens
    kept: list[train_batch.Group] = []
    idle: list[train_batch.Group] = []
    asked: list[Question] = []
    everything: list[tuple[Episode, Reward]] = []
    for attempt in range(objective.max_resample_rounds + 1):
        new = next(questions)
        sampling = dataclasses.replace(config.sampling, seed=(seed + attempt * 7919) % 2**31)
        examples = [question.example() for question in new]
        episodes = list(engine.rollout(examples, rollouts=run.group_size, sampling=sampling))
        episodes.sort(key=lambda episode: episode.index)
        rewards = score(episodes, new, config, judge, step=number - 1)
        groups: list[list[tuple[Episode, Reward]]] = [[] for _ in new]
        for episode, reward in zip(episodes, rewards, strict=True):
            if episode.end == "error":
                name = new[episode.group].id
                print(f"step {number}, question {name}: {episode.error}", file=sys.stderr)
            elif reward.known:
                groups[episode.group].append((episode, reward))
            episode.group += len(asked)
            episode.index += len(everything)
        for group in groups:
            (kept if train_batch.has_reward_variance(group, objective, limit) else idle).append(
                group
            )
        asked += new
        everything += zip(episodes, rewards, strict=True)
        if len(kept) >= run.prompts_per_step:
            break
    chosen = (kept + idle)[: run.prompts_per_step] if objective.max_resample_rounds else groups
    return RolloutBatch(chosen, everything, asked, len(kept))


def score(
    episodes: Sequence[Episode], questions: Sequence[Question], config: settings.Config,
    judge: Judge | None, *, step: int,
) -> list[Reward]:  # fmt: skip
    """Return the rewards of episodes at a training step, counted from 0.

    `Episode.group` is the index of an episode's question. If a judge request fails, the reward is
    not `known`; the number of such episodes is printed.

    Raises:
      ServiceRefusedError: The judge refuses all requests.
    """
    asked = [questions[episode.group] for episode in episodes]
    if judge is None:
        return [
            episode_reward(episode, question.answers, config.rewards, step)
            for episode, question in zip(episodes, asked, strict=True)
        ]

    async def ask():
        return await asyncio.gather(*(
            judge.judge(question.question, question.answers, episode.answer)
            for episode, question in zip(episodes, asked, strict=True)
        ))  # fmt: skip

    verdicts: list[Verdict] = asyncio.run(ask())
    for outcome, what in _OUTCOMES.items():
        reasons = collections.Counter(v.reason for v in verdicts if v.outcome == outcome)
        if reasons:
            print(f"step {step + 1}: {reasons.total()} of {len(verdicts)} answers {what} "
                  f"({reasons.most_common(1)[0][0]})", file=sys.stderr)  # fmt: skip
    found = []
    for episode, question, verdict in zip(episodes, asked, verdicts, strict=True):
        correct = bool(verdict.correct)
        reward = episode_reward(episode, question.answers, config.rewards, step, correct)
        found.append(dataclasses.replace(reward, judge=verdict.outcome))
    return found


def validate(
    engine: Engine, source: QuestionSource, config: settings.Config, judge: Judge | None
) -> dict[str, float]:
    """Answer each held-out question once, greedily, and return the metrics.

    Raises:
      ServiceRefusedError: The judge refuses all requests.
    """
    greedy = dataclasses.replace(config.sampling, temperature=0.0)
    questions = list(validation(source, config.data.validation_rows or None))
    examples = [question.example() for question in questions]
    episodes = sorted(engine.rollout(examples, sampling=greedy), key=lambda e: e.index)
    rewards = score(episodes, questions, config, judge, step=config.run.steps)
    categories = [questions[episode.group].category for episode in episodes]
    figures = metrics.episode_metrics(episodes, rewards, categories)
    return {f"validation/{name}": value for name, value in figures.items()}


def write_episodes(
    workdir: pathlib.Path, number: int, pairs: train_batch.Group, asked: Sequence[Question],
    engine: Engine,
) -> None:  # fmt: skip
    """Write some episodes of a step as JSONL, with gold answers and rewards.

    Their images go to `workdir/pictures`.
    """
    path = workdir / "episodes" / f"{number:06d}.jsonl"
    with outputs.new_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for episode, reward in pairs:
            question = asked[episode.group]
            line = line_of(episode, engine.processor, path.parent, workdir / "pictures")
            line |= {"answers": question.answers, "category": question.category}
            line |= {"source": question.source, "reward": dataclasses.asdict(reward)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _resumable(workdir: pathlib.Path, step: int) -> str:
    saved = f"step {step} is saved" if step else "no step is finished yet"
    return f"{workdir}: {saved}; the same command resumes the run"


def _with(part: list[packing.TrainBatch], learner: Learner, field: str, trained):
    """Return micro-batches with `field` set to their log-probs under the `trained` parameters."""
    scores = learner.logprobs(part, trained)
    return [b.replace(**{field: s}) for b, s in zip(part, scores, strict=True)]


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _MODEL = flags.DEFINE_string("model", None, "HF directory to begin with; else config.run.model")
    _WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; else build/CONFIG")
    cli.run(main)
