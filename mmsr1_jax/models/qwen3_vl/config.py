"""Configuration of dense Qwen3-VL: the contents of a `config.json` as frozen dataclasses.

The file is nested (`text_config`, `vision_config`). The rotary settings are in `rope_scaling`, as
in the released models, or in `rope_parameters`, as `transformers` 5 writes them.
"""

import dataclasses
import math
from typing import Any

from mmsr1_jax.models import config as base
from mmsr1_jax.models.config import ConfigError, TextConfig, integer
from mmsr1_jax.utils.checked_json import short_repr


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(base.VisionConfig):
    """Configuration of the vision tower.

    Attributes:
      num_position_embeddings: Number of learned positions, a square grid that is interpolated to
        the grid of an image.
      deepstack_indexes: Ascending indices of the blocks whose outputs become DeepStack features.
    """

    patch_size: int = 16
    num_position_embeddings: int = 2304
    deepstack_indexes: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        if self.position_side**2 != self.num_position_embeddings:
            raise ConfigError(
                f"vision_config: num_position_embeddings={self.num_position_embeddings} is not a "
                "square number"
            )
        indexes = list(self.deepstack_indexes)
        if indexes != sorted(set(indexes)):
            raise ConfigError(
                f"vision_config: deepstack_visual_indexes={short_repr(indexes)} must ascend"
            )
        if any(not 0 <= i < self.num_layers for i in indexes):
            raise ConfigError(
                f"vision_config: deepstack_visual_indexes={short_repr(indexes)} names a block "
                f"outside 0..{self.num_layers - 1}"
            )

    @property
    def position_side(self) -> int:
        """Side of the grid of learned positions (48 in the released models)."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def deepstack_layers(self) -> tuple[int, ...]:
        return self.deepstack_indexes


def text_config(
    *,
    head_size: int = 128,
    rope_theta: float = 5e6,
    mrope_section: tuple[int, int, int] = (24, 20, 20),
    **fields: Any,
) -> TextConfig:
    """Return the configuration of a text decoder of this family; fields as in `TextConfig`."""
    return TextConfig(
        head_size=head_size, qkv_bias=False, qk_norm=True, mrope_interleaved=True,
        rope_theta=rope_theta, mrope_section=mrope_section, **fields,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(base.ModelConfig):
    """Configuration of a dense Qwen3-VL model."""

    model_type = "qwen3_vl"

    vision: VisionConfig

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Build a config from the contents of a `config.json`."""
        text = {**_TEXT_DEFAULTS, **base.section(raw, "text_config")}
        rope = base.rope(text)
        if base.flag(text, "attention_bias"):
            raise ConfigError("text_config: attention_bias=true is not supported")
        base.check_activation(text, "silu")
        if rope.get("mrope_interleaved", True) is not True:
            raise ConfigError(
                f"field 'mrope_interleaved' must be true, not "
                f"{short_repr(rope['mrope_interleaved'])}"
            )
        return cls(
            text=text_config(
                vocab_size=integer(text, "vocab_size"),
                hidden_size=integer(text, "hidden_size"),
                intermediate_size=integer(text, "intermediate_size"),
                num_layers=integer(text, "num_hidden_layers"),
                num_heads=integer(text, "num_attention_heads"),
                num_kv_heads=integer(text, "num_key_value_heads"),
                head_size=integer(text, "head_dim"),
                rms_norm_eps=base.real(text, "rms_norm_eps"),
                rope_theta=base.rope_theta(text, rope),
                mrope_section=base.mrope_section({"mrope_section": [24, 20, 20], **rope}),
                tie_embeddings=base.flag(raw, "tie_word_embeddings")
                or base.flag(text, "tie_word_embeddings"),
            ),
            vision=_vision_from_hf(base.section(raw, "vision_config")),
            **base.token_ids(raw),
        )

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the contents of a `config.json` in the form of the released models."""
        t, v = self.text, self.vision
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": self.model_type,
            "tie_word_embeddings": t.tie_embeddings,
            "torch_dtype": dtype,
            **self.token_ids(),
            "text_config": {
                "model_type": "qwen3_vl_text",
                "attention_bias": False,
                "dtype": dtype,
                "vocab_size": t.vocab_size,
                "hidden_size": t.hidden_size,
                "intermediate_size": t.intermediate_size,
                "num_hidden_layers": t.num_layers,
                "num_attention_heads": t.num_heads,
                "num_key_value_heads": t.num_kv_heads,
                "head_dim": t.head_dim,
                "hidden_act": "silu",
                "rms_norm_eps": t.rms_norm_eps,
                "rope_theta": t.rope_theta,
                "rope_scaling": {
                    "rope_type": "default",
                    "mrope_interleaved": True,
                    "mrope_section": list(t.mrope_section),
                },
                "tie_word_embeddings": t.tie_embeddings,
            },
            "vision_config": {
                "model_type": self.model_type,
                "depth": v.num_layers,
                "hidden_size": v.hidden_size,
                "intermediate_size": v.intermediate_size,
                "num_heads": v.num_heads,
                "out_hidden_size": v.out_hidden_size,
                "deepstack_visual_indexes": list(v.deepstack_indexes),
                "num_position_embeddings": v.num_position_embeddings,
                "patch_size": v.patch_size,
                "temporal_patch_size": v.temporal_patch_size,
                "spatial_merge_size": v.merge_size,
                "in_channels": v.in_channels,
                "hidden_act": "gelu_pytorch_tanh",
            },
        }


# `transformers` omits fields of a section that equal its class defaults. These are those defaults.
_TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
}
_VISION_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def _vision_from_hf(raw: dict[str, Any]) -> VisionConfig:
    raw = {**_VISION_DEFAULTS, **raw}
    try:
        base.check_activation(raw, "gelu_pytorch_tanh")
        return VisionConfig(
            num_layers=integer(raw, "depth"),
            hidden_size=integer(raw, "hidden_size"),
            intermediate_size=integer(raw, "intermediate_size"),
            num_heads=integer(raw, "num_heads"),
            out_hidden_size=integer(raw, "out_hidden_size"),
            num_position_embeddings=integer(raw, "num_position_embeddings"),
            deepstack_indexes=base.layer_indices(raw, "deepstack_visual_indexes"),
            patch_size=integer(raw, "patch_size"),
            temporal_patch_size=integer(raw, "temporal_patch_size"),
            merge_size=integer(raw, "spatial_merge_size"),
            in_channels=integer(raw, "in_channels"),
        )
    except ConfigError as error:
        raise base.with_prefix(error, "vision_config") from None
