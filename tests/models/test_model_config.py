"""`config.json` is read in every published form; invalid ones are rejected."""

import json
import shutil

import pytest

from mmsr1_jax.models.config import ConfigError
from mmsr1_jax.models.families import PRESETS, parse_config, read_config
from mmsr1_jax.scripts import random_policy
from tests.reference import SMALL


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is not supported"),
        ({"hidden_size": None}, "field 'hidden_size' must be a positive int"),
        ({"num_attention_heads": 0}, "field 'num_attention_heads' must be a positive int"),
        ({"rms_norm_eps": float("nan")}, "field 'rms_norm_eps' must be a positive float"),
        ({"rope_theta": float("inf")}, "field 'rope_theta' must be a positive float"),
        ({"image_token_id": "x"}, "field 'image_token_id' must be a token id"),
        ({"text_config": []}, "field 'text_config' must be an object"),
        ({"rope_scaling": "mrope"}, "field 'rope_scaling' must be an object"),
        ({"rope_scaling": {"mrope_section": [-2, 5, 5]}}, "'mrope_section' must be three sizes"),
        ({"num_attention_heads": 7}, "num_attention_heads=7 does not divide hidden_size=128"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "must sum to half"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"vision_config": None}, "field 'vision_config' must be an object"),
    ],
)
def test_invalid_configs_are_rejected(tmp_path, change, message):
    raw = random_policy.CONFIG.to_hf()
    check_rejected(tmp_path, {**raw, **change}, message)


@pytest.mark.parametrize(
    "section, change, message",
    [
        ("", {"text_config": None}, "field 'text_config' must be an object"),
        ("text_config", {"head_dim": 0}, "field 'head_dim' must be a positive int"),
        ("text_config", {"attention_bias": True}, "text_config: attention_bias=true is not"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ("text_config", {"num_attention_heads": 7}, "num_key_value_heads=2 does not divide"),
        ("text_config", {"num_hidden_layers": 1}, "names 2 layers, more than .* has .1.$"),
        ("rope", {"mrope_interleaved": False}, "'mrope_interleaved' must be true, not False"),
        ("rope", {"mrope_section": [4, 3, 4]}, "must sum to half the head dimension, 12"),
        ("rope", {"mrope_section": [1, 6, 5]}, "can have at most a third of the 12 frequencies"),
        ("rope", {"rope_type": "yarn"}, "rope type 'yarn' is not supported"),
        ("vision_config", {"hidden_act": "silu"}, "vision_config: hidden_act 'silu' is not"),
        ("vision_config", {"out_hidden_size": 64}, "out_hidden_size=64 is not the text decoder's"),
        ("vision_config", {"num_position_embeddings": 50}, "=50 is not a square number"),
        ("vision_config", {"deepstack_visual_indexes": 3}, "must be a list of integers, not 3"),
        ("vision_config", {"deepstack_visual_indexes": [2, 0]}, r"=\[2, 0\] must ascend"),
        ("vision_config", {"deepstack_visual_indexes": [1, 4]}, "names a block outside 0..3"),
    ],
)
def test_invalid_nested_configs_are_rejected(tmp_path, section, change, message):
    raw = SMALL["qwen3_vl"].to_hf()
    if section == "rope":
        raw["text_config"]["rope_scaling"] |= change
    else:
        (raw[section] if section else raw).update(change)
    check_rejected(tmp_path, raw, message)


def check_rejected(tmp_path, raw, message):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_every_published_form_is_read(tmp_path):
    """Flat, nested, and nested without the fields that `transformers` omits."""
    config = PRESETS["qwen2.5-vl-7b"]
    flat = config.to_hf()
    assert parse_config(flat) == config
    trimmed = {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl"}
    assert parse_config({**flat, "vision_config": trimmed}) == config
    pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig(**flat).save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    assert read_config(tmp_path) == config


def test_every_form_of_a_nested_config_is_read(tmp_path):
    """As released, with the fields that `transformers` omits, and as `transformers` writes it."""
    config = PRESETS["qwen3-vl-8b"]
    raw = config.to_hf()
    assert parse_config(raw) == config
    trimmed = {"out_hidden_size": 4096, "model_type": "qwen3_vl"}
    assert parse_config({**raw, "vision_config": trimmed}) == config
    pytest.importorskip("torch")
    from transformers import Qwen3VLConfig

    Qwen3VLConfig(**raw).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert read_config(tmp_path) == config


def test_missing_and_malformed_files_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="config.json: cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not JSON"):
        read_config(tmp_path)
    shutil.rmtree(tmp_path)
