"""Collectives of a compiled program: sizes of their groups, and bytes over the links."""

import dataclasses
import math
import re

from mmsr1_jax.apps.plan.hlo import Module, Op

_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_LISTED = re.compile(r"\breplica_groups=\{\{([\d,]*)\}")
_SHAPED = re.compile(r"\breplica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"\breplica_groups=mesh\[([^\[\]]*)\][^\[\]{}]*\{([^{}]*)\}")
_SIZE = re.compile(r"'([^']*)'=(\d+)")
_AXIS = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective.

    Attributes:
      opcode: Operation, without `-start`.
      group: Number of devices of a group; 0 if the text does not say.
      received: Bytes that a device receives over links, with a ring algorithm.
    """

    opcode: str
    group: int
    received: float


def find(module: Module, op: Op) -> Collective | None:
    """Return the collective that an instruction is or that a fusion contains, or None."""
    if op.opcode == "fusion":
        name = op.computation("calls")
        inner = [c for o in module.computations[name].ops.values() if (c := find(module, o))]
        if not inner:
            return None
        received = sum(c.received for c in inner)
        if "reduce-scatter" in name:  # a TPU's reduce-scatter: an all-reduce, then a slice of it
            return Collective("reduce-scatter", inner[0].group, received / 2)
        return Collective(inner[0].opcode, inner[0].group, received)
    opcode = op.opcode.removesuffix("-start")
    if opcode not in _COLLECTIVES:
        return None
    group = group_size(op.attributes)
    others = (group - 1) / group if group else 1.0
    size = op.bytes
    if op.opcode.endswith("-start") and len(op.result) >= 2 * len(op.operands):
        # The result is (operands, results, perhaps counters).
        count = len(op.operands)
        size = sum(array.bytes for array in op.result[count : 2 * count])
    factor = {"all-reduce": 2 * others, "reduce-scatter": group * others, "collective-permute": 1}
    return Collective(opcode, group, size * factor.get(opcode, others))


def group_size(attributes: str) -> int:
    """Return the number of devices in a group of a collective's `replica_groups`; 0 without any.

    The groups are written as lists (`{{0,1},{2,3}}`), as the shape of an array of devices
    (`[2,4]<=[8]`: two groups of four) or as axes of a mesh (`mesh['a'=2,'b'=4] {'b'}`).
    """
    if match := _LISTED.search(attributes):
        return len(match.group(1).split(","))
    if match := _SHAPED.search(attributes):
        return int(match.group(1))
    if match := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in _SIZE.findall(match.group(1))}
        axes = _AXIS.findall(match.group(2))
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return 0
