"""Configuration of Qwen2.5-VL: the contents of a `config.json` as frozen dataclasses.

Both forms of the file are supported: the flat one of the released models (text fields at the top
level) and the nested one that `transformers` 5 writes (`text_config`, `rope_parameters`).
"""

import dataclasses
import pathlib
from typing import Any, TypeVar

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils import checked_json
from mmsr1_jax.utils.checked_json import short_repr

MODEL_TYPE = "qwen2_5_vl"

_Number = TypeVar("_Number", int, float)


class ConfigError(UserError):
    """Error for an invalid `config.json`. The message names the file and the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Configuration of the text decoder.

    Attributes:
      vocab_size: Number of rows of the embedding table, V. Rows beyond the tokenizer's vocabulary
        are padding.
      hidden_size: Width of the residual stream, D.
      intermediate_size: Width of the SwiGLU, F.
      num_layers: Number of decoder layers, L.
      num_heads: Number of query heads, N.
      num_kv_heads: Number of key and value heads, K; N must be a multiple of K.
      rms_norm_eps: Epsilon of every RMSNorm.
      rope_theta: Base of the rotary frequencies.
      mrope_section: Numbers of rotary frequencies, of H/2 in total, for the temporal, height and
        width positions (Qwen2-VL, arXiv 2409.12191, section 2.1).
      tie_embeddings: Whether the output head shares the embedding table.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_heads} does not divide hidden_size="
                f"{self.hidden_size}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_key_value_heads={self.num_kv_heads} does not divide num_attention_heads="
                f"{self.num_heads}"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ConfigError(
                f"mrope_section={list(self.mrope_section)} must sum to half the head dimension, "
                f"{self.head_dim // 2}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Configuration of the vision tower.

    Attributes:
      num_layers: Number of blocks, L.
      hidden_size: Width of the residual stream, D.
      intermediate_size: Width of the SwiGLU, F.
      num_heads: Number of attention heads, N.
      out_hidden_size: Width of the merged tokens, equal to the text decoder's D.
      full_attention_layers: Indices of the blocks that attend over the whole image; the others
        attend within a window.
      window_size: Side of a window, in pixels.
      patch_size: Side of a patch, in pixels.
      temporal_patch_size: Number of frames in a patch; a still image is repeated.
      merge_size: Number of patches along each side of the square that becomes one text token.
      in_channels: Number of colour channels.
      norm_eps: Epsilon of every RMSNorm (fixed in the published code).
      rope_theta: Base of the 2-D rotary frequencies (fixed in the published code).
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    full_attention_layers: tuple[int, ...]
    window_size: int = 112
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    in_channels: int = 3
    norm_eps: float = 1e-6
    rope_theta: float = 1e4

    def __post_init__(self):
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ConfigError(
                f"vision_config: hidden_size={self.hidden_size} over num_heads={self.num_heads} "
                "must give a head dimension that is a multiple of 4"
            )
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
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Number of values in a flattened patch, ordered (channel, frame, row, column)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_side(self) -> int:
        """Side of a window in merged tokens (4 in the released models)."""
        return self.window_size // (self.patch_size * self.merge_size)

    @property
    def window_patches(self) -> int:
        """Number of patches in a full window (64 in the released models)."""
        return (self.window_side * self.merge_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of a Qwen2.5-VL model, with the token ids of the checkpoint's `config.json`."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self):
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"vision_config.out_hidden_size={self.vision.out_hidden_size} is not the text "
                f"decoder's hidden_size={self.text.hidden_size}"
            )

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "ModelConfig":
        """Read the `config.json` of a checkpoint directory.

        Raises:
          ConfigError: If the file is missing or not JSON, has another `model_type`, or a field is
            missing or invalid.
        """
        path = pathlib.Path(directory) / "config.json"
        try:
            # Out-of-range numbers are accepted here: the fields in use are checked below.
            raw = checked_json.load(path, dict[str, Any], nan=True, large=True)
        except checked_json.FormatError as error:
            raise ConfigError(str(error)) from None
        try:
            return cls.from_hf(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Build a config from the contents of a `config.json`, flat or nested.

        Raises:
          ConfigError: If a field is missing, invalid or unsupported.
        """
        if not isinstance(raw, dict):
            raise ConfigError("must contain a JSON object")
        if raw.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                f"model_type {short_repr(raw.get('model_type'))} is not supported, only "
                f"{MODEL_TYPE!r}"
            )
        text = raw
        if raw.get("text_config") is not None:
            if not isinstance(raw["text_config"], dict):
                raise ConfigError("field 'text_config' must be an object")
            text = {**_NESTED_TEXT_DEFAULTS, **raw["text_config"]}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ConfigError(f"field 'rope_scaling' must be an object, not {short_repr(rope)}")
        _check_supported(text, rope)
        token_ids = {
            field.name: _token_id(raw, field.name, field.default)
            for field in dataclasses.fields(cls)
            if field.name.endswith("_token_id") and isinstance(field.default, int)
        }
        return cls(
            text=TextConfig(
                vocab_size=_integer(text, "vocab_size"),
                hidden_size=_integer(text, "hidden_size"),
                intermediate_size=_integer(text, "intermediate_size"),
                num_layers=_integer(text, "num_hidden_layers"),
                num_heads=_integer(text, "num_attention_heads"),
                num_kv_heads=_integer(text, "num_key_value_heads"),
                rms_norm_eps=_number(text, "rms_norm_eps", float),
                rope_theta=_number(rope if "rope_theta" in rope else text, "rope_theta", float),
                mrope_section=_mrope_section(rope),
                tie_embeddings=_flag(raw, "tie_word_embeddings")
                or _flag(text, "tie_word_embeddings"),
            ),
            vision=_vision_from_hf(raw.get("vision_config")),
            **token_ids,
        )

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the contents of a `config.json` in the flat form of the released models."""
        t, v = self.text, self.vision
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": MODEL_TYPE,
            "vocab_size": t.vocab_size,
            "hidden_size": t.hidden_size,
            "intermediate_size": t.intermediate_size,
            "num_hidden_layers": t.num_layers,
            "num_attention_heads": t.num_heads,
            "num_key_value_heads": t.num_kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": t.rms_norm_eps,
            "rope_theta": t.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_section)},
            "tie_word_embeddings": t.tie_embeddings,
            "use_sliding_window": False,
            "torch_dtype": dtype,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "vision_config": {
                "model_type": MODEL_TYPE,
                "depth": v.num_layers,
                "hidden_size": v.hidden_size,
                "intermediate_size": v.intermediate_size,
                "num_heads": v.num_heads,
                "out_hidden_size": v.out_hidden_size,
                "fullatt_block_indexes": list(v.full_attention_layers),
                "window_size": v.window_size,
                "patch_size": v.patch_size,
                "temporal_patch_size": v.temporal_patch_size,
                "spatial_merge_size": v.merge_size,
                "in_channels": v.in_channels,
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


# Upper bounds, each at least four times the value in any released model.
_MAX_VALUES = {
    "num_hidden_layers": 1024,
    "depth": 1024,
    "patch_size": 256,
    "temporal_patch_size": 16,
    "spatial_merge_size": 16,
    "in_channels": 16,
    "rms_norm_eps": 1.0,
}
_MAX_INT = 2**22
_MAX_FLOAT = 1e15


def _number(raw: dict[str, Any], field: str, kind: type[_Number]) -> _Number:
    """Return a positive number of type `kind`. Integral floats are accepted as integers."""
    value: Any = raw.get(field)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    max_value = _MAX_VALUES.get(field, _MAX_INT if kind is int else _MAX_FLOAT)
    if not is_number or not 0 < value <= max_value or kind(value) != value:
        raise ConfigError(
            f"field {field!r} must be a positive {kind.__name__} of at most {max_value:g}, not "
            f"{short_repr(value)}"
        )
    return kind(value)


def _integer(raw: dict[str, Any], field: str) -> int:
    return _number(raw, field, int)


def _flag(raw: dict[str, Any], field: str) -> bool:
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"field {field!r} must be true or false, not {short_repr(value)}")
    return bool(value)


def _token_id(raw: dict[str, Any], field: str, default: int) -> int:
    value = raw.get(field, default)
    if type(value) is not int or not 0 <= value < _MAX_INT:
        raise ConfigError(f"field {field!r} must be a token id, not {short_repr(value)}")
    return value


def _check_supported(text: dict[str, Any], rope: dict[str, Any]) -> None:
    """Raise ConfigError if the text decoder uses a variant that is not implemented."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("mrope", "default"):
        raise ConfigError(
            f"rope type {short_repr(kind)} is not supported, only 'mrope' and 'default'"
        )
    if _flag(text, "use_sliding_window"):
        raise ConfigError("use_sliding_window=true is not supported")
    if text.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"hidden_act {short_repr(text['hidden_act'])} is not supported, only 'silu'"
        )


