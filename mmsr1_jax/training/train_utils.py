"""Helpers of the training commands: settings, policy, step timing, SIGTERM handling."""

import collections
import contextlib
import dataclasses
import itertools
import pathlib
import signal
import sys
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from mmsr1_jax.config import settings
from mmsr1_jax.models import qwen2_5_vl, sharding
from mmsr1_jax.rl import lora
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.packing import RowShape, TrainBatch
from mmsr1_jax.rl.schedules import Schedule, make_schedule
from mmsr1_jax.training import run_config
from mmsr1_jax.utils import outputs


def resolve_workdir(given: str | None) -> pathlib.Path:
    """Return the run's directory: `--workdir`, or `build/` plus the config file's name and variant.

    Raises:
      ValueError: The command line has neither `--workdir` nor `--config`.
    """
    if given is not None:
        return pathlib.Path(given)
    if _no_config():
        raise ValueError("--config or --workdir: the settings of a new run, or a run to go on with")
    name, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    return pathlib.Path("build", pathlib.Path(name).stem + (f"_{variant}" if variant else ""))


def resolve_settings(
    workdir: pathlib.Path, given: settings.Config, model: str | None
) -> tuple[settings.Config, str]:
    """Return settings and the policy's directory, from the command or from the run that it resumes.

    Args:
      workdir: Directory of the run.
      given: Value of `--config`.
      model: Value of `--model`; None for the resumed run's policy, or `config.run.model` of a new
        run.

    Raises:
      ValueError: A new run has no policy, or a setting is invalid.
    """
    path = workdir / "config.json"
    if path.is_file() and _no_config():
        config, model_dir = run_config.read(path)
        run_config.override(config, given, sys.argv)
        return settings.validate(config), model or model_dir
    model = model or given.run.model
    if not model:
        raise ValueError("--model: the HF directory of a policy is needed to begin a run")
    return given, model


# Settings that affect the trained policy, by section of the config; None means the whole section.
_LEARNED_BY: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("images", "turns", "tools", "sampling", "rewards", "objective", "update")),
    "data": ("train",),
    "run": ("prompts_per_step", "group_size", "seed"),
}


def check_matches_existing_run(workdir: pathlib.Path, given: settings.Config, model: str) -> None:
    """Raise ValueError if the command's config file contradicts an existing run in `workdir`.

    Only a run with a checkpoint counts, and only the policy and the settings in `_LEARNED_BY` are
    compared.
    """
    path = workdir / "config.json"
    if _no_config() or not path.is_file() or not any(workdir.glob("checkpoints/[0-9]*")):
        return
    there, model_there = run_config.read(path)
    found = [("model", model_there, model)]
    for part, names in _LEARNED_BY.items():
        then, now = getattr(there, part), getattr(given, part)
        for name in names or [field.name for field in dataclasses.fields(then)]:
            found.append((f"config.{part}.{name}", getattr(then, name), getattr(now, name)))
    for name, then, now in found:
        if then != now:
            raise ValueError(
                f"{workdir}: already contains a run with {name}={then}; this command sets "
                f"{name}={now}. Use another --workdir, or resume the run with --workdir={workdir} "
                f"alone (--{name}=.. changes it)"
            )


def _no_config() -> bool:
    """Return whether the command line has no config file."""
    file = pathlib.Path(flags.FLAGS["config"].config_filename)
    return file.resolve() == pathlib.Path(settings.__file__).resolve()


def load_policy(config: settings.Config, model_dir: str, mesh: Mesh) -> qwen2_5_vl.Qwen2_5_VL:
    """Load the policy to train.

    Its parameters are float32, or in the compute dtype with LoRA, which does not change them.
    """
    return qwen2_5_vl.load(
        model_dir,
        mesh=mesh,
        param_dtype=config.model.dtype if config.update.lora_rank else "float32",
        dtype=config.model.dtype,
        attention=config.model.attention,
        remat=config.model.remat,
        logprob_chunk=config.model.logprob_chunk,
    )


def save_policy(
    learner: Learner, config: settings.Config, model_dir: str, workdir: pathlib.Path
) -> None:
    """Write `policy/`, an HF directory, and with LoRA also `adapter/`.

    Nothing is written if `policy/` already holds the policy of the last step.
    """
    update, done = config.update, workdir / "policy_step"
    there = done.is_file() and (workdir / "policy").is_dir()
    if there and done.read_text() == str(config.run.steps):
        print(f"{workdir / 'policy'}: the run is over, its policy is there", file=sys.stderr)
        return
    done.unlink(missing_ok=True)
    policy = learner.model()
    if update.lora_rank:
        lora.save(
            learner.trained, workdir / "adapter", policy.config, alpha=update.lora_alpha,
            source=model_dir,
        )  # fmt: skip
        print(f"{workdir / 'adapter'}: what was trained", file=sys.stderr)
    qwen2_5_vl.save(policy, workdir / "policy", source=model_dir)
    with outputs.new_file(done) as partial:
        partial.write_text(str(config.run.steps))
    print(f"{workdir / 'policy'}: the trained policy", file=sys.stderr)


def learning_rate(config: settings.Config) -> Schedule:
    """Return the learning rate schedule of a run, by step counted from 0."""
    update = config.update
    return make_schedule(
        update.lr_schedule,
        update.learning_rate,
        steps=config.run.steps,
        warmup_steps=update.warmup_steps,
        final=0.05 if update.lr_schedule == "sigmoid" else 0.0,
    )


def row_shape(update: settings.Update, mesh: Mesh) -> RowShape:
    """Return the shape of a micro-batch on the mesh."""
    rows = update.micro_batch_rows * sharding.num_batch_shards(mesh)
    return RowShape(rows, update.pack_length, update.pack_windows)


def write_batch(
    workdir: pathlib.Path, number: int, updates: Sequence[Iterable[TrainBatch]]
) -> pathlib.Path:
    """Write the micro-batches of a step's updates to a file for inspection, and return its path."""
    path = workdir / f"not_finite_{number:06d}.npz"
    arrays = {}
    for place, batch in enumerate(itertools.chain(*updates)):
        for name, value in jax.tree_util.tree_leaves_with_path(batch):
            arrays[f"{place}{jax.tree_util.keystr(name)}"] = value
    np.savez(path, **arrays)
    return path


class Clock:
    """Timer for the phases of a step, in seconds."""

    def __init__(self):
        self._begin = time.perf_counter()
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - begin

    def figures(self, tokens: int) -> dict[str, float]:
        """Return `time/PHASE`, `time/step`, and `time/tokens_per_second` for `tokens` tokens."""
        total = time.perf_counter() - self._begin
        found = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        return found | {"time/step": total, "time/tokens_per_second": tokens / total}


class StopSignal:
    """Flag that is set when the process receives SIGTERM."""

    def __init__(self):
        self._set = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_) -> None:
        self._set = True
        print("SIGTERM: finishing and saving this step, then exiting", file=sys.stderr)

    def is_set(self) -> bool:
        return self._set
