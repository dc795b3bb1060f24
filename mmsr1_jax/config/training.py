"""Training settings. The other settings are in `config/settings.py`."""

import dataclasses

from mmsr1_jax.config.bounds import setting
from mmsr1_jax.config.choices import (
    ADVANTAGES,
    KL_ESTIMATORS,
    LORA_TARGETS,
    LOSS_AGGREGATIONS,
    OLD_LOGPROBS,
    OVERLONG,
    RATIO_LEVELS,
    REFERENCES,
    SCHEDULES,
    TEXT_TARGETS,
)


@dataclasses.dataclass(kw_only=True, slots=True)
class Update:
    """Micro-batches and the optimiser (`rl/packing.py`, `rl/learner.py`).

    Attributes:
      pack_length: Number of tokens in a row into which episodes are packed. Longer episodes are
        skipped.
      pack_windows: Maximum number of windows of 64 patches for all images of a row together.
      micro_batch_rows: Number of micro-batch rows on each data-parallel shard of the mesh.
      offload: Whether the trainer's parameters and optimiser state are in pinned host memory during
        rollouts, those of validation included, which frees their memory for the engine's caches.
      freeze_vision: Whether the vision tower is frozen.
      lora_rank: Rank of the LoRA adapters (`rl/lora.py`). With 0, all parameters are trained
        instead.
      lora_alpha: Numerator of the factor `lora_alpha / lora_rank` that scales an adapter's output.
      lora_targets: Names of the linear layers with an adapter. Those of the vision tower begin with
        `vision.`; its feed-forward layers are `gate`, `up` and `down`, or `fc1` and `fc2`,
        depending on the policy.
      learning_rate: Peak learning rate.
      lr_schedule: Learning rate schedule: `constant`, `linear` or `cosine` (both decay to 0), or
        `sigmoid`, the published one.
      warmup_steps: Number of steps over which the learning rate rises linearly from 0.
      b1, b2, eps, weight_decay: Hyperparameter of AdamW.
      max_grad_norm: Maximum global norm of the gradient. With 0, gradients are not clipped.
      max_nonfinite_updates: Number of consecutive updates with a non-finite loss or gradient after
        which a run stops.
    """

    pack_length: int = setting(8192, at_least=1, at_most=2**24)
    pack_windows: int = setting(384, at_least=0, at_most=2**20)
    micro_batch_rows: int = setting(1, at_least=1, at_most=65536)
    offload: bool = False
    freeze_vision: bool = False
    lora_rank: int = setting(0, at_least=0, at_most=65536)
    lora_alpha: float = setting(32.0, at_least=-1e6, at_most=1e6)
    lora_targets: tuple[str, ...] = setting(TEXT_TARGETS, one_of=LORA_TARGETS)
    learning_rate: float = setting(2e-6, at_least=0, at_most=1000)
    lr_schedule: str = setting("constant", one_of=SCHEDULES)
    warmup_steps: int = setting(0, at_least=0, at_most=2**31 - 1)
    b1: float = setting(0.9, at_least=0, below=1)
    b2: float = setting(0.999, at_least=0, below=1)
    eps: float = setting(1e-8, at_least=0, at_most=1)
    weight_decay: float = setting(0.01, at_least=0, at_most=1000)
    max_grad_norm: float = setting(1.0, at_least=0, at_most=1e9)
    max_nonfinite_updates: int = setting(3, at_least=1, at_most=2**31 - 1)


