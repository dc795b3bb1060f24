"""`launch/tpu_slice.sh` and `launch/tpu_spot.sh` with a `gcloud` that has two workers here."""

import os
import signal
import subprocess

import pytest

from tests.launch.counted_command import LIMITS, attempts, command, wait_for_files
from tests.programs import ROOT

# Runs the line of `ssh --command` in the home directories of two workers, waits for both and ends
# with the exit code of the first that failed. A request for a slice is the file `state`; the states
# that `describe` prints are taken from `states`, if there are any.
GCLOUD = """#!/usr/bin/env bash
cd "$CLOUD"
echo "$*" >>calls
case "$3 $4" in
    "tpu-vm ssh")
        for argument in "$@"; do
            case "$argument" in --command=*) line=${argument#*=} ;; esac
        done
        for worker in 0 1; do
            mkdir -p "home-w-$worker"
            (cd "home-w-$worker" && HOME=$PWD HOSTNAME="t1v-w-$worker" MMSR1_PROCESS_ID=$worker \\
                exec bash -c "$line") &
            workers[worker]=$!
        done
        status=0
        for worker in 0 1; do wait "${workers[worker]}" || status=$?; done
        exit "$status" ;;
    "tpu-vm scp") for worker in 0 1; do cp "$5" "home-w-$worker"; done ;;
    "queued-resources create") echo ACTIVE >state ;;
    "queued-resources delete") rm state ;;
    "queued-resources describe")
        cat state && if [ -s states ]; then head -n 1 states >state; sed -i 1d states; fi ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """Directory of the cloud, whose workers have the checkout installed."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    (tmp_path / "counts").mkdir()
    for worker in range(2):
        (tmp_path / f"home-w-{worker}" / "mmsr1_jax").mkdir(parents=True)
    return tmp_path


