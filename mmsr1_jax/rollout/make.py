"""An engine as the settings have it."""

import jax

from mmsr1_jax import config as settings
from mmsr1_jax import sharding
from mmsr1_jax.models import qwen2_5_vl
from mmsr1_jax.processor import Processor
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.tools.make import make_tools

_MAX_PIXELS = 2 * 672 * 672


def make_engine(config: settings.Config, model_dir: str) -> Engine:
    """The policy of a directory in an engine, with the tools of the settings. It runs on one
    device, or on `mesh.tensor` of them.

    Raises:
      ValueError, OSError: something cannot be used; the message names it.
    """
    tools, tensor = make_tools(config), config.mesh.tensor
    processor = Processor.from_directory(model_dir)
    limit = config.images.max_pixels or min(processor.images.max_pixels, _MAX_PIXELS)
    processor.images = processor.images.with_limits(config.images.min_pixels, limit)
    model = qwen2_5_vl.load(
        model_dir,
        mesh=sharding.make_mesh(1, 1, tensor, devices=jax.devices()[:tensor]),
        param_dtype=config.model.dtype,
        dtype=config.model.dtype,
        attention=config.model.attention,
    )
    processor.check_fits(model.config)
    return Engine(model, processor, config, tools)
