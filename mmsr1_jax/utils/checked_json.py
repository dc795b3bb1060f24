"""JSON from outside: bounded, valid and of the expected types, or one error that names the field.

Files and answers that another program wrote (settings, tokenizers, stores, episodes, answers of web
services) are read here; the exception is a judge's reply, see `judge.read_verdict`. `json.loads`
alone raises RecursionError on deep nesting, accepts NaN, and does not check types. If a key occurs
twice, the last value is used, as by `json.loads`.
"""

import codecs
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import msgspec

from mmsr1_jax.utils import files

MAX_DEPTH = 64  # lists and objects inside each other
MAX_BYTES = 100_000_000
_MAX_INT = 2**64
_SURROGATE = re.compile(r"[\ud800-\udfff]")

T = TypeVar("T")


class FormatError(ValueError):
    """JSON that cannot be used; the message names the source and the field."""


class NotJsonError(FormatError):
    """Text that is not JSON at all, such as a line that was cut off."""


def loads(
    data: bytes | str,
    type: type[T] = Any,
    *,
    name: str = "",
    number: Callable[[str], Any] | None = None,
    surrogates: bool = False,
    nan: bool = False,
    large: bool = False,
) -> T:
    """Return the value of a JSON text, checked against a type.

    Args:
      data: UTF-8 bytes (a byte order mark is skipped) or text.
      type: what `msgspec.convert` takes: built-in and typing types, dataclasses, TypedDicts,
        `Annotated[int, msgspec.Meta(ge=0)]`. Fields of TypedDicts and dataclasses that the type
        does not name are ignored. A float is no int, even where it is whole; an int is a float.
      name: source named in errors, such as a path; empty: errors begin with the field.
      number: Called with each number's source text, NaN and Infinity included; its result is the
        value.
      surrogates: whether texts may hold halves of surrogate pairs, which are not valid Unicode.
      nan: whether numbers may be NaN or infinite, as Python writes them.
      large: Whether integers may have more than 64 bits, as `transformers` writes them into its
        files: `"model_max_length": 1000000000000000019884624838656`, for no limit.

    Raises:
      NotJsonError: not UTF-8, or not JSON.
      FormatError: nested deeper than `MAX_DEPTH`, NaN, an infinity, a number of more than 64 bits,
        half of a surrogate pair, or a field of another type; names the source and the field.
    """
    prefix = f"{name}: " if name else ""
    numbers = ("parse_int", "parse_float", "parse_constant")
    kept: dict[str, Any] = dict.fromkeys(numbers, number) if number else {}
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, **kept)
        _check_values(value, nan, math.inf if large else _MAX_INT)
        escaped = "\\ud" in text or "\\uD" in text  # much faster than an expression
        if not surrogates and (escaped or (isinstance(data, str) and _SURROGATE.search(text))):
            _check_texts(value, "")
        return value if type is Any else convert(value, type)
    except UnicodeDecodeError as error:
        raise NotJsonError(f"{prefix}not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise FormatError(f"{prefix}not JSON that can be read (nested too deeply)") from None
    except FormatError as error:
        raise error.__class__(f"{prefix}{error}") from None
    except ValueError as error:
        raise NotJsonError(f"{prefix}not JSON, cannot be read ({error})") from None


def convert(value: Any, type: type[T], *, name: str = "") -> T:
    """Return a value of `loads` as the type, see there.

    Raises:
      FormatError: a field of another type.
    """
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        prefix = f"{name}: " if name else ""
        raise FormatError(f"{prefix}{_with_field(str(error))}") from None


def load(
    path: str | pathlib.Path,
    type: type[T] = Any,
    *,
    max_bytes: int = MAX_BYTES,
    surrogates: bool = False,
    nan: bool = False,
    large: bool = False,
) -> T:
    """Return the value of a JSON file, see `loads`.

    Raises:
      FormatError: see `loads`; or the file is missing, unreadable or larger than `max_bytes`.
    """
    path = pathlib.Path(path)
    try:
        data = files.read_regular(path, max_bytes=max_bytes)
    except files.FileRefusedError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    return loads(data, type, name=str(path), surrogates=surrogates, nan=nan, large=large)


def lines(file: BinaryIO, *, max_bytes: int = MAX_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of the lines of a JSONL file that are not blank.

    Only a newline ends a line. A byte order mark at the beginning is skipped.

    Raises:
      FormatError: a line of more than `max_bytes`.
    """
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            raise FormatError(f"line {number}: longer than {max_bytes} bytes")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def load_lines(
    path: str | pathlib.Path, type: type[T] = Any, *, surrogates: bool = False
) -> Iterator[tuple[int, T]]:
    """Yield (line number from 1, value) of a JSONL file, see `loads` and `lines`.

    Raises:
      FormatError: the file cannot be read, or a line cannot be used; names the file and the line.
    """
    try:
        with open(path, "rb") as file:
            for number, line in lines(file):
                name = f"{path}, line {number}"
                yield number, loads(line, type, name=name, surrogates=surrogates)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({shown_error(error)})") from None


def valid_text(text: str) -> str:
    """Return a text with halves of surrogate pairs replaced by question marks."""
    return text.encode("utf-8", "replace").decode()


def shown(value: Any) -> str:
    """Return a value as errors show it, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def shown_error(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _with_field(message: str) -> str:
    """What msgspec says, beginning with the field: `a.b[0]: expected int, got str`."""
    said, where, field = message.rpartition(" - at `$")
    said = (said if where else message).replace("`", "")
    said = said[:1].lower() + said[1:200]  # may hold a text that is not one of those allowed
    field = field.removeprefix(".").removesuffix("`") if where else ""
    return f"{field}: {said}" if field else said


def _check_values(value: Any, nan: bool, limit: float) -> None:
    """Raise FormatError for containers deeper than MAX_DEPTH, and for numbers out of range.

    Integers must be between -limit and limit.
    """
    level, depth = [[value]], 0
    while level:
        if depth > MAX_DEPTH:
            raise FormatError(f"not JSON that can be read (nested deeper than {MAX_DEPTH} levels)")
        below: list[Any] = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            kinds = set(map(type, items))
            if dict in kinds or list in kinds:
                below += [item for item in items if isinstance(item, (dict, list))]
            numbers = [i for i in items if isinstance(i, int)] if kinds != {int} else items
            good = not numbers or (min(numbers) > -limit and max(numbers) < limit)
            if float in kinds and not nan:
                good &= all(math.isfinite(i) for i in items if isinstance(i, float))
            if not good:
                _name_number(value, "", nan, limit)
        level, depth = below, depth + 1


def _name_number(value: Any, field: str, nan: bool, limit: float) -> None:
    """Raise FormatError that names the first number out of range."""
    for child, path in _children(value, field):
        _name_number(child, path, nan, limit)
    prefix = f"{field}: " if field else ""
    if isinstance(value, int) and not -limit < value < limit:
        raise FormatError(f"{prefix}must not be an integer of more than 64 bits")
    if isinstance(value, float) and not nan and not math.isfinite(value):
        raise FormatError(f"{prefix}must not be {value}")


def _check_texts(value: Any, field: str) -> None:
    """Raise FormatError for a key or text with half of a surrogate pair."""
    for child, path in _children(value, field):
        _check_texts(child, path)
    texts = value if isinstance(value, dict) else [value] if isinstance(value, str) else ()
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        prefix = f"{field}: " if field else ""
        raise FormatError(f"{prefix}half a character (a lone surrogate)")


def _children(value: Any, field: str) -> Iterator[tuple[Any, str]]:
    """The values in a container, with their paths."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield child, valid_text(f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield child, f"{field}[{index}]"
