"""The files of a LoRA adapter, as PEFT and other programs write them.

`adapter_config.json` is read by an allow-list: a field that changes what PEFT computes is followed
as PEFT follows it or refused by name. Tensors are known by the module that they belong to, under
each of the names that programs give it.
"""

import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import regex

from mmsr1_jax.utils.checked_json import FormatError, load

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's wrapper
# Names of the text decoder and of the vision tower, before the module's own.
STYLES = (
    ("model.language_model.", "model.visual."),  # in memory, transformers since 4.52
    ("model.", "visual."),  # before that, and text-only classes
    ("language_model.", "visual."),  # the policy without its head
    ("language_model.model.", "visual."),  # vLLM
    ("", ""),  # one of the towers alone
)
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])(?:\.default)?\.weight")
_REGEX_SECONDS = 5.0  # patterns come from outside; one may take for ever

# Fields that change nothing in a merged policy, whatever they hold.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
    # PEFT sets it to false where the layers are `nn.Linear`, as here.
    "fan_in_fan_out",
}  # fmt: skip
# Initialisations that do not modify the base weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# A linear map: its path in the model and its layer (None: not stacked); and such by name.
Place = tuple[tuple[str, ...], int | None]
Table = dict[str, Place]

_Rank = Annotated[int, msgspec.Meta(gt=0, le=2**16)]


