"""A small command in place of training, which counts its attempts."""

import pathlib
import sys
import time

LIMITS = {"RESTART_DELAY": "0", "KILL_AFTER": "1", "RESTARTS": "3"}
# Each process counts its attempts in a file of its own.
_PROLOGUE = """
import os, pathlib, signal, sys, time
index = int(os.environ["MMSR1_PROCESS_ID"])
file = pathlib.Path(sys.argv[1], str(index))
attempt = len(file.read_bytes()) if file.exists() else 0
file.write_bytes(b"x" * (attempt + 1))
"""


def command(folder: pathlib.Path, body: str) -> list[str]:
    """Return a command that runs the lines of `body`, which know `index`, `attempt` and `file`."""
    return [sys.executable, "-c", _PROLOGUE + body, str(folder)]


def attempts(folder: pathlib.Path) -> list[int]:
    """Return the number of attempts of each process."""
    files = sorted(path for path in folder.iterdir() if path.name.isdecimal())
    return [len(path.read_bytes()) for path in files]


def wait_for_files(folder: pathlib.Path, pattern: str, count: int) -> list[pathlib.Path]:
    """Wait until `folder` has `count` files, and return them."""
    deadline = time.monotonic() + 30
    while len(files := sorted(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, files
        time.sleep(0.02)
    return files
