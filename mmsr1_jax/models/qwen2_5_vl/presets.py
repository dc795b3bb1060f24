"""Configurations of the released models."""

from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig, VisionConfig, text_config


def _preset(
    *,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    vision_ffn: int,
    tied: bool = False,
) -> ModelConfig:
    return ModelConfig(
        text=text_config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            tie_embeddings=tied,
        ),
        vision=VisionConfig(
            num_layers=32,
            hidden_size=1280,
            intermediate_size=vision_ffn,
            num_heads=16,
            out_hidden_size=hidden,
            full_attention_layers=(7, 15, 23, 31),
        ),
    )


# The released models (config.json of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct).
PRESETS: dict[str, ModelConfig] = {
    "qwen2.5-vl-3b": _preset(
        hidden=2048,
        ffn=11008,
        layers=36,
        heads=16,
        kv_heads=2,
        vocab=151936,
        vision_ffn=3420,
        tied=True,
    ),
    "qwen2.5-vl-7b": _preset(
        hidden=3584,
        ffn=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        vocab=152064,
        vision_ffn=3420,
    ),
    "qwen2.5-vl-32b": _preset(
        hidden=5120,
        ffn=27648,
        layers=64,
        heads=40,
        kv_heads=8,
        vocab=152064,
        vision_ffn=3456,
    ),
    "qwen2.5-vl-72b": _preset(
        hidden=8192,
        ffn=29568,
        layers=80,
        heads=64,
        kv_heads=8,
        vocab=152064,
        vision_ffn=3456,
    ),
}

# Small policies: of tests, with random parameters, and of the embedded task.
SMALL: dict[str, ModelConfig] = {
    "random": ModelConfig(
        text=text_config(
            vocab_size=512,  # slightly larger than the small tokenizer's, as in the released models
            hidden_size=128,
            intermediate_size=256,
            num_layers=3,
            num_heads=8,
            num_kv_heads=2,
            mrope_section=(2, 3, 3),
        ),
        vision=VisionConfig(
            num_layers=4,
            hidden_size=64,
            intermediate_size=96,
            num_heads=4,
            out_hidden_size=128,
            full_attention_layers=(1, 3),
            window_size=112,
        ),
        image_token_id=5,
        video_token_id=511,
        vision_start_token_id=3,
        vision_end_token_id=4,
    ),
    "tiny_world": ModelConfig(
        text=text_config(
            vocab_size=1152,  # slightly larger than the tokenizer's, as in the released models
            hidden_size=128,
            intermediate_size=384,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            mrope_section=(4, 6, 6),
        ),
        vision=VisionConfig(
            num_layers=3,
            hidden_size=96,
            intermediate_size=192,
            num_heads=4,
            out_hidden_size=128,
            full_attention_layers=(2,),
            window_size=112,
        ),
        image_token_id=5,
        video_token_id=1151,
        vision_start_token_id=3,
        vision_end_token_id=4,
    ),
}
