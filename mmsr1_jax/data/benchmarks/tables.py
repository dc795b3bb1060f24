"""Rows of published parquet and JSON files, and access to the values in their columns."""

import base64
import glob
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from mmsr1_jax.data import cells, parquet_sizes
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.utils import checked_json

Row = dict[str, Any]  # column -> Arrow scalar, which may be large, or JSON value

_MAX_JSON = 4_000_000_000  # maximum size of a JSON file, in bytes
_ROWS = 4  # rows in memory at a time; a row of SlideVQA has twenty images


class BadFieldError(Exception):
    """Invalid field of a row."""

    def __init__(self, field: str, reason: str):
        super().__init__(reason)
        self.field = field


def find_files(path: pathlib.Path, patterns: Sequence[str]) -> list[pathlib.Path]:
    """Return the files that a path names, sorted by name.

    They are the file itself, or the matches of a path with wildcards, or, for a directory, the
    matches of the first pattern that has any.

    Raises:
      DataError: No file matches.
    """
    if path.is_dir():
        for pattern in patterns:
            if files := sorted(file for file in path.glob(pattern) if file.is_file()):
                return files
        raise DataError(f"{path}: contains none of {', '.join(patterns)}")
    if files := [path] if path.is_file() else sorted(map(pathlib.Path, glob.glob(str(path)))):
        return files
    raise DataError(f"{path}: no such file")


def open_rows(
    path: pathlib.Path,
    required: dict[str, str],
    optional: Sequence[str] = (),
    expand: Callable[[Row], Sequence[Row]] | None = None,
) -> Iterator[tuple[int, Row]]:
    """Iterate over the rows of a parquet file, or the objects of a JSON list, numbered from 0.

    Problems with the file as a whole are raised immediately, not when the first row is requested.

    Args:
      required: Required columns and their kinds: `text`, `texts`, `image`, `any`. JSON has no
        column types, so a field only has to occur in some object.
      optional: Other columns to read, as regular expressions.
      expand: Function that makes rows of an object of a JSON file, which then share its number.

    Raises:
      DataError: The file cannot be read or lacks a column. Also raised during iteration, if the
        file is damaged inside.
    """
    if path.suffix == ".json":
        return _json_rows(path, required, expand)
    try:
        with parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from None
    for column, kind in required.items():
        if column not in schema.names:
            raise DataError(f"{path}: no column {column!r}; it has {', '.join(schema.names)}")
        description, matches = _KINDS[kind]
        column_type = schema.field(column).type
        if not matches(column_type):
            raise DataError(f"{path}: column {column!r} must be {description}; it is {column_type}")
    patterns = [*map(re.escape, required), *optional]
    columns = [c for c in schema.names if any(re.fullmatch(p, c) for p in patterns)]
    try:
        parquet_sizes.check_sizes(path, metadata, columns)
    except parquet_sizes.SizeError as error:
        raise DataError(f"{path}: {error}") from None
    return _parquet_rows(path, columns)


def text(row: Row, field: str, *, required: bool = True) -> str:
    """Return text or a number, converted by `cells.to_text`; "" for null unless `required`.

    Raises:
      BadFieldError: The value has another type, or is empty although `required`.
    """
    content = _text(value(row, field), field)
    if required and not content:
        raise BadFieldError(field, "empty")
    return content


def texts(row: Row, field: str) -> tuple[str, ...]:
    """Return the texts of a list, including repeats and blank ones (from null and NaN, too).

    A single text counts as a list of one item, and null as an empty list.

    Raises:
      BadFieldError: An item is neither text nor a number.
    """
    content = value(row, field)
    items = content if isinstance(content, list) else [] if content is None else [content]
    return tuple(_text(item, field) for item in items)


def image_bytes(row: Row, field: str) -> bytes | None:
    """Return the undecoded image file in a column of bytes, {bytes} or base64; None for null.

    Base64 may be broken into lines, follow `data:image/png;base64,`, lack the `=` at its end, and
    use either alphabet (RFC 4648, sections 4 and 5).

    Raises:
      BadFieldError: Text is not base64.
    """
    content = value(row, field)
    if isinstance(content, dict):
        content = content.get("bytes")
    if isinstance(content, str):
        try:
            content = _from_base64(content)
        except ValueError:
            raise BadFieldError(field, "not base64") from None
    return content or None


def value(row: Row, field: str) -> Any:
    """Return a column's value, or None if missing. Raises BadFieldError if not UTF-8."""
    cell = row.get(field)
    if not isinstance(cell, pa.Scalar):
        return cell
    try:
        return cells.to_python(cell)
    except UnicodeDecodeError:
        raise BadFieldError(field, "not UTF-8") from None


def _text(content: Any, field: str) -> str:
    try:
        return cells.to_text(content)
    except ValueError as error:
        raise BadFieldError(field, str(error)) from None


def _from_base64(text: str) -> bytes:
    """Decode base64. Raises ValueError if the text is not base64."""
    letters = "".join(text.rpartition(",")[2].split()).rstrip("=")
    letters = letters.replace("-", "+").replace("_", "/")
    return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)


def _parquet_rows(path: pathlib.Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    index = 0
    try:
        for batch in parquet_sizes.batches(path, _ROWS, columns, large=columns):
            for i in range(batch.num_rows):
                yield index, {name: batch.column(name)[i] for name in columns}
                index += 1
    except parquet_sizes.SizeError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _json_rows(
    path: pathlib.Path,
    required: dict[str, str],
    expand: Callable[[Row], Sequence[Row]] | None,
) -> Iterator[tuple[int, Row]]:
    try:
        objects = checked_json.load(path, max_bytes=_MAX_JSON, surrogates=True, nan=True)
    except checked_json.FormatError as error:
        raise DataError(str(error)) from None
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise DataError(f"{path}: must be a list of objects")
    rows = [
        (i, row) for i, item in enumerate(objects) for row in (expand(item) if expand else [item])
    ]
    fields = dict.fromkeys(field for _, row in rows for field in row)
    for field in required:
        if field not in fields:
            raise DataError(
                f"{path}: no object has a field {field!r}; their fields are "
                f"{', '.join(fields) or 'none'}"
            )
    return iter(rows)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    letters = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return letters or number


def _is_texts(kind: pa.DataType) -> bool:
    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
    return pa.types.is_null(kind) or (isinstance(kind, lists) and _is_text(kind.value_type))


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [field.name for field in kind]
    data = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return data or pa.types.is_string(kind) or pa.types.is_large_string(kind)


_KINDS: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "text": ("text or a number", _is_text),
    "texts": ("a list of texts", _is_texts),
    "image": ("an image: {bytes, path}, bytes, or base64 text", _is_image),
    "any": ("anything", lambda _: True),
}
