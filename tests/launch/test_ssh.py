"""`launch/ssh.sh` with an `ssh` that runs commands on this machine."""

import os
import signal
import subprocess

import pytest

from tests.launch.counted_command import LIMITS, attempts, command, wait_for_files
from tests.programs import ROOT

# Options, the host, and a line for its shell. The line runs in a session of its own, which survives
# a connection that breaks, as on another host.
SSH = """#!/usr/bin/env bash
while [ "$1" = -o ]; do shift 2; done
echo "$1" >>"$CONNECTIONS"
setsid --fork --wait bash -c "$2"
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a run of the lines of `body` on three hosts."""
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "a folder").mkdir()
    environment = {
        **os.environ, **LIMITS, "HOSTS": "one me@two three", "SSH": str(tmp_path / "ssh"),
        "TMPDIR": str(tmp_path), "CONNECTIONS": str(tmp_path / "connections"),
    }  # fmt: skip

    def start(body: str) -> subprocess.Popen:
        folder = tmp_path / "a folder"
        return subprocess.Popen(
            [ROOT / "launch" / "ssh.sh", folder, *command(folder, body)], env=environment,
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


def test_each_host_runs_its_process_in_the_folder(start, tmp_path):
    process = start("""
print(os.getcwd(), os.environ["MMSR1_COORDINATOR"], os.environ["MMSR1_NUM_PROCESSES"], index)
""")
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 0, messages
    assert sorted(output.splitlines()) == [
        f"[{host}] {tmp_path}/a folder one:8476 3 {index}"
        for index, host in sorted(enumerate(["one", "me@two", "three"]), key=lambda pair: pair[1])
    ]


def test_all_hosts_start_again_and_one_that_hangs_is_killed(start, tmp_path):
    process = start("""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if attempt == 0:
    sys.exit(1) if index == 1 else time.sleep(600)
""")
    process.communicate(timeout=60)
    assert process.returncode == 0 and attempts(tmp_path / "a folder") == [2, 2, 2]


def test_what_a_broken_connection_leaves_is_killed_before_the_next_start(start, tmp_path):
    process = start("""
if attempt == 0:
    file.with_suffix(f".{os.getpid()}").touch()
    time.sleep(600)
""")
    files = wait_for_files(tmp_path / "a folder", "[0-2].*", 3)
    pids = [int(path.suffix[1:]) for path in files]
    clients = subprocess.run(["pgrep", "-P", str(process.pid), "-f", str(tmp_path / "ssh")],
                             capture_output=True, text=True).stdout.split()  # fmt: skip
    assert len(clients) == 3
    for client in clients:
        os.kill(int(client), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 0 and attempts(tmp_path / "a folder") == [2, 2, 2]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_sigterm_reaches_all_hosts(start, tmp_path):
    process = start("""
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
file.with_suffix(".ready").touch()
time.sleep(600)
""")
    wait_for_files(tmp_path / "a folder", "*.ready", 3)
    process.send_signal(signal.SIGTERM)
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 0, messages
    assert sorted(output.splitlines()) == ["[me@two] saved", "[one] saved", "[three] saved"]
