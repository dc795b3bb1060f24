"""What a compiled program moves and computes: bytes, FLOPs, cycles, kernels, collectives.

    traffic = measure(compiled.as_text(), trips={"decode/while": 16})
    traffic.bytes, traffic.flops, traffic.largest(10)

Every instruction outside of fusions counts what it reads and writes in the device's main memory:

| instruction | bytes |
|---|---|
| any | its operands and its result; arrays in on-chip memory do not count |
| slice, gather, also within a fusion or asynchronous | of the operand, only what is taken |
| update of a slice, scatter, also as a fusion's result | only what is written: it is in place |
| kernel (custom call) | its cost estimate, or the given cost, or else its operands and result |
| loop | its body, times its trip count |
| conditional | its branch with the most bytes (then FLOPs), or all by the given fractions |

The compiler states the trip counts of most loops. The others are given by the caller, by the end of
the loop's path in the traced function, or else are counted once and listed in `unknown_loops`.

A TPU's compiler prefetches weights: an asynchronous copy or slice brings them into on-chip memory
while earlier instructions run. Its bytes are counted once, at its start; the product that uses them
reads nothing in main memory. Collectives may be asynchronous as well, and are counted at their
start. The end is listed too, without bytes, so that `estimate` can let copies and collectives
overlap with the instructions in between. The compiler also states the cycles that it expects of
each instruction, except for kernels and collectives. These are estimates for comparing programs and
for finding copies, not measurements.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

from mmsr1_jax.apps.plan import collectives, flops, hlo, loops, operands
from mmsr1_jax.apps.plan.collectives import Collective
from mmsr1_jax.apps.plan.hlo import Array, Computation, Op

# Instructions that move nothing. The end of an asynchronous operation is counted at its start.
_FREE = frozenset([
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "add-dependency", "opt-barrier", "partition-id", "replica-id", "domain",
])  # fmt: skip
_FREE_TARGETS = frozenset(["AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"])
_COPIES = frozenset(["copy-start", "slice-start", "dynamic-slice-start"])
_KERNELS = re.compile(
    r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*|__gpu\$xla\.gpu\.triton|triton_kernel_call'
    r'|__cudnn\$[^"]*)"'
)
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ESTIMATE = re.compile(r'"cost_estimate":\{([^{}]*)\}')
_STATED = re.compile(r'"(\w+)":"?(\d+)')


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Cost of one call of a kernel: bytes that it moves and FLOPs."""

    bytes: float
    flops: float = 0.0


# Cost of a kernel, fixed or as a function of its path and of the types of its operands.
Kernel = KernelCost | Callable[[str, Sequence[Array]], KernelCost]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """An instruction and what one run of it costs.

    Attributes:
      name: Name in the HLO text.
      opcode: Operation, such as `fusion`.
      kind: `kernel`, `collective`, `copy` (the start of an asynchronous copy), `wait` (the end of
        an asynchronous copy or collective) or `other`.
      where: Path of the operation in the traced function.
      loop: Path of the innermost loop around it; empty outside of loops.
      result: Types of the result.
      runs: Number of times that the program runs it.
      read, written: Bytes read and written in the device's main memory.
      collective: The collective that the instruction is, contains or starts, or None.
      flops: FLOPs of matrix products.
      cycles: Cycles that the compiler expects; 0 if it does not say.
      asynchronous: Whether a `wait` ends it.
      start: Of a `wait`, the name of the asynchronous copy or collective.
    """

    name: str
    opcode: str
    kind: str
    where: str
    result: str
    runs: float
    read: float
    written: float
    loop: str = ""
    collective: Collective | None = None
    flops: float = 0.0
    cycles: float = 0.0
    asynchronous: bool = False
    start: str = ""

    @property
    def bytes(self) -> float:
        """Bytes of one run."""
        return self.read + self.written

    @property
    def links(self) -> float:
        """Bytes that one run receives over links between devices."""
        return self.collective.received if self.collective else 0.0


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Costs of a compiled program.

    Attributes:
      instructions: Instructions that cost anything, in the order of the text.
      unknown_loops: Paths of loops of unknown trip count, which are counted once.
      branches: Names of conditionals with the branch that is counted.
    """

    instructions: tuple[Instruction, ...]
    unknown_loops: tuple[str, ...]
    branches: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> float:
        """Bytes read and written in the device's main memory."""
        return sum(i.bytes * i.runs for i in self.instructions)

    @property
    def flops(self) -> float:
        """FLOPs of matrix products, and of kernels that state theirs."""
        return sum(i.flops * i.runs for i in self.instructions)

    @property
    def cycles(self) -> float:
        """Cycles that the compiler expects, without kernels and collectives."""
        return sum(i.cycles * i.runs for i in self.instructions)

    @property
    def link_bytes(self) -> float:
        """Bytes received over links between devices."""
        return sum(i.links * i.runs for i in self.instructions)

    @property
    def collectives(self) -> list[Instruction]:
        """Instructions that are or contain a collective; of an asynchronous one, the start."""
        return [i for i in self.instructions if i.collective]

    def gathers(self, shape: tuple[int, ...], scope: str) -> float:
        """Return how often the program gathers an array, or one as large, from other devices.

        Args:
          shape: Shape of the array.
          scope: Part of the path of what gathers it.
        """
        return sum(
            i.runs for i in self.collectives
            if i.collective and i.collective.opcode == "all-gather" and scope in i.where
            and math.prod(i.collective.shape) == math.prod(shape)
        )  # fmt: skip

    def of_kind(self, kind: str) -> list[Instruction]:
        """Return the instructions of a kind, such as `kernel`."""
        return [i for i in self.instructions if i.kind == kind]

    def largest(self, count: int) -> list[Instruction]:
        """Return the instructions that move the most bytes in all their runs, largest first."""
        return sorted(self.instructions, key=lambda i: -i.bytes * i.runs)[:count]


