"""Several processes that stand for hosts: started together, each with devices of its own."""

import contextlib
import pathlib
import shutil
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
      address: Address of process 0.

    Attributes:
      processes: The processes, by index.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], logs: Sequence[TextIO], devices: int, address: str
    ):
        coordinator = f"{address}:{free_port()}"
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
def hosts(
    commands: Sequence[Sequence[str]], devices: int = 1, address: str = "127.0.0.1"
) -> Iterator[Hosts]:
    """Start processes, and kill those that still run when the block ends.

    Args:
      commands: Command of each process.
      devices: Number of devices of each.
      address: Address of process 0.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        started = Hosts(commands, logs, devices, address)
        stack.callback(started.kill)
        yield started


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[str]]:
    """Create network namespaces with addresses 10.77.0.1, .2, .. on one bridge.

    Yields:
      Their names. `ip netns exec NAME` runs a command in one; the link `NAME` cuts it off.
    """

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    bridge, names = "mmsr1br", [f"mmsr1n{index}" for index in range(count)]
    with contextlib.ExitStack() as stack:
        ip("link", "add", bridge, "type", "bridge")
        stack.callback(ip, "link", "delete", bridge)
        ip("link", "set", bridge, "up")
        for index, name in enumerate(names):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", bridge, "up")
            ip("-n", name, "address", "add", f"10.77.0.{index + 1}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
            # In place of /etc/hosts: collectives use the address of the host's own name.
            folder = pathlib.Path("/etc/netns", name)
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder)
            lines = f"127.0.0.1 localhost\n10.77.0.{index + 1} {socket.gethostname()}\n"
            (folder / "hosts").write_text(lines)
        yield names


def cut_off(name: str) -> None:
    """Cut a namespace off from the others."""
    subprocess.run(["ip", "link", "set", name, "down"], check=True)


def script(body: str, start: float = 60, timeout: float = 60, heartbeat: float = 4) -> list[str]:
    """Return a command that joins the processes and then runs the lines of `body`.

    In `body`, `index` is the index of the process.
    """
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    code = CODE.format(body=lines, start=start, timeout=timeout, heartbeat=heartbeat)
    return [sys.executable, "-c", code]
