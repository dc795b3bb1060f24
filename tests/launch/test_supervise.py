"""Restarts after failures, by `launch/local.sh` with small commands in place of training."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.counted_command import LIMITS, attempts, command, wait_for_files
from tests.programs import ROOT


def start(folder, body, count=2, **limits) -> subprocess.Popen:
    """Start `count` processes that run the lines of `body`, which know `index` and `attempt`."""
    return subprocess.Popen(
        [ROOT / "launch" / "local.sh", str(count), "1", *command(folder, body)],
        env={**os.environ, **LIMITS, **limits}, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def run(folder, body, **arguments) -> tuple[int, str, str]:
    """Run to the end, and return exit code, output and messages."""
    process = start(folder, body, **arguments)
    output, messages = process.communicate(timeout=60)
    return process.returncode, output, messages


def test_processes_that_succeed_run_once(tmp_path):
    body = 'print(os.environ["MMSR1_NUM_PROCESSES"], os.environ["MMSR1_COORDINATOR"])'
    code, output, _ = run(tmp_path, body)
    assert code == 0 and attempts(tmp_path) == [1, 1]
    lines = sorted(output.splitlines())
    assert [line[:16] for line in lines] == ["[0] 2 127.0.0.1:", "[1] 2 127.0.0.1:"]
    assert lines[0][4:] == lines[1][4:]


@pytest.mark.parametrize("failure", ["sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_all_processes_start_again_after_a_failure(tmp_path, failure):
    body = f"""
if attempt < 2:
    if index == 1:
        {failure}
    time.sleep(0.5)
    sys.exit(1)
"""
    code, _, messages = run(tmp_path, body)
    assert code == 0 and attempts(tmp_path) == [3, 3]
    assert "start again in 0 s (failure 2 of 3 in a row)" in messages


def test_failures_in_a_row_are_limited(tmp_path):
    code, _, messages = run(tmp_path, "sys.exit(9)")
    assert code == 9 and attempts(tmp_path) == [4, 4]
    assert "exit code 9, and no restart after 3 failures in a row" in messages


def test_an_attempt_that_lasted_begins_a_new_row_of_failures(tmp_path):
    code, _, _ = run(tmp_path, "sys.exit(attempt < 5)", STEADY_SECONDS="0")
    assert code == 0 and attempts(tmp_path) == [6, 6]


@pytest.mark.parametrize("code", [2, 127])
def test_a_refused_command_does_not_start_again(tmp_path, code):
    assert run(tmp_path, f"sys.exit({code})")[0] == code
    assert attempts(tmp_path) == [1, 1]


def test_a_command_that_ran_before_and_is_refused_starts_again(tmp_path):
    code, _, _ = run(tmp_path, "sys.exit((1, 2, 0)[attempt])")
    assert code == 0 and attempts(tmp_path) == [3, 3]


def test_a_process_that_hangs_is_killed_after_the_failure_of_another(tmp_path):
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if attempt == 0:
    sys.exit(1) if index == 0 else time.sleep(600)
"""
    code, _, messages = run(tmp_path, body)
    assert code == 0 and attempts(tmp_path) == [2, 2]
    assert "killing the processes that have not ended" in messages


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes_once_and_nothing_starts_again(tmp_path, number):
    body = """
def stop(*_):
    print("saved", flush=True)
    sys.exit(int(index == 1))
signal.signal(signal.SIGTERM, stop)
file.with_suffix(".ready").touch()
time.sleep(600)
"""
    process = start(tmp_path, body)
    wait_for_files(tmp_path, "*.ready", 2)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_stopped_run_has_a_code_of_its_own_if_asked_for(tmp_path):
    assert run(tmp_path, "sys.exit(75)")[0] == 75
    assert attempts(tmp_path) == [1, 1]


def test_a_second_signal_kills(tmp_path):
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
file.with_suffix(".ready").touch()
time.sleep(600)
"""
    process = start(tmp_path, body)
    wait_for_files(tmp_path, "*.ready", 2)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL


def test_a_wrong_command_line_is_refused():
    done = subprocess.run([ROOT / "launch" / "local.sh", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: " in done.stderr


def test_a_script_may_change_while_it_runs(tmp_path):
    """As it does when the checkout is updated; bash reads a file while it runs it."""
    for name in ("local.sh", "supervise.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path)
    script = tmp_path / "local.sh"
    line = 'touch "$0/ready"; until [ -e "$0/end" ]; do sleep 0.05; done'
    process = subprocess.Popen(
        [script, "1", "1", "bash", "-c", line, tmp_path], stderr=subprocess.PIPE, text=True
    )
    wait_for_files(tmp_path, "ready", 1)
    script.write_text("\n".join(["#", "never_run"] * 40) + script.read_text())
    (tmp_path / "end").touch()
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 0 and not messages
