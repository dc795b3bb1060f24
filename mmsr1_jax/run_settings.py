"""The settings of a run as a file, so that its directory alone is enough to go on with it."""

import dataclasses
import json
import os
import pathlib
import typing
from collections.abc import Sequence

from mmsr1_jax import config as settings
from mmsr1_jax import redaction


def write(path: pathlib.Path, config: settings.Config, model: str) -> None:
    """`path` holds the settings and the directory that the policy came from."""
    partial = path.with_name(f".{path.name}.partial")
    data = redaction.redact({"model": str(model), "config": dataclasses.asdict(config)})
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: pathlib.Path) -> tuple[settings.Config, str]:
    """What `write` wrote.

    Raises:
      ConfigError: the file is none of ours, or has settings that there are no more.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        config = _made(settings.Config, data["config"])
        return settings.validate(config), data["model"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise settings.ConfigError(f"{path}: {error}") from None


def override(config: settings.Config, given: settings.Config, argv: Sequence[str]) -> None:
    """Puts into `config` what `given` has in the fields that a command line names."""
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-") or not name.startswith("config."):
            continue
        *parts, field = name.split(".")[1:]
        target, source = config, given
        for part in parts:
            target, source = getattr(target, part), getattr(source, part)
        setattr(target, field, getattr(source, field))


def _made(kind: type, data: dict):
    """A dataclass from plain data; lists become tuples."""
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in data.items():
        if dataclasses.is_dataclass(hints.get(name)):
            value = _made(hints[name], value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
