"""Construction of rollout engines from a config."""

import jax
from flax import nnx
from jax.sharding import Mesh

from mmsr1_jax.config import settings
from mmsr1_jax.models import qwen2_5_vl, sharding
from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.placement import transfer
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.tools.build import make_tools
from mmsr1_jax.utils import processes

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
    meshes = _meshes(config.mesh)[:engines]
    tools = make_tools(config, num_loops=len(meshes) * processes.count())
    processor = make_processor(config, model_dir)
    model = qwen2_5_vl.load(
        model_dir,
        mesh=meshes[0],
        param_dtype=config.model.dtype,
        dtype=config.model.dtype,
        attention=config.model.attention,
    )
    processor.check_fits(model.config)
    if len(meshes) == 1:
        return Engine(model, processor, config, tools, donate=True)
    return EnginePool(replicate(model, meshes), processor, config, tools, donate=True)


def make_processor(config: settings.Config, model_dir: str) -> Processor:
    """Load the processor of a directory, with image size limits that suit a rollout engine."""
    processor = Processor.from_directory(model_dir)
    limit = config.images.max_pixels or min(processor.images.max_pixels, _MAX_PIXELS)
    processor.images = processor.images.with_limits(config.images.min_pixels, limit)
    return processor


def replicate(model: Qwen2_5_VL, meshes: list[Mesh]) -> list[Qwen2_5_VL]:
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
