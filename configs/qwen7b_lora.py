"""Qwen2.5-VL-7B with LoRA on one node of eight accelerators with 80 GB each: the settings and
variants of `qwen7b.py`, except for those that LoRA changes.
"""

import pathlib
import runpy

from mmsr1_jax.config import Config

_FULL = pathlib.Path(__file__).with_name("qwen7b.py")


def get_config(variant: str = "paper") -> Config:
    config = runpy.run_path(str(_FULL))["get_config"](variant)
    update = config.update
    # A reward carries little information, so a low rank is enough for RL. All linear layers should
    # have adapters, not only those of attention (Schulman et al., "LoRA Without Regret", 2025).
    # 81 million parameters in all.
    update.lora_rank = 32
    update.lora_alpha = 32.0  # lora_alpha / lora_rank = 1: adapter outputs are not scaled
    update.lora_targets = ("q", "k", "v", "out", "gate", "up", "down")  # in the text decoder
    update.learning_rate *= 10  # LoRA's best rate is about ten times that of full training (ibid.)
    config.objective.reference = "device"  # the policy with zero adapters, not a second copy
    # The policy is in bfloat16 without optimiser state or gradients: 2 GB per device instead of 17.
    # This leaves room for a larger KV cache, 56 KiB a token, and for the merged kernels, 1.6 GB.
    config.rollout.lanes = 192
    config.rollout.cache_tokens = 72 * 8192  # 31 GiB
    config.rollout.decode_batch_size = 96
    return config
