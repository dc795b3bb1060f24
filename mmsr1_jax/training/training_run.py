"""A training run in its directory: restoring, progress, metrics, checkpoints and termination.

`train` and `sft` share it:

    sigterm = StopSignal()              # before anything that takes long
    with TrainingRun(config, model_dir, workdir, learner, sigterm) as run:
        metadata = run.restore()        # of the latest checkpoint; None: a new run
        run.start()
        for step in run.steps():        # up to the last step, or until SIGTERM
            ...
            run.check_finite(step, [..], micro_batches)
            run.finish_step(step, metrics, metadata)
        return run.finish()             # writes the policy of a complete run
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.packing import TrainBatch
from mmsr1_jax.rollout.timeline import Timeline
from mmsr1_jax.training import metrics, run_config, train_utils
from mmsr1_jax.training.checkpoint import Checkpoints
from mmsr1_jax.training.workdir import Workdir
from mmsr1_jax.utils import compile_counter, processes
from mmsr1_jax.utils.logs import log
from mmsr1_jax.utils.object_store import StoreError


class NonfiniteUpdatesError(UserError):
    """`update.max_nonfinite_updates` consecutive updates had a non-finite loss or gradient."""


class TrainingRun:
    """A run of `train` or `sft`; a context manager that closes the checkpoints and metrics log.

    Args:
      config: Settings of the run.
      model_dir: HF directory of the policy that training starts from.
      workdir: Directory of the run. Files are pushed to its store, if it has one, after each step
        and before each checkpoint.
      learner: Trained parameters and optimiser state, which checkpoints hold.
      sigterm: Set when the run is to stop after its current step.
    """

    def __init__(
        self, config: settings.Config, model_dir: str, workdir: Workdir, learner: Learner,
        sigterm: "StopSignal",
    ):  # fmt: skip
        self.workdir = workdir
        self._sigterm = sigterm
        self._config, self._model_dir, self._learner = config, model_dir, learner
        self._checkpoints = Checkpoints(workdir.checkpoints, keep=config.run.keep_checkpoints)
        self.start_step = processes.broadcast("latest checkpoint", self._checkpoints.latest) or 0
        self._saved_step = self.start_step
        self._nonfinite_streak = 0
        self._stopping = False
        self._timer = StepTimer()
        # Of the last step: seconds, and seconds that were not its rollout.
        self._last_step = self._last_update = float("inf")
        self._resources = contextlib.ExitStack()
        self._resources.callback(self._checkpoints.close)

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._resources.close()
        if kind and issubclass(kind, Exception) and not issubclass(kind, StoreError):
            try:
                self.workdir.push()
            except StoreError as error:  # the error that ends the run matters more
                log.warning("%s", error)

    def restore(self) -> dict[str, Any] | None:
        """Restore the latest checkpoint into the learner, and return its metadata.

        Return None, and change nothing, if there is no checkpoint.
        """
        if not self.start_step:
            return None
        state, metadata = self._checkpoints.restore(self.start_step, self._state())
        self._learner.trained, self._learner.optimizer = state["trained"], state["optimizer"]
        self._nonfinite_streak = metadata["nonfinite_streak"]
        log.info("%s: resuming after step %d", self.workdir, self.start_step)
        return metadata

    def start(self) -> None:
        """Write `config.json`, and open the metrics log."""
        if processes.main():
            run_config.write(self.workdir.path / "config.json", self._config, self._model_dir)
            config = dataclasses.asdict(self._config)
            self._log = metrics.Log(
                self.workdir.path, self._config.run.log_to, step=self.start_step, config=config
            )
            self._resources.callback(self._log.close)

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps, counted from 1, until the last one or SIGTERM.

        A profiler trace of the steps in `run.profile` is written to `profile/`.
        """
        step, last = self.start_step, self._config.run.steps
        first = step + 1
        self._bar = tqdm(
            range(first, last + 1), initial=first - 1, total=last, unit="step",
            disable=not processes.main(),
        )  # fmt: skip
        profile = self._config.run.profile
        self._stopping = any(processes.exchange("stop at once", self._sigterm.is_set()))
        if self._stopping:
            self._bar.close()
            log.info("%s: stopped before step %d", self.workdir, first)
            return
        with self._bar, contextlib.ExitStack() as trace:
            for step in self._bar:
                if profile and max(first, profile[0]) == step <= profile[1]:
                    trace.enter_context(jax.profiler.trace(self.workdir.path / "profile"))
                self._timer = StepTimer()
                yield step
                if profile and step == profile[1]:
                    trace.close()
                if self._stopping and step < last:
                    break
        if self._stopping and step < last:
            log.info(
                "%s: stopped after step %d, which is saved; the same command resumes the run",
                self.workdir, step,
            )  # fmt: skip

    def must_stop_rollout(self) -> bool:
        """Return whether SIGTERM leaves too little time for the step, by that of the last one.

        A step that it interrupts before any other is complete is not finished either.
        """
        if not self._sigterm.is_set():
            return False
        remaining = max(self._last_step - self._timer.seconds(), self._last_update)
        return self._sigterm.seconds() + remaining > self._config.run.grace_seconds

    def stop_rollout(self, step: int, metadata: dict[str, Any]) -> None:
        """Save the step before `step`, whose rollout was stopped.

        Args:
          step: The step that is not finished.
          metadata: Metadata of the checkpoint, as JSON data.
        """
        self.save(step - 1, metadata)
        saved = f"step {step - 1} is saved" if step > 1 else "no step is complete yet"
        log.info(
            "%s: SIGTERM: step %d would take more than run.grace_seconds=%g and was dropped; %s; "
            "the same command resumes the run",
            self.workdir, step, self._config.run.grace_seconds, saved,
        )  # fmt: skip

    def phase(self, name: str) -> contextlib.AbstractContextManager:
        """Return a context that adds its time to `time/NAME` of this step."""
        processes.phase(name)
        return self._timer.phase(name)

    def collective_phase(self, name: str) -> contextlib.AbstractContextManager:
        """Return a `phase` in which processes wait for each other on their devices.

        It begins once all are there, which adds to `time/wait`. If it then takes too long, all
        processes end with a message.
        """
        stack = contextlib.ExitStack()
        with self._timer.phase("wait"):
            processes.barrier(name)
        stack.enter_context(processes.watchdog(name, self._config.processes.update_seconds))
        stack.enter_context(self._timer.phase(name))
        return stack

    @contextlib.contextmanager
    def timeline(self, step: int) -> Iterator[Timeline | None]:
        """Yield a recorder of a step's rollout, and write `timelines/STEP.json` afterwards.

        Yield None unless `run.timeline` is set. With several processes, process 0 is recorded.
        """
        timeline = Timeline() if self._config.run.timeline and processes.main() else None
        yield timeline
        if timeline is not None:
            timeline.write(self.workdir.path / "timelines" / f"{step:06d}.json")

    def check_finite(
        self, step: int, finite: Sequence[float], batches: Iterable[Sequence[TrainBatch]]
    ) -> None:
        """Count consecutive updates that were skipped because they were not finite.

        Args:
          step: Step of the updates.
          finite: Whether the loss and gradient of each update of the step were finite.
          batches: Micro-batches of each update, written to a file if the run is aborted.

        Raises:
          NonfiniteUpdatesError: There were `update.max_nonfinite_updates` such updates.
        """
        limit = self._config.update.max_nonfinite_updates
        for is_finite in finite:
            self._nonfinite_streak = 0 if is_finite else self._nonfinite_streak + 1
            if self._nonfinite_streak >= limit:
                self._bar.close()
                part = f"_{processes.index()}" if processes.count() > 1 else ""
                name = f"nonfinite_{step:06d}{part}.npz"
                _write_batches(self.workdir.path / name, itertools.chain(*batches))
                self.workdir.push()
                processes.barrier("batches written")
                raise NonfiniteUpdatesError(
                    f"step {step}: the loss or gradient of {limit} updates in a row was not finite "
                    f"(update.max_nonfinite_updates). Their micro-batches are in "
                    f"{self.workdir}/{name}"
                )

    def finish_step(
        self,
        step: int,
        step_metrics: dict[str, float],
        metadata: dict[str, Any],
        *,
        tokens: int,
        shown: Sequence[str],
        score: float | None = None,
        save: bool = False,
    ) -> None:
        """Log the metrics of a step, and save a checkpoint if one is due.

        A checkpoint is due every `run.save_every` steps, after the last step, and on SIGTERM.
        Metrics are written before the checkpoint, so that a resumed run has both or neither.

        Args:
          step: The completed step.
          step_metrics: Metrics of the step; times and the number of compilations are added.
          metadata: Metadata of the checkpoint, as JSON data.
          tokens: Number of tokens that the step processed, for `time/tokens_per_second`.
          shown: Names of metrics to show beside the progress bar.
          score: Validation score of the step, if any, which selects the best checkpoint.
          save: Whether to save a checkpoint in any case.
        """
        run = self._config.run
        step_metrics = step_metrics | self._timer.metrics(tokens)
        step_metrics["time/compiles"] = float(compile_counter.count())
        if processes.main():
            self._log.write(step, step_metrics)
        self._stopping = any(processes.exchange("stop", self._sigterm.is_set()))
        due = run.save_every and step % run.save_every == 0
        if save or due or step == run.steps or self._stopping:
            self.save(step, metadata, score)
        else:
            self.workdir.push()
        values = {name: f"{step_metrics.get(name, 0):.3f}" for name in shown}
        values["tokens/s"] = f"{step_metrics['time/tokens_per_second']:.0f}"
        self._bar.set_postfix(values)
        # A validation can be stopped, so it is not time that a step needs.
        self._last_step = self._timer.seconds() - self._timer.seconds("validation")
        self._last_update = self._last_step - self._timer.seconds("rollout")

    def save(self, step: int, metadata: dict[str, Any], score: float | None = None) -> None:
        """Save a checkpoint of a step unless it is saved already."""
        if step > self._saved_step:
            self.workdir.push()  # a resumed run reads the metrics of the step
            metadata = metadata | {"nonfinite_streak": self._nonfinite_streak}
            with processes.watchdog("save", self._config.processes.update_seconds):
                self._checkpoints.save(step, self._state(), metadata, score=score)
            self._saved_step = step

    def with_resume_hint(self, error: UserError, step: int) -> UserError:
        """Return the error that ends the run after `step`, saying how to resume it."""
        self._bar.close()
        if processes.count() > 1:  # the first process that fails ends the others
            self._resources.close()
            processes.barrier("saved")
        saved = f"step {step} is saved" if step else "no step is complete yet"
        return type(error)(f"{error}; {self.workdir}: {saved}; the same command resumes the run")

    def finish(self) -> int:
        """Wait for the last checkpoint and, if the run is complete, write its policy.

        Returns:
          The exit code: 0. Of a run that SIGTERM stopped it is 75 if MMSR1_REPORT_STOPPED is set,
          as launchers do that must tell it from a complete one.
        """
        with processes.watchdog("last save", self._config.processes.update_seconds):
            self._resources.close()
        self.workdir.push()
        if self._saved_step == self._config.run.steps:
            train_utils.save_policy(self._learner, self._config, self._model_dir, self.workdir)
            return 0
        return os.EX_TEMPFAIL if os.environ.get("MMSR1_REPORT_STOPPED") else 0

    def _state(self) -> dict[str, Any]:
        return {"trained": self._learner.trained, "optimizer": self._learner.optimizer}


