"""Qwen2.5-VL-3B on one node of eight accelerators with 80 GB each: the settings and variants of
`qwen7b.py`, except for those that depend on the model's size.
"""

import pathlib
import runpy

from mmsr1_jax.config import Config

_LARGER = pathlib.Path(__file__).with_name("qwen7b.py")


def get_config(variant: str = "paper") -> Config:
    config = runpy.run_path(str(_LARGER))["get_config"](variant)
    config.run.model = "build/qwen2.5-vl-3b"
    config.rollout.lanes = 256
    config.rollout.cache_tokens = 112 * 8192  # of 36 KiB each: 32 GiB
    config.rollout.decode_batch_size = 128
    config.objective.reference = "device"  # 7 GB of bfloat16, spread over the devices
    return config
