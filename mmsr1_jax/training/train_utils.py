"""Helpers of the training commands: settings, directory and policy of a run."""

import contextlib
import dataclasses
import pathlib
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

import mmsr1_jax
from mmsr1_jax.config import redaction, settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data import QuestionSource
from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.models.attention import supports_prefixes
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.rl import lora
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.packing import RowShape
from mmsr1_jax.rl.schedules import Schedule, make_schedule
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.training import run_config
from mmsr1_jax.training.workdir import Workdir, open_store
from mmsr1_jax.utils import object_store, outputs, processes
from mmsr1_jax.utils.logs import log
from mmsr1_jax.utils.source import source_digest


@contextlib.contextmanager
def open_workdir(given: str | None) -> Iterator[Workdir]:
    """Lock the run's directory, check that all processes have the same, and yield it.

    Args:
      given: Value of `--workdir`, a directory or an address `gs://BUCKET/FOLDER`; None for `build/`
        plus the config file's name and variant.

    Raises:
      UserError: The command line has neither `--workdir` nor `--config`, the directory is in use,
        or the address is invalid or refused.
      ProcessError: The processes do not have the same directory.
    """
    if given is not None and object_store.is_address(given):
        with open_store(given) as workdir:
            yield workdir
        return
    path = _default_workdir() if given is None else pathlib.Path(given)
    with outputs.lock(path):
        check_directory(path)
        yield Workdir(path, saved_steps=saved_steps(path))


def saved_steps(workdir: pathlib.Path) -> tuple[int, ...]:
    """Return the steps of the checkpoints in a directory on a disk, ascending."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return tuple(sorted(int(name) for name in names if name.isdigit()))


def _default_workdir() -> pathlib.Path:
    if _without_config_file():
        raise UserError("give --config=FILE to start a run, or --workdir=RUN of the run to resume")
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    name, _, variant = file.partition(":")
    return pathlib.Path("build", pathlib.Path(name).stem + (f"_{variant}" if variant else ""))


def local_directory(given: str, flag: str) -> pathlib.Path:
    """Return the directory that a flag names. Raises UserError for an object store."""
    if object_store.is_address(given):
        raise UserError(f"--{flag}={given}: must be a directory on a disk, not an object store")
    return pathlib.Path(given)


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
      UserError: A new run has no policy, or a setting is invalid.
    """
    path = workdir / "config.json"
    if path.is_file() and _without_config_file():
        config, model_dir = run_config.read(path)
        run_config.override(config, given, sys.argv)
        return settings.validate(config), model or model_dir
    model = model or given.run.model
    if not model:
        raise UserError(
            "a new run needs a policy: give its HF directory as --model or config.run.model"
        )
    return given, model


# Settings that affect the trained policy, by section of the config; None means the whole section.
_TRAINING_SETTINGS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("images", "turns", "tools", "sampling", "rewards", "objective", "update")),
    "data": ("train",),
    "run": ("prompts_per_step", "group_size", "seed"),
}


def check_matches_existing_run(workdir: Workdir, given: settings.Config, model: str) -> None:
    """Raise UserError if the command's config file contradicts an existing run in `workdir`.

    Only a run with a checkpoint counts. Only the policy and the settings in `_TRAINING_SETTINGS`
    are compared.
    """
    path = workdir.path / "config.json"
    if _without_config_file() or not path.is_file() or not workdir.saved_steps:
        return
    existing, existing_model = run_config.read(path)
    pairs = [("model", existing_model, model)]
    for section, names in _TRAINING_SETTINGS.items():
        old, new = getattr(existing, section), getattr(given, section)
        for name in names or [field.name for field in dataclasses.fields(old)]:
            pairs.append((f"config.{section}.{name}", getattr(old, name), getattr(new, name)))
    for name, old, new in pairs:
        if old != new:
            raise UserError(
                f"{workdir}: already contains a run with {name}={old}; this command sets "
                f"{name}={new}. Use another --workdir, or resume the run with --workdir={workdir} "
                f"alone (--{name}=.. changes it)"
            )


def _without_config_file() -> bool:
    """Return whether the command line has no config file."""
    file = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    return file.resolve() == pathlib.Path(settings.__file__).resolve()


def facts(config: settings.Config, model_dir: str) -> dict[str, Any]:
    """Return what must be the same in all processes of a run: settings, policy, code."""
    values: dict[str, Any] = {"the policy": model_dir}
    for section, fields in redaction.redact(dataclasses.asdict(config)).items():
        values |= {f"config.{section}.{name}": value for name, value in fields.items()}
    files = sorted(pathlib.Path(model_dir).glob("*.safetensors"))
    values["the policy's files"] = [[file.name, file.stat().st_size] for file in files]
    values["the code's digest"] = source_digest(pathlib.Path(mmsr1_jax.__file__).parent)[:16]
    values["the version of jax"] = jax.__version__
    return values


