"""Bounds on the memory that a parquet file takes, checked before it is read.

A few kilobytes may expand to a cell of gigabytes (compression), a million copies of one long value
(dictionary encoding), or millions of empty rows.
"""

import os
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
from pyarrow import parquet

from mmsr1_jax.config.errors import UserError

MAX_TEXT = 1_000_000  # total bytes of text in a cell
MAX_ITEMS = 1000  # items of a list in a cell
_MIN_BYTES = 64 << 20  # memory always allowed for a column of a row group
_MAX_RATIO = 100  # further bytes of memory allowed per byte in the file
_MIN_ROWS = 1_000_000  # rows of a file, or values of a column chunk, always allowed
_VALUES_PER_ROW = 64  # further values of a column allowed per row

# Read in chunks. Without a buffer size, a whole row group is read at once.
_STREAMED: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20}

pc: Any = pyarrow.compute  # it defines its functions when it is imported


class SizeError(UserError):
    """File that would take far more memory than its size; names row group and column, if any."""


def check_sizes(
    path: pathlib.Path, metadata: parquet.FileMetaData, columns: Collection[str]
) -> None:
    """Raise SizeError if reading `columns` by row groups would take disproportionate memory.

    Args:
      path: Path of the file.
      metadata: Metadata of the file.
      columns: Names of top-level columns.
    """
    size = os.stat(path).st_size
    if metadata.num_rows > _MIN_ROWS + size:
        raise SizeError(f"claims {metadata.num_rows} rows in {size} bytes")
    in_file = 0
    for group_index in range(metadata.num_row_groups):
        group = metadata.row_group(group_index)
        for column in _columns(group):
            if column.path_in_schema.partition(".")[0] not in columns:
                continue
            where = f"row group {group_index}, column {column.path_in_schema!r}"
            in_file += column.total_compressed_size
            if in_file > size:
                raise SizeError(f"{where}: claims more bytes than the file has")
            if column.num_values > _MIN_ROWS + _VALUES_PER_ROW * group.num_rows:
                rows, values = group.num_rows, column.num_values
                raise SizeError(f"{where}: claims {values} values in {rows} rows")
            _check_ratio(column.total_uncompressed_size, column, where)


def batches(
    path: pathlib.Path,
    rows: int,
    columns: Sequence[str],
    groups: Sequence[int] | None = None,
    large: Collection[str] = ("images",),
) -> Iterator[pa.RecordBatch]:
    """Yield batches of at most `rows` rows.

    Args:
      path: Path of a file that passed `check_sizes`.
      rows: Maximum number of rows in a batch.
      columns: Names of the top-level columns to read.
      groups: Indices of the row groups to read; None means all.
      large: Columns whose values are images. Text is read as dictionaries, so that a repeated value
        takes memory once. With images, a dictionary would hold those of a whole row group.

    Raises:
      SizeError: Dictionary-encoded images would take disproportionate memory when expanded.
      OSError, pyarrow.ArrowException: The file cannot be read.
    """
    with parquet.ParquetFile(path, **_STREAMED) as file:
        metadata = file.metadata
    schema = [metadata.schema.column(i) for i in range(len(metadata.schema))]
    leaves = [leaf for leaf in schema if leaf.physical_type == "BYTE_ARRAY"]
    texts, images = [], []
    for leaf in leaves:
        name = leaf.path.partition(".")[0]
        if name in columns:
            (images if name in large else texts).append(leaf)
    for group in range(metadata.num_row_groups) if groups is None else groups:
        for leaf in images:
            _check_dictionary(path, metadata, group, leaf, rows)
        # Reopened for each row group, because Arrow does not merge their dictionaries.
        dictionaries = [leaf.path for leaf in texts]
        with parquet.ParquetFile(path, **_STREAMED, read_dictionary=dictionaries) as file:
            yield from file.iter_batches(rows, [group], list(columns), use_threads=False)


def _check_dictionary(
    path: pathlib.Path, metadata: parquet.FileMetaData, group_index: int, leaf: Any, rows: int
) -> None:
    """Raise SizeError if expanding dictionary-encoded values takes disproportionate memory.

    Such values are stored once, in the dictionary page of the column chunk.
    """
    group = metadata.row_group(group_index)
    (column,) = (column for column in _columns(group) if column.path_in_schema == leaf.path)
    if not column.has_dictionary_page:
        return
    with parquet.ParquetFile(path, **_STREAMED, read_dictionary=[leaf.path]) as file:
        batch = next(file.iter_batches(1, [group_index], [leaf.path], use_threads=False), None)
    if batch is not None:
        longest = max((_longest(part) for part, _ in _parts(batch.column(0))), default=0)
        values = column.num_values if leaf.max_repetition_level else rows
        _check_ratio(longest * values, column, f"row group {group_index}, column {leaf.path!r}")


def max_memory(in_file: int) -> int:
    """Return the maximum memory, in bytes, that `in_file` bytes of a file may take."""
    return _MIN_BYTES + _MAX_RATIO * in_file


def _check_ratio(size: int, column: parquet.ColumnChunkMetaData, where: str) -> None:
    in_file = column.total_compressed_size
    if size > max_memory(in_file):
        raise SizeError(f"{where}: up to {size} bytes of memory for {in_file} bytes in the file")


def is_small(array: pa.Array) -> bool:
    """Return whether no cell of an array can exceed MAX_ITEMS items or MAX_TEXT bytes of text.

    The bound is conservative: it combines the longest list with the longest text, and a dictionary
    may include texts of other arrays.
    """
    items, longest = 1, 0
    for part, size in _parts(array):
        items, longest = max(items, size), max(longest, _longest(part))
    return items <= MAX_ITEMS and items * longest <= MAX_TEXT


def is_bounded(cell: pa.Array, texts: bool = True) -> bool:
    """Return whether the only cell of an array is within the limits.

    Each list may have at most MAX_ITEMS items and, if `texts` is set, the whole cell at most
    MAX_TEXT bytes of text.
    """
    total = 0
    for part, size in _parts(cell):
        if size > MAX_ITEMS:
            return False
        if texts and pa.types.is_dictionary(part.type):
            part = part.dictionary.take(part.indices)
        if texts and _has_bytes(part.type):
            total += pc.sum(pc.binary_length(part)).as_py() or 0
    return total <= MAX_TEXT


def _parts(array: pa.Array, items: int = 0) -> Iterator[tuple[pa.Array, int]]:
    """Yield the arrays of values inside an array, each with its longest enclosing list's length."""
    if _is_list(array.type):
        items = max(items, pc.max(pc.list_value_length(array)).as_py() or 0)
        if items > MAX_ITEMS:
            yield pa.nulls(0), items
        else:
            yield from _parts(array.flatten(), items)
    elif pa.types.is_struct(array.type):
        for i in range(array.type.num_fields):
            yield from _parts(array.field(i), items)
    else:
        yield array, items


def _columns(group: parquet.RowGroupMetaData) -> Iterator[parquet.ColumnChunkMetaData]:
    return (group.column(i) for i in range(group.num_columns))


def _longest(array: pa.Array) -> int:
    """Return the byte length of the longest text or binary value, dictionary entries included."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary
    return (pc.max(pc.binary_length(array)).as_py() or 0) if _has_bytes(array.type) else 0


def _has_bytes(kind: pa.DataType) -> bool:
    kinds = pa.types
    return any((kinds.is_string(kind), kinds.is_large_string(kind), kinds.is_binary(kind),
                kinds.is_large_binary(kind)))  # fmt: skip


def _is_list(kind: pa.DataType) -> bool:
    return isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType))
