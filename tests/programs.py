"""Programs that tests compile or start."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]


def environment(devices: int = 1) -> dict[str, str]:
    """Return the environment of a command that a test starts, with a number of virtual devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return {**os.environ, "XLA_FLAGS": flags}


def run(
    *arguments: object,
    module: str = "mmsr1_jax.score",
    devices: int = 1,
    cwd: str | os.PathLike | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS`."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**environment(devices), "PYTHONPATH": str(ROOT)},
        cwd=cwd or ROOT,
        timeout=300,
    )


def read_jsonl(path: pathlib.Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().strip().split(b"\n")]


def write_jsonl(path: pathlib.Path, lines: list[Any]) -> None:
    """Write objects as unescaped JSON, as other programs do, and bytes unchanged."""
    encoded = [
        line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")


def array_sizes(compiled) -> set[int]:
    """Return the number of elements of every array in a compiled program."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text())
    return {int(np.prod([int(d) for d in shape.split(",")])) for shape in shapes}
