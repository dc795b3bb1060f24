"""`TrainingRun` with a stand-in for the learner: steps, checkpoints, SIGTERM, nonfinite updates."""

import itertools
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.training import metrics, train_utils
from mmsr1_jax.training.training_run import NonfiniteUpdatesError, StopSignal, TrainingRun
from mmsr1_jax.training.workdir import Workdir


class FakeLearner:
    """Learner with one parameter and one optimiser moment; an update adds the step to both."""

    def __init__(self):
        self.trained = {"w": jnp.zeros(3)}
        self.optimizer = {"mu": jnp.zeros(3)}

    def update(self, step: int) -> None:
        self.trained = {"w": self.trained["w"] + step}
        self.optimizer = {"mu": self.optimizer["mu"] - step}

    def values(self) -> list[float]:
        return [self.trained["w"][0].item(), self.optimizer["mu"][0].item()]


@pytest.fixture(autouse=True)
def sigterm_handler():
    """Restore the SIGTERM handler, which `TrainingRun.start` replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def saved_policies(monkeypatch):
    """List of the directories in which runs have saved a policy."""
    workdirs = []

    def save_policy(learner, config, model_dir, workdir):
        workdirs.append(workdir.path)

    monkeypatch.setattr(train_utils, "save_policy", save_policy)
    return workdirs


def make_config(steps=6, max_nonfinite_updates=3, **run) -> settings.Config:
    run = {"save_every": 0, "keep_checkpoints": 100, "log_to": ""} | run
    return settings.Config(
        run=settings.Run(steps=steps, **run),
        update=settings.Update(max_nonfinite_updates=max_nonfinite_updates),
    )


def make_run(workdir, config, learner=None) -> TrainingRun:
    workdir = workdir if isinstance(workdir, Workdir) else Workdir(workdir)
    return TrainingRun(config, "policy", workdir, learner or FakeLearner(), StopSignal())


def finish_step(run, step, **keywords) -> None:
    run.finish_step(step, {"loss": 1 / step}, {"position": step}, tokens=10, shown=(), **keywords)


def train(workdir, config, *, learner=None, on_step=lambda step: None, last=None) -> list[int]:
    """Restore and run to the end, and return the steps.

    Args:
      workdir, config, learner: Arguments of the run.
      on_step: Called in each step, before it is finished.
      last: Step after which the loop is left without `finish`, as if the process were killed.
    """
    learner = learner or FakeLearner()
    steps = []
    with make_run(workdir, config, learner) as run:
        run.restore()
        run.start()
        for step in run.steps():
            learner.update(step)
            on_step(step)
            finish_step(run, step)
            steps.append(step)
            if step == last:
                return steps
        assert run.finish() == 0
    return steps


def saved_steps(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def logged_steps(workdir) -> list[int]:
    return [line["step"] for line in metrics.read(workdir / "metrics.jsonl")]


# Steps and checkpoints


def test_a_new_run_starts_at_step_1_and_restores_nothing(tmp_path):
    with make_run(tmp_path, make_config(steps=3)) as run:
        assert run.restore() is None and run.start_step == 0
        run.start()
        steps = run.steps()
        assert next(steps) == 1
        steps.close()
    assert (tmp_path / "config.json").is_file()


def test_steps_resume_after_the_latest_checkpoint(tmp_path, saved_policies):
    config = make_config(steps=6, save_every=2)
    assert train(tmp_path, config, last=5) == [1, 2, 3, 4, 5]
    learner = FakeLearner()
    with make_run(tmp_path, config, learner) as run:
        metadata = run.restore()
        assert metadata["position"] == 4 and run.start_step == 4
        assert learner.values() == [1 + 2 + 3 + 4, -(1 + 2 + 3 + 4)]
    learner = FakeLearner()
    assert train(tmp_path, config, learner=learner) == [5, 6]
    assert learner.values() == [21, -21] and saved_policies == [tmp_path]


def test_a_complete_run_has_no_further_steps(tmp_path, saved_policies):
    config = make_config(steps=2)
    assert train(tmp_path, config) == [1, 2]
    assert train(tmp_path, config) == []
    assert train(tmp_path, make_config(steps=3)) == [3]  # more steps extend it
    assert len(saved_policies) == 3


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path, saved_policies):
    config = make_config(steps=6, save_every=2)
    train(tmp_path, config, last=5)
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5]
    with make_run(tmp_path, config) as run:
        run.restore()
        run.start()
        assert logged_steps(tmp_path) == [1, 2, 3, 4]
    train(tmp_path, config)
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("save_every, steps", [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (4, [4, 6])])
def test_checkpoints_are_saved_at_intervals_and_after_the_last_step(
    tmp_path, saved_policies, save_every, steps
):
    train(tmp_path, make_config(steps=6, save_every=save_every))
    assert saved_steps(tmp_path) == steps


def test_finish_step_saves_a_requested_checkpoint(tmp_path):
    with make_run(tmp_path, make_config(save_every=4)) as run:
        run.start()
        for step in run.steps():
            finish_step(run, step, save=step == 2)
            if step == 3:
                break
    assert saved_steps(tmp_path) == [2]


def test_a_saved_step_is_not_saved_again(tmp_path):
    learner = FakeLearner()
    with make_run(tmp_path, make_config(save_every=1), learner) as run:
        run.start()
        for step in run.steps():
            learner.update(step)
            finish_step(run, step)
            break
        learner.update(100)
        run.save(1, {"position": "other"})
    learner = FakeLearner()
    with make_run(tmp_path, make_config(), learner) as run:
        assert run.restore()["position"] == 1
    assert learner.values() == [1, -1]


def test_a_step_logs_its_times_and_throughput(tmp_path):
    with make_run(tmp_path, make_config()) as run:
        run.start()
        for step in run.steps():
            with run.phase("rollout"):
                pass
            finish_step(run, step)
            break
    (line,) = metrics.read(tmp_path / "metrics.jsonl")
    assert line["loss"] == 1 and 0 <= line["time/rollout"] <= line["time/step"]
    assert line["time/tokens_per_second"] == pytest.approx(10 / line["time/step"])


# SIGTERM


def test_sigterm_before_the_first_step_ends_the_run_without_one(tmp_path, saved_policies, capsys):
    with make_run(tmp_path, make_config()) as run:
        run.restore()
        signal.raise_signal(signal.SIGTERM)  # while programs compile
        run.start()
        assert list(run.steps()) == [] and run.finish() == 0
    assert f"{tmp_path}: stopped before step 1" in capsys.readouterr().err
    assert train(tmp_path, make_config(steps=2)) == [1, 2]


def test_sigterm_ends_the_run_after_the_step_and_saves_it(tmp_path, saved_policies, capsys):
    config = make_config(steps=6)

    def stop(step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    assert train(tmp_path, config, on_step=stop) == [1, 2, 3]
    assert saved_steps(tmp_path) == [3] and logged_steps(tmp_path) == [1, 2, 3]
    assert saved_policies == []  # the run is not complete
    stderr = capsys.readouterr().err
    assert "SIGTERM: finishing and saving the current step, then exiting" in stderr
    assert f"{tmp_path}: stopped after step 3, which is saved" in stderr
    assert train(tmp_path, config) == [4, 5, 6]
    assert saved_policies == [tmp_path]


def test_sigterm_in_the_last_step_completes_the_run(tmp_path, saved_policies, capsys):
    def stop(step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    assert train(tmp_path, make_config(steps=2), on_step=stop) == [1, 2]
    assert saved_policies == [tmp_path]
    assert "stopped after step" not in capsys.readouterr().err


def test_a_rollout_stops_after_sigterm_if_the_step_would_take_longer_than_the_grace(
    tmp_path, saved_policies, capsys, monkeypatch
):
    """A step takes 100 s, 60 of them its rollout; the grace is 51 s."""
    now, ticks = [0.0], itertools.count()
    for name in ("perf_counter", "monotonic"):
        clock = f"mmsr1_jax.training.training_run.time.{name}"
        monkeypatch.setattr(clock, lambda: now[0] + 1e-9 * next(ticks))
    config = make_config(steps=6, grace_seconds=51.0)
    with make_run(tmp_path, config) as run:
        run.restore()
        run.start()
        for step in run.steps():
            assert not run.must_stop_rollout()
            with run.phase("rollout"):
                now[0] += 45.0
                if step == 2:
                    signal.raise_signal(signal.SIGTERM)
                    assert run.must_stop_rollout()  # 55 s remain
                    now[0] += 5.0
                    assert run.must_stop_rollout()  # 50 s, of which 46 are left
                    run._sigterm._time = now[0]
                    assert not run.must_stop_rollout()
                    now[0] += 9.0
                    assert not run.must_stop_rollout()  # 40 s for the update, of 42
                    now[0] += 3.0
                    assert run.must_stop_rollout()
                    run.stop_rollout(step, {"position": 1})
                    break
                now[0] += 15.0
            now[0] += 40.0
            finish_step(run, step)
        assert run.finish() == 0
    assert saved_steps(tmp_path) == [1] and saved_policies == []
    stderr = capsys.readouterr().err
    assert "step 2 would take more than run.grace_seconds=51 and was dropped; step 1 is" in stderr
    assert train(tmp_path, make_config()) == [2, 3, 4, 5, 6]


def test_before_any_step_is_complete_a_rollout_stops_at_once(tmp_path, saved_policies):
    with make_run(tmp_path, make_config(steps=6, grace_seconds=1e4)) as run:
        run.restore()
        run.start()
        for step in run.steps():
            signal.raise_signal(signal.SIGTERM)
            assert run.must_stop_rollout()
            run.stop_rollout(step, {"position": 0})
            break
        assert run.finish() == 0
    assert saved_steps(tmp_path) == []


# Nonfinite updates


def check_steps(workdir, config, finite, *, last=None) -> None:
    """Train with the given outcomes of the updates of each step, see `TrainingRun.check_finite`."""
    with make_run(workdir, config) as run:
        run.restore()
        run.start()
        for step in run.steps():
            batches = [[{"mask": np.full(2, step + i / 10)}] for i in range(len(finite[step]))]
            run.check_finite(step, finite[step], batches)
            finish_step(run, step)
            if step == last:
                break


def test_nonfinite_updates_in_a_row_abort_the_run(tmp_path):
    finite = {1: [1.0, 0.0], 2: [0.0, 0.0]}
    with pytest.raises(NonfiniteUpdatesError, match="step 2: .* 3 updates in a row") as error:
        check_steps(tmp_path, make_config(max_nonfinite_updates=3), finite)
    path = tmp_path / "nonfinite_000002.npz"
    assert str(path) in str(error.value) and logged_steps(tmp_path) == [1]
    with np.load(path) as arrays:  # the micro-batches of all updates of the step
        assert [float(arrays[name][0]) for name in sorted(arrays)] == [2.0, 2.1]


def test_a_finite_update_resets_the_count(tmp_path):
    finite = {1: [0.0, 0.0], 2: [1.0, 0.0], 3: [0.0, 1.0], 4: [0.0, 0.0]}
    check_steps(tmp_path, make_config(steps=4, max_nonfinite_updates=3), finite)
    assert logged_steps(tmp_path) == [1, 2, 3, 4]


def test_nonfinite_updates_are_counted_over_a_resume(tmp_path):
    config = make_config(save_every=1, max_nonfinite_updates=3)
    finite = {1: [1.0], 2: [0.0], 3: [0.0], 4: [0.0], 5: [1.0]}
    check_steps(tmp_path, config, finite, last=3)
    with pytest.raises(NonfiniteUpdatesError, match="step 4: .* 3 updates in a row"):
        check_steps(tmp_path, config, finite)


# Ending a run


@pytest.mark.parametrize("step, message", [(0, "no step is complete yet"), (2, "step 2 is saved")])
def test_an_error_that_ends_a_run_says_how_to_resume_it(tmp_path, step, message):
    with make_run(tmp_path, make_config()) as run:
        run.start()
        steps = run.steps()
        next(steps)
        error = run.with_resume_hint(NonfiniteUpdatesError("the judge refuses"), step)
        steps.close()
    assert type(error) is NonfiniteUpdatesError and isinstance(error, UserError)
    assert str(error) == (
        f"the judge refuses; {tmp_path}: {message}; the same command resumes the run"
    )


@pytest.mark.parametrize("damage", ["no metadata", "no arrays", "cut short", "other bytes"])
def test_a_damaged_checkpoint_is_named(tmp_path, saved_policies, damage):
    """The run resumes from the one before once it is removed."""
    config = make_config(steps=6, save_every=1)
    assert train(tmp_path, config, last=2) == [1, 2]
    folder = tmp_path / "checkpoints" / "2"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        is_metadata = "metadata" in path.name.lower()
        if damage.startswith("no") and is_metadata == (damage == "no metadata"):
            path.unlink()
        elif not damage.startswith("no"):
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2] if damage == "cut short" else data[::-1])
    with make_run(tmp_path, config) as run:
        with pytest.raises(UserError, match="checkpoints/2: the checkpoint is damaged: ") as error:
            run.restore()
        assert "\n" not in str(error.value)
    shutil.rmtree(folder)
    assert train(tmp_path, config) == [2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_model_is_rejected(tmp_path):
    config, learner = make_config(steps=1), FakeLearner()
    with make_run(tmp_path, config, learner) as run:
        run.start()
        for step in run.steps():
            finish_step(run, step)
    learner.trained = {"w": jnp.zeros(4)}
    raises = pytest.raises(UserError, match=r"trained.w has shape \(3,\), and this run needs")
    with make_run(tmp_path, config, learner) as run, raises:
        run.restore()