def start(cloud, script, *arguments, **variables) -> subprocess.Popen:
    environment = {
        **os.environ, **LIMITS, "CLOUD": str(cloud), "POLL_SECONDS": "0.1",
        "PATH": f"{cloud / 'bin'}:{os.environ['PATH']}", **variables,
    }  # fmt: skip
    return subprocess.Popen(
        [ROOT / "launch" / script, *arguments], env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(cloud, script, *arguments, **variables) -> tuple[int, str, str]:
    process = start(cloud, script, *arguments, **variables)
    output, messages = process.communicate(timeout=60)
    return process.returncode, output, messages


def counted(cloud, body):
    return command(cloud / "counts", body)


def calls(cloud) -> list[str]:
    return (cloud / "calls").read_text().splitlines()


def test_a_slice_runs_the_command_on_all_workers(cloud):
    body = 'print("it\'s", os.getcwd(), os.environ["JAX_COORDINATOR_PORT"])'
    code, output, messages = run(cloud, "tpu_slice.sh", "run", "pod", "z", *counted(cloud, body))
    assert code == 0, messages
    assert sorted(output.splitlines()) == [
        f"[worker {worker}] it's {cloud}/home-w-{worker}/mmsr1_jax 8476" for worker in range(2)
    ]
    assert all("--worker=all" in call and "--zone=z" in call for call in calls(cloud))
    logs = run(cloud, "tpu_slice.sh", "logs", "pod", "z")[1]
    assert sorted(logs.splitlines()) == sorted(output.splitlines())


def test_a_slice_starts_again_after_a_failure(cloud):
    body = "sys.exit(attempt == 0 and index == 1)"
    assert run(cloud, "tpu_slice.sh", "run", "pod", "z", *counted(cloud, body))[0] == 0
    assert attempts(cloud / "counts") == [2, 2]


@pytest.mark.parametrize("by", ["stop", "SIGTERM"])
def test_a_slice_is_stopped(cloud, by):
    body = """
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
file.with_suffix(".ready").touch()
time.sleep(600)
"""
    process = start(cloud, "tpu_slice.sh", "run", "pod", "z", *counted(cloud, body))
    wait_for_files(cloud / "counts", "*.ready", 2)
    if by == "stop":
        assert run(cloud, "tpu_slice.sh", "stop", "pod", "z")[0] == 0
    else:
        process.send_signal(signal.SIGTERM)
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 0, messages
    assert sorted(output.splitlines()) == ["[worker 0] saved", "[worker 1] saved"]


def test_setup_installs_the_checkout_on_all_workers(cloud):
    (cloud / "bin" / "python3").write_text('#!/bin/sh\necho "$*" >>"$HOME/python"\n')
    (cloud / "bin" / "python3").chmod(0o755)
    assert run(cloud, "tpu_slice.sh", "setup", "pod", "z")[0] == 0
    for home in (cloud / "home-w-0", cloud / "home-w-1"):
        assert (home / "mmsr1_jax" / "pyproject.toml").is_file()
        assert "uv pip install" in (home / "python").read_text().splitlines()[-1]


@pytest.fixture
def no_setup(cloud):
    """Directory of the cloud, with launch scripts whose `setup` only exits."""
    (cloud / "launch").mkdir()
    for name in ("supervise.sh", "tpu_slice.sh", "tpu_spot.sh"):
        text = (ROOT / "launch" / name).read_text()
        if name == "tpu_slice.sh":
            line = 'if [ "$1" = setup ]; then exit "${SETUP_CODE:-0}"; fi'
            text = text.replace("set -euo", f"{line}; set -euo", 1)
        (cloud / "launch" / name).write_text(text)
        (cloud / "launch" / name).chmod(0o755)
    return cloud


def spot(cloud, body, **variables) -> tuple[int, str]:
    arguments = ["pod", "z", "v6e-32", *counted(cloud, body)]
    code, _, messages = run(cloud, cloud / "launch" / "tpu_spot.sh", *arguments, **variables)
    return code, messages


def requests(cloud) -> list[str]:
    """Return the calls that create and delete the slice, and run a line on it."""
    verbs = {"queued-resources create": "create", "queued-resources delete": "delete",
             "tpu-vm ssh": "run"}  # fmt: skip
    names = [verbs.get(" ".join(call.split()[2:4])) for call in calls(cloud)]
    return [name for name in names if name]


def test_a_spot_slice_is_created_and_deleted(no_setup):
    code, messages = spot(no_setup, 'assert os.environ["MMSR1_REPORT_STOPPED"] == "1"')
    assert code == 0, messages
    assert requests(no_setup) == ["create", "run", "delete"]
    created = next(call for call in calls(no_setup) if " create " in call)
    assert "--spot" in created and "--runtime-version=v2-alpha-tpuv6e" in created


@pytest.mark.parametrize("code", [75, 143])
def test_a_preempted_spot_slice_is_created_again(no_setup, code):
    """Whether the run had time to save its step or not."""
    # `describe` prints that of the creation, then these.
    (no_setup / "states").write_text("SUSPENDED\nSUSPENDED\n" if code == 143 else "SUSPENDED\n")
    status, messages = spot(no_setup, f"sys.exit(attempt == 0 and {code})")
    assert status == 0, messages
    assert requests(no_setup) == ["create", "run", "delete", "create", "run", "delete"]


def test_a_run_that_fails_on_a_slice_that_is_there_is_limited(no_setup):
    assert spot(no_setup, "sys.exit(1)")[0] == 1
    assert requests(no_setup) == ["create", *["run"] * 4, "delete"]


def test_a_refused_command_ends_the_spot_slice(no_setup):
    assert spot(no_setup, "sys.exit(2)", KEEP="1")[0] == 2
    assert requests(no_setup) == ["create", "run"]


def test_a_setup_that_fails_is_limited(no_setup):
    assert spot(no_setup, "", SETUP_CODE="1")[0] == 1
    assert requests(no_setup) == ["create", "delete"]


def test_a_signal_stops_the_run_and_deletes_the_spot_slice(no_setup):
    body = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
file.with_suffix(".ready").touch()
time.sleep(600)
"""
    arguments = ["pod", "z", "v6e-32", *counted(no_setup, body)]
    process = start(no_setup, no_setup / "launch" / "tpu_spot.sh", *arguments)
    wait_for_files(no_setup / "counts", "*.ready", 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and not (no_setup / "state").exists()
