"""Collectives of a compiled program: groups of devices, and bytes over the links.

A TPU's compiler writes an asynchronous collective as two or more fusions with the same channel:

    async-collective-start     begins it; its root is AsyncCollectiveStart
    async_collective_fusion    a product during which it goes on
    async-collective-done      waits for it; its root is AsyncCollectiveDone

Each of them contains the collective, which is counted at the start alone.
"""

import dataclasses
import math
import re
from collections.abc import Container

import numpy as np

from mmsr1_jax.apps.plan.hlo import Module, Op

# Groups of devices, as indices of the program's devices. Empty: one group of all devices.
Groups = tuple[tuple[int, ...], ...]

_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_LISTED = re.compile(r"\breplica_groups=\{((?:\{[\d,]*\},?)+)\}")
_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{[\d,]*\},?)+)\}")
_LIST = re.compile(r"\{([\d,]+)\}")
_SHAPED = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"\breplica_groups=mesh\[([^\[\]]*)\]"
    r"(?:, device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\))? \{([^{}]*)\}"
)
_SIZE = re.compile(r"'([^']*)'=(\d+)")
_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective.

    Attributes:
      opcode: Operation, without `-start`.
      groups: Groups of devices that exchange data; of a `collective-permute`, pairs of source and
        target.
      received: Bytes that a device receives over links, with a ring algorithm.
      shape: Shape of the first result; empty if there are several collectives.
      channel: Its number, which the parts of an asynchronous collective have in common.
    """

    opcode: str
    groups: Groups
    received: float
    shape: tuple[int, ...] = ()
    channel: str = ""


def find(module: Module, op: Op, counted: Container[str] = ()) -> Collective | None:
    """Return the collective that an instruction is or that a fusion contains, or None.

    Args:
      module: Program.
      op: Instruction.
      counted: Channels of asynchronous collectives; as parts of fusions they are left out.
    """
    if op.opcode == "fusion":
        return _find_fused(module, op, counted)
    opcode = op.opcode.removesuffix("-start")
    if opcode not in _COLLECTIVES:
        return None
    groups = device_groups(op.attributes)
    group = len(groups[0]) if groups else 0
    others = (group - 1) / group if group else 1.0
    result = op.result[:1]
    size = op.bytes
    if op.opcode.endswith("-start") and len(op.result) >= 2 * len(op.operands):
        # The result is (operands, results, perhaps counters).
        count = len(op.operands)
        result = op.result[count : 2 * count]
        size = sum(array.bytes for array in result)
    factor = {"all-reduce": 2 * others, "reduce-scatter": group * others, "collective-permute": 1}
    received = size * factor.get(opcode, others)
    return Collective(opcode, groups, received, result[0].shape, op.find(_CHANNEL) or "")


def _find_fused(module: Module, op: Op, counted: Container[str]) -> Collective | None:
    name = op.computation("calls")
    inner = [
        c for o in module.computations[name].ops.values()
        if (c := find(module, o, counted)) and not (c.channel and c.channel in counted)
    ]  # fmt: skip
    if not inner:
        return None
    first = inner[0]
    if len(inner) > 1:
        first = dataclasses.replace(first, received=sum(c.received for c in inner), shape=())
    if "reduce-scatter" in name:  # a TPU's reduce-scatter: an all-reduce, then a slice of it
        shape = op.result[0].shape if op.result else ()
        return dataclasses.replace(
            first, opcode="reduce-scatter", received=first.received / 2, shape=shape
        )
    return first


def is_start(module: Module, op: Op) -> bool:
    """Return whether an instruction is a fusion that begins an asynchronous collective."""
    return _START in _root_attributes(module, op)


def done_channel(module: Module, op: Op) -> str:
    """Return the channel of the asynchronous collective that a fusion waits for, or an empty one"""
    if _DONE not in _root_attributes(module, op):
        return ""
    collective = find(module, op)
    return collective.channel if collective else ""


def _root_attributes(module: Module, op: Op) -> str:
    """Return the attributes of the root of a fusion."""
    if op.opcode != "fusion":
        return ""
    computation = module.computations[op.computation("calls")]
    return computation.ops[computation.root].attributes


def device_groups(attributes: str) -> Groups:
    """Return the groups of a collective's `replica_groups` or `source_target_pairs`.

    Groups are written as lists (`{{0,1},{2,3}}`), as the shape of an array of devices
    (`[4,2]<=[2,4]T(1,0)`: the devices 0 to 7 as [2, 4], transposed and reshaped to four groups of
    two) or as axes of a mesh (`mesh['a'=2,'b'=4] {'b'}`).
    """
    if match := _LISTED.search(attributes) or _PAIRS.search(attributes):
        return tuple(_integers(group) for group in _LIST.findall(match.group(1)))
    if match := _SHAPED.search(attributes):
        shape, reshaped, order = match.groups()
        return _groups(_iota(reshaped, order).reshape(_integers(shape)))
    if match := _MESH.search(attributes):
        return _mesh_groups(*match.groups())
    return ()


def _mesh_groups(
    sizes: str, reshaped: str | None, order: str | None, ids: str | None, axes: str
) -> Groups:
    """Return the groups along axes of a mesh, which may be parts of axes, as `'b':(2)4`.

    The part is that of 4 if the axis of b is split into dimensions of 2, 4 and the rest.
    """
    mesh = {name: int(size) for name, size in _SIZE.findall(sizes)}
    taken: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in _AXIS.findall(axes):
        part = (int(before), int(size)) if size else (1, mesh[name])
        taken.setdefault(name, []).append(part)
    shape: list[int] = []
    grouped: list[int] = []  # dimensions of `shape` within a group
    for name, size in mesh.items():
        done = 1
        for before, part in sorted(taken.get(name, [])):
            shape += [before // done, part]
            grouped.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    devices = np.arange(math.prod(mesh.values()))
    if reshaped:
        devices = _iota(reshaped, order).reshape(-1)
    elif ids:
        devices = np.array(_integers(ids))
    others = [d for d in range(len(shape)) if d not in grouped]
    array = devices.reshape(shape).transpose(others + grouped)
    return _groups(array.reshape(-1, math.prod(shape[d] for d in grouped)))


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Return the numbers 0, 1, .. in an array of a shape, transposed."""
    sizes = _integers(shape)
    array = np.arange(math.prod(sizes)).reshape(sizes)
    return array.transpose(_integers(order)) if order else array


def _groups(array: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in row) for row in array)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
