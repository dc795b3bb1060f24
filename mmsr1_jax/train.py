"""Train a policy when and how to search: GRPO with tools (arXiv 2506.20670, 2402.03300).

    python -m mmsr1_jax.train --config=configs/qwen7b.py [--model=DIR] [--workdir=RUN] \\
        [--config.field=value ..]
    python -m mmsr1_jax.train --workdir=RUN        resumes an existing run

A step:

    questions ─► episodes ─► rewards ─► advantages ─► packed rows ─► updates ─► engine
                 with tools             per group                              loads parameters

RUN contains `config.json`, `metrics.jsonl`, `episodes/` with their images in `images/`,
`checkpoints/`, and at the end `policy/`, an HF directory (with LoRA also `adapter/`). A run may be
killed at any time; a resumed run is bit-identical to an uninterrupted one. RUN may be in an object
store, `gs://BUCKET/FOLDER` (`training/workdir.py`).

Every web service gets a test request before the first step. If one refuses it, or the judge
refuses requests later, the run ends with its last complete step saved. Episodes whose judge
request failed are excluded from the update. All fallbacks are counted (`utils/fallbacks.py`).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data import Question, batches
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.models import sharding
from mmsr1_jax.rewards.reward_function import Reward
from mmsr1_jax.rl import packing, train_batch
from mmsr1_jax.rl.advantages import group_advantages
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rollout.active import RolloutStopped
from mmsr1_jax.rollout.build import make_engine
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.rollout.timeline import Timeline
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.service import ServiceRefusedError
from mmsr1_jax.tools.service_checks import check_services
from mmsr1_jax.training import metrics, train_utils
from mmsr1_jax.training.rollouts import (
    RolloutBatch,
    collect_episodes,
    compute_rewards,
    validate,
    write_episodes,
)
from mmsr1_jax.training.training_run import StopSignal, TrainingRun
from mmsr1_jax.training.workdir import Workdir
from mmsr1_jax.utils import fallbacks, processes
from mmsr1_jax.utils.logs import log


def main(argv) -> int:
    del argv
    _START_PROCESSES(_CONFIG.value)
    with train_utils.open_workdir(_WORKDIR.value) as workdir:
        config, model_dir = train_utils.resolve_settings(workdir.path, _CONFIG.value, _MODEL.value)
        train_utils.check_matches_existing_run(workdir, config, model_dir)
        processes.agree(train_utils.facts(config, model_dir))
        return train(config, model_dir, workdir)


def train(config: settings.Config, model_dir: str, workdir: Workdir) -> int:
    """Train until the last step or SIGTERM, and return the exit code."""
    metrics.check_loggers(config.run.log_to)
    if not config.sampling.temperature > 0:
        raise UserError("config.sampling.temperature=0: training needs episodes that differ")
    (workdir.path / "episodes").mkdir(parents=True, exist_ok=True)
    is_complete = config.run.steps in workdir.saved_steps
    if not is_complete and processes.main():
        check_services(config, [config.turns])
    with contextlib.ExitStack() as stack:  # closes the engine and the run at every exit
        return _train(config, model_dir, workdir, stack)


def _train(
    config: settings.Config, model_dir: str, workdir: Workdir, stack: contextlib.ExitStack
) -> int:
    objective, update, max_tokens = config.objective, config.update, config.turns.max_episode_tokens
    sigterm = StopSignal()

    # ---------------------------------------------------------------- engine, policy and judge
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    engine = stack.enter_context(contextlib.closing(make_engine(config, model_dir)))
    engine.release()  # its programs are compiled; the memory is free for the trainer, until `load`
    model = train_utils.load_policy(config, model_dir, mesh)
    judge = make_judge(config)

    # ---------------------------------------------------------------- questions
    questions = batches(
        train_utils.question_source(config, config.data.train),
        config.run.prompts_per_step,
        config.run.seed,
        processes.index(),
        processes.count(),
    )
    processes.agree({"the training data": questions.state()})
    validation_source = (
        train_utils.question_source(config, config.data.validation)
        if config.data.validation
        else None
    )

    # ---------------------------------------------------------------- learner and checkpoint
    learner = Learner(
        model, train_batch.make_loss(objective), update, mesh,
        temperature=config.sampling.temperature, seed=config.run.seed,
    )  # fmt: skip
    memory = "pinned_host" if objective.reference == "host" else None
    reference = learner.snapshot(memory) if objective.kl_coef else None
    learning_rate = train_utils.learning_rate_schedule(config)
    shape = train_utils.row_shape(config, mesh)
    run = stack.enter_context(TrainingRun(config, model_dir, workdir, learner, sigterm))
    if metadata := run.restore():
        questions.restore(metadata["questions"])
    with processes.watchdog("load", config.processes.update_seconds):
        engine.load(learner.params)
    run.start()
    fallbacks.take_counts()  # events before the first step belong to no step

    for step in run.steps():
        # ------------------------------------------------------------ sample, roll out, reward
        data_position = questions.state()
        seed = (config.run.seed * 100_003 + step) % 2**31  # differs by step
        try:
            with (
                run.phase("rollout"),
                run.timeline(step) as timeline,
                train_utils.memory_for_rollouts(engine, learner, update.offload),
            ):
                rollouts = roll_out(
                    engine, questions, config, judge, seed=seed, step=step, timeline=timeline,
                    must_stop=run.must_stop_rollout,
                )  # fmt: skip
        except RolloutStopped:
            run.stop_rollout(step, {"questions": data_position})
            break
        except ServiceRefusedError as error:
            run.save(step - 1, {"questions": data_position})
            raise run.with_resume_hint(error, step - 1) from None
        engine.release()  # its memory is free for the update, until `load`

        # ------------------------------------------------------------ advantages, packed rows
        minibatches, skipped = [], []
        with run.phase("pack"):
            for groups in train_batch.split(
                rollouts.groups, rollouts.positions, rollouts.num_groups, objective.num_minibatches
            ):
                rewards = [train_batch.shape_rewards(g, objective, max_tokens) for g in groups]
                advantages = [group_advantages(r, objective.advantage) for r in rewards]
                samples, too_long = train_batch.make_samples(
                    groups, advantages, objective, max_tokens, model.config, shape
                )
                minibatches.append(packing.pack(samples, model.config, shape))
                skipped += too_long
        for reason in skipped:
            log.warning("step %d: skipped in the update: %s", step, reason)

        # ------------------------------------------------------------ reference and old log-probs
        with run.collective_phase("score"):
            if reference is not None:
                minibatches = [
                    train_batch.with_logprobs(minibatch, "ref_logprobs", learner, reference)
                    for minibatch in minibatches
                ]
            # With objective.old_logprobs="engine", the ratio's denominator is the log-probs that
            # were recorded at sampling. With "trainer" and one update per step, it is the updated
            # policy itself; only with several updates must it be computed before the first one.
            if objective.old_logprobs == "trainer" and objective.num_minibatches > 1:
                minibatches = [
                    train_batch.with_logprobs(minibatch, "old_logprobs", learner)
                    for minibatch in minibatches
                ]

        # ------------------------------------------------------------ clipped loss and update
        with run.collective_phase("update"):
            sums = [learner.update(b, float(learning_rate(step - 1))) for b in minibatches if b]
        updates = [train_batch.update_metrics(values) for values in sums]
        run.check_finite(step, [values["finite"] for values in updates], minibatches)

        # ------------------------------------------------------------ sync
        with run.collective_phase("load"):
            engine.load(learner.params)

        # ------------------------------------------------------------ metrics and checkpoint
        step_metrics = rollouts.metrics() | train_batch.mean_update_metrics(updates)
        step_metrics["update/learning_rate"] = float(learning_rate(step - 1))
        step_metrics["update/skipped"] = float(sum(processes.exchange("skipped", len(skipped))))
        step_metrics["update/packing_efficiency"] = packing.efficiency([*chain(*minibatches)])
        rollouts.warn_of_failed_searches(step)
        write_episodes(workdir, step, rollouts, config.run.saved_episodes, engine)
        refusal = None
        if validation_source and train_utils.is_validation_step(config.run, step):
            try:
                with (
                    run.phase("validation"),
                    train_utils.memory_for_rollouts(engine, learner, update.offload),
                ):
                    step_metrics |= validate(
                        engine, validation_source, config, judge, must_stop=run.must_stop_rollout
                    )
            except RolloutStopped:
                log.warning("step %d: saved without its validation, because of SIGTERM", step)
            except ServiceRefusedError as error:  # the step itself is complete
                refusal = error
        run.finish_step(
            step,
            step_metrics | processes.sum_counts("fallbacks", fallbacks.take_counts()),
            {"questions": questions.state()},
            tokens=sum(processes.exchange("tokens", rollouts.num_tokens)),
            score=step_metrics.get("validation/accuracy"),
            save=refusal is not None,
            shown=("reward", "accuracy", "search/any"),
        )
        if refusal is not None:
            raise run.with_resume_hint(refusal, step)
    return run.finish()


def roll_out(
    engine: Engine | EnginePool, questions: Iterator[list[Question]], config: settings.Config,
    judge: Judge | None, *, seed: int, step: int, timeline: Timeline | None = None,
    must_stop: Callable[[], bool] | None = None,
) -> RolloutBatch:  # fmt: skip
    """Sample the episodes of a step (counted from 1), and compute their rewards.

    Of P processes, process p samples those of the questions p, p + P, ..; questions and episodes
    are numbered over all processes, so that they do not depend on P.

    With `objective.max_resample_rounds`, groups with zero reward variance are replaced by groups of
    further questions (DAPO, arXiv 2503.14476, section 3.2).

    Raises:
      RolloutStopped: `must_stop` returns True in a process.
    """
    objective, run, max_tokens = config.objective, config.run, config.turns.max_episode_tokens
    groups: dict[int, list[tuple[Episode, Reward]]] = {}
    all_questions: dict[int, Question] = {}
    all_episodes: list[tuple[Episode, Reward]] = []
    varies: dict[int, bool] = {}  # whether the rewards of a group differ, of all processes
    for attempt in range(objective.max_resample_rounds + 1):
        first = attempt * run.prompts_per_step  # number of the attempt's first question
        new_questions = dict(
            zip(count(processes.index(), processes.count()), next(questions), strict=False)
        )
        sampling = dataclasses.replace(config.sampling, seed=(seed + attempt * 7919) % 2**31)
        rollout = engine.rollout(
            [question.example() for question in new_questions.values()],
            group_size=run.group_size, sampling=sampling, indices=new_questions, timeline=timeline,
            must_stop=must_stop,
        )  # fmt: skip
        episodes = collect_episodes(rollout)
        judged = partial(compute_rewards, episodes, new_questions, config, judge, step=step - 1)
        rewards = processes.call_together("rewards", judged, ServiceRefusedError)
        new_groups = {first + number: [] for number in new_questions}
        for episode, reward in zip(episodes, rewards, strict=True):
            if episode.end == "error":
                question = new_questions[episode.group].id
                log.warning("step %d, question %s: %s", step, question, episode.error)
            episode.group += first
            episode.index += first * run.group_size
            if episode.end != "error" and reward.known:
                new_groups[episode.group].append((episode, reward))
        own = [
            [number, train_batch.has_reward_variance(group, objective, max_tokens)]
            for number, group in new_groups.items()
        ]
        varies |= dict(sorted(chain(*processes.exchange("reward variance", own))))
        groups |= new_groups
        all_questions |= {first + number: q for number, q in new_questions.items()}
        all_episodes += zip(episodes, rewards, strict=True)
        if sum(varies.values()) >= run.prompts_per_step:
            break
    # With further rounds, the groups that vary are first.
    order = sorted(varies, key=lambda n: not varies[n]) if objective.max_resample_rounds else varies
    chosen = [*order][: run.prompts_per_step]
    positions = {number: k for k, number in enumerate(chosen) if number in groups}
    return RolloutBatch(
        groups=[groups[number] for number in positions],
        positions=[*positions.values()],
        num_groups=len(chosen),
        episodes=all_episodes,
        questions=all_questions,
        num_sampled=len(varies),
        num_with_variance=sum(varies.values()),
    )


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _START_PROCESSES = cli.define_process_flags()
    _MODEL = flags.DEFINE_string(
        "model", None, "HF directory of the initial policy; default: config.run.model"
    )
    _WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; default: build/CONFIG")
    cli.run(main)
