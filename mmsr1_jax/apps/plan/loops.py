"""Trip counts of loops in a compiled program."""

import math
import re

from mmsr1_jax.apps.plan.hlo import Computation, Module, Op

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"\bindex=(\d+)")


def trip_count(module: Module, computation: Computation, loop: Op) -> int | None:
    """Return the trip count of a `while`, or None if it is not a constant of the program.

    The compiler states it, or the loop counts: its condition is `i < bound`, where an iteration
    adds a constant to i. TPU programs have loops that count in twos.

    Args:
      module: Program.
      computation: Computation of the loop.
      loop: The `while` instruction.
    """
    if known := loop.find(_KNOWN):
        return int(known)
    condition = module.computations[loop.computation("condition")]
    compare, operands = _unwrapped(module, condition, condition.ops[condition.root])
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, bound = operands
    index = counter.find(_INDEX)
    if bound.opcode != "constant" or counter.opcode != "get-tuple-element" or index is None:
        return None
    step = _step(module, module.computations[loop.computation("body")], int(index))
    start = _start(computation, loop, int(index))
    if step is None or start is None:
        return None
    return max(0, math.ceil((int(bound.literal) - start) / step))


def _step(module: Module, body: Computation, index: int) -> int | None:
    """Return the constant that an iteration adds to an element of the loop's state, or None."""
    result = body.ops[body.root]
    if result.opcode != "tuple":
        return None
    op, operands = _unwrapped(module, body, _source(body, result.operands[index]))
    added = [int(o.literal) for o in operands if o.opcode == "constant"]
    return added[0] if op.opcode == "add" and len(added) == 1 else None


def _unwrapped(module: Module, scope: Computation, op: Op) -> tuple[Op, list[Op]]:
    """Return an instruction and its operands; of a fusion, its root with the fusion's operands."""
    if op.opcode != "fusion":
        return op, [_source(scope, name) for name in op.operands]
    inner = module.computations[op.computation("calls")]
    outside = {name: op.operands[number] for number, name in inner.parameters.items()}
    root = inner.ops[inner.root]
    operands = [_source(inner, name) for name in root.operands]
    return root, [_source(scope, outside[o.name]) if o.name in outside else o for o in operands]


def _source(scope: Computation, name: str) -> Op:
    """Return the instruction that produces a value, before copies."""
    op = scope.ops[name]
    while op.opcode in ("copy", "bitcast"):
        op = scope.ops[op.operands[0]]
    return op


def _start(computation: Computation, loop: Op, index: int) -> int | None:
    """Return the initial value of an element of the loop's state, or None."""
    state = computation.ops[loop.operands[0]]
    if state.opcode != "tuple":
        return None
    op = _source(computation, state.operands[index])
    return int(op.literal) if op.opcode == "constant" else None
