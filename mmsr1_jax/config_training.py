"""The settings of training; `config.py` has the others."""

import dataclasses

from mmsr1_jax.allowed import setting
from mmsr1_jax.rl.advantages import ADVANTAGES
from mmsr1_jax.rl.lora_targets import TARGETS, TEXT_TARGETS
from mmsr1_jax.rl.loss import AVERAGES, KLS, RATIOS
from mmsr1_jax.rl.schedules import SCHEDULES

OLD = ("engine", "trainer")
REFERENCES = ("device", "host")
OVERLONG = ("keep", "mask", "penalty")


@dataclasses.dataclass(kw_only=True, slots=True)
class Update:
    """Micro-batches and the optimiser (`rl/packing.py`, `rl/update.py`).

    Attributes:
      row_tokens: of a row into which episodes are packed; an episode has at most so many.
      row_windows: of 64 patches, that the pictures of a row may have together.
      rows: of a micro-batch, for each part into which the mesh cuts a batch.
      freeze_vision: the vision tower is not trained.
      lora_rank: of the adapters that are trained in the place of the parameters (`rl/lora.py`); 0:
        none, all parameters are trained.
      lora_alpha: what an adapter adds is multiplied by `lora_alpha / lora_rank`.
      lora_targets: linear maps that have an adapter, by name; those of the vision tower begin with
        `vision.`.
      learning_rate: the highest.
      schedule: `constant`, `linear`, `cosine` (both down to 0), or `sigmoid`, the published one.
      warmup_steps: in which the rate rises from 0.
      b1, b2, eps, weight_decay: of AdamW.
      grad_clip: of the gradient's global norm; 0: none.
      bad_in_a_row: updates with a loss or gradient that is not finite, after which a run stops.
    """

    row_tokens: int = setting(8192, at_least=1, at_most=2**24)
    row_windows: int = setting(384, at_least=0, at_most=2**20)
    rows: int = setting(1, at_least=1, at_most=65536)
    freeze_vision: bool = False
    lora_rank: int = setting(0, at_least=0, at_most=65536)
    lora_alpha: float = setting(32.0, at_least=-1e6, at_most=1e6)
    lora_targets: tuple[str, ...] = setting(TEXT_TARGETS, one_of=tuple(TARGETS))
    learning_rate: float = setting(2e-6, at_least=0, at_most=1000)
    schedule: str = setting("constant", one_of=SCHEDULES)
    warmup_steps: int = setting(0, at_least=0, at_most=2**31 - 1)
    b1: float = setting(0.9, at_least=0, below=1)
    b2: float = setting(0.999, at_least=0, below=1)
    eps: float = setting(1e-8, at_least=0, at_most=1)
    weight_decay: float = setting(0.01, at_least=0, at_most=1000)
    grad_clip: float = setting(1.0, at_least=0, at_most=1e9)
    bad_in_a_row: int = setting(3, at_least=1, at_most=2**31 - 1)


@dataclasses.dataclass(kw_only=True, slots=True)
class Objective:
    """What is maximised (`rl/advantages.py`, `rl/loss.py`).

    Attributes:
      advantage: of an episode in its group: `grpo` (less the mean, by the standard deviation),
        `mean` (less the mean), `rloo` (less the mean of the others).
      ratio: of importance, by `token`, `sequence` (GSPO) or `trajectory`.
      average: of the loss, by `token`, by `sequence` (then over them), or over a `fixed` length
        (`turns.tokens`).
      clip_low, clip_high: of the ratio, below and above 1.
      kl, kl_weight: estimate and weight of the divergence from the reference policy; weight 0:
        there is no reference policy.
      reference: where its parameters lie, `device` or `host`.
      entropy_weight: of the bonus.
      old: log-probs that the ratio is taken against: those of the `engine`, as sampled, or of the
        `trainer`, computed before the first update of a step.
      importance_cap: of the weight by which a token counts for the difference between the engine
        and the trainer (truncated importance sampling, with `old` = `trainer`); 0: none.
      updates: of a step: its groups are dealt out to so many.
      overlong: what becomes of an episode whose tokens were used up: `keep`, `mask` (it carries no
        loss), `penalty` (it costs reward, more so the longer).
      overlong_buffer: tokens before the limit, `turns.tokens`, from which on the penalty grows.
      refill: times that a step's groups without spread may be replaced by new ones (DAPO); 0: they
        stay.
    """

    advantage: str = setting("grpo", one_of=ADVANTAGES)
    ratio: str = setting("token", one_of=RATIOS)
    average: str = setting("token", one_of=AVERAGES)
    clip_low: float = setting(0.2, at_least=0, at_most=1e6)
    clip_high: float = setting(0.2, at_least=0, at_most=1e6)
    kl: str = setting("k3", one_of=KLS)
    kl_weight: float = setting(1e-3, at_least=0, at_most=1e6)
    reference: str = setting("device", one_of=REFERENCES)
    entropy_weight: float = setting(0.0, at_least=0, at_most=1e6)
    old: str = setting("trainer", one_of=OLD)
    importance_cap: float = setting(2.0, at_least=0, at_most=1e6)
    updates: int = setting(1, at_least=1, at_most=65536)
    overlong: str = setting("keep", one_of=OVERLONG)
    overlong_buffer: int = setting(512, at_least=1, at_most=2**24)
    refill: int = setting(0, at_least=0, at_most=1000)


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
    """Questions (`data/questions.py`); for `sft`, episodes (`data/stories.py`).

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
      questions: of a step; for `sft`, episodes.
      rollouts: of each question.
      seed: of the order of questions or episodes, and of sampling.
      validate_every: steps; 0: never. Greedy.
      save_every: steps; the last one is always saved.
      keep: checkpoints, the latest; the best one by validation is kept beside them.
      episodes: of each step that are written out.
      log: `tensorboard`, `wandb`, both or none, separated by commas. JSONL is always written.
    """

    model: str | None = None
    steps: int = setting(50, at_least=1, at_most=2**31 - 1)
    questions: int = setting(32, at_least=1, at_most=2**20)
    rollouts: int = setting(8, at_least=1, at_most=2**16)
    seed: int = setting(0, at_least=0, at_most=2**31 - 1)
    validate_every: int = setting(10, at_least=0, at_most=2**31 - 1)
    save_every: int = setting(10, at_least=0, at_most=2**31 - 1)
    keep: int = setting(2, at_least=1, at_most=2**20)
    episodes: int = setting(4, at_least=0, at_most=2**20)
    log: str = "tensorboard"


def mistake(objective: Objective, update: Update, run: Run) -> str | None:
    """What does not fit together, beginning with the field; None where all does."""
    problem = _lora_mistake(update)
    if problem:
        return problem
    unknown = {name.strip() for name in run.log.split(",")} - {"", "tensorboard", "wandb"}
    if unknown:
        return f"run.log={run.log!r}: only tensorboard and wandb are known"
    if objective.updates > run.questions:
        return f"objective.updates={objective.updates} is more than run.questions={run.questions}"
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
