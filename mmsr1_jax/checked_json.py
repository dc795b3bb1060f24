"""JSON from outside: bounded, valid and of the expected types, or one error that says what is wrong.

Every file and answer that another program wrote (settings, tokenizers, stores, episodes, answers of
web services) is read here. `json.loads` alone raises RecursionError on deep nesting, accepts NaN,
and says nothing of the types inside.
"""

import json
import math
import pathlib
from typing import Any, TypeVar

import msgspec

MAX_DEPTH = 64

T = TypeVar("T")


class FormatError(ValueError):
    """JSON that cannot be used; the message names the source and the field."""


def loads(data: bytes | str, type: type[T] = Any, *, name: str = "") -> T:
    """Return the value of a JSON text, checked against a type.

    Args:
      data: UTF-8 bytes (a byte order mark is skipped) or text.
      type: what `msgspec.convert` takes: built-in and typing types, dataclasses, TypedDicts,
        `Annotated[int, msgspec.Meta(ge=0)]`. Fields of TypedDicts and dataclasses that the type
        does not name are ignored.
      name: source named in errors, such as a path; empty: errors begin with the field.

    Raises:
      FormatError: not UTF-8, not JSON, nested deeper than `MAX_DEPTH`, NaN or an infinity, or a
        field of another type; the message names the source and the field.
    """
    prefix = f"{name}: " if name else ""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, parse_constant=_refuse_constant)
        _check_values(value)
        return msgspec.convert(value, type)
    except UnicodeDecodeError as error:
        raise FormatError(f"{prefix}not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise FormatError(f"{prefix}JSON nested too deeply") from None
    except msgspec.ValidationError as error:
        raise FormatError(f"{prefix}{error}") from None
    except FormatError as error:
        raise FormatError(f"{prefix}{error}") from None
    except ValueError as error:
        raise FormatError(f"{prefix}not JSON ({error})") from None


def load(path: str | pathlib.Path, type: type[T] = Any, *, max_bytes: int = 100_000_000) -> T:
    """Return the value of a JSON file, see `loads`.

    Raises:
      FormatError: see `loads`; or the file is missing, unreadable or larger than `max_bytes`.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from None
    if len(data) > max_bytes:
        raise FormatError(f"{path}: larger than {max_bytes} bytes")
    return loads(data, type, name=str(path))


def _refuse_constant(constant: str) -> None:
    raise FormatError(f"{constant} is not a number")


def _check_values(value: Any) -> None:
    """Raise FormatError for containers deeper than MAX_DEPTH, and for numbers that overflow."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise FormatError("a number is too large")
        if not below:
            return
        level = below
    raise FormatError(f"nested deeper than {MAX_DEPTH} levels")
