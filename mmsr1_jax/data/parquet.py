"""Reading and writing of questions in parquet files with veRL's schema.

column        required  contents
prompt        yes       list of {content, role}: the question is the content of the only user
                        message, without "<image>" marks around it; system messages are ignored
images        yes       list of {bytes, path}: contents of image files, or paths, relative to the
                        parquet file's folder, of files in it
reward_model  yes       {ground_truth, candidate_answers}: the answer, and its alternative forms
                        as a JSON string, a list or null; numbers and nulls in it are converted as
                        in `data/cells.py`
data_id       no        question ID; default: file and row
data_source   no        source; default: the file's name
category      no        FVQA's search_required or search_free
"""

import bisect
import dataclasses
import glob
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data import cells, parquet_sizes
from mmsr1_jax.episodes.episode import Example
from mmsr1_jax.utils import checked_json, outputs
from mmsr1_jax.utils.files import FileRefusedError, read_regular, resolve_inside

_IMAGE_MARK = "<image>"
_IMAGE_ROWS = 8  # rows of images in memory at a time
_TEXT_ROWS = 1024
_GROUP_BYTES = 16 << 20  # image bytes per written row group
# Required columns with their fields, and the columns that are lists of such structs.
_REQUIRED = {
    "prompt": ("content", "role"),
    "images": ("bytes",),
    "reward_model": ("ground_truth",),
}
_LISTS = ("prompt", "images")
_TEXTS = ("prompt", "reward_model", "data_id", "data_source", "category")
_SCHEMA = pa.schema(
    {
        "data_id": pa.string(),
        "category": pa.string(),
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "reward_model": pa.struct(
            {"candidate_answers": pa.string(), "ground_truth": pa.string(), "style": pa.string()}
        ),
        "image_urls": pa.string(),
    }
)


class DataError(UserError):
    """Unusable data file or data position; the message names the problem."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its images, answers and origin.

    Attributes:
      id: Identifier of the question.
      question: Text of the question.
      images: Contents of the image files, at least one, in the order in which they are shown.
      answers: Ground truth followed by its alternative forms, without duplicates.
      source: Data set that the question comes from.
      category: Category that the data set assigns, or "" if it assigns none.
      file, row: Location of the question, for messages; rows of a file count from 0.
    """

    id: str
    question: str
    images: tuple[bytes, ...] = dataclasses.field(repr=False)
    answers: tuple[str, ...]
    source: str = ""
    category: str = ""
    file: str = ""
    row: int = 0

    def example(self) -> Example:
        """Return the engine's input, which does not include the answers."""
        return Example(id=self.id, question=self.question, images=self.images)


