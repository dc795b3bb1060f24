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
                **base.text_fields(raw, text),
                head_size=integer(text, "head_dim"),
                mrope_section=base.mrope_section({"mrope_section": [24, 20, 20], **rope}),
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
                **base.hf_text_fields(t),
                "head_dim": t.head_dim,
                "hidden_act": "silu",
                "rope_scaling": {
                    "rope_type": "default",
                    "mrope_interleaved": True,
                    "mrope_section": list(t.mrope_section),
                },
            },
            "vision_config": {
                "model_type": self.model_type,
                **base.hf_vision_fields(v),
                "deepstack_visual_indexes": list(v.deepstack_indexes),
                "num_position_embeddings": v.num_position_embeddings,
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
    with base.errors_of("vision_config"):
        base.check_activation(raw, "gelu_pytorch_tanh")
        return VisionConfig(
            **base.vision_fields(raw),
            num_position_embeddings=integer(raw, "num_position_embeddings"),
            deepstack_indexes=base.layer_indices(raw, "deepstack_visual_indexes"),
        )
