"""Programs that tests compile, or run as subprocesses."""

import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]


def environment(devices: int = 1) -> dict[str, str]:
    """Return the environment of a subprocess: that of the tests, with `devices` CPU devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return {**os.environ, "XLA_FLAGS": flags}


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's root, and return its exit code and output.

    Args:
      command: Program and arguments.
      env: Environment; None is `environment()`.
      timeout: Seconds after which the command is killed and the test fails.
    """
    return subprocess.run(
        command, cwd=ROOT, env=env or environment(), capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


def start(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in the project's root, without waiting for it. Its stderr is captured."""
    return subprocess.Popen(
        command, cwd=ROOT, env=env or environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(
    process: subprocess.Popen[str],
    condition: Callable[[], bool],
    *,
    timeout: float = 300,
    interval: float = 0.002,
) -> None:
    """Wait until a condition holds; fail if the process ends first."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"the process ended with exit code {process.returncode}"
        assert time.monotonic() < deadline, f"the condition did not hold within {timeout} s"
        time.sleep(interval)


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Kill a process (SIGKILL) as soon as a condition holds; fail if the process ends first."""
    wait_until(process, condition)
    process.send_signal(signal.SIGKILL)
    process.wait()


def array_sizes(compiled) -> set[int]:
    """Return the numbers of elements of all arrays in a compiled program."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text())
    return {int(np.prod([int(d) for d in shape.split(",")])) for shape in shapes}
