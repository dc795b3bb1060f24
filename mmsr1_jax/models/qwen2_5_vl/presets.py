"""Configurations of the released models."""

from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig, TextConfig, VisionConfig


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
        text=TextConfig(
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
    "3b": _preset(
        hidden=2048,
        ffn=11008,
        layers=36,
        heads=16,
        kv_heads=2,
        vocab=151936,
        vision_ffn=3420,
        tied=True,
    ),
    "7b": _preset(
        hidden=3584,
        ffn=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        vocab=152064,
        vision_ffn=3420,
    ),
    "32b": _preset(
        hidden=5120,
        ffn=27648,
        layers=64,
        heads=40,
        kv_heads=8,
        vocab=152064,
        vision_ffn=3456,
    ),
    "72b": _preset(
        hidden=8192,
        ffn=29568,
        layers=80,
        heads=64,
        kv_heads=8,
        vocab=152064,
        vision_ffn=3456,
    ),
}
