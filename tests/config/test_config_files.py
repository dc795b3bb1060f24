"""Files in `configs/`."""

import runpy

import pytest

from mmsr1_jax.config import settings
from tests.programs import ROOT


@pytest.mark.parametrize("name", ["tiny", "qwen3b", "qwen7b", "qwen7b_lora", "qwen3vl_8b"])
def test_every_variant_is_valid_and_its_episodes_fit_into_a_row(name):
    get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    variants = ["paper", "script", "sft"]
    if name == "tiny":
        variants = ["warm_start", "warm_start_facts"]
    if name == "qwen3vl_8b":
        variants = ["paper", "sft"]
    for arguments in [(), *((variant,) for variant in variants)]:
        config = settings.validate(get_config(*arguments))
        assert config.turns.max_episode_tokens <= config.update.pack_length
