"""Reader of optimised HLO, the text of a compiled program (`compiled.as_text()`).

    module = hlo.read(compiled.as_text())
    module.computations[module.entry].ops["fusion.3"]

An HLO text is a list of computations; the entry computation calls the others (bodies of loops,
branches, fusions). Only the parts that `traffic` needs are interpreted: result types with their
memory spaces, operands, and the attributes as text.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

# Bytes of an element, by the type's name in HLO. Other types, such as tokens, occupy no memory.
_ELEMENT_BYTES = {
    "pred": 1.0,
    **{f"{sign}{bits}": bits / 8 for sign in "su" for bits in (2, 4, 8, 16, 32, 64)},
    **{"bf16": 2.0, "f16": 2.0, "f32": 4.0, "f64": 8.0, "c64": 8.0, "c128": 16.0},
    "f4e2m1fn": 0.5,
    **{f"f8{kind}": 1.0 for kind in ("e3m4", "e4m3", "e4m3fn", "e4m3b11fnuz", "e4m3fnuz")},
    **{f"f8{kind}": 1.0 for kind in ("e5m2", "e5m2fnuz", "e8m0fnu")},
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_LONGEST_NAME = 1000  # characters
_SPACE = re.compile(r"S\((\d+)\)")
_OP = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_BRANCHES = re.compile(r"\bbranch_computations=\{([^{}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of an array.

    Attributes:
      dtype: Name of the element type in HLO, such as `bf16`.
      shape: Sizes of the dimensions.
      space: Number of the memory space: 0 is the device's main memory, others are on-chip memories
        or the host's.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes of the elements in whatever memory."""
        return self.size * _ELEMENT_BYTES[self.dtype]

    @property
    def memory_bytes(self) -> float:
        """Bytes of the elements in the device's main memory."""
        return 0.0 if self.space else self.bytes


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction.

    Attributes:
      name: Name in its computation.
      opcode: Operation, such as `fusion`.
      result: Arrays of the result; a tuple is flattened.
      operands: Names of the operands.
      literal: Text in the parentheses of a constant or a parameter.
      attributes: Text after the operands.
    """

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def op_name(self) -> str:
        """Path of the operation in the traced function, or the instruction's name without one."""
        return self.find(_OP_NAME) or self.name

    @property
    def memory_bytes(self) -> float:
        """Bytes of the result in the device's main memory."""
        return sum(array.memory_bytes for array in self.result)

    @property
    def bytes(self) -> float:
        """Bytes of the result in whatever memory."""
        return sum(array.bytes for array in self.result)

    def find(self, pattern: re.Pattern[str]) -> str | None:
        """Return the first group of a regular expression in the attributes, or None."""
        match = pattern.search(self.attributes)
        return match and match.group(1)

    def computation(self, attribute: str) -> str:
        """Return the computation that an attribute such as `body` names; empty if it has none."""
        _, found, rest = self.attributes.partition(f" {attribute}=%")
        match = _NAME.match(f"%{rest[:_LONGEST_NAME]}") if found else None
        return match.group(1) if match else ""

    def branches(self) -> list[str]:
        """Return the computations of a `conditional`, in the order of their index."""
        if names := self.find(_BRANCHES):
            return _NAME.findall(names)
        # Index 0 of a predicate's two branches is `false`.
        return [self.computation("false_computation"), self.computation("true_computation")]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: instructions by name, in the order of the text, and the name of its root."""

    ops: dict[str, Op]
    root: str

    @property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(op.literal): op.name for op in self.ops.values() if op.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations by name, and the name of the entry computation."""

    computations: dict[str, Computation]
    entry: str


def read(text: str) -> Module:
    """Parse the text of a compiled program.

    Raises:
      ValueError: The text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    name, root, entry, ops = "", "", "", {}
    for line in _logical_lines(text):
        if _is_header(line):
            name, root, ops = line.removeprefix("ENTRY ").split()[0].lstrip("%"), "", {}
            entry = name if line.startswith("ENTRY ") else entry
        elif match := _OP.fullmatch(line):
            op = _parse_op(match.group(2), match.group(3))
            ops[op.name] = op
            root = op.name if match.group(1) else root
        elif name:  # the closing brace
            computations[name] = Computation(ops, root or next(reversed(ops), ""))
            name = ""
    if entry not in computations:
        raise ValueError("the text of the program has no entry computation")
    return Module(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """Return the arrays that a type names, such as `(f32[2,3]{1,0}, bf16[8]{0:T(128)S(1)})`."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        if dtype in _ELEMENT_BYTES:
            shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
            space = _SPACE.search(layout)
            found.append(Array(dtype, shape, int(space.group(1)) if space else 0))
    return tuple(found)


def _is_header(line: str) -> bool:
    """Return whether a line begins a computation: `[ENTRY ]%NAME (PARAMETERS) -> TYPE {`."""
    return line.endswith("{") and " -> " in line and not line[0].isspace()


def _logical_lines(text: str) -> Iterator[str]:
    """Yield headers, instructions and closing braces; an instruction may span several lines."""
    instruction = ""
    for line in text.splitlines():
        closes = line == "}" or line.startswith("}, execution_thread=")
        if closes or _is_header(line) or _OP.match(line):
            if instruction:
                yield instruction
            instruction = line if _OP.match(line) else ""
            if not instruction:
                yield "}" if closes else line
        elif instruction:
            instruction += line


def _parse_op(name: str, text: str) -> Op:
    """Parse the text after `NAME = `: `TYPE OPCODE(OPERANDS), ATTRIBUTES`."""
    end = _type_end(text)
    opcode, _, rest = text[end + 1 :].partition("(")
    close = _closing(rest)
    inside = rest[:close]
    return Op(
        name=name,
        opcode=opcode.strip(),
        result=arrays(text[:end]),
        operands=tuple(_NAME.findall(inside)),
        literal=inside.strip(),
        attributes=rest[close + 1 :],
    )


def _type_end(text: str) -> int:
    """Return the index of the space after a type; the type may be a tuple."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == " " and depth == 0:
            return index
    return len(text)


def _closing(text: str) -> int:
    """Return the index of the parenthesis that closes the operands."""
    depth, quoted = 1, False
    for index, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif not quoted:
            depth += (character in "([{") - (character in ")]}")
            if depth == 0:
                return index
    return len(text)