@dataclasses.dataclass(frozen=True)
class BadRow:
    """An unusable row. `row` counts from 0 in its file; `field` is within the row."""

    file: str
    row: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.field}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class QuestionFile:
    """A parquet file of questions.

    Attributes:
      path: Path of the file.
      columns: Columns in `_TEXTS` that the file has.
      starts: First row of each row group.
      stamp: Size in bytes and modification time in ns.
    """

    path: pathlib.Path
    columns: tuple[str, ...]
    starts: tuple[int, ...]
    stamp: tuple[int, int]

    @classmethod
    def open(cls, path: pathlib.Path) -> "QuestionFile":
        """Open a file and check its schema and size.

        Raises:
          DataError: The file is not parquet, lacks a column or a field of one, or would take much
            more memory than its size.
        """
        try:
            stat = path.stat()
            with parquet.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a readable parquet file ({error})") from None
        for column, fields in _REQUIRED.items():
            if column not in schema.names:
                raise DataError(f"{path}: no column {column!r}; it has {', '.join(schema.names)}")
            kind = schema.field(column).type
            if not _has_fields(kind, column in _LISTS, fields):
                shape = f"{'a list of ' * (column in _LISTS)}{{{', '.join(fields)}}}"
                raise DataError(f"{path}: column {column!r} must be {shape}; it is {kind}")
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        try:
            parquet_sizes.check_sizes(path, metadata, (*_TEXTS, "images"))
        except parquet_sizes.SizeError as error:
            raise DataError(f"{path}: {error}") from None
        starts = tuple(itertools.accumulate(sizes, initial=0))[: len(sizes)]
        columns = tuple(name for name in _TEXTS if name in schema.names)
        return cls(path, columns, starts, (stat.st_size, stat.st_mtime_ns))

    def group_of(self, row: int) -> int:
        """Return the row group that contains a row."""
        return bisect.bisect_right(self.starts, row) - 1

    def read_texts(self) -> Iterator[Question | BadRow]:
        """Yield all rows, without images. Raises DataError if the file cannot be read."""
        row, remaining = 0, parquet_sizes.max_memory(self.stamp[0])
        for batch in self._batches(_TEXT_ROWS, self.columns, None):
            unbounded = [n for n in self.columns if not parquet_sizes.is_small(batch.column(n))]
            for i in range(batch.num_rows):
                try:
                    for name in unbounded:
                        _check_bounded(name, batch.column(name).slice(i, 1))
                    values = {name: _cell(name, batch.column(name)[i]) for name in self.columns}
                    question = _question(values, self.path, row)
                    remaining -= len(question.question) + sum(map(len, question.answers))
                    if remaining < 0:
                        raise DataError(
                            f"{self.path}, row {row}: column 'prompt': the texts up to this row "
                            f"take far more memory than the file of {self.stamp[0]} bytes"
                        )
                    yield question
                except _BadFieldError as error:
                    yield BadRow(str(self.path), row, error.field, error.reason)
                row += 1

    def read_images(
        self, group: int, rows: Iterable[int], image_roots: Sequence[str] = ()
    ) -> Iterator[tuple[int, tuple[bytes, ...] | BadRow]]:
        """Yield rows of a row group in ascending order, each with its undecoded image files.

        Args:
          group: Index of the row group.
          rows: Numbers of rows in the group, counted from the start of the file.
          image_roots: Directories, besides the parquet file's folder, in which image files may lie.

        Raises:
          DataError: The file cannot be read, or has changed since it was opened.
        """
        requested, row = set(rows), self.starts[group]
        last = max(requested)
        for batch in self._batches(_IMAGE_ROWS, ("images",), [group]):
            for i in range(batch.num_rows):
                if row in requested:
                    try:
                        _check_bounded("images", batch.column(0).slice(i, 1), texts=False)
                        yield row, _images(batch.column(0)[i], self.path.parent, image_roots)
                    except _BadFieldError as error:
                        yield row, BadRow(str(self.path), row, error.field, error.reason)
                row += 1
            if row > last:
                return

    def _batches(
        self, rows: int, columns: Sequence[str], groups: list[int] | None
    ) -> Iterator[pa.RecordBatch]:
        # Reopened each time, because an open ParquetFile is not thread-safe.
        try:
            stat = self.path.stat()
            if (stat.st_size, stat.st_mtime_ns) != self.stamp:
                raise DataError(
                    f"{self.path}: changed while in use; data must not change during a run"
                )
            yield from parquet_sizes.batches(self.path, rows, columns, groups)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: cannot be read ({error})") from None
        except parquet_sizes.SizeError as error:
            raise DataError(f"{self.path}: {error}") from None


def write_parquet(path: str | pathlib.Path, questions: Iterable[Question]) -> int:
    """Write questions in veRL's schema, with images as bytes, and return their number.

    The file appears when it is complete. About 16 MB of images are in memory at a time.
    """
    count = 0
    # Pages of few images, so that a reader holds few at a time. Images are all different, so a
    # dictionary would not help.
    options: dict[str, Any] = {
        "use_dictionary": ["data_source", "category"],
        "write_batch_size": 4,
    }
    with (
        outputs.new_file(path) as partial,
        parquet.ParquetWriter(partial, _SCHEMA, **options) as writer,
    ):
        rows, size = [], 0
        for question in questions:
            rows.append(_row(question))
            count += 1
            size += sum(map(len, question.images))
            if size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    return count


def _row(question: Question) -> dict[str, Any]:
    truth, *others = question.answers
    return {
        "data_id": question.id,
        "category": question.category or None,
        "data_source": question.source,
        "prompt": [{"content": question.question, "role": "user"}],
        "images": [{"bytes": image, "path": None} for image in question.images],
        "reward_model": {
            "candidate_answers": json.dumps(others),
            "ground_truth": truth,
            "style": "rule",
        },
        "image_urls": None,
    }


