"""Configuration of a policy, as frozen dataclasses, and the reading of fields of a `config.json`.

What depends on the family (the file's form, the vision tower) is in the family's own `config`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils.checked_json import short_repr

_Number = TypeVar("_Number", int, float)

GROUP_SLOTS = 64  # patches in a group of slots, unless the tower's windows say otherwise


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
      head_size: Head dimension, H; None: D / N.
      qkv_bias: Whether the projections to queries, keys and values have a bias.
      qk_norm: Whether queries and keys are normalised by an RMSNorm over H before the rotary
        embedding (arXiv 2505.09388, section 2).
      rms_norm_eps: Epsilon of every RMSNorm.
      rope_theta: Base of the rotary frequencies.
      mrope_section: Numbers of rotary frequencies, of H/2 in total, for the temporal, height and
        width positions (Qwen2-VL, arXiv 2409.12191, section 2.1).
      mrope_interleaved: Whether the three positions alternate from frequency to frequency (arXiv
        2511.21631, section 2.1), instead of taking one contiguous section each.
      tie_embeddings: Whether the output head shares the embedding table.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int | None = None
    qkv_bias: bool
    qk_norm: bool
    rms_norm_eps: float = 1e-6
    rope_theta: float
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.head_size is None and self.hidden_size % self.num_heads:
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
        _, height, width = self.mrope_section
        if self.mrope_interleaved and 3 * max(height, width) > self.head_dim // 2:
            raise ConfigError(
                f"mrope_section={list(self.mrope_section)}: interleaved, height and width can have "
                f"at most a third of the {self.head_dim // 2} frequencies"
            )

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Configuration of a vision tower, of which families have subclasses.

    Attributes:
      num_layers: Number of blocks, L.
      hidden_size: Width of the residual stream, D.
      intermediate_size: Width of the feed-forward layers, F.
      num_heads: Number of attention heads, N.
      out_hidden_size: Width of the merged tokens, equal to the text decoder's D.
      patch_size: Side of a patch, in pixels.
      temporal_patch_size: Number of frames in a patch; a still image is repeated.
      merge_size: Number of patches along each side of the square that becomes one text token.
      in_channels: Number of colour channels.
      norm_eps: Epsilon of every norm (fixed in the published code).
      rope_theta: Base of the 2-D rotary frequencies (fixed in the published code).
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Number of values in a flattened patch, ordered (channel, frame, row, column)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_side(self) -> int | None:
        """Side of an attention window in merged tokens; None if all blocks see whole images."""
        return None

    @property
    def window_patches(self) -> int:
        """Number of patches in a group of slots, the unit in which rows of patches are sized."""
        return GROUP_SLOTS

    @property
    def full_attention_share(self) -> float:
        """Share of the blocks that attend over the whole image."""
        return 1.0

    @property
    def deepstack_layers(self) -> tuple[int, ...]:
        """Blocks whose features are added to the first decoder layers at image tokens."""
        return ()

    @property
    def token_width(self) -> int:
        """Number of values of a merged token: its embedding, and its DeepStack features."""
        return self.out_hidden_size * (1 + len(self.deepstack_layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of a policy, with the token ids of the checkpoint's `config.json`.

    A family's subclass sets `model_type`, its name in `config.json`.
    """

    model_type: ClassVar[str]

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
        deepstack = len(self.vision.deepstack_layers)
        if deepstack > self.text.num_layers:
            raise ConfigError(
                f"vision_config.deepstack_visual_indexes names {deepstack} layers, more than the "
                f"text decoder has ({self.text.num_layers})"
            )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Build a config from the contents of a `config.json`.

        Raises:
          ConfigError: If a field is missing, invalid or unsupported.
        """
        raise NotImplementedError

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the contents of a `config.json` in the form of the released models."""
        raise NotImplementedError

    def token_ids(self) -> dict[str, int]:
        """Return the token ids by their field of `config.json`."""
        return {name: getattr(self, name) for name in TOKEN_IDS}


TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

