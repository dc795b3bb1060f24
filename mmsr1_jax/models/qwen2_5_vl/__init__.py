"""Qwen2.5-VL (arXiv 2502.13923): what differs from the other families."""

from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig
from mmsr1_jax.models.qwen2_5_vl.presets import PRESETS, SMALL
from mmsr1_jax.models.qwen2_5_vl.tensors import vision_tensors
from mmsr1_jax.models.qwen2_5_vl.vision import VisionTower
from mmsr1_jax.models.tensors import LAYOUTS

DEFAULT_SYSTEM = "You are a helpful assistant."
RELEASED_LAYOUT = LAYOUTS[0]

__all__ = [
    "DEFAULT_SYSTEM",
    "PRESETS",
    "RELEASED_LAYOUT",
    "SMALL",
    "ModelConfig",
    "VisionTower",
    "vision_tensors",
]
