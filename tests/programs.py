"""Programs that tests compile or start."""

import os
import re

import numpy as np


def environment(devices: int = 1) -> dict[str, str]:
    """Return the environment of a command that a test starts: as here, with so many devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return {**os.environ, "XLA_FLAGS": flags}


def array_sizes(compiled) -> set[int]:
    """Elements of every array in a compiled program."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text())
    return {int(np.prod([int(d) for d in shape.split(",")])) for shape in shapes}
