"""Programs that tests compile, or run as subprocesses."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tests import command_server

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
    env = env or environment()
    if [*command[:2]] == [sys.executable, "-m"] and command[2].startswith("mmsr1_jax."):
        arguments = [str(argument) for argument in command[3:]]
        return command_server.run(command[2], arguments, cwd=ROOT, env=env, timeout=timeout)
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def run_module(
    *arguments: object,
    module: str = "mmsr1_jax.score",
    devices: int = 1,
    cwd: str | os.PathLike | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS`."""
    env = {**environment(devices), "PYTHONPATH": str(ROOT)}
    arguments_as_text = [str(argument) for argument in arguments]
    return command_server.run(module, arguments_as_text, cwd=cwd or ROOT, env=env, timeout=300)


def read_jsonl(path: pathlib.Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().strip().split(b"\n")]


def write_jsonl(path: pathlib.Path, lines: list[Any]) -> None:
    """Write objects as unescaped JSON, as other programs do, and bytes unchanged."""
    encoded = [
        line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")


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
