"""Validation of untrusted JSON: bounded, valid and of the expected types.

Invalid input raises one error that names the field. All files and responses that another program
wrote (settings, tokenizers, caches, episodes, responses of web services) are parsed here, except a
judge's reply (see `verdicts.parse_verdict`). `json.loads` alone raises RecursionError on deep
nesting, accepts NaN, and does not check types. If a key occurs twice, the last value is used, as in
`json.loads`.
"""

import codecs
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import msgspec

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils import files

MAX_DEPTH = 64  # levels of nested lists and objects
MAX_BYTES = 100_000_000
_MAX_INT = 2**64
_SURROGATE = re.compile(r"[\ud800-\udfff]")

T = TypeVar("T")


class FormatError(UserError):
    """Invalid JSON; the message names the source and the field."""


class NotJsonError(FormatError):
    """Text that is not JSON at all, such as a truncated line."""


def loads(
    data: bytes | str,
    type: type[T] | Any = Any,
    *,
    name: str = "",
    parse_number: Callable[[str], Any] | None = None,
    surrogates: bool = False,
    nan: bool = False,
    large: bool = False,
) -> T:
    """Parse JSON and check the value against a type.

    Args:
      data: UTF-8 bytes (a byte order mark is skipped) or a string.
      type: Any type that `msgspec.convert` accepts: built-in and typing types, dataclasses,
        TypedDicts, `Annotated[int, msgspec.Meta(ge=0)]`. Fields that a TypedDict or dataclass does
        not declare are ignored. A float is not accepted for an int, even if it is integral; an int
        is accepted for a float.
      name: Source named in errors, such as a path. If empty, errors begin with the field.
      parse_number: Function that converts the source text of each number, including NaN and
        Infinity, to its value.
      surrogates: Whether strings may contain lone surrogates, which are not valid Unicode.
      nan: Whether numbers may be NaN or infinite, as Python writes them.
      large: Whether integers may have more than 64 bits. `transformers` writes such numbers, such
        as `"model_max_length": 1000000000000000019884624838656` for no limit.

    Raises:
      NotJsonError: The data is not UTF-8, or not JSON.
      FormatError: The value is nested deeper than `MAX_DEPTH`, contains NaN, an infinity, an
        integer of more than 64 bits or a lone surrogate, or has a field of the wrong type. The
        message names the source and the field.
    """
    prefix = f"{name}: " if name else ""
    hooks: dict[str, Any] = {}
    if parse_number:
        hooks = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), parse_number)
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, **hooks)
        _check_values(value, nan, math.inf if large else _MAX_INT)
        escaped = "\\ud" in text or "\\uD" in text  # much faster than a regular expression
        if not surrogates and (escaped or (isinstance(data, str) and _SURROGATE.search(text))):
            _check_texts(value, "")
        return value if type is Any else convert(value, type)
    except UnicodeDecodeError as error:
        raise NotJsonError(f"{prefix}not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise FormatError(f"{prefix}not JSON (nested too deeply)") from None
    except FormatError as error:
        raise error.__class__(f"{prefix}{error}") from None
    except ValueError as error:
        raise NotJsonError(f"{prefix}not JSON ({error})") from None


def convert(value: Any, type: type[T], *, name: str = "") -> T:
    """Convert a value returned by `loads` to a type (see `loads`).

    Raises:
      FormatError: A field has the wrong type.
    """
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        prefix = f"{name}: " if name else ""
        raise FormatError(f"{prefix}{_with_field(str(error))}") from None


def load(
    path: str | pathlib.Path,
    type: type[T] | Any = Any,
    *,
    max_bytes: int = MAX_BYTES,
    surrogates: bool = False,
    nan: bool = False,
    large: bool = False,
) -> T:
    """Parse a JSON file (see `loads`).

    Raises:
      FormatError: The content is invalid (see `loads`), or the file is missing, unreadable or
        larger than `max_bytes`.
    """
    path = pathlib.Path(path)
    try:
        data = files.read_regular(path, max_bytes=max_bytes)
    except files.FileRefusedError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    return loads(data, type, name=str(path), surrogates=surrogates, nan=nan, large=large)


def jsonl_lines(
    source: str | pathlib.Path | BinaryIO, *, max_bytes: int = MAX_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) for each non-blank line of a JSONL file.

    Only a newline ends a line. A byte order mark at the beginning is skipped.

    Args:
      source: Path, which is opened when the first line is requested, or a file opened for reading
        bytes.
      max_bytes: Maximum size of a line.

    Raises:
      FormatError: A line is longer than `max_bytes`.
      OSError: The file cannot be opened or read.
    """
    if isinstance(source, (str, pathlib.Path)):
        with open(source, "rb") as file:
            yield from jsonl_lines(file, max_bytes=max_bytes)
        return
    line_number = 0
    while line := source.readline(max_bytes + 1):
        line_number += 1
        if len(line) > max_bytes:
            raise FormatError(f"line {line_number}: longer than {max_bytes} bytes")
        if line_number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield line_number, line


def load_jsonl(
    path: str | pathlib.Path, type: type[T] | Any = Any, *, surrogates: bool = False
) -> Iterator[tuple[int, T]]:
    """Yield (line number from 1, value) for each line of a JSONL file.

    See `loads` and `jsonl_lines`.

    Raises:
      FormatError: The file cannot be read, or a line is invalid. The message names the file and, if
        a value is invalid, the line.
    """
    try:
        for line_number, line in jsonl_lines(path):
            name = f"{path}, line {line_number}"
            yield line_number, loads(line, type, name=name, surrogates=surrogates)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error_reason(error)})") from None


def valid_text(text: str) -> str:
    """Return a string with lone surrogates replaced by question marks."""
    return utf8(text).decode()


def utf8(text: str) -> bytes:
    """Encode a string as UTF-8, with lone surrogates replaced by question marks."""
    return text.encode("utf-8", "replace")


def short_repr(value: Any) -> str:
    """Format a value for an error message, in at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def error_reason(error: Exception) -> str:
    """Return the reason of an error, without the file name that an OSError adds."""
    return getattr(error, "strerror", None) or str(error)


def _with_field(message: str) -> str:
    """Rewrite a msgspec error to begin with the field: `a.b[0]: expected int, got str`."""
    problem, separator, field = message.rpartition(" - at `$")
    problem = (problem if separator else message).replace("`", "")
    problem = problem[:1].lower() + problem[1:200]  # the message may quote an invalid string
    field = field.removeprefix(".").removesuffix("`") if separator else ""
    return f"{field}: {problem}" if field else problem


def _check_values(value: Any, nan: bool, limit: float) -> None:
    """Raise FormatError for nesting deeper than MAX_DEPTH, and for numbers out of range.

    Integers must be strictly between -limit and limit.
    """
    level, depth = [[value]], 0
    while level:
        if depth > MAX_DEPTH:
            raise FormatError(f"not JSON (nested deeper than {MAX_DEPTH} levels)")
        below: list[Any] = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            types = set(map(type, items))
            if dict in types or list in types:
                below += [item for item in items if isinstance(item, (dict, list))]
            numbers = [i for i in items if isinstance(i, int)] if types != {int} else items
            valid = not numbers or (min(numbers) > -limit and max(numbers) < limit)
            if float in types and not nan:
                valid &= all(math.isfinite(i) for i in items if isinstance(i, float))
            if not valid:
                _raise_for_number(value, "", nan, limit)
        level, depth = below, depth + 1


def _raise_for_number(value: Any, field: str, nan: bool, limit: float) -> None:
    """Raise a FormatError that names the first number out of range."""
    for child, path in _children(value, field):
        _raise_for_number(child, path, nan, limit)
    prefix = f"{field}: " if field else ""
    if isinstance(value, int) and not -limit < value < limit:
        raise FormatError(f"{prefix}must not be an integer of more than 64 bits")
    if isinstance(value, float) and not nan and not math.isfinite(value):
        raise FormatError(f"{prefix}must not be {value}")


def _check_texts(value: Any, field: str) -> None:
    """Raise FormatError for a key or string with a lone surrogate."""
    for child, path in _children(value, field):
        _check_texts(child, path)
    texts = value if isinstance(value, dict) else [value] if isinstance(value, str) else ()
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        prefix = f"{field}: " if field else ""
        raise FormatError(f"{prefix}contains a lone surrogate, which is not valid Unicode")


def _children(value: Any, field: str) -> Iterator[tuple[Any, str]]:
    """Yield the values in a container with their field paths."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield child, valid_text(f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield child, f"{field}[{index}]"