def measure(
    text: str,
    *,
    trips: Mapping[str, float] | None = None,
    kernels: Mapping[str, Kernel] | None = None,
    branches: Mapping[str, Sequence[float]] | None = None,
) -> Traffic:
    """Return the costs of a compiled program.

    Args:
      text: Optimised HLO, `compiled.as_text()`.
      trips: Trip counts of loops that the compiler does not know, by the end of the path of the
        loop, such as `decode/while`.
      kernels: Costs of one call of kernels, by a part of the path or name of the call. They
        replace the kernels' own estimates.
      branches: Fractions of the runs that take each branch of a conditional, by a part of its path;
        of a predicate, first `false`, then `true`.

    Raises:
      ValueError: The text is not that of a compiled program.
    """
    walk = _Walk(hlo.read(text), trips or {}, kernels or {}, branches or {})
    walk.computation(walk.module.entry, 1.0)
    return Traffic(
        tuple(walk.instructions),
        tuple(dict.fromkeys(walk.unknown_loops)),
        tuple(walk.taken.items()),
    )


def wasteful(traffic: Traffic, *, cache_bytes: float, layer_bytes: float) -> list[Instruction]:
    """Return the instructions outside of kernels that copy much of the cache or of the weights.

    An instruction copies what it both reads and writes: a matrix product that reads weights and
    writes activations copies only as much as the activations.

    Args:
      traffic: Costs of the program.
      cache_bytes: Bytes of the KV cache on a device; 2 % of it may be copied by one run.
      layer_bytes: Bytes of the weights of a decoder layer on a device; 25 % may be copied.

    Returns:
      The instructions above either bound, those that copy the most first.
    """
    bound = min(0.02 * cache_bytes, 0.25 * layer_bytes)
    found = [
        i for i in traffic.instructions if i.kind != "kernel" and min(i.read, i.written) > bound
    ]
    return sorted(found, key=lambda i: -min(i.read, i.written) * i.runs)


