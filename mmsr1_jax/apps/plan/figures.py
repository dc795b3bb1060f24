"""Figures of compiled programs, cached on disk so that a plan can be interrupted and resumed."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import time
from typing import Any

import jax
import jaxlib.version

from mmsr1_jax.apps.plan import estimate, parts, targets, traffic
from mmsr1_jax.apps.plan.estimate import Calibration
from mmsr1_jax.apps.plan.memory import Footprint
from mmsr1_jax.apps.plan.network import Network
from mmsr1_jax.apps.plan.parts import Part
from mmsr1_jax.apps.plan.programs import Program
from mmsr1_jax.apps.plan.targets import Target
from mmsr1_jax.utils import outputs
from mmsr1_jax.utils.source import source_digest

_PLAN = pathlib.Path(__file__).parent
_PACKAGE = _PLAN.parents[1]
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # environment variables that the compilers read
_STATED_SIZE = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMG])")
_LARGEST = 5  # instructions that are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a compiled program, per device.

    Attributes:
      name, phase, needed_bytes, flops: See `programs.Program`.
      argument_bytes: Bytes of the arguments.
      output_bytes: Bytes of the outputs that do not reuse the memory of an argument.
      temporary_bytes: Bytes of temporaries.
      moved_bytes: Bytes read and written in the device's memory (`traffic`).
      link_bytes: Bytes received from other devices.
      counted_flops: FLOPs of the compiled program, those of recomputation included.
      cycles: Cycles that the compiler expects; 0 if it states none.
      kernels, collectives: Numbers of these instructions, whatever the loops around them.
      bound_seconds: Least time for what is needed.
      seconds: Estimated time.
      efficiency: FLOP/s of the estimated time as a share of those of the bare product. The FLOPs
        are by formula: those needed, and those of rematerialisation.
      parts: Bytes, seconds and FLOPs by part of the policy, of the trainer's programs.
      compile_seconds: Time that lowering and compiling took.
      compile_cpu_seconds: Time of the processor that they took, of all threads.
      largest: The instructions that move the most: bytes in all runs, runs, path.
      unknown_loops: Loops of unknown trip count, counted once.
      problem: The compiler's message if it refused the program, else empty.
    """

    name: str
    phase: str
    needed_bytes: float
    flops: float
    argument_bytes: float = 0.0
    output_bytes: float = 0.0
    temporary_bytes: float = 0.0
    moved_bytes: float = 0.0
    link_bytes: float = 0.0
    counted_flops: float = 0.0
    cycles: float = 0.0
    kernels: int = 0
    collectives: int = 0
    bound_seconds: float = 0.0
    seconds: float = 0.0
    efficiency: float = 0.0
    parts: tuple[Part, ...] = ()
    compile_seconds: float = 0.0
    compile_cpu_seconds: float = 0.0
    largest: tuple[tuple[float, float, str], ...] = ()
    unknown_loops: tuple[str, ...] = ()
    problem: str = ""

    def footprint(self, program: Program) -> Footprint:
        """Return the arrays of the program, for `memory.phases`."""
        return Footprint(
            name=self.name, phase=self.phase, state=program.state,
            argument_bytes=self.argument_bytes, output_bytes=self.output_bytes,
            temporary_bytes=self.temporary_bytes, inputs=program.inputs,
        )  # fmt: skip


class FigureCache:
    """Directory of figures, one file for each program and everything that it depends on.

    Args:
      directory: Directory of the files, created if it does not exist.
      target: Target of the programs. Figures also depend on the versions of JAX and of the
        compiler, and on the environment variables that it reads.
      run: Settings and model of the run, as JSON, on which all programs depend.
    """

    def __init__(self, directory: pathlib.Path, target: Target, run: dict[str, Any]):
        self.directory = directory
        self._target, self._run = target, run

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the values stored for a program, or None."""
        return self._read(self._program_path(name))

    def store(self, name: str, values: dict[str, Any]) -> None:
        """Store the values of a program."""
        self._write(self._program_path(name), values)

    def load_product(self) -> dict[str, Any] | None:
        """Return the values stored for the bare product, which no setting changes, or None."""
        return self._read(self._path("product", source_digest(_PLAN)))

    def store_product(self, values: dict[str, Any]) -> None:
        """Store the values of the bare product."""
        self._write(self._path("product", source_digest(_PLAN)), values)

    def _program_path(self, name: str) -> pathlib.Path:
        return self._path(name, source_digest(_PACKAGE), self._run)

    def _path(self, *key: Any) -> pathlib.Path:
        """Return the file of what depends on the key, the target and the compiler."""
        versions = [jax.__version__, jaxlib.version.__version__]
        versions += targets.compiler_versions(self._target.chip.platform)
        flags = [os.environ.get(name, "") for name in _FLAGS]
        everything = [self._target.name, versions, flags, *key]
        text = json.dumps(everything, sort_keys=True, default=str)
        return self.directory / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def _read(self, path: pathlib.Path) -> dict[str, Any] | None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stored if isinstance(stored, dict) else None

    def _write(self, path: pathlib.Path, values: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        outputs.write_text(path, json.dumps(values))


def default_directory() -> pathlib.Path:
    """Return the user's cache directory for figures."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "mmsr1_jax" / "plan"


