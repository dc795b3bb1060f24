"""Configuration of Qwen2.5-VL: the contents of a `config.json` as frozen dataclasses.

Both forms of the file are supported: the flat one of the released models (text fields at the top
level) and the nested one that `transformers` 5 writes (`text_config`, `rope_parameters`).
"""

import dataclasses
from typing import Any

from mmsr1_jax.models import config as base
from mmsr1_jax.models.config import ConfigError, TextConfig, integer
from mmsr1_jax.utils.checked_json import short_repr


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(base.VisionConfig):
    """Configuration of the vision tower.

    Attributes:
      full_attention_layers: Indices of the blocks that attend over the whole image; the others
        attend within a window.
      window_size: Side of a window, in pixels.
    """

    patch_size: int = 14
    full_attention_layers: tuple[int, ...]
    window_size: int = 112

    def __post_init__(self):
        super().__post_init__()
        if self.window_size % (self.patch_size * self.merge_size):
            raise ConfigError(
                f"vision_config: window_size={self.window_size} is not a multiple of patch_size x "
                f"spatial_merge_size = {self.patch_size * self.merge_size}"
            )
        if any(not 0 <= i < self.num_layers for i in self.full_attention_layers):
            blocks = short_repr(list(self.full_attention_layers))
            raise ConfigError(
                f"vision_config: fullatt_block_indexes={blocks} names a block outside "
                f"0..{self.num_layers - 1}"
            )

    @property
    def window_side(self) -> int:
        """Side of a window in merged tokens (4 in the released models)."""
        return self.window_size // (self.patch_size * self.merge_size)

    @property
    def window_patches(self) -> int:
        """Number of patches in a full window (64 in the released models)."""
        return (self.window_side * self.merge_size) ** 2

    @property
    def full_attention_share(self) -> float:
        return len(self.full_attention_layers) / self.num_layers


def text_config(
    *,
    rope_theta: float = 1e6,
    mrope_section: tuple[int, int, int] = (16, 24, 24),
    **fields: Any,
) -> TextConfig:
    """Return the configuration of a text decoder of this family; fields as in `TextConfig`."""
    return TextConfig(
        qkv_bias=True, qk_norm=False, mrope_interleaved=False, rope_theta=rope_theta,
        mrope_section=mrope_section, **fields,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(base.ModelConfig):
    """Configuration of a Qwen2.5-VL model."""

    model_type = "qwen2_5_vl"

    vision: VisionConfig

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Build a config from the contents of a `config.json`, flat or nested."""
        text = raw
        if raw.get("text_config") is not None:
            text = {**_NESTED_TEXT_DEFAULTS, **base.section(raw, "text_config")}
        if base.flag(text, "use_sliding_window"):
            raise ConfigError("use_sliding_window=true is not supported")
        base.check_activation(text, "silu")
        return cls(
            text=text_config(
                **base.text_fields(raw, text), mrope_section=base.mrope_section(base.rope(text))
            ),
            vision=_vision_from_hf(base.section(raw, "vision_config")),
            **base.token_ids(raw),
        )

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the contents of a `config.json` in the flat form of the released models."""
        t, v = self.text, self.vision
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": self.model_type,
            **base.hf_text_fields(t),
            "hidden_act": "silu",
            "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_section)},
            "use_sliding_window": False,
            "torch_dtype": dtype,
            **self.token_ids(),
            "vision_config": {
                "model_type": self.model_type,
                **base.hf_vision_fields(v),
                "fullatt_block_indexes": list(v.full_attention_layers),
                "window_size": v.window_size,
                "hidden_act": "silu",
            },
        }


# `transformers` omits the fields of a nested section that equal its class defaults, so a re-saved
# 7B has no `depth`. These are those defaults. Flat text fields are always written.
_NESTED_TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_NESTED_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}


def _vision_from_hf(raw: dict[str, Any]) -> VisionConfig:
    raw = {**_NESTED_VISION_DEFAULTS, **raw}
    with base.errors_of("vision_config"):
        base.check_activation(raw, "silu")
        return VisionConfig(
            **base.vision_fields(raw),
            full_attention_layers=base.layer_indices(raw, "fullatt_block_indexes"),
            window_size=integer(raw, "window_size"),
        )