class _Walk:
    """Walk over the computations that a program runs."""

    def __init__(
        self,
        module: hlo.Module,
        trips: Mapping[str, float],
        kernels: Mapping[str, Kernel],
        branches: Mapping[str, Sequence[float]],
    ):
        self.module, self.trips, self.kernels, self.fractions = module, trips, kernels, branches
        self.instructions: list[Instruction] = []
        self.unknown_loops: list[str] = []
        self.taken: dict[str, int] = {}
        self.loop = ""  # path of the loop around the current instruction
        self.started: dict[str, str] = {}  # start of each asynchronous collective, by its channel

    @property
    def cost(self) -> tuple[float, float]:
        """Bytes and FLOPs so far, by which branches are compared."""
        return (
            sum(i.bytes * i.runs for i in self.instructions),
            sum(i.flops * i.runs for i in self.instructions),
        )

    def computation(self, name: str, runs: float) -> None:
        """Add the instructions of a computation that runs `runs` times."""
        computation = self.module.computations[name]
        for op in computation.ops.values():
            if op.opcode == "while":
                outer = self.loop
                self.loop = outer if op.op_name == op.name else op.op_name
                self.computation(op.computation("body"), runs * self._trip_count(computation, op))
                self.loop = outer
            elif op.opcode == "conditional":
                self._conditional(op, runs)
            elif op.opcode == "call":
                self.computation(op.computation("to_apply"), runs)
            elif op.opcode.endswith("-start") and op.computation("calls"):
                self._asynchronous(op, runs)
            elif op.opcode.endswith("-done"):
                self._wait(computation, op, runs)
            elif not (op.opcode in _FREE or op.opcode.endswith("-update")):
                self._add(computation, op, runs)

    def _trip_count(self, computation: Computation, op: Op) -> float:
        """Return the trip count of a loop: the compiler's, else the given one, else 1."""
        if counted := loops.trip_count(self.module, computation, op):
            return float(counted)
        for end, count in self.trips.items():
            if op.op_name.endswith(end):
                return float(count)
        self.unknown_loops.append(op.op_name)
        return 1.0

    def _conditional(self, op: Op, runs: float) -> None:
        """Add the branches of a conditional by the given fractions, or else the costliest one."""
        path, names = f"{op.op_name} {op.name}", op.branches()
        for part, fractions in self.fractions.items():
            if part in path:
                for name, fraction in zip(names, fractions, strict=True):
                    self.computation(name, runs * fraction)
                return
        branches = []
        for name in names:
            branch = _Walk(self.module, self.trips, self.kernels, self.fractions)
            branch.loop, branch.started = self.loop, dict(self.started)
            branch.computation(name, runs)
            branches.append(branch)
        index = max(range(len(branches)), key=lambda i: branches[i].cost)
        branch = branches[index]
        self.instructions += branch.instructions
        self.unknown_loops += branch.unknown_loops
        self.taken |= {**branch.taken, op.name: index}

    def _asynchronous(self, op: Op, runs: float) -> None:
        """Add the instructions of an asynchronous operation whose computation is written out."""
        first = len(self.instructions)
        self.computation(op.computation("calls"), runs)
        for n, inner in enumerate(self.instructions[first:], first):
            if inner.collective:
                self.instructions[n] = dataclasses.replace(inner, name=op.name, asynchronous=True)

    def _wait(self, computation: Computation, op: Op, runs: float) -> None:
        """Add the end of an asynchronous copy or collective."""
        start = computation.ops.get(op.operands[0]) if op.operands else None
        while start is not None and start.opcode.endswith("-update"):
            start = computation.ops.get(start.operands[0])
        if start is not None:
            self._add_wait(op, start.name, runs)

    def _add_wait(self, op: Op, start: str, runs: float) -> None:
        self.instructions.append(
            Instruction(
                name=op.name, opcode=op.opcode, kind="wait", where=op.op_name, loop=self.loop,
                result="", runs=runs, read=0.0, written=0.0, start=start,
            )
        )  # fmt: skip

    def _add(self, computation: Computation, op: Op, runs: float) -> None:
        target = op.find(_TARGET) or ""
        if target in _FREE_TARGETS:
            return
        if start := self.started.get(collectives.done_channel(self.module, op)):
            self._add_wait(op, start, runs)
            return
        read, written = operands.instruction_bytes(self.module, computation, op, self.started)
        kind, asynchronous = "other", op.opcode in _COPIES
        work = flops.op_flops(self.module, computation, op)
        collective = collectives.find(self.module, op, self.started)
        if collective and not work:
            kind = "collective"
            asynchronous = op.opcode.endswith("-start")
            if collectives.is_start(self.module, op):
                self.started[collective.channel], asynchronous = op.name, True
        elif op.opcode in _COPIES:
            kind = "copy"
        elif op.opcode == "custom-call" and _KERNELS.search(op.attributes):
            kind = "kernel"
            if cost := self._kernel_cost(computation, op):
                read, written, work = cost.bytes, 0.0, cost.flops
        cycles = float(op.find(_CYCLES) or 0)
        if read or written or collective or work or cycles:
            self.instructions.append(
                Instruction(
                    name=op.name, opcode=op.opcode, kind=kind, where=op.op_name, loop=self.loop,
                    result=" ".join(f"{a.dtype}{list(a.shape)}" for a in op.result[:3]), runs=runs,
                    read=read, written=written, collective=collective, flops=work, cycles=cycles,
                    asynchronous=asynchronous,
                )
            )  # fmt: skip

    def _kernel_cost(self, computation: Computation, op: Op) -> KernelCost | None:
        """Return the given cost of a kernel, else its own estimate, else None."""
        path = f"{op.op_name} {op.name}"
        for part, cost in self.kernels.items():
            if part in path:
                if isinstance(cost, KernelCost):
                    return cost
                return cost(path, [a for name in op.operands for a in computation.ops[name].result])
        estimate = op.find(_ESTIMATE) or ""
        stated = {name: float(value) for name, value in _STATED.findall(estimate)}
        if stated.get("bytes_accessed"):
            return KernelCost(stated["bytes_accessed"], stated.get("flops", 0.0))
        return None