def _mrope_section(rope: dict[str, Any]) -> tuple[int, int, int]:
    section = rope.get("mrope_section")
    if not isinstance(section, list) or list(map(type, section)) != [int] * 3 or min(section) < 0:
        raise ConfigError(f"field 'mrope_section' must be three sizes, not {short_repr(section)}")
    temporal, height, width = section
    return temporal, height, width


def _vision_from_hf(raw: Any) -> VisionConfig:
    if not isinstance(raw, dict):
        raise ConfigError("field 'vision_config' must be an object")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"vision_config: hidden_act {short_repr(raw['hidden_act'])} is not supported"
        )
    raw = {**_NESTED_VISION_DEFAULTS, **raw}
    full_attention = raw["fullatt_block_indexes"]
    if not isinstance(full_attention, list) or any(type(i) is not int for i in full_attention):
        raise ConfigError(
            "vision_config: field 'fullatt_block_indexes' must be a list of integers, not "
            f"{short_repr(full_attention)}"
        )
    try:
        return VisionConfig(
            num_layers=_integer(raw, "depth"),
            hidden_size=_integer(raw, "hidden_size"),
            intermediate_size=_integer(raw, "intermediate_size"),
            num_heads=_integer(raw, "num_heads"),
            out_hidden_size=_integer(raw, "out_hidden_size"),
            full_attention_layers=tuple(full_attention),
            window_size=_integer(raw, "window_size"),
            patch_size=_integer(raw, "patch_size"),
            temporal_patch_size=_integer(raw, "temporal_patch_size"),
            merge_size=_integer(raw, "spatial_merge_size"),
            in_channels=_integer(raw, "in_channels"),
        )
    except ConfigError as error:
        message = str(error)
        prefix = "" if message.startswith("vision_config") else "vision_config: "
        raise ConfigError(prefix + message) from None
