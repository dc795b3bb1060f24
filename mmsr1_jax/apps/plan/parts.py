"""Costs of a program by part of the policy: vision tower, text decoder, log-probs.

The policy's functions run in named scopes (`models.policy`), which the compiled program
keeps in the paths of its instructions, also in those of the backward pass. Gathers of parameters
may have the path of the parameter instead (jax 0.11).
"""

import dataclasses
import re
from collections.abc import Sequence

from mmsr1_jax.apps.plan.traffic import Instruction, Traffic

PARTS = ("vision", "text", "log_probs")
OTHER = "other"
_SCOPE = re.compile(rf"\b({'|'.join(PARTS)})\b")
_HEAD = "['text']['head']"


@dataclasses.dataclass(frozen=True)
class Part:
    """Costs of a part of a program, per device.

    Attributes:
      name: One of `PARTS`, or `other`: instructions without a scope, such as the sum of gradients.
      bytes: Bytes moved.
      seconds: Estimated time.
      flops: FLOPs of the compiled program.
    """

    name: str
    bytes: float
    seconds: float
    flops: float


def by_part(program: Traffic, times: Sequence[float]) -> tuple[Part, ...]:
    """Return the costs of a program's parts; none if it has no instruction in a scope.

    Args:
      program: Costs of the program.
      times: Estimated time of each instruction in seconds (`estimate.instruction_times`).
    """
    totals = {name: [0.0, 0.0, 0.0] for name in (*PARTS, OTHER)}
    for i, seconds in zip(program.instructions, times, strict=True):
        total = totals[part_of(i)]
        total[0] += i.bytes * i.runs
        total[1] += seconds
        total[2] += i.flops * i.runs
    if not any(any(totals[name]) for name in PARTS):
        return ()
    return tuple(Part(name, *total) for name, total in totals.items())


def part_of(instruction: Instruction) -> str:
    """Return the part of an instruction: that of its path, else that of the loop around it."""
    for path in (instruction.where.replace("\\'", "'"), instruction.loop):
        if _HEAD in path:
            return "log_probs"
        if match := _SCOPE.search(path):
            return match.group(1)
    return OTHER
