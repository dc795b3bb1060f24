"""Settings file of a run, so that the run's directory alone is enough to resume it."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from mmsr1_jax.config import bounds, redaction, settings
from mmsr1_jax.utils import checked_json, outputs


@dataclasses.dataclass(frozen=True)
class _File:
    model: Annotated[str, msgspec.Meta(min_length=1)]
    config: dict[str, Any]


def write(path: pathlib.Path, config: settings.Config, model: str) -> None:
    """Write the settings, with secrets redacted, and the policy's source directory to `path`."""
    data = redaction.redact({"model": str(model), "config": dataclasses.asdict(config)})
    outputs.write_text(path, json.dumps(data, indent=2) + "\n")


def read(path: pathlib.Path) -> tuple[settings.Config, str]:
    """Read the settings and the policy's directory from a file that `write` wrote.

    Raises:
      ConfigError: The file cannot be read, or a field in it is missing, unknown or invalid; the
        message names the file and the field.
    """
    try:
        data = checked_json.load(path, _File)
        config = bounds.made(settings.Config, data.config, "config")
        if config.services.cache is not None:  # the file does not contain its password
            config.services.cache = config.services.cache.replace(f"{redaction.REDACTED}@", "")
        return settings.validate(config), data.model
    except checked_json.FormatError as error:
        raise settings.ConfigError(str(error)) from None
    except settings.ConfigError as error:
        raise settings.ConfigError(f"{path}: {error}") from None


def override(config: settings.Config, given: settings.Config, argv: Sequence[str]) -> None:
    """Copy the fields that a command line names from `given` to `config`."""
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-") or not name.startswith("config."):
            continue
        *parts, field = name.split(".")[1:]
        target, source = config, given
        for part in parts:
            target, source = getattr(target, part), getattr(source, part)
        setattr(target, field, getattr(source, field))
