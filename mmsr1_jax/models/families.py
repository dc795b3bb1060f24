"""The families of policies, and the choice of one by `model_type`.

A family defines what differs from the others (`Family`); `policy` and the other modules of this
package are shared. `docs/policies.md` describes the protocol.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mmsr1_jax.models import qwen2_5_vl, qwen3_vl
from mmsr1_jax.models.config import ConfigError, ModelConfig
from mmsr1_jax.models.tensors import Layout, TensorTable, text_tensors
from mmsr1_jax.utils import checked_json
from mmsr1_jax.utils.checked_json import short_repr

_Parsed = TypeVar("_Parsed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a family of policies defines.

    Attributes:
      config: Configuration, which reads and writes `config.json`.
      tower: Vision tower, a module that is called with `ImageRows` and returns image tokens,
        float[B, M, image_D]. It has `blocks`, layers stacked along their first axis.
      vision_tensors: Function that returns the tower's part of `tensor_table`.
      layout: Prefixes of the names in the released checkpoints.
      presets: Released models by the lower-case name of their repository, without `-instruct`.
      small: Small policies by purpose: `random` for tests, `tiny_world` for the embedded task.
      default_system: System message of conversations without one; None: they have none.
    """

    config: type[ModelConfig]
    tower: Callable[..., Any]
    vision_tensors: Callable[[Any], TensorTable]
    layout: Layout
    presets: Mapping[str, ModelConfig]
    small: Mapping[str, ModelConfig]
    default_system: str | None


FAMILIES: dict[str, Family] = {
    module.ModelConfig.model_type: Family(
        config=module.ModelConfig,
        tower=module.VisionTower,
        vision_tensors=module.vision_tensors,
        layout=module.RELEASED_LAYOUT,
        presets=module.PRESETS,
        small=module.SMALL,
        default_system=module.DEFAULT_SYSTEM,
    )
    for module in (qwen2_5_vl, qwen3_vl)
}

# Released models of all families, by name.
PRESETS: dict[str, ModelConfig] = {
    name: config for family in FAMILIES.values() for name, config in family.presets.items()
}


def family_of(config: ModelConfig) -> Family:
    """Return the family of a configuration."""
    return FAMILIES[config.model_type]


def tensor_table(config: ModelConfig) -> TensorTable:
    """Return the checkpoint representation of every parameter, by its path in the module tree."""
    vision = family_of(config).vision_tensors(config.vision)
    return TensorTable({**text_tensors(config.text), **vision})


def read_config(directory: str | pathlib.Path) -> ModelConfig:
    """Read the `config.json` of a checkpoint directory.

    Raises:
      ConfigError: If the file is missing or not JSON, its `model_type` is not supported, or a field
        is missing or invalid.
    """
    return _read(directory, parse_config)


def read_family(directory: str | pathlib.Path) -> Family:
    """Return the family that the `config.json` of a checkpoint directory names.

    Raises:
      ConfigError: If the file is missing or not JSON, or its `model_type` is not supported.
    """
    return _read(directory, _family_in)


def _read(directory: str | pathlib.Path, parse: Callable[[dict[str, Any]], _Parsed]) -> _Parsed:
    path = pathlib.Path(directory) / "config.json"
    try:
        # Out-of-range numbers are accepted here: the fields in use are checked by `parse`.
        raw = checked_json.load(path, dict[str, Any], nan=True, large=True)
    except checked_json.FormatError as error:
        raise ConfigError(str(error)) from None
    try:
        return parse(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Build a config from the contents of a `config.json`.

    Raises:
      ConfigError: If its `model_type` is not supported, or a field is missing or invalid.
    """
    return _family_in(raw).config.from_hf(raw)


def _family_in(raw: dict[str, Any]) -> Family:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {short_repr(model_type)} is not supported, only "
            + " and ".join(map(repr, FAMILIES))
        )
    return FAMILIES[model_type]