class _BadFieldError(Exception):
    """Invalid field of a row."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def find_files(paths: str | pathlib.Path | Sequence[str | pathlib.Path]) -> list[pathlib.Path]:
    """Return the parquet files that a path, a directory, a glob or a sequence of these names.

    Files of a directory or glob are sorted by name. Duplicates are dropped.

    Raises:
      DataError: An item matches no file, or there are no items.
    """
    files: dict[pathlib.Path, None] = {}
    for item in [paths] if isinstance(paths, (str, pathlib.Path)) else paths:
        path = pathlib.Path(item)
        if path.is_dir():
            matches = [p for p in sorted(path.glob("*.parquet")) if not p.name.startswith(".")]
        else:
            matches = [path] if path.exists() else sorted(map(pathlib.Path, glob.glob(str(item))))
        if not matches:
            raise DataError(f"{item}: no parquet file found")
        files |= dict.fromkeys(matches)
    if not files:
        raise DataError("no parquet file given")
    return list(files)


def _has_fields(kind: pa.DataType, is_list: bool, fields: Sequence[str]) -> bool:
    """Return whether a column has the fields; a column of type null always does."""
    if is_list and isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        kind, is_list = kind.value_type, False
    if pa.types.is_null(kind):
        return True
    return not is_list and pa.types.is_struct(kind) and set(fields) <= {f.name for f in kind}


def _cell(field: str, scalar: pa.Scalar) -> Any:
    try:
        return cells.to_python(scalar)
    except UnicodeDecodeError:
        raise _BadFieldError(field, "not UTF-8") from None


def _check_bounded(field: str, cell: pa.Array, texts: bool = True) -> None:
    """Raise _BadFieldError if a text or a list is too long."""
    if not parquet_sizes.is_bounded(cell, texts):
        raise _BadFieldError(
            field,
            f"contains more than {parquet_sizes.MAX_ITEMS} items"
            + f" or {parquet_sizes.MAX_TEXT} bytes of text" * texts,
        )


def _question(values: dict[str, Any], path: pathlib.Path, row: int) -> Question:
    """Build a question from the values of a row. Raises _BadFieldError."""
    return Question(
        id=_text(values.get("data_id"), "data_id") or f"{path.stem}_{row}",
        question=_question_text(values["prompt"]),
        images=(),
        answers=_answers(values["reward_model"]),
        source=_text(values.get("data_source"), "data_source") or path.stem,
        category=_text(values.get("category"), "category"),
        file=str(path),
        row=row,
    )


def _question_text(messages: Any) -> str:
    """Return the text of the user message.

    Instructions that a data set puts around its questions are kept.
    """
    roles = [message and message["role"] for message in messages or ()]
    if roles.count("user") != 1 or any(role not in ("user", "system") for role in roles):
        raise _BadFieldError("prompt", f"must have exactly one user message; its roles are {roles}")
    text = _text(messages[roles.index("user")]["content"], "prompt.content")
    while text.startswith(_IMAGE_MARK) or text.endswith(_IMAGE_MARK):
        text = text.removeprefix(_IMAGE_MARK).removesuffix(_IMAGE_MARK).strip()
    if not text:
        raise _BadFieldError("prompt.content", "empty")
    return text


def _answers(reward: Any) -> tuple[str, ...]:
    truth = _text(reward and reward["ground_truth"], "reward_model.ground_truth")
    if not truth:
        raise _BadFieldError("reward_model.ground_truth", "empty")
    field = "reward_model.candidate_answers"
    others = reward.get("candidate_answers")
    if isinstance(others, str):
        try:
            others = (
                checked_json.loads(others, parse_number=_json_number, surrogates=True)
                if others.strip()
                else None
            )
        except checked_json.FormatError as error:
            raise _BadFieldError(field, str(error)) from None
    if not isinstance(others, (list, type(None))):
        raise _BadFieldError(field, "not a list")
    texts = [_text(other, field) for other in others or ()]
    return tuple(dict.fromkeys([truth, *filter(None, texts)]))


def _json_number(text: str) -> str | None:
    """Convert a JSON number with `cells.json_number`; return None for NaN and infinities."""
    return None if text.strip("-") in ("NaN", "Infinity") else cells.json_number(text)


def _text(value: Any, field: str) -> str:
    """Convert a value with `cells.to_text`. Raises _BadFieldError."""
    try:
        return cells.to_text(value)
    except ValueError as error:
        raise _BadFieldError(field, str(error)) from None


def _images(cell: pa.Scalar, folder: pathlib.Path, image_roots: Sequence[str]) -> tuple[bytes, ...]:
    """Return the contents of a row's image files. Raises _BadFieldError."""
    images = []
    for index, entry in enumerate(_cell("images", cell) or ()):
        field, entry = f"images[{index}]", entry or {}
        data, path = entry.get("bytes"), _text(entry.get("path"), f"{field}.path")
        if data is None and path:
            try:
                data = read_regular(resolve_inside(path, folder, image_roots))
            except FileRefusedError as error:
                raise _BadFieldError(field, str(error)) from None
        if not isinstance(data, bytes) or not data:
            raise _BadFieldError(field, "has neither bytes nor path")
        images.append(data)
    if not images:
        raise _BadFieldError("images", "has no image")
    return tuple(images)
