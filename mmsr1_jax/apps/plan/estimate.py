"""Estimated time of a compiled program, and a lower bound from the bytes and FLOPs that it needs.

An instruction takes the largest of

    cycles / clock          if the compiler states cycles (TPU, without kernels and collectives)
    bytes / bandwidth
    FLOPs / peak            of its matrix products
    link bytes / links      of a collective

and the program takes the sum over its instructions. An asynchronous copy, by which a TPU prefetches
weights into on-chip memory, uses the main memory while the instructions after its start leave it
idle: those limited by cycles, FLOPs or links. What is left of it where the program waits for it
adds to the sum. Asynchronous collectives are counted in full, so the sum is pessimistic about them;
it knows nothing of the latency of launches and of collectives, and so is optimistic about small
ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmsr1_jax.apps.plan import traffic
from mmsr1_jax.apps.plan.targets import Chip, Target
from mmsr1_jax.apps.plan.traffic import Instruction, Traffic

_PRODUCT = 8192  # size of the three dimensions


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Estimate of a bare product of bfloat16[8192, 8192] matrices on one device.

    Attributes:
      cycles: Cycles that the compiler expects; 0 if it states none.
      seconds: Estimated time.
      efficiency: Share of the peak FLOP/s. Kernels, whose cycles are unknown, are assumed to reach
        it too. On a GPU, where no cycles are stated, it is 1.
    """

    cycles: float
    seconds: float
    efficiency: float


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
    flops = 2.0 * _PRODUCT**3
    if not product.cycles:
        return Calibration(0.0, flops / chip.peak_flops, 1.0)
    seconds = product.cycles / chip.clock
    return Calibration(product.cycles, seconds, min(1.0, flops / seconds / chip.peak_flops))


def instruction_seconds(cost: Instruction, chip: Chip, efficiency: float) -> float:
    """Return the estimated time of one run of an instruction."""
    seconds = max(cost.bytes / chip.bandwidth, cost.links / chip.links)
    if cost.cycles and chip.clock:
        return max(seconds, cost.cycles / chip.clock, cost.flops / chip.peak_flops)
    return max(seconds, cost.flops / (chip.peak_flops * efficiency))


def program_seconds(program: Traffic, chip: Chip, calibration: Calibration) -> float:
    """Return the estimated time of a program."""
    total = 0.0
    pending: dict[str, float] = {}  # seconds that asynchronous copies still need, oldest first

    def transfer(seconds: float) -> None:
        """Use the memory for pending copies, one after the other."""
        for name in list(pending):
            used = min(seconds, pending[name])
            pending[name], seconds = pending[name] - used, seconds - used
            if pending[name]:
                return
            del pending[name]

    for i in program.instructions:
        memory = i.runs * i.bytes / chip.bandwidth
        if i.kind == "copy":
            pending[i.name] = memory
        elif i.kind == "wait":
            while i.copy in pending:  # those started before it end before it
                total += pending.pop(next(iter(pending)))
        else:
            seconds = i.runs * instruction_seconds(i, chip, calibration.efficiency)
            transfer(seconds - memory)
            total += seconds
    return total + sum(pending.values())


def bound_seconds(needed_bytes: float, flops: float, chip: Chip) -> float:
    """Return the least time in which a device can move the bytes and compute the FLOPs."""
    return max(needed_bytes / chip.bandwidth, flops / chip.peak_flops)
