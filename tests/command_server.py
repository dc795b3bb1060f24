"""Runs the project's commands in forks of a process that has imported what they import.

Importing JAX and what is built on it takes two seconds of a processor, which the tests would spend
for each of about a hundred commands. The process has not initialised a backend of JAX, so a fork is
what `python -m MODULE` is when its imports have been done: it reads its own arguments and
environment, and exits through the interpreter. Tests that send signals start commands themselves.

The server reads one JSON object per line: `module`, `arguments`, `cwd`, `env`, and the files
`stdout` and `stderr`. It answers with two numbers of `_ANSWER` bytes: process id and exit code.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence

# Commands with all that they import; their own modules are run, not imported.
_PRELOADED = (
    "mmsr1_jax.train", "mmsr1_jax.evaluate", "mmsr1_jax.sft", "mmsr1_jax.score", "mmsr1_jax.curate",
    "mmsr1_jax.construct",
    "mmsr1_jax.report", "mmsr1_jax.infer", "mmsr1_jax.serve",
)  # fmt: skip
_ANSWER = 16  # bytes
_LOCK = threading.Lock()
_SERVER: list[subprocess.Popen[str]] = []


def run(
    module: str,
    arguments: Sequence[str],
    *,
    cwd: str | os.PathLike,
    env: Mapping[str, str],
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` in a fork, and return its exit code and output.

    Raises:
      subprocess.TimeoutExpired: The command took longer than `timeout` seconds, and was killed.
    """
    with _LOCK, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        server = _server()
        assert server.stdin is not None
        request = {
            "module": module, "arguments": list(arguments), "cwd": os.fspath(cwd), "env": dict(env),
            "stdout": f"/proc/{os.getpid()}/fd/{out.fileno()}",
            "stderr": f"/proc/{os.getpid()}/fd/{err.fileno()}",
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        pid = _answer(server, 120)  # importing takes seconds
        assert pid, "the server of commands did not start one"
        code = _answer(server, timeout)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            _answer(server, 120)
            raise subprocess.TimeoutExpired([module, *arguments], timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        return subprocess.CompletedProcess([module, *arguments], code, *texts)


def _server() -> subprocess.Popen[str]:
    """Return this process's server, started at the first call."""
    if not _SERVER:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.command_server"], cwd=root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _SERVER.append(server)
        atexit.register(server.kill)
    return _SERVER[0]


def _answer(server: subprocess.Popen[str], timeout: float) -> int | None:
    """Return the next number of the server, or None after `timeout` seconds."""
    assert server.stdout is not None
    ready, _, _ = select.select([server.stdout], [], [], timeout)
    return int(os.read(server.stdout.fileno(), _ANSWER)) if ready else None


def serve() -> None:
    """Fork for each request. Returns in the forks, which then run their command."""
    for name in _PRELOADED:
        importlib.import_module(name)
        del sys.modules[name]  # a fork runs it as the main module
    gc.collect()
    gc.freeze()  # so that a collection in a fork does not copy the imported modules
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _become(json.loads(line))
            return
        os.write(1, f"{pid:{_ANSWER}}".encode())
        _, status = os.waitpid(pid, 0)
        os.write(1, f"{os.waitstatus_to_exitcode(status):{_ANSWER}}".encode())
    os._exit(0)


def _become(request: dict) -> None:
    """Make this process what `python -m MODULE` would be before it runs the module."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for descriptor, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    sys.path[0] = request["cwd"]
    sys.argv = [request["module"], *request["arguments"]]


if __name__ == "__main__":
    serve()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
