"""Reading LoRA adapter files written by PEFT and other programs.

`adapter_config.json` is checked against an allow-list: a field that changes what PEFT computes is
either interpreted as PEFT interprets it or rejected by name. Tensors are matched to modules under
every naming scheme that programs use (`NAMING_SCHEMES`).
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
import regex

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils.checked_json import FormatError, load
from mmsr1_jax.utils.logs import log

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's wrapper
# Prefixes of module names in the text decoder and in the vision tower.
NAMING_SCHEMES = (
    ("model.language_model.", "model.visual."),  # in memory, transformers 4.52 and later
    ("model.", "visual."),  # older transformers, and text-only classes
    ("language_model.", "visual."),  # the policy without its output head
    ("language_model.model.", "visual."),  # vLLM
    ("", ""),  # a single tower
)
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])(?:\.default)?\.weight")
_REGEX_TIMEOUT = 5.0  # seconds; patterns are untrusted input and may take exponential time

# Fields that do not affect a merged policy, whatever their values.
_IGNORED_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
    # PEFT sets it to false for `nn.Linear` layers, which all layers here are.
    "fan_in_fan_out",
}  # fmt: skip
# Initialisations that do not modify the base weights.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

# A linear map, given by its path in the model and its layer (None if it is not stacked), and a
# table of linear maps by name.
LinearMap = tuple[tuple[str, ...], int | None]
ModuleTable = dict[str, LinearMap]

_Rank = Annotated[int, msgspec.Meta(gt=0, le=2**16)]


T = TypeVar("T")


class AdapterError(UserError):
    """Adapter that cannot be read; the message names the file and, if applicable, the tensor."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Fields of `adapter_config.json` that select the adapted modules and their scales.

    The attributes are those of PEFT's `LoraConfig`.
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
        """Return whether PEFT adds an adapter to the linear map with this in-memory name."""
        if self.exclude_modules and _names_module(self.exclude_modules, name):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return True  # all linear maps in the tables; the output head is not in them
            return _names_module(self.target_modules, name)
        if name in self.target_modules:  # PEFT applies no layer filter to a full name
            return True
        return _names_module(self.target_modules, name) and self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for pattern in patterns:
            prefix = r".*?\." if not self.layers_pattern else r"(?:^|.*?\.)"
            if match := _match(rf"{prefix}{pattern}\.(?P<idx>\d+)\.", name):
                return int(match["idx"]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def rank(self, name: str) -> int:
        """Return the rank of a module's adapter."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        """Return a module's scale s in `W + s B A`."""
        return self._scale(self.rank(name), _by_pattern(self.alpha_pattern, name, self.lora_alpha))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def default_scale(self) -> float:
        """Scale of modules that no pattern matches, or 1 if that is 0."""
        return self._scale(self.r, self.lora_alpha) or 1.0


def read_config(path: pathlib.Path) -> AdapterConfig:
    """Read the configuration of an adapter.

    Raises:
      AdapterError: The adapter is not LoRA, or not plain LoRA; the message names the field.
    """
    try:
        raw = load(path, dict[str, Any], large=True)
        peft_type = raw.get("peft_type")
        if peft_type != "LORA":
            raise AdapterError(f"{path}: peft_type={peft_type!r} with r={raw.get('r')} is not LoRA")
        config = msgspec.convert(raw, AdapterConfig)
    except (FormatError, msgspec.ValidationError) as error:
        message = str(error).removeprefix(f"{path}: ")
        raise AdapterError(f"{path}: not the configuration of a LoRA adapter ({message})") from None
    if config.init_lora_weights not in _PLAIN_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights={config.init_lora_weights!r}: only plain LoRA can be read; "
            "convert it with PEFT (save_pretrained, path_initial_model_for_weight_conversion)"
        )
    known = {field.name for field in dataclasses.fields(AdapterConfig)} | _IGNORED_FIELDS
    for field, value in raw.items():
        if field == "bias":
            supported = value in (None, "none")
        else:  # PEFT writes unused fields as null, false or empty
            supported = field in known or value is None or value is False or value in ("", [], {})
        if not supported:
            raise AdapterError(f"{path}: {field}={value!r:.80}: only plain LoRA can be read")
    if isinstance(config.target_modules, str) and (
        config.layers_to_transform is not None or config.layers_pattern is not None
    ):
        raise AdapterError(
            f"{path}: layers_to_transform and layers_pattern need a list of target_modules"
        )
    return config


