"""The programs of a rollout engine, lowered for a mesh of abstract devices.

    load            convert the trainer's parameters for all engines, on the trainer's mesh
    encode          images of a number of windows
    extend          prompts and tool results of a length
    decode          one step
    fork            copy the last page of a prompt
    read_pages      copy pages out of the cache

Decoding and extending depend on how full the cache is: every row's lane is assumed to hold half of
`turns.max_episode_tokens`. A call of `decode` runs up to `rollout.decode_steps` steps; one is
counted.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mmsr1_jax.apps.plan import kernels, memory, needs, programs
from mmsr1_jax.apps.plan.programs import Program
from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.paged_attention import PAGE_LOOP
from mmsr1_jax.rollout.build import runs_in_lockstep
from mmsr1_jax.rollout.lockstep_programs import LockstepPrograms
from mmsr1_jax.rollout.programs import PAGES_PER_MOVE, Call, Programs
from mmsr1_jax.rollout.sampler import THRESHOLD_SEARCH

# States of the stop automaton. `turns.STOPS` give 29, and a tokenizer's end tokens a few more; a
# plan reads no tokenizer.
_STATES = 32
_RUNNING = 26  # those in which a turn goes on


def make_engine(
    config: settings.Config, model: ModelConfig, devices: Sequence[Any], tensor: int
) -> Programs:
    """Return the programs of an engine over an abstract policy.

    Args:
      config: Settings of the run.
      model: Configuration of the policy.
      devices: Devices of the target; the engine has the first of their tensor groups, or is one of
        those that run their programs together on all.
      tensor: Devices of a tensor group.
    """
    lockstep = runs_in_lockstep(config, devices, tensor)
    own = list(devices) if lockstep else list(devices)[:tensor]
    mesh = sharding.make_mesh(1, -1, tensor, devices=own)
    policy = programs.make_policy(config, model, mesh, config.model.dtype, remat="none")
    kind = LockstepPrograms if lockstep else Programs
    return kind(policy, config, states=_STATES, running=_RUNNING)


def filled_tokens(config: settings.Config) -> int:
    """Return the number of tokens that each row's lane is assumed to hold."""
    return config.turns.max_episode_tokens // 2


def engine_programs(
    config: settings.Config, model: ModelConfig, mesh: Mesh, engine: Programs
) -> list[Program]:
    """Return the programs of an engine, in the order of a step.

    Args:
      config: Settings of the run.
      model: Configuration of the policy.
      mesh: Mesh of the trainer, whose parameters are loaded.
      engine: Programs of the engine (`make_engine`).
    """
    image = needs.image_patches(config.images, model)
    visible = kernels.Visible(image_patches=image, image_keys=needs.image_keys(model, image))
    costs = kernels.engine_kernels(filled_tokens(config), visible)
    devices = _devices(engine)
    result = []
    for call in engine.calls():
        kind = call.name.partition(" ")[0]
        if kind == "load":
            result.append(_load(config, model, mesh, engine))
        elif needed := _NEEDS.get(kind):
            needed_bytes, flops, state = needed(config, model, engine, call)
            result.append(
                Program(
                    name=call.name, phase="rollout", lower=_lowering(engine, call),
                    needed_bytes=needed_bytes, flops=flops / _tensor(engine), state=state,
                    devices=devices,
                    # The compiler drops the parameters that a program does not use.
                    inputs=memory.device_bytes(_inputs(call)),
                    trips=_trips(config, call), kernels=costs,
                )
            )  # fmt: skip
    return result


def usual_programs(names: Sequence[str]) -> list[str]:
    """Return the names of the programs that a plan compiles by default.

    Of `encode`, which is slow to compile, those for the fewest and for the most windows.
    """
    encode = [name for name in names if name.startswith("encode")]
    return [name for name in names if name not in encode[1:-1]]


def _inputs(call: Call) -> list[Any]:
    """Return the arguments of a call that are neither parameters nor one of the caches."""
    state = _STATE_ARGUMENTS[call.name.partition(" ")[0]]
    return [argument for index, argument in enumerate(call.args) if index not in state]


def _lowering(engine: Programs, call: Call) -> Callable[[], jax.stages.Lowered]:
    def lower() -> jax.stages.Lowered:
        with engine.context():
            return call.program.lower(*call.args, **call.keywords)

    return lower


def _load(config: settings.Config, model: ModelConfig, mesh: Mesh, engine: Programs) -> Program:
    """Return the program that gives all engines the trainer's parameters.

    With LoRA, adapters are merged before.
    """
    policy = programs.make_policy(config, model, mesh, programs.trained_dtype(config))
    params = nnx.split(policy)[1]
    program = engine.load(mesh if mesh.size > 1 else None)
    own = memory.device_bytes(engine.abstract_params())
    return Program(
        name="load", phase="load", lower=lambda: program.lower(params),
        needed_bytes=memory.device_bytes(params) + own, flops=0.0,
        devices=list(mesh.devices.flat),
        state=frozenset([memory.POLICY]),
    )  # fmt: skip


