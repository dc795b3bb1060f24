"""Qwen2.5-VL-7B with LoRA on one node of eight accelerators with 80 GB each: as `qwen7b.py`
(its variants too), but for what LoRA changes."""

import pathlib
import runpy

from mmsr1_jax.config import Config

_FULL = pathlib.Path(__file__).with_name("qwen7b.py")


def get_config(variant: str = "paper") -> Config:
    config = runpy.run_path(str(_FULL))["get_config"](variant)
    update = config.update
    # A reward says little about an episode: a low rank is enough for RL, while all linear maps
    # should have adapters, not those of attention alone (Schulman et al., "LoRA Without Regret",
    # 2025). 81 million parameters in all.
    update.lora_rank = 32
    update.lora_alpha = 32.0  # what adapters add counts once
    update.lora_targets = ("q", "k", "v", "out", "gate", "up", "down")  # of the text decoder
    update.learning_rate *= 10  # LoRA's best rate is about ten times that of full training (there)
    config.objective.reference = "device"  # adapters of zero, no second copy of the policy
    # The policy in bfloat16 without optimiser state or gradients: 2 GB a device in the place of 17.
    # That is room for more lanes, of 448 MiB each, and for the merged kernels, of 1.6 GB.
    config.rollout.lanes = 72
    config.rollout.decode_batch_size = 60
    return config