class AdapterError(ValueError):
    """An adapter that cannot be read; the message names file and tensor."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of `adapter_config.json` that say which modules have an adapter, and its scale.

    Attributes: as in PEFT's `LoraConfig`.
    """

    r: _Rank
    lora_alpha: float
    target_modules: str | list[str]
    peft_type: str | None = None
    use_rslora: bool | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = None
    bias: str | None = None

    def adapts(self, name: str) -> bool:
        """Return whether PEFT gives the linear map of that name in memory an adapter."""
        if self.exclude_modules and _listed(self.exclude_modules, name):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return True  # of those that can have one; the head is none of them
            return _listed(self.target_modules, name)
        if name in self.target_modules:  # PEFT asks nothing else of a full name
            return True
        return _listed(self.target_modules, name) and self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for pattern in patterns:
            start = r".*?\." if not self.layers_pattern else r"(?:^|.*?\.)"
            if found := _match(rf"{start}{pattern}\.(?P<idx>\d+)\.", name):
                return int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def rank(self, name: str) -> int:
        """Return the rank of the adapter of that module."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        """Return the s of `W + s B A` for that module."""
        return self._scale(self.rank(name), _by_pattern(self.alpha_pattern, name, self.lora_alpha))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def default_scale(self) -> float:
        return self._scale(self.r, self.lora_alpha) or 1.0


def read_config(path: pathlib.Path) -> AdapterConfig:
    """Return the settings of an adapter.

    Raises:
      AdapterError: no LoRA, or a variant that is not plain LoRA; the message names the field.
    """
    try:
        raw = load(path, dict[str, Any], large=True)
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"{path}: peft_type={kind!r} with r={raw.get('r')} is not LoRA")
        config = msgspec.convert(raw, AdapterConfig)
    except (FormatError, msgspec.ValidationError) as error:
        named = str(error).removeprefix(f"{path}: ")
        raise AdapterError(f"{path}: not the settings of a LoRA adapter ({named})") from None
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise AdapterError(
            f"{path}: init_lora_weights={config.init_lora_weights!r}: only plain LoRA can be read; "
            "convert it with PEFT (save_pretrained, path_initial_model_for_weight_conversion)"
        )
    known = {field.name for field in dataclasses.fields(AdapterConfig)} | _WITHOUT_EFFECT
    for field, value in raw.items():
        if field == "bias":
            off = value in (None, "none")
        else:  # what is not in use is null, false or empty in PEFT's files
            off = field in known or value is None or value is False or value in ("", [], {})
        if not off:
            raise AdapterError(f"{path}: {field}={value!r:.80}: only plain LoRA can be read")
    if isinstance(config.target_modules, str) and (
        config.layers_to_transform is not None or config.layers_pattern is not None
    ):
        raise AdapterError(
            f"{path}: layers_to_transform and layers_pattern need a list of target_modules"
        )
    return config


def modules_by_tensor(
    names: Iterable[str], tables: Sequence[Table], path: pathlib.Path
) -> tuple[Table, dict[Place, dict[str, str]]]:
    """Return the modules of each tower that the file has tensors of, and the tensors by module.

    Args:
      names: tensors of the file.
      tables: for each of `STYLES`, all modules that can have an adapter.
      path: the file, named in errors.

    Returns:
      The modules by the names that the file uses, and `{"A": tensor, "B": tensor}` for each of
      them that it holds (one may be missing).

    Raises:
      AdapterError: a tensor that is of no such module, or two of the same one.
    """
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        factor = _FACTOR.fullmatch(name)
        module = factor["module"].removeprefix(_PREFIX) if factor else ""
        if not any(module in table for table in tables):
            raise AdapterError(
                f"{path}: tensor {name} is of no linear map that can have an adapter"
            )
        if factor["letter"] in found.setdefault(module, {}):
            other = found[module][factor["letter"]]
            raise AdapterError(f"{path}: tensors {other} and {name} are of the same module")
        found[module][factor["letter"]] = name
    names_of_file: Table = {}
    for tower in ("text", "vision"):  # a program may have renamed one and not the other
        ours = {m for m in found if any(_tower(t[m]) == tower for t in tables if m in t)}
        for table in tables if ours else ():
            if ours <= table.keys():
                names_of_file |= {m: place for m, place in table.items() if _tower(place) == tower}
                break
        else:
            if ours:
                raise AdapterError(f"{path}: {min(ours)} and others have names of two programs")
    return names_of_file, {names_of_file[module]: factors for module, factors in found.items()}


def ranks_and_scales(
    config: AdapterConfig,
    present: set[Place],
    names_of_file: Table,
    tables: Sequence[Table],
    path: pathlib.Path,
) -> dict[Place, tuple[int, float]]:
    """Return rank and scale of the adapter of each module that the file holds.

    The settings are PEFT's, whose names may be of another version than the tensors'. A tower
    without any tensor may be one that the program which trained the adapter did not have.

    Raises:
      AdapterError: the settings name other modules than the file holds, or a pattern of theirs is
        no regular expression or takes too long.
    """
    try:
        names = _names_in_settings(config, present, names_of_file, tables, path)
        _warn_of_unused_patterns(config, names.values(), path.parent / CONFIG)
        return {place: (config.rank(name), config.scale(name)) for place, name in names.items()}
    except (regex.error, TimeoutError) as error:
        raise AdapterError(
            f"{path.parent / CONFIG}: a pattern cannot be used ({error or 'takes too long'})"
        ) from None


def _names_in_settings(
    config: AdapterConfig,
    present: set[Place],
    names_of_file: Table,
    tables: Sequence[Table],
    path: pathlib.Path,
) -> dict[Place, str]:
    towers = {_tower(place) for place in present}
    missing, extra = [], []
    for table in (names_of_file, *tables):
        names = {place: name for name, place in table.items() if _tower(place) in towers}
        wanted = {place for place, name in names.items() if config.adapts(name)}
        if wanted == present:
            return {place: names[place] for place in present}
        if table is names_of_file:
            missing, extra = ([names[p] for p in x] for x in (wanted - present, present - wanted))
    if missing:
        raise AdapterError(
            f"{path}: tensor {_PREFIX}{min(missing)}.lora_A.weight is missing; {CONFIG} names this "
            "module"
        )
    raise AdapterError(f"{path}: holds {min(extra)}, which {CONFIG} does not name")


def _tower(place: Place) -> str:
    return place[0][0]


def _warn_of_unused_patterns(config: AdapterConfig, names: Iterable[str], path) -> None:
    """Say, as PEFT does, which patterns match no module."""
    names = list(names)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or {}:
            if not any(_match(rf"(.*\.)?({pattern})$", name) for name in names):
                print(f"{path}: {field}: {pattern!r} matches no module", file=sys.stderr)


def _listed(modules: str | list[str], name: str) -> bool:
    if isinstance(modules, str):
        return _match(modules, name, whole=True) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default):
    for pattern, value in (patterns or {}).items():
        if _match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _match(pattern: str, name: str, *, whole: bool = False):
    function = regex.fullmatch if whole else regex.match
    return function(pattern, name, timeout=_REGEX_SECONDS)
