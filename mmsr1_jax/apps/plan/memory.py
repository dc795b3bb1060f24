"""State that stays on a device during a run, and the memory of the run's phases."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.qwen2_5_vl import ModelConfig
from mmsr1_jax.models.qwen2_5_vl.checkpoint import abstract_model
from mmsr1_jax.rl.learner import Learner

POLICY, OPTIMIZER, REFERENCE = "policy", "optimizer", "reference"
ENGINE, CACHE, IMAGES = "engine policy", "KV cache", "image cache"
PHASES = ("rollout", "load", "score", "update")
_CACHE_BLOCK = 256  # tokens; a lane's capacity is rounded up to it


@dataclasses.dataclass(frozen=True)
class Phase:
    """Memory of a device in a phase of a step.

    Attributes:
      name: Name from `PHASES`.
      bytes: Bytes at the peak.
      limit: Bytes that the device has.
      parts: Bytes by part: state by name, and the arrays of the largest program.
    """

    name: str
    bytes: float
    limit: float
    parts: Mapping[str, float]

    @property
    def fits(self) -> bool:
        """Whether the phase fits into the device's memory."""
        return self.bytes <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Arrays of a program on a device.

    Attributes:
      name: Name of the program.
      phase: Phase that runs it.
      state: Names of the state among its arguments.
      argument_bytes, output_bytes: Bytes of arguments, and of outputs that reuse none of them.
      temporary_bytes: Bytes of temporaries.
    """

    name: str
    phase: str
    state: frozenset[str]
    argument_bytes: float
    output_bytes: float
    temporary_bytes: float


def state_bytes(
    config: settings.Config, model: ModelConfig, learner: Learner, mesh: Mesh
) -> dict[str, float]:
    """Return the bytes of the state that a device holds in all phases, by name.

    Args:
      config: Settings of the run.
      model: Configuration of the policy.
      learner: Abstract learner.
      mesh: Mesh of the learner.
    """
    tensor, itemsize = mesh.shape["tensor"], jnp.dtype(config.model.dtype).itemsize
    state = {
        POLICY: device_bytes((learner.trained, learner.frozen)),
        OPTIMIZER: device_bytes(learner.optimizer),
        ENGINE: engine_policy_bytes(config, model, mesh),
        CACHE: config.rollout.lanes * lane_bytes(config, model, tensor),
        IMAGES: float(config.rollout.image_cache_tokens * model.text.hidden_size * itemsize),
    }
    if config.objective.kl_coef and config.objective.reference == "device":
        state[REFERENCE] = reference_bytes(config, learner)
    return state


def reference_bytes(config: settings.Config, learner: Learner) -> float:
    """Return the bytes of the reference policy on a device: a copy in the compute dtype."""
    itemsize = jnp.dtype(config.model.dtype).itemsize
    return float(device_elements(learner.trained) * itemsize)


def engine_policy_bytes(config: settings.Config, model: ModelConfig, mesh: Mesh) -> float:
    """Return the bytes of an engine's policy on each of its `mesh.tensor` devices."""
    devices = mesh.devices.reshape(-1)[: mesh.shape["tensor"]].tolist()
    engine = sharding.make_mesh(1, 1, len(devices), devices=devices)
    params = nnx.split(abstract_model(model, param_dtype=config.model.dtype))[1]
    return device_bytes(sharding.abstract_params(params, engine))


def lane_bytes(config: settings.Config, model: ModelConfig, tensor: int) -> float:
    """Return the bytes of a lane's keys and values on a device."""
    t, blocks = model.text, math.ceil(config.turns.max_episode_tokens / _CACHE_BLOCK)
    heads = t.num_kv_heads / tensor if t.num_kv_heads % tensor == 0 else t.num_kv_heads
    itemsize = jnp.dtype(config.model.dtype).itemsize
    return blocks * _CACHE_BLOCK * 2.0 * t.num_layers * heads * t.head_dim * itemsize


def device_bytes(tree: Any) -> float:
    """Return the bytes of a pytree's abstract arrays on one device."""
    return float(sum(_shard_size(x) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def device_elements(tree: Any) -> int:
    """Return the number of elements of a pytree's abstract arrays on one device."""
    return sum(_shard_size(x) for x in jax.tree.leaves(tree))


def phases(
    state: Mapping[str, float],
    footprints: Iterable[Footprint],
    limit: float,
    extra: Mapping[str, Mapping[str, float]],
) -> list[Phase]:
    """Return the memory of each phase: all state, and the other arrays of its largest program.

    Args:
      state: Bytes of the state, see `state_bytes`.
      footprints: Arrays of the programs.
      limit: Bytes that the device has.
      extra: Bytes by name that a phase holds besides state and programs.
    """
    footprints, result = list(footprints), []
    for name in PHASES:
        parts = {**state, **extra.get(name, {})}
        largest: dict[str, float] = {}
        for program in (p for p in footprints if p.phase == name):
            arguments = program.argument_bytes - sum(state[s] for s in program.state)
            arrays = {
                f"{program.name} arguments": max(0.0, arguments),
                f"{program.name} outputs": program.output_bytes,
                f"{program.name} temporaries": program.temporary_bytes,
            }
            largest = max(largest, arrays, key=lambda a: sum(a.values()))
        parts |= largest
        result.append(Phase(name, sum(parts.values()), limit, parts))
    return result


def _shard_size(x: Any) -> int:
    """Return the number of elements of an abstract array on one device."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape)
