"""Estimated time of a compiled program, and a lower bound from the bytes and FLOPs that it needs.

An instruction takes the largest of

    cycles / clock          if the compiler states cycles (TPU, without kernels and collectives)
    bytes / bandwidth
    FLOPs / peak            of its matrix products
    link bytes / links      of a collective

and the program takes the sum over its instructions. Bandwidth and peak are those that copies and a
bare product reach, where that was measured (`targets.Chip`). The links are those of the
collective's group of devices (`network`). What is asynchronous overlaps with the instructions
between its start and its end:

- A copy, by which a TPU prefetches weights into on-chip memory, uses the main memory while those
  instructions leave it idle: those limited by cycles, FLOPs or links.
- A collective uses the links while those instructions leave them idle. It is assumed to take
  neither memory bandwidth nor time of the core away from them.

Several that are in progress at once take turns, oldest first, even if they would use different
links. What is left where the program waits for one adds to the sum. A collective that is not
asynchronous is counted in full. The sum knows nothing of the latency of launches and of
collectives, and so is optimistic about small ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmsr1_jax.apps.plan import traffic
from mmsr1_jax.apps.plan.network import Network
from mmsr1_jax.apps.plan.targets import Chip, Target
from mmsr1_jax.apps.plan.traffic import Instruction, Traffic

_PRODUCT = 8192  # size of the three dimensions
_PRODUCT_FLOPS = 2.0 * _PRODUCT**3


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Estimate of a bare product of bfloat16[8192, 8192] matrices on one device.

    Attributes:
      cycles: Cycles that the compiler expects; 0 if it states none.
      seconds: Estimated time.
      efficiency: Share of the peak FLOP/s. Kernels, whose cycles are unknown, are assumed to reach
        it too. On a GPU, where no cycles are stated, it is what was measured (`Chip`).
    """

    cycles: float
    seconds: float
    efficiency: float

    @property
    def flops_per_second(self) -> float:
        """FLOP/s of the bare product."""
        return _PRODUCT_FLOPS / self.seconds


def calibrate(target: Target) -> Calibration:
    """Compile a bare product for one device of the target, and return its estimate."""
    mesh = Mesh([target.devices[0]], ("device",))
    matrix = jax.ShapeDtypeStruct(
        (_PRODUCT, _PRODUCT), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    compiled = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    return calibration(traffic.measure(compiled.as_text() or ""), target.chip)


def calibration(product: Traffic, chip: Chip) -> Calibration:
    """Return the calibration for the costs of the compiled product."""
    if not product.cycles:
        seconds = _PRODUCT_FLOPS / (chip.peak_flops * chip.product_share)
        return Calibration(0.0, seconds, chip.product_share)
    seconds = product.cycles / chip.clock
    efficiency = min(1.0, _PRODUCT_FLOPS / seconds / chip.peak_flops)
    return Calibration(product.cycles, seconds, efficiency)


def instruction_seconds(cost: Instruction, network: Network, efficiency: float) -> float:
    """Return the estimated time of one run of an instruction."""
    chip = network.chip
    seconds = max(cost.bytes / chip.copy_bandwidth, link_seconds(cost, network))
    if cost.cycles and chip.clock:
        return max(seconds, cost.cycles / chip.clock, cost.flops / chip.peak_flops)
    return max(seconds, cost.flops / (chip.peak_flops * efficiency))


def link_seconds(cost: Instruction, network: Network) -> float:
    """Return the time for which one run of an instruction uses the links."""
    return cost.links / network.bandwidth(cost.collective.groups) if cost.collective else 0.0


class _Pending:
    """Asynchronous operations that share a resource, one after the other."""

    def __init__(self):
        self._left: dict[str, float] = {}  # seconds that each still needs, oldest first

    def start(self, name: str, seconds: float) -> None:
        """Begin an operation."""
        self._left[name] = seconds

    def progress(self, seconds: float) -> None:
        """Use the resource for some time."""
        for name in list(self._left):
            used = min(seconds, self._left[name])
            self._left[name], seconds = self._left[name] - used, seconds - used
            if self._left[name]:
                return
            del self._left[name]

    def wait(self, name: str) -> float:
        """End an operation and those that were started before it; return the seconds it takes."""
        total = 0.0
        while name in self._left:
            total += self._left.pop(next(iter(self._left)))
        return total

    def end(self) -> dict[str, float]:
        """Return the seconds that each operation still needs at the end of the program."""
        return self._left


def instruction_times(
    program: Traffic, network: Network, calibration: Calibration
) -> tuple[float, ...]:
    """Return the estimated time of each instruction in all its runs; the sum is the program's.

    What an asynchronous operation takes beyond the instructions that hide it counts for its end, or
    for its start if nothing waits for it.
    """
    memory, links = _Pending(), _Pending()
    times: list[float] = []
    index = {i.name: n for n, i in enumerate(program.instructions)}
    for i in program.instructions:
        memory_time = i.runs * i.bytes / network.chip.copy_bandwidth
        seconds = 0.0
        if i.kind == "copy":
            memory.start(i.name, memory_time)
        elif i.asynchronous:
            links.start(i.name, max(memory_time, i.runs * link_seconds(i, network)))
        elif i.kind == "wait":
            copying, receiving = memory.wait(i.start), links.wait(i.start)
            memory.progress(receiving)
            links.progress(copying)
            seconds = copying + receiving
        else:
            seconds = i.runs * instruction_seconds(i, network, calibration.efficiency)
            memory.progress(seconds - memory_time)
            links.progress(seconds - i.runs * link_seconds(i, network))
        times.append(seconds)
    for name, seconds in [*memory.end().items(), *links.end().items()]:
        times[index[name]] += seconds
    return tuple(times)


def program_seconds(program: Traffic, network: Network, calibration: Calibration) -> float:
    """Return the estimated time of a program."""
    return sum(instruction_times(program, network, calibration))


def bound_seconds(needed_bytes: float, flops: float, chip: Chip) -> float:
    """Return the least time in which a device can move the bytes and compute the FLOPs."""
    return max(needed_bytes / chip.bandwidth, flops / chip.peak_flops)
