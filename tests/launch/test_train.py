"""Training under `launch/local.sh`, with a process that is killed or stopped."""

import os
import signal
import subprocess

import pytest

from mmsr1_jax.training import metrics
from tests import train_runs
from tests.programs import ROOT, wait_until

STEPS = [
    "--config.run.steps=3", "--config.run.save_every=1", "--config.run.validate_every=0",
    "--config.mesh.fsdp=4", "--config.run.log_to=", "--config.processes.heartbeat_seconds=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return train_runs.write_questions(tmp_path_factory.mktemp("questions"), 16)


def start(command, **variables) -> subprocess.Popen[str]:
    environment = {**os.environ, "RESTART_DELAY": "1", "XLA_FLAGS": "", **variables}
    return subprocess.Popen(
        [ROOT / "launch" / "local.sh", "2", "2", *command], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_step(process, workdir, step: int) -> None:
    def is_written() -> bool:
        return any(line["step"] >= step for line in metrics.read(workdir / "metrics.jsonl"))

    wait_until(process, is_written, timeout=600, interval=0.1)


def processes_of(launcher) -> list[int]:
    """Return the process IDs of the training processes, by index."""
    listed = subprocess.run(
        ["pgrep", "--parent", str(launcher.pid), "--full", "mmsr1_jax.train"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(line) for line in listed.stdout.split()]


@pytest.mark.proof
def test_a_run_with_killed_processes_goes_on_and_is_bit_identical(questions, tmp_path):
    unbroken = start(train_runs.new_run_command(tmp_path / "unbroken", questions, *STEPS))
    assert unbroken.wait(900) == 0
    workdir = tmp_path / "killed"
    process = start(train_runs.new_run_command(workdir, questions, *STEPS))
    for step, index in ((1, 1), (2, 0)):
        wait_for_step(process, workdir, step)
        os.kill(processes_of(process)[index], signal.SIGKILL)
    _, messages = process.communicate(timeout=900)
    assert process.returncode == 0, messages
    assert messages.count("launch: exit code 137; all processes start again") == 2, messages
    assert train_runs.run_results(workdir) == train_runs.run_results(tmp_path / "unbroken")


@pytest.mark.proof
def test_a_stopped_run_has_a_code_of_its_own_if_asked_for(questions, tmp_path):
    workdir = tmp_path / "run"
    command = train_runs.new_run_command(workdir, questions, *STEPS)
    process = start(command, MMSR1_REPORT_STOPPED="1")
    wait_for_step(process, workdir, 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == os.EX_TEMPFAIL
    process = start(command, MMSR1_REPORT_STOPPED="1")
    assert process.wait(600) == 0
    assert [line["step"] for line in metrics.read(workdir / "metrics.jsonl")] == [1, 2, 3]
    # What is refused is not started again, in no process.
    process = start([*command, "--config.run.seed=5"])
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 2 and "start again" not in messages
