"""Bounds on what a parquet file takes in memory, checked before it is read.

A few kilobytes may hold a cell of gigabytes (compression), the same long value a million times (a
dictionary), or millions of empty rows.
"""

import os
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

MAX_TEXT = 1_000_000  # bytes of all texts of a cell
MAX_ITEMS = 1000  # of a list in a cell
_FREE = 64 << 20  # bytes of a column of a row group, whatever they take in the file
_MAX_RATIO = 100  # bytes in memory for a byte in the file, beyond that
_FREE_ROWS = 1_000_000  # rows of a file, and values of a column of a row group
_MAX_VALUES = 64  # of a column for each row, beyond that

# Read in pieces; without a buffer size, all of a row group is read at once.
_STREAMED = {"pre_buffer": False, "buffer_size": 1 << 20}

Group = parquet.RowGroupMetaData
Column = parquet.ColumnChunkMetaData


class SizeError(ValueError):
    """A file that would take much more memory than its size; names row group and column."""


def check_sizes(
    path: pathlib.Path, metadata: parquet.FileMetaData, columns: Collection[str]
) -> None:
    """Raise SizeError where reading `columns`, by row groups, would take memory out of proportion.

    Args:
      path: of the file.
      metadata: of the file.
      columns: names of top-level columns.
    """
    size = os.stat(path).st_size
    if metadata.num_rows > _FREE_ROWS + size:
        raise SizeError(f"claims {metadata.num_rows} rows in {size} bytes")
    in_file = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in _columns(group):
            if column.path_in_schema.partition(".")[0] not in columns:
                continue
            where = f"row group {number}, column {column.path_in_schema!r}"
            in_file += column.total_compressed_size
            if in_file > size:
                raise SizeError(f"{where}: claims more bytes than the file has")
            if column.num_values > _FREE_ROWS + _MAX_VALUES * group.num_rows:
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
      path: of a file that `check_sizes` was called for.
      rows: of a batch.
      columns: names of the top-level columns to read.
      groups: numbers of row groups; None: all.
      large: columns whose values are pictures. Texts are read as dictionaries, so that one that
        comes many times takes memory once; with pictures that would hold all of a row group.

    Raises:
      SizeError: pictures in a dictionary would take memory out of proportion where they are used.
      OSError, pyarrow.ArrowException: the file cannot be read.
    """
    with parquet.ParquetFile(path, **_STREAMED) as file:
        metadata = file.metadata
    schema = [metadata.schema.column(i) for i in range(len(metadata.schema))]
    leaves = [leaf for leaf in schema if leaf.physical_type == "BYTE_ARRAY"]
    texts, pictures = [], []
    for leaf in leaves:
        name = leaf.path.partition(".")[0]
        if name in columns:
            (pictures if name in large else texts).append(leaf)
    for group in range(metadata.num_row_groups) if groups is None else groups:
        for leaf in pictures:
            _check_dictionary(path, metadata, group, leaf, rows)
        # Opened for each row group: Arrow joins no dictionaries of several.
        options = _STREAMED | {"read_dictionary": [leaf.path for leaf in texts]}
        with parquet.ParquetFile(path, **options) as file:
            yield from file.iter_batches(rows, [group], list(columns), use_threads=False)


def _check_dictionary(
    path: pathlib.Path, metadata: parquet.FileMetaData, number: int, leaf: Any, rows: int
) -> None:
    """Raise SizeError where values that are stored once, in the dictionary of the column's pages,
    would take memory out of proportion where they are used."""
    group = metadata.row_group(number)
    (column,) = (column for column in _columns(group) if column.path_in_schema == leaf.path)
    if not column.has_dictionary_page:
        return
    with parquet.ParquetFile(path, **_STREAMED, read_dictionary=[leaf.path]) as file:
        batch = next(file.iter_batches(1, [number], [leaf.path], use_threads=False), None)
    if batch is not None:
        longest = max((_longest(part) for part, _ in _parts(batch.column(0))), default=0)
        values = column.num_values if leaf.max_repetition_level else rows
        _check_ratio(longest * values, column, f"row group {number}, column {leaf.path!r}")


def most_memory(in_file: int) -> int:
    """Return how many bytes of memory so many bytes of a file may take."""
    return _FREE + _MAX_RATIO * in_file


def _check_ratio(size: int, column: Column, where: str) -> None:
    in_file = column.total_compressed_size
    if size > most_memory(in_file):
        raise SizeError(f"{where}: up to {size} bytes of memory for {in_file} bytes in the file")


def is_small(array: pa.Array) -> bool:
    """Whether no cell of an array can have more than MAX_ITEMS items or MAX_TEXT bytes of text, by
    its longest list and text; a dictionary may have texts of other arrays, too."""
    items, longest = 1, 0
    for part, size in _parts(array):
        items, longest = max(items, size), max(longest, _longest(part))
    return items <= MAX_ITEMS and items * longest <= MAX_TEXT


def is_bounded(cell: pa.Array, texts: bool = True) -> bool:
    """Whether the cell in an array of one row has at most MAX_ITEMS items in each list and, where
    `texts` is set, MAX_TEXT bytes of text in all."""
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
    """The arrays of values inside an array, with the length of the longest list around each."""
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


def _columns(group: Group) -> Iterator[Column]:
    return (group.column(i) for i in range(group.num_columns))


def _longest(array: pa.Array) -> int:
    """Bytes of the longest text or binary value, those of a dictionary included."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary
    return (pc.max(pc.binary_length(array)).as_py() or 0) if _has_bytes(array.type) else 0


def _has_bytes(kind: pa.DataType) -> bool:
    kinds = pa.types
    return any((kinds.is_string(kind), kinds.is_large_string(kind), kinds.is_binary(kind),
                kinds.is_large_binary(kind)))  # fmt: skip


def _is_list(kind: pa.DataType) -> bool:
    return isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType))
