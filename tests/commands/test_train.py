"""`python -m mmsr1_jax.train`: the files of a run, resuming after a stop or a kill, and errors."""

import json
import random
import shutil
import signal
import sys
import time

import pytest

from mmsr1_jax.training import metrics
from tests.programs import kill_when, run, start, wait_until
from tests.train_runs import (
    SMALL,
    new_run_command,
    run_results,
    train_command,
    write_questions,
)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions"))


RECORDED = ("--config.run.profile=(2,2)", "--config.run.timeline=True")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, questions):
    """Directory of a complete run of 6 steps with a profile of the second and timelines."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    result = run(new_run_command(workdir, questions, *RECORDED))
    assert result.returncode == 0, result.stderr[-3000:]
    return workdir


# Files of a run


def test_metrics_of_every_step_are_written(uninterrupted):
    lines, _, _ = run_results(uninterrupted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["update/rollout_logprob_diff_abs"] < 1e-4
        assert line["update/ratio"] == 1.0 and line["update/clip_fraction"] == 0.0
        assert line["update/gradient_norm"] > 0 and line["update/nonfinite"] == 0
        assert line["errors"] == 0 and line["groups/sampled"] == 2
    # Some rewards differ within a group, and tools are used.
    assert any(
        line["groups/with_variance"] > 0 and line["update/policy_loss"] != 0 for line in lines
    )
    assert sum(line["tool/calls"] for line in lines) > 5
    assert all(line["tool/failed"] == 0 for line in lines)
    assert ["validation/accuracy" in line for line in lines] == [False, False, True] * 2
    assert lines[0]["update/kl"] == pytest.approx(0, abs=1e-9)
    assert lines[-1]["update/kl"] > 1e-6
    compiles = [line["time/compiles"] for line in metrics.read(uninterrupted / "metrics.jsonl")]
    assert compiles[3] == compiles[-1]  # the second validation compiles nothing
    assert any((uninterrupted / "tensorboard").iterdir())


def test_episodes_are_saved_with_answers_and_rewards(uninterrupted):
    _, _, episodes = run_results(uninterrupted)
    episode = episodes[0]
    assert episode["answers"] and episode["segments"] and "reward" in episode["reward"]


def test_the_last_two_checkpoints_and_the_best_one_are_kept(uninterrupted):
    lines, _, _ = run_results(uninterrupted)
    steps = {int(path.name) for path in (uninterrupted / "checkpoints").iterdir()}
    scores = [line.get("validation/accuracy", -1) for line in lines]
    best = 1 + max(range(6), key=lambda i: (scores[i], i))
    # The best step may have no checkpoint, since checkpoints are saved every 2 steps.
    assert steps == {4, 6} | ({best} if best in (2, 4, 6) else set()), (steps, scores)


def test_profiles_and_timelines_are_written(uninterrupted):
    traces = list((uninterrupted / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0
    timelines = sorted((uninterrupted / "timelines").iterdir())
    assert [path.name for path in timelines] == [f"{step:06d}.json" for step in range(1, 7)]
    events = json.loads(timelines[0].read_text())["traceEvents"]
    assert {"prefill", "decode", "device waits for host"} <= {event["name"] for event in events}


# Resuming


@pytest.mark.parametrize(
    ("grace", "message"),
    [(600, "which is saved"), pytest.param(0, "was dropped", marks=pytest.mark.proof)],
)
def test_a_run_stopped_by_sigterm_resumes_bit_identically(
    uninterrupted, tmp_path, questions, grace, message
):
    """The step is finished, or its rollout dropped. The trainer is in host memory during rollouts,
    which changes no number."""
    workdir = tmp_path / "run"
    arguments = ["--config.update.offload=True", f"--config.run.grace_seconds={grace}"]
    process = start(new_run_command(workdir, questions, *arguments))
    wait_until(process, lambda: bool(metrics.read(workdir / "metrics.jsonl")), interval=0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and message in stderr, stderr[-3000:]
    assert len(metrics.read(workdir / "metrics.jsonl")) < 6
    assert run(train_command(workdir)).returncode == 0
    assert run_results(workdir) == run_results(uninterrupted)


@pytest.mark.proof
def test_a_run_killed_while_saving_resumes_bit_identically(uninterrupted, tmp_path, questions):
    workdir = tmp_path / "run"
    checkpoints = workdir / "checkpoints"
    process = start(new_run_command(workdir, questions))
    kill_when(process, lambda: any(checkpoints.glob("4.*")) or (checkpoints / "4").exists())
    result = run(train_command(workdir))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resuming after step" in result.stderr, result.stderr[-3000:]
    assert run_results(workdir) == run_results(uninterrupted)


@pytest.mark.proof
def test_runs_killed_at_random_moments_resume_bit_identically(uninterrupted, tmp_path, questions):
    """Each run is killed at a random moment of a random step; a third of them during a save."""
    rng = random.Random(0)
    for index in range(10):
        workdir = tmp_path / f"run{index}"
        step, delay = rng.randint(0, 5), rng.uniform(0, 2)
        process = start(new_run_command(workdir, questions))
        if index % 3 == 0:
            kill_when(process, lambda saved=workdir / "checkpoints": any(saved.glob("*.*")))
        else:
            while len(metrics.read(workdir / "metrics.jsonl")) < step:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(delay)
            assert process.poll() is None, "the run was complete before it could be killed"
            process.send_signal(signal.SIGKILL)
            process.wait()
        command = train_command(workdir)
        if not (workdir / "config.json").is_file():  # killed before it wrote its settings
            command = new_run_command(workdir, questions)
        result = run(command)
        assert result.returncode == 0, result.stderr[-3000:]
        assert run_results(workdir) == run_results(uninterrupted), index


@pytest.mark.proof
def test_a_complete_run_rejects_other_settings_and_is_unchanged(uninterrupted, tmp_path, questions):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    settings_before = (workdir / "config.json").read_bytes()
    policy_time = (workdir / "policy" / "config.json").stat().st_mtime_ns
    other = [*RECORDED, "--config.rewards.search_penalty=0"]
    result = run(new_run_command(workdir, questions, *other))
    assert result.returncode == 2
    assert "with config.rewards.search_penalty=0.3; this command sets" in result.stderr
    result = run(train_command(workdir, "--config.run.seed=1"))
    assert result.returncode == 2 and "seed=0" in result.stderr
    assert (workdir / "config.json").read_bytes() == settings_before
    # Resuming a complete run writes nothing.
    assert run(train_command(workdir)).returncode == 0
    assert (workdir / "policy" / "config.json").stat().st_mtime_ns == policy_time
    assert run_results(workdir) == run_results(uninterrupted)


# Errors


def test_invalid_commands_end_with_one_line(tmp_path, tiny_dir):
    def error(*arguments):
        result = run(train_command(tmp_path / "run", *arguments))
        assert result.returncode == 2
        return result.stderr.strip().splitlines()[-1]

    result = run([sys.executable, "-m", "mmsr1_jax.train"])
    assert result.returncode == 2 and "give --config=FILE to start a run" in result.stderr
    assert "a new run needs a policy" in error(*SMALL, "--config.run.model=")
    no_tools = ["--config.tools.text=none", "--config.tools.image=none"]
    data = "--config.data.train=('nowhere.parquet',)"
    message = error(*SMALL, f"--model={tiny_dir}", data, *no_tools)
    assert message.startswith("error: ") and "nowhere.parquet" in message
    assert not (tmp_path / "run" / "config.json").exists()
    assert "temperature=0" in error(*SMALL, "--config.sampling.temperature=0")