def check_directory(directory: pathlib.Path) -> None:
    """Check that all processes see the same directory, by a file that process 0 puts there.

    Raises:
      UserError: They do not; the message names the first process that does not.
    """
    if processes.count() == 1:
        return
    token = directory / f".mmsr1-{processes.broadcast('token', uuid.uuid4().hex)}"
    if processes.main():
        token.touch()
    processes.barrier("token")
    seen = processes.exchange("directory", token.is_file())
    if processes.main():
        token.unlink()
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)}: does not see the files that process 0 writes to "
            f"{directory}; all processes need the same directory, on a disk that they share"
        )


def load_policy(config: settings.Config, model_dir: str, mesh: Mesh) -> Policy:
    """Load the policy to train.

    Its parameters are float32, or in the compute dtype with LoRA, which does not change them.
    """
    return checkpoint.load(
        model_dir,
        mesh=mesh,
        param_dtype=config.model.dtype if config.update.lora_rank else "float32",
        dtype=config.model.dtype,
        attention=config.model.attention,
        remat=config.model.remat,
        logprob_chunk=config.model.logprob_chunk,
    )


@contextlib.contextmanager
def memory_for_rollouts(
    engine: Engine | EnginePool, learner: Learner, offload: bool
) -> Iterator[None]:
    """Keep the learner's state in host memory during a rollout, if `offload`.

    The engine allocates its caches in the rollout. They are freed before the state returns, which
    may need their memory.
    """
    if not offload:
        yield
        return
    learner.offload()
    try:
        yield
    finally:
        engine.release_caches()
        learner.restore()


def save_policy(
    learner: Learner, config: settings.Config, model_dir: str, workdir: Workdir
) -> None:
    """Write `policy/`, an HF directory, and with LoRA also `adapter/`.

    Nothing is written if `policy/` already holds the policy of the last step.
    """
    update, marker = config.update, workdir.path / "policy_step"
    exists = marker.is_file() and workdir.has_folder("policy")
    is_saved = exists and marker.read_text() == str(config.run.steps)
    if processes.broadcast("policy saved", is_saved):
        log.info("%s/policy: the run is complete, and its policy is saved here", workdir)
        return
    if processes.main():
        workdir.remove(marker.name)
    policy = learner.model()
    if update.lora_rank:
        lora.save(
            learner.trained, workdir.path / "adapter", policy.config, alpha=update.lora_alpha,
            source=model_dir,
        )  # fmt: skip
        log.info("%s/adapter: saved the trained adapter", workdir)
    checkpoint.save(policy, workdir.path / "policy", source=model_dir)
    workdir.push()  # before the marker, which says that the policy is complete
    if processes.main():
        outputs.write_text(marker, str(config.run.steps))
    workdir.push()
    log.info("%s/policy: saved the trained policy", workdir)


def question_source(config: settings.Config, files: Sequence[str]) -> QuestionSource:
    """Return the questions of parquet files, with the settings of `config.data`."""
    return QuestionSource(
        files,
        image_roots=config.data.image_roots,
        max_bad_rows=config.data.max_bad_rows,
        max_file_pixels=config.images.max_file_pixels,
    )


def learning_rate_schedule(config: settings.Config) -> Schedule:
    """Return the learning rate schedule of a run, by step counted from 0."""
    update = config.update
    return make_schedule(
        update.lr_schedule,
        update.learning_rate,
        steps=config.run.steps,
        warmup_steps=update.warmup_steps,
        final=0.05 if update.lr_schedule == "sigmoid" else 0.0,
    )


def row_shape(config: settings.Config, mesh: Mesh) -> RowShape:
    """Return the shape of a micro-batch on the mesh."""
    update = config.update
    rows = update.micro_batch_rows * sharding.num_local_batch_shards(mesh)
    with jax.set_mesh(mesh):
        shares = supports_prefixes(config.model.attention, update.pack_length, config.model.dtype)
    return RowShape(rows, update.pack_length, update.pack_windows, shares)


def is_validation_step(run: settings.Run, step: int) -> bool:
    """Return whether the policy is validated after a step: every `validate_every`, and the last."""
    return bool(run.validate_every) and (step % run.validate_every == 0 or step == run.steps)
