"""Configurations of the released models."""

from mmsr1_jax.models.qwen3_vl.config import ModelConfig, VisionConfig, text_config


def _preset(
    *, hidden: int, ffn: int, layers: int, heads: int, vision: dict, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        text=text_config(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=8,
            tie_embeddings=tied,
        ),
        vision=VisionConfig(num_heads=16, out_hidden_size=hidden, **vision),
    )


_SMALL_TOWER = {
    "num_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_indexes": (5, 11, 17),
}
_LARGE_TOWER = {
    "num_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_indexes": (8, 16, 24),
}

# The released models Qwen/Qwen3-VL-{2B,4B,8B,32B}-Instruct and `-Thinking`, as configurations of
# other public implementations have them.
PRESETS: dict[str, ModelConfig] = {
    "qwen3-vl-2b": _preset(
        hidden=2048, ffn=6144, layers=28, heads=16, vision=_SMALL_TOWER, tied=True
    ),
    "qwen3-vl-4b": _preset(
        hidden=2560, ffn=9728, layers=36, heads=32, vision=_SMALL_TOWER, tied=True
    ),
    "qwen3-vl-8b": _preset(hidden=4096, ffn=12288, layers=36, heads=32, vision=_LARGE_TOWER),
    "qwen3-vl-32b": _preset(hidden=5120, ffn=25600, layers=64, heads=64, vision=_LARGE_TOWER),
}

# Small policies: of tests, with random parameters.
SMALL: dict[str, ModelConfig] = {
    "random": ModelConfig(
        text=text_config(
            vocab_size=512,  # slightly larger than the small tokenizer's, as in the released models
            hidden_size=128,
            intermediate_size=256,
            num_layers=4,
            num_heads=8,
            num_kv_heads=2,
            head_size=24,  # not D / N, as in the 4B and 32B
            mrope_section=(4, 4, 4),
        ),
        vision=VisionConfig(
            num_layers=4,
            hidden_size=64,
            intermediate_size=96,
            num_heads=4,
            out_hidden_size=128,
            num_position_embeddings=49,
            deepstack_indexes=(0, 2),
        ),
        image_token_id=5,
        video_token_id=511,
        vision_start_token_id=3,
        vision_end_token_id=4,
    ),
}
