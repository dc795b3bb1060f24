"""Looking into compiled programs."""

import re

import numpy as np


def array_sizes(compiled) -> set[int]:
    """Elements of every array in a compiled program."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text())
    return {int(np.prod([int(d) for d in shape.split(",")])) for shape in shapes}
