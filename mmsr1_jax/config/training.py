"""The settings of training; `config/settings.py` has the others."""

import dataclasses

from mmsr1_jax.config.bounds import setting
from mmsr1_jax.config.choices import (
    ADVANTAGES,
    AVERAGES,
    KLS,
    LORA_TARGETS,
    OLD_LOGPROBS,
    OVERLONG,
    RATIOS,
    REFERENCES,
    SCHEDULES,
    TEXT_TARGETS,
)


@dataclasses.dataclass(kw_only=True, slots=True)
class Update:
    """Micro-batches and the optimiser (`rl/packing.py`, `rl/learner.py`).

    Attributes:
      pack_length: of a row into which episodes are packed; an episode has at most so many.
      pack_windows: of 64 patches, that the pictures of a row may have together.
      micro_batch_rows: of a micro-batch, for each part into which the mesh cuts a batch.
      freeze_vision: the vision tower is not trained.
      lora_rank: of the adapters that are trained in the place of the parameters (`rl/lora.py`); 0:
        none, all parameters are trained.
      lora_alpha: what an adapter adds is multiplied by `lora_alpha / lora_rank`.
      lora_targets: linear maps that have an adapter, by name; those of the vision tower begin with
        `vision.`.
      learning_rate: the highest.
      lr_schedule: `constant`, `linear`, `cosine` (both down to 0), or `sigmoid`, the published one.
      warmup_steps: in which the rate rises from 0.
      b1, b2, eps, weight_decay: of AdamW.
      max_grad_norm: of the gradient's global norm; 0: none.
      max_nonfinite_updates: updates with a loss or gradient that is not finite, after which a run
        stops.
    """

    pack_length: int = setting(8192, at_least=1, at_most=2**24)
    pack_windows: int = setting(384, at_least=0, at_most=2**20)
    micro_batch_rows: int = setting(1, at_least=1, at_most=65536)
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
    """What is maximised (`rl/advantages.py`, `rl/loss.py`).

    Attributes:
      advantage: of an episode in its group: `grpo` (less the mean, by the standard deviation),
        `mean` (less the mean), `rloo` (less the mean of the others).
      ratio_level: of importance, by `token`, `sequence` (GSPO) or `trajectory`.
      loss_aggregation: of the loss, by `token`, by `sequence` (then over them), or over a `fixed`
        length (`turns.max_episode_tokens`).
      clip_low, clip_high: of the ratio, below and above 1.
      kl_estimator, kl_coef: estimate and weight of the divergence from the reference policy; weight
        0: there is no reference policy.
      reference: where its parameters lie, `device` or `host`.
      entropy_coef: of the bonus.
      old_logprobs: log-probs that the ratio is taken against: those of the `engine`, as sampled, or
        of the `trainer`, computed before the first update of a step.
      tis_cap: of the weight by which a token counts for the difference between the engine
        and the trainer (truncated importance sampling, with `old` = `trainer`); 0: none.
      num_minibatches: of a step: its groups are dealt out to so many.
      overlong: what becomes of an episode whose tokens were used up: `keep`, `mask` (it carries no
        loss), `penalty` (it costs reward, more so the longer).
      overlong_buffer: tokens before the limit, `turns.max_episode_tokens`, from which on the
        penalty grows.
      max_resample_rounds: times that a step's groups without spread may be replaced by new ones
        (DAPO); 0: they stay.
    """

    advantage: str = setting("grpo", one_of=ADVANTAGES)
    ratio_level: str = setting("token", one_of=RATIOS)
    loss_aggregation: str = setting("token", one_of=AVERAGES)
    clip_low: float = setting(0.2, at_least=0, at_most=1e6)
    clip_high: float = setting(0.2, at_least=0, at_most=1e6)
    kl_estimator: str = setting("k3", one_of=KLS)
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
      train, validation: parquet files (for `sft` JSONL, and no validation), directories of them, or
        patterns.
      image_roots: directories in which pictures (of `sft` also indexes) may lie that the files
        name, beside the folder of the file that names them.
      max_bad_rows: rows or lines that cannot be used, after which a run stops.
      validation_rows: of the validation files, the first so many; 0: all.
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
      model: HF directory of the policy to begin with, unless `--model` names one.
      steps: of rollouts and updates; of updates for `sft`.
      prompts_per_step: of a step; for `sft`, episodes.
      group_size: of each question.
      seed: of the order of questions or episodes, and of sampling.
      validate_every: steps; 0: never. Greedy.
      save_every: steps; the last one is always saved.
      keep_checkpoints: checkpoints, the latest; the best one by validation is kept beside them.
      saved_episodes: of each step that are written out.
      log_to: `tensorboard`, `wandb`, both or none, separated by commas. JSONL is always written.
    """

    model: str | None = None
    steps: int = setting(50, at_least=1, at_most=2**31 - 1)
    prompts_per_step: int = setting(32, at_least=1, at_most=2**20)
    group_size: int = setting(8, at_least=1, at_most=2**16)
    seed: int = setting(0, at_least=0, at_most=2**31 - 1)
    validate_every: int = setting(10, at_least=0, at_most=2**31 - 1)
    save_every: int = setting(10, at_least=0, at_most=2**31 - 1)
    keep_checkpoints: int = setting(2, at_least=1, at_most=2**20)
    saved_episodes: int = setting(4, at_least=0, at_most=2**20)
    log_to: str = "tensorboard"


def mistake(objective: Objective, update: Update, run: Run) -> str | None:
    """What does not fit together, beginning with the field; None where all does."""
    problem = _lora_mistake(update)
    if problem:
        return problem
    unknown = {name.strip() for name in run.log_to.split(",")} - {"", "tensorboard", "wandb"}
    if unknown:
        return f"run.log_to={run.log_to!r}: only tensorboard and wandb are known"
    if objective.num_minibatches > run.prompts_per_step:
        return (
            f"objective.num_minibatches={objective.num_minibatches} is more than "
            f"run.prompts_per_step={run.prompts_per_step}"
        )
    return None


def _lora_mistake(update: Update) -> str | None:
    if update.lora_rank and not update.lora_targets:
        return f"update.lora_targets is empty, with lora_rank={update.lora_rank}"
    if update.lora_rank and not update.lora_alpha > 0:
        return f"update.lora_alpha={update.lora_alpha} must be over 0"
    vision = [name for name in update.lora_targets if name.startswith("vision.")]
    if update.lora_rank and update.freeze_vision and vision:
        return f"update.lora_targets: {vision[0]!r} is frozen by update.freeze_vision"
    return None
