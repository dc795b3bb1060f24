"""Bytes that an instruction reads and writes in the device's main memory, see `traffic`."""

from collections.abc import Container

from mmsr1_jax.apps.plan import collectives
from mmsr1_jax.apps.plan.hlo import Computation, Module, Op

_TAKES = frozenset(["slice", "dynamic-slice", "gather"])
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> operand that is written
# Operations that a fused computation passes its operand through without reading it.
_VIEWS = frozenset(["bitcast", "get-tuple-element", "reshape"])


def instruction_bytes(
    module: Module, computation: Computation, op: Op, started: Container[str]
) -> tuple[float, float]:
    """Return the bytes that an instruction reads and writes.

    Args:
      module: Program.
      computation: Computation of the instruction.
      op: Instruction.
      started: Channels of asynchronous collectives whose start is counted: a fusion that contains
        another part of one moves nothing for it.
    """
    operands = [computation.ops[name] for name in op.operands if name in computation.ops]
    read = [operand.memory_bytes for operand in operands]
    if op.opcode == "fusion":
        fusion = _Fusion(module, started)
        name = op.computation("calls")
        taken = [fusion.read(name, n, whole) for n, whole in enumerate(read)]
        return sum(taken), fusion.written(name, op)
    if op.opcode.endswith("-start") and op.opcode.removesuffix("-start") in _TAKES:
        part = op.result[len(operands)]  # the result is (operands, slice, context)
        return part.bytes if read[0] else 0.0, part.memory_bytes
    if op.opcode in _TAKES:
        size = op.bytes if read[0] else 0.0
        return size + sum(read[1:]), op.memory_bytes
    if op.opcode in _UPDATES:
        update = _UPDATES[op.opcode]
        rest = [size for n, size in enumerate(read) if n != 0]
        return sum(rest), operands[update].bytes if op.memory_bytes else 0.0
    if op.opcode.endswith("-start") and len(op.result) > len(operands):
        # A copy, (result, operand, ..), or a collective, (operands, results, ..).
        first = 0 if op.opcode == "copy-start" else len(operands)
        result = op.result[first : first + len(operands)]
        return sum(read), sum(array.memory_bytes for array in result)
    return sum(read), op.memory_bytes


class _Fusion:
    """Bytes of fusions of a module."""

    def __init__(self, module: Module, started: Container[str]):
        self.module, self.started = module, started

    def read(self, name: str, number: int, whole: float) -> float:
        """Return the bytes that a fusion reads of an operand whose size in memory is `whole`."""
        computation = self.module.computations[name]
        names, total = {computation.parameters.get(number, "")}, 0.0
        if not whole:
            return 0.0
        for op in computation.ops.values():
            places = [n for n, operand in enumerate(op.operands) if operand in names]
            if not places or self._is_counted(op):
                continue
            if op.opcode in _VIEWS or self._is_view(op):
                names.add(op.name)
                if op.name == computation.root:
                    return whole
            elif op.opcode == "fusion":
                inner = op.computation("calls")
                total += sum(self.read(inner, n, whole) for n in places)
            elif op.opcode in _TAKES and places == [0]:
                total += op.bytes
            elif not ((op.opcode in _UPDATES and places == [0]) or op.opcode == "tuple"):
                return whole
        return min(total, whole)

    def written(self, name: str, fusion: Op) -> float:
        """Return the bytes that a fusion writes: of an update in place, only the update."""
        computation = self.module.computations[name]
        root = computation.ops[computation.root]
        roots = [root]
        if root.opcode == "tuple" and len(root.operands) == len(fusion.result):
            roots = [computation.ops[operand] for operand in root.operands]
        if collectives.is_start(self.module, fusion):
            # Of the result, (operands, results, counters ..), the operands are there already.
            return sum(array.memory_bytes for array in fusion.result[len(fusion.operands) :])
        if len(roots) != len(fusion.result):
            return fusion.memory_bytes
        written = 0.0
        for op, result in zip(roots, fusion.result, strict=True):
            while op.opcode in _VIEWS and op.operands[0] in computation.ops:
                op = computation.ops[op.operands[0]]
            whole = result.memory_bytes
            if op.opcode in _UPDATES:
                update = computation.ops[op.operands[_UPDATES[op.opcode]]]
                whole = min(whole, update.bytes)
            elif op.opcode == "fusion":  # nested
                whole = min(whole, self.written(op.computation("calls"), op))
            elif op.opcode == "parameter":
                whole = 0.0 if len(roots) > 1 else whole
            elif self._is_counted(op):
                whole = 0.0
            written += whole
        return written

    def _is_counted(self, op: Op) -> bool:
        """Return whether an instruction is part of a collective that is counted at its start."""
        collective = None if op.opcode == "fusion" else collectives.find(self.module, op)
        return collective is not None and collective.channel in self.started

    def _is_view(self, op: Op) -> bool:
        """Return whether an instruction is a fusion that only renames its operand."""
        if op.opcode != "fusion" or len(op.operands) != 1:
            return False
        inner = self.module.computations[op.computation("calls")]
        return all(o.opcode in _VIEWS or o.opcode == "parameter" for o in inner.ops.values())
