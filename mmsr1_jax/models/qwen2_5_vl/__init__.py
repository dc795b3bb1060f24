"""Qwen2.5-VL: configuration, vision tower, text decoder, positions and checkpoints."""

from mmsr1_jax.models.qwen2_5_vl.checkpoint import check_replaceable, load, save
from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig, TextConfig, VisionConfig
from mmsr1_jax.models.qwen2_5_vl.model import Qwen2_5_VL, Rows
from mmsr1_jax.models.qwen2_5_vl.positions import mrope_positions
from mmsr1_jax.models.qwen2_5_vl.presets import PRESETS
from mmsr1_jax.models.qwen2_5_vl.vision import ImageRows

__all__ = [
    "PRESETS",
    "ImageRows",
    "ModelConfig",
    "Qwen2_5_VL",
    "Rows",
    "TextConfig",
    "VisionConfig",
    "check_replaceable",
    "load",
    "mrope_positions",
    "save",
]
