"""Report of a plan: table of programs, memory by phase, and what to change."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmsr1_jax.apps.plan import memory
from mmsr1_jax.apps.plan.estimate import Calibration
from mmsr1_jax.apps.plan.figures import Figures
from mmsr1_jax.apps.plan.memory import CacheSize, Phase
from mmsr1_jax.apps.plan.targets import Target
from mmsr1_jax.config import settings

_GIB = 2.0**30
_COLUMNS = (
    "program", "arguments", "temporaries", "moved", "needed", "over links", "TFLOP", "needed TFLOP",
    "kernels", "collectives", "bound", "estimate", "efficiency", "compiled in (CPU)",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Result of a plan.

    Attributes:
      target: Devices that the programs are compiled for.
      model: Name of the policy.
      calibration: Estimate of a bare product on a device.
      programs: Figures of the programs.
      phases: Memory of the phases.
      cache: Size of an engine's KV cache in the settings.
      filled: Tokens that each lane is assumed to hold in the engine's programs.
      tensor: Devices of a tensor group.
      crosses_hosts: Whether a tensor group spans several hosts.
      lockstep: Whether all engines run their programs together.
    """

    target: Target
    model: str
    calibration: Calibration
    programs: Sequence[Figures]
    phases: Sequence[Phase]
    cache: CacheSize
    filled: int
    tensor: int
    crosses_hosts: bool
    lockstep: bool

    @property
    def largest_cache(self) -> int | None:
        """Largest value of `cache.setting` with which all phases fit; 0 if they never do.

        None if that is not known, since programs of a phase are missing.
        """
        if not all(phase.complete for phase in self.phases):
            return None
        if not all(phase.fits for phase in self.phases if memory.CACHE not in phase.parts):
            return 0
        free = (p.limit - p.bytes for p in self.phases if memory.CACHE in p.parts)
        value = self.cache.value(min(free))
        return value if value >= self.cache.smallest else 0

    @property
    def most_lanes(self) -> int | None:
        """The most full lanes that fit; 0 if not a single one does, None if that is not known."""
        largest = self.largest_cache
        if largest is None or not self.cache.is_set:
            return largest
        # One page is for copies of a prompt's last page.
        pages = max(0, largest // self.cache.tokens - 1)
        return pages // self.cache.pages_per_lane


def as_json(plan: Plan, config: settings.Config) -> dict[str, Any]:
    """Return the plan as JSON."""
    return {
        "target": plan.target.name,
        "devices": len(plan.target.devices),
        "hosts": plan.target.num_hosts,
        "model": plan.model,
        "product": dataclasses.asdict(plan.calibration),
        "programs": [dataclasses.asdict(program) for program in plan.programs],
        "phases": [
            {
                "name": phase.name, "bytes": phase.bytes, "limit": phase.limit,
                "fits": phase.fits, "parts": dict(phase.parts),
                "advice": advice(phase, plan, config),
            }
            for phase in plan.phases
        ],
        "cache": {
            "bytes": plan.cache.bytes, "setting": plan.cache.setting,
            "largest": plan.largest_cache, "most_lanes": plan.most_lanes,
            "filled_tokens": plan.filled,
        },
        "tensor_groups_cross_hosts": plan.crosses_hosts, "lockstep": plan.lockstep,
    }  # fmt: skip


def as_text(plan: Plan, config: settings.Config) -> str:
    """Return the plan as Markdown."""
    target, product = plan.target, plan.calibration
    lines = [
        f"{plan.model} on {target.name}: {len(target.devices)} devices on {target.num_hosts} "
        f"host{'s' * (target.num_hosts > 1)}. Figures are per device.",
        "",
        _product_line(product, target),
        "",
        _row(_COLUMNS),
        _row(["---"] * len(_COLUMNS)),
        *(_program_row(program) for program in plan.programs),
        "",
        *_notes(plan.programs),
        _row(["phase", "memory", "of", "verdict", "largest parts"]),
        _row(["---"] * 5),
        *(_phase_row(phase, plan, config) for phase in plan.phases),
        "",
        _cache_line(plan),
        f"Decode (one step) and extend: each row's lane holds {plan.filled} tokens before it.",
    ]
    if target.num_hosts > 1:
        lines.append(f"A run on this target has one process on each of {target.num_hosts} hosts.")
    if plan.tensor > 1:
        where = "span several hosts" if plan.crosses_hosts else "stay on one host"
        lines.append(f"Groups of mesh.tensor={plan.tensor} devices {where}.")
    if plan.lockstep:
        lines.append("All engines run their programs together (rollout.lockstep).")
    return "\n".join(lines)


def advice(phase: Phase, plan: Plan, config: settings.Config) -> str:
    """Return the setting to change if a phase does not fit, else an empty string.

    The first of these that frees enough on its own: reference policy to the host, a smaller KV
    cache (at least an episode, or `rollout.decode_batch_size` lanes), trainer to the host during
    rollouts, larger tensor groups, smaller micro-batches.
    """
    excess = phase.bytes - phase.limit
    if excess <= 0:
        return ""
    parts, rollout = phase.parts, config.rollout
    if phase.name != "score" and parts.get(memory.REFERENCE, 0.0) >= excess:
        return "objective.reference=host"
    cache = plan.cache
    smaller = cache.value(-excess) if memory.CACHE in parts else 0
    if smaller >= (cache.smallest if cache.is_set else rollout.decode_batch_size):
        return f"{cache.setting}={smaller}"
    trainer = parts.get(memory.POLICY, 0.0) + parts.get(memory.OPTIMIZER, 0.0)
    if phase.name == "rollout" and trainer >= excess:
        return "update.offload=True"
    engine = sum(size for name, size in parts.items() if memory.ENGINE in name)
    if engine / 2 >= excess:
        return f"mesh.tensor={2 * plan.tensor}"
    temporaries = sum(size for name, size in parts.items() if name.endswith("temporaries"))
    if temporaries >= excess:
        if config.model.remat != "full":
            return "model.remat=full"
        if config.update.micro_batch_rows > 1:
            return f"update.micro_batch_rows={config.update.micro_batch_rows // 2}"
    if not cache.is_set and smaller >= 1:
        return f"rollout.lanes={smaller} with rollout.decode_batch_size={smaller}"
    if not config.update.lora_rank and parts.get(memory.OPTIMIZER, 0.0) >= excess:
        return "update.lora_rank=32, or a target with more devices"
    largest = max(parts, key=lambda name: parts[name])
    return f"a target with more memory or devices (largest part: {largest})"


def _product_line(product: Calibration, target: Target) -> str:
    """Return the sentence about the bare product."""
    size = "A bare product of bfloat16[8192, 8192] matrices"
    if not product.cycles:
        return (
            f"{size} is estimated at {product.seconds * 1e3:.2f} ms: the compiler for GPUs states "
            f"no cycles, so all products are assumed to reach {product.efficiency:.0%} of the "
            "peak, as a bare one did on an H100."
        )
    return (
        f"{size} is estimated at {product.seconds * 1e3:.2f} ms: {product.cycles / 1e6:.2f} M "
        f"cycles at {target.chip.clock / 1e9:.2f} GHz, {product.efficiency:.0%} of the peak."
    )


def _program_row(program: Figures) -> str:
    if program.problem:
        size = f"over {_size(program.temporary_bytes)}"
        return _row([program.name, "", size, *[""] * (len(_COLUMNS) - 4), "refused"])
    return _row(
        [
            program.name,
            _size(program.argument_bytes),
            _size(program.temporary_bytes),
            _size(program.moved_bytes),
            _size(program.needed_bytes),
            _size(program.link_bytes),
            f"{program.counted_flops / 1e12:.1f}",
            f"{program.flops / 1e12:.1f}",
            str(program.kernels),
            str(program.collectives),
            _time(program.bound_seconds),
            _time(program.seconds),
            f"{program.efficiency:.0%}" if program.efficiency else "",
            f"{program.compile_seconds:.0f} s ({program.compile_cpu_seconds:.0f} s)",
        ]
    )


def _notes(programs: Sequence[Figures]) -> list[str]:
    """Return lines about single programs, and an empty line if there are any."""
    notes = [line for program in programs if (line := _parts_line(program))]
    notes += [f"{p.name}: {p.problem}" for p in programs if p.problem]
    notes += [
        f"{p.name}: a loop of unknown length is counted once: {loop}"
        for p in programs
        for loop in p.unknown_loops
    ]
    return [*notes, ""] if notes else []


def _parts_line(program: Figures) -> str:
    """Return the sentence about the parts of a program; empty if it has none."""
    if not program.parts:
        return ""
    parts = [
        f"{part.name} {_size(part.bytes)} ({part.bytes / program.moved_bytes:.0%}), "
        f"{_time(part.seconds)} ({part.seconds / program.seconds:.0%}), "
        f"{part.flops / 1e12:.1f} TFLOP"
        for part in program.parts
    ]
    return f"{program.name} by part: {'; '.join(parts)}."


def _phase_row(phase: Phase, plan: Plan, config: settings.Config) -> str:
    verdict = "fits" if phase.fits else "not compiled"
    if phase.fits is False:
        verdict = f"does not fit: {advice(phase, plan, config)}"
    parts = sorted(phase.parts.items(), key=lambda part: -part[1])[:3]
    largest = ", ".join(f"{name} {_size(size)}" for name, size in parts)
    return _row([phase.name, _size(phase.bytes), _size(phase.limit), verdict, largest])


def _cache_line(plan: Plan) -> str:
    """Return the sentence about the KV cache."""
    cache = plan.cache
    size = f"KV cache: {cache.pages} pages of {cache.tokens} tokens, {_size(cache.bytes)}"
    full = f"{cache.lanes} lanes, full lanes of {cache.pages_per_lane} pages"
    if plan.largest_cache is None:
        return f"{size}, for {full}; run without --programs for the largest cache that fits."
    if not plan.largest_cache:
        return f"{size}, for {full}; no cache fits."
    lanes = f", {plan.most_lanes} full lanes" if cache.is_set else ""
    return f"{size}, for {full}; at most {cache.setting}={plan.largest_cache}{lanes} fits."


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _size(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