@dataclasses.dataclass(kw_only=True, slots=True)
class Objective:
    """Training objective (`rl/advantages.py`, `rl/loss.py`).

    Attributes:
      advantage: Advantage estimator within a group: `grpo` (subtract the mean, divide by the
        standard deviation), `mean` (subtract the mean), or `rloo` (subtract the mean of the other
        episodes).
      ratio_level: Level of the importance ratio: `token`, `sequence` (GSPO) or `trajectory`.
      loss_aggregation: Averaging of the loss: over all tokens (`token`), over the tokens of each
        episode and then over episodes (`sequence`), or with a fixed length
        `turns.max_episode_tokens` as denominator (`fixed`).
      clip_low, clip_high: Clipping range of the importance ratio, [1 - clip_low, 1 + clip_high].
      kl_estimator, kl_coef: Estimator and coefficient of the KL divergence from the reference
        policy. With a coefficient of 0, no reference policy is kept.
      reference: Placement of the reference policy's parameters, `device` or `host`.
      entropy_coef: Coefficient of the entropy bonus.
      old_logprobs: Log-probs in the denominator of the importance ratio: those recorded by the
        `engine` while sampling, or those computed by the `trainer` before the first update of a
        step.
      tis_cap: Cap on the importance weights that correct for the mismatch between engine and
        trainer (truncated importance sampling, with `old_logprobs` = `trainer`). With 0, there is
        no correction.
      num_minibatches: Number of minibatches among which the groups of a step are distributed, with
        one update for each.
      overlong: Treatment of episodes that reach the token limit: `keep`, `mask` (no loss), or
        `penalty` (a reward penalty that grows with the length).
      overlong_buffer: Number of tokens before the limit `turns.max_episode_tokens` over which the
        penalty grows.
      max_resample_rounds: Maximum number of times that groups with zero reward variance are
        resampled in a step (DAPO). With 0, they are kept.
    """

    advantage: str = setting("grpo", one_of=ADVANTAGES)
    ratio_level: str = setting("token", one_of=RATIO_LEVELS)
    loss_aggregation: str = setting("token", one_of=LOSS_AGGREGATIONS)
    clip_low: float = setting(0.2, at_least=0, at_most=1e6)
    clip_high: float = setting(0.2, at_least=0, at_most=1e6)
    kl_estimator: str = setting("k3", one_of=KL_ESTIMATORS)
    kl_coef: float = setting(1e-3, at_least=0, at_most=1e6)
    reference: str = setting("device", one_of=REFERENCES)
    entropy_coef: float = setting(0.0, at_least=0, at_most=1e6)
    old_logprobs: str = setting("trainer", one_of=OLD_LOGPROBS)
    tis_cap: float = setting(2.0, at_least=0, at_most=1e6)
    num_minibatches: int = setting(1, at_least=1, at_most=65536)
    overlong: str = setting("keep", one_of=OVERLONG)
    overlong_buffer: int = setting(512, at_least=1, at_most=2**24)
    max_resample_rounds: int = setting(0, at_least=0, at_most=1000)


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
    """Questions (`data/questions.py`); for `sft`, episodes (`training/sft_dataset.py`).

    Attributes:
      train, validation: Parquet files, directories of them, or glob patterns. `sft` reads JSONL
        files and has no validation.
      image_roots: Directories, in addition to the folder of a data file, that may contain the
        images which the file names (for `sft` also the indexes).
      max_bad_rows: Maximum number of unusable rows or lines; a run with more stops.
      validation_rows: Number of rows taken from the start of the validation files. With 0, all rows
        are used.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    image_roots: tuple[str, ...] = ()
    max_bad_rows: int = setting(100, at_least=0, at_most=2**31 - 1)
    validation_rows: int = setting(0, at_least=0, at_most=2**31 - 1)


@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
    """A training run.

    Attributes:
      model: HF directory of the initial policy, unless `--model` names one.
      steps: Number of steps, each of a rollout and its updates; for `sft`, number of updates.
      prompts_per_step: Number of questions in a step; for `sft`, number of episodes.
      group_size: Number of episodes sampled for each question.
      seed: Random seed of the order of questions or episodes, and of sampling.
      validate_every: Number of steps between validations, which use greedy decoding. With 0, there
        is no validation.
      save_every: Number of steps between checkpoints. The last step is always saved.
      keep_checkpoints: Number of most recent checkpoints to keep. The best one by validation score
        is kept as well.
      grace_seconds: Seconds after SIGTERM in which a run should end, 30 for a spot machine. If the
        current step would take longer, its rollout is dropped and the step before it is saved.
      saved_episodes: Number of episodes written to disk in each step.
      log_to: Metric loggers: `tensorboard`, `wandb`, both separated by a comma, or empty for
        neither. JSONL is always written.
      profile: First and last step of a JAX profiler trace, which is written to `profile/` in the
        directory of the run; empty for none.
      timeline: Whether to record what the device, the lanes and the tools do in the rollouts of
        each step, as a trace file `RUN/timelines/STEP.json` for https://ui.perfetto.dev.
    """

    model: str | None = None
    steps: int = setting(50, at_least=1, at_most=2**31 - 1)
    prompts_per_step: int = setting(32, at_least=1, at_most=2**20)
    group_size: int = setting(8, at_least=1, at_most=2**16)
    seed: int = setting(0, at_least=0, at_most=2**31 - 1)
    validate_every: int = setting(10, at_least=0, at_most=2**31 - 1)
    save_every: int = setting(10, at_least=0, at_most=2**31 - 1)
    keep_checkpoints: int = setting(2, at_least=1, at_most=2**20)
    grace_seconds: float = setting(30.0, at_least=0, at_most=86400)
    saved_episodes: int = setting(4, at_least=0, at_most=2**20)
    log_to: str = "tensorboard"
    profile: tuple[int, ...] = ()
    timeline: bool = False


def inconsistency(objective: Objective, update: Update, run: Run) -> str | None:
    """Return an error message for inconsistent settings, beginning with the field, or None."""
    problem = _lora_inconsistency(update)
    if problem:
        return problem
    unknown = {name.strip() for name in run.log_to.split(",")} - {"", "tensorboard", "wandb"}
    if unknown:
        return f"run.log_to={run.log_to!r} must be tensorboard, wandb, both with a comma, or empty"
    if objective.num_minibatches > run.prompts_per_step:
        return (
            f"objective.num_minibatches={objective.num_minibatches} is more than "
            f"run.prompts_per_step={run.prompts_per_step}"
        )
    profile = run.profile
    if profile and not (len(profile) == 2 and 1 <= profile[0] <= profile[1]):
        return f"run.profile={profile} must be empty, or (first step, last step)"
    return None


def _lora_inconsistency(update: Update) -> str | None:
    if update.lora_rank and not update.lora_targets:
        return f"update.lora_targets is empty, with lora_rank={update.lora_rank}"
    if update.lora_rank and not update.lora_alpha > 0:
        return f"update.lora_alpha={update.lora_alpha} must be over 0"
    vision_targets = [name for name in update.lora_targets if name.startswith("vision.")]
    if update.lora_rank and update.freeze_vision and vision_targets:
        return f"update.lora_targets: {vision_targets[0]!r} is frozen by update.freeze_vision"
    return None