# Fields of `TextConfig` and `VisionConfig` that are integers, and their names in `config.json`.
_TEXT_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
_VISION_FIELDS = {
    "num_layers": "depth",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_heads",
    "out_hidden_size": "out_hidden_size",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
    "in_channels": "in_channels",
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


def integer(raw: dict[str, Any], field: str) -> int:
    """Return a positive integer. Raises ConfigError for anything else."""
    return _number(raw, field, int)


def real(raw: dict[str, Any], field: str) -> float:
    """Return a positive number as a float. Raises ConfigError for anything else."""
    return _number(raw, field, float)


def flag(raw: dict[str, Any], field: str) -> bool:
    """Return a boolean, False if the field is missing. Raises ConfigError for anything else."""
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"field {field!r} must be true or false, not {short_repr(value)}")
    return bool(value)


def section(raw: dict[str, Any], field: str) -> dict[str, Any]:
    """Return an object. Raises ConfigError for anything else."""
    value = raw.get(field)
    if not isinstance(value, dict):
        raise ConfigError(f"field {field!r} must be an object")
    return value


def layer_indices(raw: dict[str, Any], field: str) -> tuple[int, ...]:
    """Return a list of integers. Raises ConfigError for anything else."""
    value = raw[field]
    if not isinstance(value, list) or any(type(i) is not int for i in value):
        raise ConfigError(f"field {field!r} must be a list of integers, not {short_repr(value)}")
    return tuple(value)


def text_fields(raw: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `TextConfig` that all families have.

    Args:
      raw: Contents of a `config.json`.
      text: Its section for the text decoder, or all of it.
    """
    return {
        **{field: integer(text, name) for field, name in _TEXT_FIELDS.items()},
        "rms_norm_eps": real(text, "rms_norm_eps"),
        "rope_theta": rope_theta(text, rope(text)),
        "tie_embeddings": flag(raw, "tie_word_embeddings") or flag(text, "tie_word_embeddings"),
    }


def hf_text_fields(text: TextConfig) -> dict[str, Any]:
    """Return the fields of `text_fields` by their names in `config.json`."""
    return {
        **{name: getattr(text, field) for field, name in _TEXT_FIELDS.items()},
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_embeddings,
    }


def vision_fields(vision: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `VisionConfig` that all families have, from a `vision_config`."""
    return {field: integer(vision, name) for field, name in _VISION_FIELDS.items()}


def hf_vision_fields(vision: VisionConfig) -> dict[str, Any]:
    """Return the fields of `vision_fields` by their names in `config.json`."""
    return {name: getattr(vision, field) for field, name in _VISION_FIELDS.items()}


def token_ids(raw: dict[str, Any]) -> dict[str, int]:
    """Return the token ids of a `config.json`, for the fields of `ModelConfig` of these names."""
    ids = {}
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    for name in TOKEN_IDS:
        value = raw.get(name, defaults[name])
        if type(value) is not int or not 0 <= value < _MAX_INT:
            raise ConfigError(f"field {name!r} must be a token id, not {short_repr(value)}")
        ids[name] = value
    return ids


def rope(text: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings, `rope_parameters` or `rope_scaling`.

    Raises:
      ConfigError: If they are not an object, or of a type other than M-RoPE without scaling.
    """
    settings = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"field 'rope_scaling' must be an object, not {short_repr(settings)}")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ("mrope", "default"):
        raise ConfigError(
            f"rope type {short_repr(kind)} is not supported, only 'mrope' and 'default'"
        )
    return settings


def rope_theta(text: dict[str, Any], rope: dict[str, Any]) -> float:
    """Return the base of the rotary frequencies."""
    return real(rope if "rope_theta" in rope else text, "rope_theta")


def mrope_section(rope: dict[str, Any]) -> tuple[int, int, int]:
    """Return the numbers of frequencies of the three positions."""
    sizes = rope.get("mrope_section")
    if not isinstance(sizes, list) or list(map(type, sizes)) != [int] * 3 or min(sizes) < 0:
        raise ConfigError(f"field 'mrope_section' must be three sizes, not {short_repr(sizes)}")
    temporal, height, width = sizes
    return temporal, height, width


def check_activation(raw: dict[str, Any], expected: str) -> None:
    """Raise ConfigError if `hidden_act` names another activation than the expected one."""
    if raw.get("hidden_act", expected) != expected:
        raise ConfigError(
            f"hidden_act {short_repr(raw['hidden_act'])} is not supported, only {expected!r}"
        )


@contextlib.contextmanager
def errors_of(section: str) -> Iterator[None]:
    """Put the name of a section before the message of a ConfigError, unless it begins with it."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        if message.startswith(section):
            raise
        raise ConfigError(f"{section}: {message}") from None
