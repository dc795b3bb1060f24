"""Construction of rollout engines from a config."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mmsr1_jax.config import settings
from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.lockstep import Lockstep
from mmsr1_jax.rollout.placement import transfer
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.tools.build import make_tools
from mmsr1_jax.utils import processes

# Kinds of TPU that run programs only on all chips of a slice, or on one.
_WHOLE_SLICES = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
_MAX_PIXELS = 2 * 672 * 672  # default bound on the area of an image, as in the published script


def make_engine(
    config: settings.Config, model_dir: str, *, engines: int | None = None
) -> Engine | EnginePool:
    """Load a policy from a checkpoint directory into a rollout engine with the configured tools.

    An engine runs on one device, or on `mesh.tensor` devices. If this process has several such
    groups of devices, return a pool with one engine on each.

    Args:
      config: All settings.
      model_dir: Checkpoint directory of the policy and its processor.
      engines: Maximum number of engines; None: one on each group of devices.

    Raises:
      UserError, OSError: A file or setting is unusable; the message names it.
    """
    meshes = _meshes(config.mesh)
    lockstep = runs_in_lockstep(config, jax.devices(), meshes[0].size)
    if not lockstep:
        meshes = meshes[:engines]
    tools = make_tools(config, num_loops=len(meshes) * processes.count())
    processor = make_processor(config, model_dir)
    model = checkpoint.load(
        model_dir,
        mesh=sharding.make_mesh(1, -1, meshes[0].size) if lockstep else meshes[0],
        param_dtype=config.model.dtype,
        dtype=config.model.dtype,
        attention=config.model.attention,
    )
    processor.check_fits(model.config)
    if lockstep:
        engines_together = Lockstep(model, config, donate=True)
        return EnginePool(
            [model] * len(meshes), processor, config, tools, lockstep=engines_together
        )
    if len(meshes) == 1:
        return Engine(model, processor, config, tools, donate=True)
    return EnginePool(replicate(model, meshes), processor, config, tools, donate=True)


def runs_in_lockstep(config: settings.Config, devices: Sequence[Any], tensor: int) -> bool:
    """Return whether the engines of a slice run their programs together, see `lockstep`.

    Unless `rollout.lockstep` says, they do on TPU v5e and v6e with several chips an engine: these
    refuse programs on some parts of a slice.

    Args:
      config: All settings.
      devices: Devices of the slice.
      tensor: Number of devices of an engine.
    """
    if config.rollout.lockstep != "auto":
        return config.rollout.lockstep == "always"
    return 1 < tensor < len(devices) and devices[0].device_kind in _WHOLE_SLICES


def make_processor(config: settings.Config, model_dir: str) -> Processor:
    """Load the processor of a directory, with image size limits that suit a rollout engine."""
    processor = Processor.from_directory(model_dir)
    limit = config.images.max_pixels or min(processor.images.max_pixels, _MAX_PIXELS)
    processor.images = processor.images.with_limits(config.images.min_pixels, limit)
    return processor


def replicate(model: Policy, meshes: list[Mesh]) -> list[Policy]:
    """Return the model on each mesh, transferred from device to device.

    Arrays that are already in place are shared, not copied.
    """
    graph, params = nnx.split(model)
    layouts = [sharding.param_shardings(params, mesh) for mesh in meshes]
    return [nnx.merge(graph, transfer(params, layout)) for layout in layouts]


def _meshes(mesh: settings.Mesh) -> list[Mesh]:
    """Return one mesh per engine: this process's devices in groups of `mesh.tensor`.

    Devices left over after the last whole group stay unused.
    """
    devices = jax.local_devices()
    tensor = mesh.tensor
    if tensor == -1:
        tensor = jax.device_count() // (mesh.replica * mesh.fsdp)
    if not 1 <= tensor <= len(devices):
        raise settings.ConfigError(
            f"config.mesh.tensor={mesh.tensor}: an engine needs {tensor} devices of one process, "
            f"which has {len(devices)}"
        )
    groups = [devices[first : first + tensor] for first in range(0, len(devices), tensor)]
    return [sharding.make_mesh(1, 1, tensor, devices=g) for g in groups if len(g) == tensor]
