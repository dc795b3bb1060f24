"""State that stays on a device during a run, and the memory of the run's phases."""

import dataclasses
import functools
import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.rl import lora
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rollout.programs import Programs

POLICY, OPTIMIZER, REFERENCE = "policy", "optimizer", "reference"
ENGINE, CACHE, IMAGES = "engine policy", "KV cache", "image cache"
MERGED = "merged kernels"
PHASES = ("rollout", "load", "score", "update")


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Size of an engine's KV cache.

    Attributes:
      pages: Number of pages.
      page_bytes: Bytes of a page of all layers, on a device.
      lanes: Number of lanes.
      pages_per_lane: Number of pages of a full lane.
      lane_bytes: Bytes that a lane takes besides its pages.
      tokens: Number of tokens in a page.
      is_set: Whether `rollout.cache_tokens` gives the number of pages; otherwise all lanes can be
        full at once.
    """

    pages: int
    page_bytes: float
    lanes: int
    pages_per_lane: int
    lane_bytes: float
    tokens: int
    is_set: bool

    @property
    def bytes(self) -> float:
        """Bytes on a device. There is a lane more, for a prompt (`Programs.num_lanes`)."""
        return self.pages * self.page_bytes + (self.lanes + 1) * self.lane_bytes

    @property
    def setting(self) -> str:
        """Name of the setting that decides the size."""
        return "rollout.cache_tokens" if self.is_set else "rollout.lanes"

    def value(self, free: float) -> int:
        """Return the largest value of `setting` for which the cache is at most `free` bytes larger.

        At least 0. A cache of that size may be too small for an episode (`smallest`).
        """
        if self.is_set:
            return max(0, self.pages + math.floor(free / self.page_bytes)) * self.tokens
        lane = self.pages_per_lane * self.page_bytes + self.lane_bytes
        return max(0, self.lanes + math.floor(free / lane))

    @property
    def smallest(self) -> int:
        """Smallest valid value of `setting`."""
        return (self.pages_per_lane + 1) * self.tokens if self.is_set else 1


def cache_size(config: settings.Config, engine: Programs) -> CacheSize:
    """Return the size of an engine's KV cache."""
    cache, lanes = engine.abstract_state()[0], config.rollout.lanes
    return CacheSize(
        pages=engine.num_pages,
        page_bytes=device_bytes(cache.pages) / engine.num_pages,
        lanes=lanes,
        pages_per_lane=engine.pages_per_lane,
        lane_bytes=device_bytes(cache.hidden) / engine.num_lanes,
        tokens=config.rollout.page_size,
        is_set=config.rollout.cache_tokens > 0,
    )