def modules_by_tensor(
    names: Iterable[str], tables: Sequence[ModuleTable], path: pathlib.Path
) -> tuple[ModuleTable, dict[LinearMap, dict[str, str]]]:
    """Return the modules of each tower with tensors in the file, and the tensors by module.

    Args:
      names: Names of the file's tensors.
      tables: All modules that can have an adapter, for each of `NAMING_SCHEMES`.
      path: Path of the file, for error messages.

    Returns:
      All modules of these towers, keyed by their names in the file, and
      `{"A": name, "B": name}` of the tensors of each module in the file (one may be missing).

    Raises:
      AdapterError: A tensor belongs to no such module, two tensors have the same role in a module,
        or the names within a tower follow different schemes.
    """
    tensors: dict[str, dict[str, str]] = {}  # tensors by factor, by module
    for name in sorted(names):
        match = _FACTOR.fullmatch(name)
        module = match["module"].removeprefix(_PREFIX) if match else ""
        if match is None or not any(module in table for table in tables):
            raise AdapterError(
                f"{path}: tensor {name} belongs to no linear map that can have an adapter"
            )
        factors, factor = tensors.setdefault(module, {}), match["letter"]
        if factor in factors:
            raise AdapterError(
                f"{path}: tensors {factors[factor]} and {name} belong to the same module"
            )
        factors[factor] = name
    file_modules: ModuleTable = {}
    for tower in ("text", "vision"):  # a program may rename modules in only one tower
        modules = {m for m in tensors if any(_tower(t[m]) == tower for t in tables if m in t)}
        if not modules:
            continue
        scheme = next((table for table in tables if modules <= table.keys()), None)
        if scheme is None:
            raise AdapterError(
                f"{path}: {min(modules)} and other modules follow different naming schemes"
            )
        file_modules |= {m: linear for m, linear in scheme.items() if _tower(linear) == tower}
    return file_modules, {file_modules[module]: factors for module, factors in tensors.items()}


def ranks_and_scales(
    config: AdapterConfig,
    present: set[LinearMap],
    file_modules: ModuleTable,
    tables: Sequence[ModuleTable],
    path: pathlib.Path,
) -> dict[LinearMap, tuple[int, float]]:
    """Return the rank and scale of each adapter in the file.

    Module names in the configuration may follow another naming scheme than the tensors. A tower
    without tensors is ignored, since the program that trained the adapter may not have had it.

    Raises:
      AdapterError: The configuration selects other modules than those in the file, or one of its
        patterns is not a regular expression or takes too long to match.
    """
    try:
        names = _names_in_config(config, present, file_modules, tables, path)
        _warn_of_unused_patterns(config, names.values(), path.parent / CONFIG)
        return {linear: (config.rank(name), config.scale(name)) for linear, name in names.items()}
    except (regex.error, TimeoutError) as error:
        raise AdapterError(
            f"{path.parent / CONFIG}: a pattern cannot be used ({error or 'takes too long'})"
        ) from None


def _names_in_config(
    config: AdapterConfig,
    present: set[LinearMap],
    file_modules: ModuleTable,
    tables: Sequence[ModuleTable],
    path: pathlib.Path,
) -> dict[LinearMap, str]:
    """Return the names of the file's linear maps in the naming scheme of the configuration."""
    towers = {_tower(linear) for linear in present}
    missing, unselected = [], []
    for table in (file_modules, *tables):
        names = {linear: name for name, linear in table.items() if _tower(linear) in towers}
        selected = {linear for linear, name in names.items() if config.adapts(name)}
        if selected == present:
            return {linear: names[linear] for linear in present}
        if table is file_modules:
            missing = [names[linear] for linear in selected - present]
            unselected = [names[linear] for linear in present - selected]
    if missing:
        raise AdapterError(
            f"{path}: tensor {_PREFIX}{min(missing)}.lora_A.weight is missing, although {CONFIG} "
            "selects its module"
        )
    raise AdapterError(f"{path}: contains {min(unselected)}, which {CONFIG} does not select")


def _tower(linear: LinearMap) -> str:
    return linear[0][0]


def _warn_of_unused_patterns(
    config: AdapterConfig, names: Iterable[str], path: pathlib.Path
) -> None:
    """Warn about patterns that match no module, as PEFT does."""
    names = list(names)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or {}:
            if not any(_match(rf"(.*\.)?({pattern})$", name) for name in names):
                log.warning("%s: %s: %r matches no module", path, field, pattern)


def _names_module(modules: str | list[str], name: str) -> bool:
    if isinstance(modules, str):
        return _match(modules, name, full=True) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _by_pattern(patterns: Mapping[str, T] | None, name: str, default: T) -> T:
    for pattern, value in (patterns or {}).items():
        if _match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _match(pattern: str, name: str, *, full: bool = False) -> regex.Match[str] | None:
    function = regex.fullmatch if full else regex.match
    return function(pattern, name, timeout=_REGEX_TIMEOUT)