def _write_batches(path: pathlib.Path, batches: Iterable[TrainBatch]) -> None:
    """Write micro-batches to an `.npz` file for inspection."""
    arrays = {}
    for index, batch in enumerate(batches):
        for name, value in jax.tree_util.tree_leaves_with_path(batch):
            arrays[f"{index}{jax.tree_util.keystr(name)}"] = value
    np.savez(path, **arrays)


class StepTimer:
    """Timer for the phases of a step, in seconds."""

    def __init__(self):
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def seconds(self, phase: str | None = None) -> float:
        """Return the seconds since the start, or those of a phase."""
        return time.perf_counter() - self._start if phase is None else self._seconds[phase]

    def metrics(self, tokens: int) -> dict[str, float]:
        """Return `time/PHASE`, `time/step`, and `time/tokens_per_second` for `tokens` tokens."""
        total = self.seconds()
        phases = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        return phases | {"time/step": total, "time/tokens_per_second": tokens / total}


class StopSignal:
    """Flag that is set when this process receives SIGTERM, and a second later when another does."""

    def __init__(self):
        self._time: float | None = None
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_) -> None:
        if self._time is None:
            self._time = time.monotonic()
        processes.notify("stop")
        log.info("SIGTERM: finishing and saving the current step, then exiting")

    def is_set(self) -> bool:
        if self._time is None and processes.notified("stop"):
            self._time = time.monotonic()
        return self._time is not None

    def seconds(self) -> float:
        """Return the seconds since the flag was set; 0 if it is not."""
        return time.monotonic() - self._time if self.is_set() and self._time else 0.0
