"""Qwen3-VL (arXiv 2511.21631), dense: what differs from the other families."""

from mmsr1_jax.models.qwen3_vl.config import ModelConfig
from mmsr1_jax.models.qwen3_vl.presets import PRESETS, SMALL
from mmsr1_jax.models.qwen3_vl.tensors import vision_tensors
from mmsr1_jax.models.qwen3_vl.vision import VisionTower
from mmsr1_jax.models.tensors import LAYOUTS

DEFAULT_SYSTEM = None
RELEASED_LAYOUT = LAYOUTS[1]

__all__ = [
    "DEFAULT_SYSTEM",
    "PRESETS",
    "RELEASED_LAYOUT",
    "SMALL",
    "ModelConfig",
    "VisionTower",
    "vision_tensors",
]