@dataclasses.dataclass(frozen=True)
class Phase:
    """Memory of a device in a phase of a step.

    Attributes:
      name: Name from `PHASES`.
      bytes: Bytes at the peak.
      limit: Bytes that the device has.
      parts: Bytes by part: state by name, and the arrays of the largest program.
      complete: Whether the figures of all its programs are known.
    """

    name: str
    bytes: float
    limit: float
    parts: Mapping[str, float]
    complete: bool = True

    @property
    def fits(self) -> bool | None:
        """Whether the phase fits into the device's memory.

        None if that is not known, since programs are missing and what is there fits.
        """
        if self.bytes > self.limit:
            return False
        return True if self.complete else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Arrays of a program on a device.

    Attributes:
      name: Name of the program.
      phase: Phase that runs it.
      state: Names of the state among its arguments.
      inputs: Bytes of the other arguments; None: `argument_bytes` less the state.
      argument_bytes, output_bytes: Bytes of arguments, and of outputs that reuse none of them.
      temporary_bytes: Bytes of temporaries.
    """

    name: str
    phase: str
    state: frozenset[str]
    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    inputs: float | None = None


def state_bytes(config: settings.Config, learner: Learner, engine: Programs) -> dict[str, float]:
    """Return the bytes of the state that a device holds between programs, by name.

    Args:
      config: Settings of the run.
      learner: Abstract learner.
      engine: Programs of an engine over an abstract policy.
    """
    cache, images = engine.abstract_state()
    state = {
        POLICY: device_bytes((learner.trained, learner.frozen)),
        OPTIMIZER: device_bytes(learner.optimizer),
        ENGINE: device_bytes(engine.abstract_params()),
        CACHE: device_bytes(cache),
        IMAGES: device_bytes(images),
    }
    if config.objective.kl_coef and config.objective.reference == "device":
        state[REFERENCE] = reference_bytes(config, learner)
    return state


def reference_bytes(config: settings.Config, learner: Learner) -> float:
    """Return the bytes of the reference policy on a device: a copy in the compute dtype."""
    itemsize = jnp.dtype(config.model.dtype).itemsize
    return float(device_elements(learner.trained) * itemsize)


def merged_bytes(learner: Learner) -> float:
    """Return the bytes on a device of the kernels that LoRA adapters are merged into."""
    merge = functools.partial(lora.merge, scale=1.0)
    merged = jax.eval_shape(merge, learner.trained, learner.frozen)
    return device_bytes(sharding.abstract_params(merged, learner.mesh))


def phase_extras(
    config: settings.Config, learner: Learner, state: Mapping[str, float], compiled: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Return the bytes that phases hold besides state and programs, by phase and name.

    Args:
      config: Settings of the run.
      learner: Abstract learner.
      state: Bytes of the state, see `state_bytes`.
      compiled: Names of the compiled programs, whose arguments and outputs are counted already.
    """
    extra: dict[str, dict[str, float]] = {"load": {}, "score": {}}
    if config.update.lora_rank:
        extra["load"][MERGED] = merged_bytes(learner)
    if "load" not in compiled:
        extra["load"][f"new {ENGINE}"] = state[ENGINE]
    if config.objective.kl_coef and config.objective.reference == "host":
        extra["score"][REFERENCE] = reference_bytes(config, learner)
    return extra


def device_bytes(tree: Any) -> float:
    """Return the bytes of a pytree's abstract arrays on one device."""
    return float(sum(_shard_size(x) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def device_elements(tree: Any) -> int:
    """Return the number of elements of a pytree's abstract arrays on one device."""
    return sum(_shard_size(x) for x in jax.tree.leaves(tree))


def absent_state(config: settings.Config) -> dict[str, frozenset[str]]:
    """Return the names of the state that is not on the devices in a phase, by phase.

    The engine is released after a rollout. `load` allocates its parameters, and the next rollout
    its caches. With `update.offload` the trainer is in host memory during a rollout, also that of a
    validation, and the caches exist only then.
    """
    engine = frozenset([ENGINE, CACHE, IMAGES])
    trainer = frozenset([POLICY, OPTIMIZER] if config.update.offload else [])
    return {"rollout": trainer, "load": engine, "score": engine, "update": engine}


def phases(
    state: Mapping[str, float],
    footprints: Iterable[Footprint],
    limit: float,
    extra: Mapping[str, Mapping[str, float]],
    absent: Mapping[str, frozenset[str]],
    missing: Container[str] = (),
) -> list[Phase]:
    """Return the memory of each phase: its state, and the other arrays of its largest program.

    Args:
      state: Bytes of the state, see `state_bytes`.
      footprints: Arrays of the programs.
      limit: Bytes that the device has.
      extra: Bytes by name that a phase holds besides state and programs.
      absent: State that is not on the device in a phase, see `absent_state`.
      missing: Phases some of whose programs are not among the footprints.
    """
    footprints, result = list(footprints), []
    for name in PHASES:
        kept = {part: x for part, x in state.items() if part not in absent[name]}
        parts = {**kept, **extra.get(name, {})}
        largest: dict[str, float] = {}
        for program in (p for p in footprints if p.phase == name):
            inputs = program.inputs
            if inputs is None:
                inputs = max(0.0, program.argument_bytes - sum(state[s] for s in program.state))
            arrays = {
                f"{program.name} arguments": inputs,
                f"{program.name} outputs": program.output_bytes,
                f"{program.name} temporaries": program.temporary_bytes,
            }
            largest = max(largest, arrays, key=lambda a: sum(a.values()))
        parts |= largest
        complete = name not in missing
        result.append(Phase(name, sum(parts.values()), limit, parts, complete))
    return result


def _shard_size(x: Any) -> int:
    """Return the number of elements of an abstract array on one device."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape)
