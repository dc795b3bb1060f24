"""`launch/slurm.sbatch` with stand-ins for the commands of SLURM.

They behave as those of SLURM 22.05 did with the same script on two nodes.
"""

import os
import signal
import subprocess

import pytest

from tests.launch.counted_command import LIMITS, attempts, command, wait_for_files
from tests.programs import ROOT

# Runs the command as two tasks, and ends with the highest exit code.
SRUN = """#!/usr/bin/env bash
while [[ $1 = --* ]]; do shift; done
for task in 0 1; do
    MMSR1_PROCESS_ID=$task "$@" &
    echo $! >>tasks
    pids[task]=$!
done
highest=0
for task in 0 1; do
    status=0
    wait "${pids[task]}" || status=$?
    if ((status > highest)); then highest=$status; fi
done
rm tasks
exit "$highest"
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>calls
kill -"${1#--signal=}" $(cat tasks)
"""
SCONTROL = '#!/bin/sh\necho "scontrol $*" >>calls\n'
SQUEUE = "#!/bin/sh\ncat state\n"


@pytest.fixture
def job(tmp_path):
    """Return a function that starts a job whose tasks run the lines of `body`."""
    (tmp_path / "bin").mkdir()
    programs = {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "squeue": SQUEUE}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "counts").mkdir()
    (tmp_path / "state").write_text("RUNNING\n")

    def start(body: str) -> subprocess.Popen:
        environment = {
            **os.environ, **LIMITS, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT),
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", ROOT / "launch" / "slurm.sbatch", *command(tmp_path / "counts", body)],
            cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


def calls(tmp_path) -> list[str]:
    """Return the calls of `scancel` and `scontrol`."""
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_failure_starts_the_tasks_again_in_the_allocation(job, tmp_path):
    process = job("sys.exit(attempt == 0 and index == 1)")
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 0, messages
    assert attempts(tmp_path / "counts") == [2, 2] and calls(tmp_path) == []


def test_a_refused_command_ends_the_job(job, tmp_path):
    assert job("sys.exit(2)").wait(60) == 2
    assert attempts(tmp_path / "counts") == [1, 1] and calls(tmp_path) == []


STOPPABLE = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
file.with_suffix(".ready").touch()
time.sleep(600)
"""


def test_a_job_whose_time_ends_is_queued_again(job, tmp_path):
    process = job(STOPPABLE)
    wait_for_files(tmp_path / "counts", "*.ready", 2)
    process.send_signal(signal.SIGTERM)  # by --signal=B:TERM
    assert process.wait(60) == 75
    assert calls(tmp_path) == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_a_preempted_job_is_queued_again(job, tmp_path):
    """SLURM signals the tasks only."""
    assert job("sys.exit(75)").wait(60) == 75
    assert calls(tmp_path) == ["scontrol requeue 7"]


def test_a_cancelled_job_is_not_queued_again(job, tmp_path):
    (tmp_path / "state").write_text("COMPLETING\n")
    assert job("sys.exit(75)").wait(60) == 75
    assert calls(tmp_path) == []