def calibrate(target: Target, cache: FigureCache) -> Calibration:
    """Return the calibration of a target, from the cache or by compiling the bare product."""
    if stored := cache.load_product():
        return Calibration(**stored)
    calibration = estimate.calibrate(target)
    cache.store_product(dataclasses.asdict(calibration))
    return calibration


def compile_figures(
    program: Program, target: Target, calibration: Calibration, cache: FigureCache
) -> Figures:
    """Return the figures of a program, from the cache or by compiling it."""
    if stored := cache.load(program.name):
        return _restored(stored)
    start, cpu_start = time.monotonic(), time.process_time()
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        figures = _refused(program, str(error))
    else:
        figures = _extract(program, compiled, target, calibration)
    figures = dataclasses.replace(
        figures, compile_seconds=time.monotonic() - start,
        compile_cpu_seconds=time.process_time() - cpu_start,
    )  # fmt: skip
    cache.store(program.name, dataclasses.asdict(figures))
    return figures


def _restored(stored: dict[str, Any]) -> Figures:
    """Return figures from the values of their JSON file."""
    tuples = {
        "largest": tuple(tuple(row) for row in stored["largest"]),
        "unknown_loops": tuple(stored["unknown_loops"]),
        "parts": tuple(Part(**part) for part in stored["parts"]),
    }
    return Figures(**{**stored, **tuples})


def _extract(
    program: Program, compiled: jax.stages.Compiled, target: Target, calibration: Calibration
) -> Figures:
    """Return the figures of a compiled program."""
    sizes = compiled.memory_analysis()
    assert sizes is not None  # XLA's CPU, GPU and TPU compilers all state them
    costs = traffic.measure(
        compiled.as_text() or "", trips=program.trips, kernels=program.kernels,
        branches=program.branches,
    )  # fmt: skip
    times = estimate.instruction_times(costs, Network(target, program.devices), calibration)
    done = program.flops + program.recomputed_flops
    return Figures(
        name=program.name,
        phase=program.phase,
        needed_bytes=program.needed_bytes,
        flops=program.flops,
        argument_bytes=float(sizes.argument_size_in_bytes),
        output_bytes=float(sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
        temporary_bytes=float(sizes.temp_size_in_bytes),
        moved_bytes=costs.bytes,
        link_bytes=costs.link_bytes,
        counted_flops=costs.flops,
        cycles=costs.cycles,
        kernels=len(costs.of_kind("kernel")),
        collectives=len(costs.collectives),
        bound_seconds=estimate.bound_seconds(program.needed_bytes, program.flops, target.chip),
        seconds=sum(times),
        efficiency=done / (sum(times) * calibration.flops_per_second) if done else 0.0,
        parts=() if program.phase == "rollout" else parts.by_part(costs, times),
        largest=tuple((i.bytes * i.runs, i.runs, i.where) for i in costs.largest(_LARGEST)),
        unknown_loops=costs.unknown_loops,
    )


def _refused(program: Program, message: str) -> Figures:
    """Return the figures of a program that does not fit, with the size that the compiler states."""
    stated = _STATED_SIZE.search(message)
    size = float(stated.group(1)) * 2.0 ** (10 + 10 * "KMG".index(stated.group(2))) if stated else 0
    return Figures(
        name=program.name, phase=program.phase, needed_bytes=program.needed_bytes,
        flops=program.flops, temporary_bytes=size,
        problem=" ".join(message.split())[:300],
    )  # fmt: skip
