"""Several processes that stand for hosts: started together, each with devices of its own."""

import contextlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TextIO

from tests.programs import ROOT, environment

CODE = """
import os, sys, time
from mmsr1_jax import cli
from mmsr1_jax.config.settings import Config
from mmsr1_jax.utils import processes

def main(argv):
    processes.start(
        coordinator=os.environ["MMSR1_COORDINATOR"], count=int(os.environ["MMSR1_NUM_PROCESSES"]),
        index=int(os.environ["MMSR1_PROCESS_ID"]), start_seconds={start}, timeout={timeout},
        heartbeat_seconds={heartbeat},
    )
    index = processes.index()
{body}

cli.run(main)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Hosts:
    """Processes of one run.

    Args:
      commands: Command of each process.
      logs: Open file for the output of each.
      devices: Number of devices of each.

    Attributes:
      processes: The processes, by index.
    """

    def __init__(self, commands: Sequence[Sequence[str]], logs: Sequence[TextIO], devices: int):
        coordinator = f"127.0.0.1:{free_port()}"
        self._logs = logs
        self.processes = [
            subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={
                    **environment(devices), "MMSR1_COORDINATOR": coordinator,
                    "MMSR1_NUM_PROCESSES": str(len(commands)), "MMSR1_PROCESS_ID": str(index),
                },
            )
            for index, (command, log) in enumerate(zip(commands, self._logs, strict=True))
        ]  # fmt: skip

    def wait(self, timeout: float) -> list[int]:
        """Wait for all processes, and return their exit codes. Raises TimeoutExpired."""
        return [process.wait(timeout) for process in self.processes]

    def output(self, index: int) -> str:
        """Return what a process has written so far."""
        self._logs[index].seek(0)
        return self._logs[index].read()

    def kill(self) -> None:
        """Kill what still runs, processes that are stopped included."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


@contextlib.contextmanager
def hosts(commands: Sequence[Sequence[str]], devices: int = 1) -> Iterator[Hosts]:
    """Start processes, and kill those that still run when the block ends."""
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        started = Hosts(commands, logs, devices)
        stack.callback(started.kill)
        yield started


def script(body: str, start: float = 60, timeout: float = 60, heartbeat: float = 4) -> list[str]:
    """Return a command that joins the processes and then runs the lines of `body`.

    In `body`, `index` is the index of the process.
    """
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    code = CODE.format(body=lines, start=start, timeout=timeout, heartbeat=heartbeat)
    return [sys.executable, "-c", code]
