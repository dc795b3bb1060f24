"""Loading of an HF directory's image processor settings, as `transformers` reads them.

Every field either has the same effect as in Qwen2-VL's image processor (its PIL backend) or is
rejected with an error that names it.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

import msgspec

from mmsr1_jax.utils.checked_json import FormatError, load
from mmsr1_jax.utils.logs import log

NESTED, FLAT = "processor_config.json", "preprocessor_config.json"
MAX_MIN_PIXELS = 100_000_000  # a larger lower bound could exhaust memory on any image

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTERS = range(6)  # values of PIL.Image.Resampling
_TYPES = {
    f"Qwen{version}VLImageProcessor{backend}"
    for version in ("2", "2_5_")
    for backend in ("", "Fast", "Pil")
}
# Fields without effect on a single image: class names, and arguments that Qwen2-VL's image
# processor accepts but does not use.
_WITHOUT_EFFECT = {
    "processor_class", "_processor_class", "default_to_square", "crop_size", "do_pad", "pad_size",
    "data_format", "input_data_format", "return_tensors", "device", "disable_grouping",
    "image_seq_length",
}  # fmt: skip

# In these fields, `transformers` does not replace null by the default: null counts as false, or
# raises an error later.
_NOT_NULL = (
    "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "patch_size", "temporal_patch_size", "merge_size",
)  # fmt: skip

_Size = Annotated[int, msgspec.Meta(gt=0)]
_PerChannel = float | Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)]


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Fields with an effect; None means the default of the class."""

    image_processor_type: str | None = None
    auto_map: dict[str, Any] | None = None
    do_resize: bool | None = None
    size: dict[str, _Size | None] | None = None
    min_pixels: _Size | None = None
    max_pixels: _Size | None = None
    resample: int | None = None
    do_rescale: bool | None = None
    rescale_factor: float | None = None
    do_normalize: bool | None = None
    image_mean: _PerChannel | None = None
    image_std: _PerChannel | None = None
    # Ignored: images are already RGB here. In `transformers`, an image with other channels is an
    # error if this is false.
    do_convert_rgb: bool | None = None
    do_center_crop: bool | None = None
    patch_size: _Size | None = None
    temporal_patch_size: _Size | None = None
    merge_size: _Size | None = None


def read(directory: str | pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Return the settings file in use and the `ImageProcessor` arguments that it defines.

    Like `transformers`, this reads the section `image_processor` of `processor_config.json` if it
    exists, else `preprocessor_config.json`. If both exist, a warning names the one in use.

    Raises:
      FormatError: If neither exists, or the settings cannot be used. The message names file and
        field.
    """
    nested, flat = (pathlib.Path(directory) / name for name in (NESTED, FLAT))
    section = None
    if nested.is_file():
        content = load(nested, dict[str, Any], large=True)
        section = _check_object(content.get("image_processor"), f"{nested}: image_processor")
    if section is None and not flat.is_file():
        raise FormatError(
            f"{directory}: contains neither {FLAT} nor a {NESTED} with a section image_processor"
        )
    if section is None:
        return flat, _arguments(load(flat, dict[str, Any], large=True), str(flat))
    if flat.is_file():
        log.warning(
            "%s: using image_processor of %s and ignoring %s, as transformers does",
            directory, NESTED, FLAT,
        )  # fmt: skip
    return nested, _arguments(section, f"{nested}: image_processor")


def _check_object(value: Any, name: str) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise FormatError(f"{name}: must be an object, not {value!r:.50}")
    return value


def _arguments(raw: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        fields = msgspec.convert(raw, _Fields)
    except msgspec.ValidationError as error:
        raise FormatError(f"{name}: {error}") from None
    known = {field.name for field in dataclasses.fields(_Fields)} | _WITHOUT_EFFECT
    if unknown := sorted(raw.keys() - known):
        log.warning(
            "%s: ignoring %s, which Qwen2-VL's image processor does not know",
            name, ", ".join(unknown),
        )  # fmt: skip
    try:
        _check_supported(fields, raw)
        low, high = _limits(fields)
        mean, std = _normalisation(fields)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    scale = 1 / 255 if fields.rescale_factor is None else fields.rescale_factor
    arguments = {
        "min_pixels": low,
        "max_pixels": high,
        "patch_size": fields.patch_size,
        "temporal_patch_size": fields.temporal_patch_size,
        "merge_size": fields.merge_size,
        "resample": fields.resample,
        "rescale_factor": 1.0 if fields.do_rescale is False else scale,
        "mean": mean,
        "std": std,
    }
    return {field: value for field, value in arguments.items() if value is not None}


def _check_supported(fields: _Fields, raw: dict[str, Any]) -> None:
    for field in _NOT_NULL:
        if field in raw and raw[field] is None:
            raise FormatError(f"{field}=null: give a value, or remove the field for its default")
    if fields.image_processor_type not in (None, *_TYPES):
        raise FormatError(
            f"image_processor_type={fields.image_processor_type!r} is not Qwen2-VL's image "
            "processor"
        )
    if fields.auto_map and "AutoImageProcessor" in fields.auto_map:
        raise FormatError(
            "auto_map: the checkpoint defines its own image processor; its code is never executed"
        )
    if fields.do_resize is False:
        raise FormatError(
            "do_resize=false: images must be resized to multiples of a merged token's side"
        )
    if fields.resample is not None and fields.resample not in _FILTERS:
        raise FormatError(f"resample={fields.resample} must be one of Pillow's filters, 0 to 5")
    if fields.do_center_crop and raw.get("crop_size") is None:
        raise FormatError("do_center_crop=true requires crop_size")


def _limits(fields: _Fields) -> tuple[int, int]:
    """Return (min_pixels, max_pixels). These fields override `size`, which overrides defaults."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    size = size if fields.size is None else dict(fields.size)
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if (value := getattr(fields, name)) is not None:
            size.pop(name, None)
            size[edge] = value
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    if low is None or high is None or len(size) > 2:
        raise FormatError(
            f"size={fields.size}: must have shortest_edge and longest_edge (pixels of area), and "
            "nothing else"
        )
    if low > high:
        raise FormatError(f"min_pixels={low} is more than max_pixels={high}")
    if low > MAX_MIN_PIXELS:
        raise FormatError(f"min_pixels={low} is more than {MAX_MIN_PIXELS}")
    return low, high


def _normalisation(fields: _Fields) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if fields.do_normalize is False:
        return (0.0,) * 3, (1.0,) * 3
    mean = _CLIP_MEAN if fields.image_mean is None else fields.image_mean
    std = _CLIP_STD if fields.image_std is None else fields.image_std
    mean, std = ((x,) * 3 if isinstance(x, float) else tuple(x) for x in (mean, std))
    if min(map(abs, std)) == 0:
        raise FormatError(f"image_std={list(std)} must not contain zero")
    return mean, std