def _decode(config: settings.Config, model: ModelConfig, engine: Programs, call: Call):
    rows, filled = config.rollout.decode_batch_size, filled_tokens(config)
    weights = needs.multiplied_weights(model)
    read = (weights["text"] + weights["head"]) * _itemsize(config) / _tensor(engine)
    read += rows * (filled + 1) * _token_bytes(config, engine)
    flops = needs.cached_flops(model, rows, 1, filled) + 2.0 * rows * weights["head"]
    return read, flops, frozenset([memory.ENGINE, memory.CACHE])


def _extend(config: settings.Config, model: ModelConfig, engine: Programs, call: Call):
    T = int(call.name.split()[1])
    rows = engine.extend_rows(T)
    filled = filled_tokens(config)
    read = needs.multiplied_weights(model)["text"] * _itemsize(config) / _tensor(engine)
    read += rows * (filled + 2 * T) * _token_bytes(config, engine)  # new tokens are written too
    flops = needs.cached_flops(model, rows, T, filled)
    return read, flops, frozenset([memory.ENGINE, memory.CACHE, memory.IMAGES])


def _encode(config: settings.Config, model: ModelConfig, engine: Programs, call: Call):
    windows = int(call.name.split()[1])
    rows, patches = engine.encode_rows(windows), windows * model.vision.window_patches
    moved = rows * patches * model.vision.patch_dim * 4.0
    tokens = rows * patches // model.vision.merge_size**2
    moved += tokens * model.vision.token_width * _itemsize(config)
    weights = needs.multiplied_weights(model)
    moved += (weights["vision"] + weights["mergers"]) * _itemsize(config) / _tensor(engine)
    image = needs.image_patches(config.images, model)
    work = needs.Work(rows=rows, length=0, patches=patches, image_patches=image, columns=0)
    flops = sum(needs.forward_flops(model, work).values())
    return moved, flops, frozenset([memory.ENGINE, memory.IMAGES])


def _fork(config: settings.Config, model: ModelConfig, engine: Programs, call: Call):
    page = _token_bytes(config, engine) * config.rollout.page_size
    hidden = model.text.hidden_size * _itemsize(config)
    return 2.0 * (page + hidden), 0.0, frozenset([memory.CACHE])


def _read_pages(config: settings.Config, model: ModelConfig, engine: Programs, call: Call):
    page = _token_bytes(config, engine) * config.rollout.page_size
    return 2.0 * PAGES_PER_MOVE * page, 0.0, frozenset([memory.CACHE])


# Bytes that a device must move, FLOPs of all devices of the engine, and state of a program.
_NEEDS: dict[str, Callable[..., tuple[float, float, frozenset[str]]]] = {
    "encode": _encode, "extend": _extend, "decode": _decode, "fork": _fork,
    "read_pages": _read_pages,
}  # fmt: skip

# Positions of parameters and caches among the arguments.
_STATE_ARGUMENTS = {
    "encode": (0, 1), "extend": (0, 1, 3), "decode": (0, 1), "fork": (0,), "read_pages": (0,),
}  # fmt: skip


def _token_bytes(config: settings.Config, engine: Programs) -> float:
    """Return the bytes of a token's keys and values on a device."""
    return memory.cache_size(config, engine).page_bytes / config.rollout.page_size


def _itemsize(config: settings.Config) -> int:
    return jnp.dtype(config.model.dtype).itemsize


def _tensor(engine: Programs) -> int:
    return len(_devices(engine)) // engine.num_engines


def _devices(engine: Programs) -> list[Any]:
    """Return the devices of an engine in the order of its mesh."""
    replicated: Any = engine.replicated
    return list(replicated.mesh.devices.flat)


def _trips(config: settings.Config, call: Call) -> dict[str, float]:
    """Return the trip counts of the loops whose length depends on data, by the end of their paths.

    `decode` runs one step and the sampler's searches. Where attention is computed by XLA, it visits
    the pages that the rows fill, in `extend` as well.
    """
    sampling = config.sampling
    searches = (sampling.top_k > 0) + (sampling.top_p < 1) if sampling.temperature else 0
    new = int(call.name.split()[1]) if call.name.startswith("extend") else 1
    pages = math.ceil((filled_tokens(config) + new) / config.rollout.page_size)
    return {
        f"{THRESHOLD_SEARCH}/while": searches, f"{PAGE_LOOP}/while": pages, "jit(decode)/while": 1,
        "jit(decode)/shard_map/while": 1,  # of engines in lockstep
    }  # fmt: skip
