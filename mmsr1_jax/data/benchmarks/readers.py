"""Readers of benchmark questions from their published files.

fvqa-test    HF lmms-lab/FVQA: veRL's schema, see `data/parquet.py`
infoseek     also in veRL's schema
mmsearch     HF CaraJ/MMSearch, end2end.parquet: sample_id, query, query_image, gt_answer,
             alternative_gt_answers, area. Rows without an image are skipped
simplevqa    HF m-a-p/SimpleVQA, parquet: data_id, image (base64), language, question, answer,
             vqa_category. Only the English questions are read
livevqa      HF ONE-Lab/LiveVQA-Research-Preview, qa.json: sample_id, query, query_image (a
             file beside it), gt_answer; or GitHub fumingyang2004/LIVEVQA, benchmark.json: id,
             level1_qa and level2_qa, each {question, img_path, Ground_Truth_List}
okvqa        HF lmms-lab/OK-VQA, parquet: question_id, image, question, answers (of ten
             annotators), question_type
slidevqa     HF NTT-hil-insight/SlideVQA, parquet: qa_id, question, answer, page_1 .. page_20,
             reasoning_type
mmlongbench  HF yubo2333/MMLongBench-Doc, parquet, or its samples.json: doc_id, doc_type,
             question, answer, answer_format; the PDFs are in a folder `documents`
"""

import collections
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmsr1_jax.data.benchmarks import grading
from mmsr1_jax.data.benchmarks.pages import load_pdfium, page_processor, render_pdf, shrink_pages
from mmsr1_jax.data.benchmarks.tables import (
    BadFieldError,
    Row,
    find_files,
    image_bytes,
    open_rows,
    text,
    texts,
)
from mmsr1_jax.data.parquet import BadRow, DataError, Question
from mmsr1_jax.data.questions import QuestionSource
from mmsr1_jax.processing.image_files import DEFAULT_MAX_FILE_PIXELS, ImageError, image_size
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.utils.files import FileRefusedError, check_regular, read_regular, resolve_inside
from mmsr1_jax.utils.logs import log

_NUM_ANNOTATORS = 10  # annotators of each OK-VQA question
_PAGE_COLUMN = r"page_\d+"
_MAX_DOCUMENT_BYTES = 500_000_000  # maximum size of a PDF


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkQuestion(Question):
    """A question with the additional fields that grading needs.

    Attributes:
      references: Answers of all annotators, with repeats (OK-VQA); empty for other benchmarks.
      answer_format: Format of the gold answer (MMLongBench-Doc), one of `grading.FORMATS`; "" for
        other benchmarks.
      omitted_pages: Number of document pages that are not among the images because they exceed the
        token budget.
    """

    references: tuple[str, ...] = ()
    answer_format: str = ""
    omitted_pages: int = 0


@dataclasses.dataclass(frozen=True)
class _Context:
    """The settings of `read`, the file, and a cache of the last document.

    `document` maps the last document's name to its pages and the number of omitted pages, because
    several consecutive questions are about one document.
    """

    path: pathlib.Path
    processor: ImageProcessor
    page_tokens: int
    max_file_pixels: int
    image_roots: tuple[str, ...] = ()
    document: dict[str, tuple[tuple[bytes, ...], int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Benchmark:
    """Published format of a benchmark.

    Attributes:
      files, required, optional, expand: Arguments of `tables.find_files` and `tables.open_rows`.
      question: Function that returns the fields of a row's question, or the reason why the row is
        not part of the benchmark. Raises BadFieldError, and ImageError for pages.
    """

    files: tuple[str, ...]
    required: dict[str, str]
    question: Callable[[Row, _Context], dict[str, Any] | str]
    optional: tuple[str, ...] = ()
    expand: Callable[[Row], Sequence[Row]] | None = None


def read(
    name: str,
    paths: str | pathlib.Path | Sequence[str | pathlib.Path],
    *,
    processor: ImageProcessor | None = None,
    page_tokens: int = 6144,
    image_roots: Sequence[str] = (),
    max_bad_rows: int = 100,
    max_file_pixels: int = DEFAULT_MAX_FILE_PIXELS,
) -> Iterator[Question]:
    """Iterate over the questions of a benchmark, in the order of files and rows.

    Files are checked immediately. Rows are read lazily, with few in memory at a time. Unusable rows
    are logged and skipped.

    Args:
      name: Name of the benchmark, one of NAMES.
      paths: Directory in its published layout, file, path with wildcards, or several of these.
      processor: Image processor of the policy; None means Qwen2.5-VL's. Document pages are resized
        with its `page_processor`, which must also be the one that shows them to the policy.
      page_tokens: Token budget for all pages of a question, see `pages.fit_pages`. The default
        leaves a quarter of the 8,192 tokens of an episode for the rest.
      image_roots: Directories, besides the data's folder, in which images and documents may lie
        that symbolic links in this folder point to.
      max_bad_rows: Number of unusable rows above which DataError is raised.
      max_file_pixels: Maximum size of an image in pixels, see `image_files.open_image`.

    Raises:
      DataError: The benchmark or a file does not exist, a file cannot be read or lacks a column, no
        question is usable, or too many rows are unusable.
    """
    sources = files(name, paths)
    if name in _VERL:
        return iter(
            QuestionSource(
                sources,
                image_roots=image_roots,
                max_bad_rows=max_bad_rows,
                max_file_pixels=max_file_pixels,
            )
        )
    benchmark = _BENCHMARKS[name]
    if benchmark.question is _mmlongbench:
        load_pdfium()  # required for every row
    processor = processor or ImageProcessor()
    if name in DOCUMENT_BENCHMARKS:
        processor = page_processor(processor)
    tables = [
        (
            _Context(path, processor, page_tokens, max_file_pixels, tuple(image_roots)),
            open_rows(path, benchmark.required, benchmark.optional, benchmark.expand),
        )
        for path in sources
    ]
    return _questions(name, benchmark, tables, max_bad_rows)


def files(
    name: str, paths: str | pathlib.Path | Sequence[str | pathlib.Path]
) -> list[pathlib.Path]:
    """Return the files that `read` reads questions from, without images and documents beside them.

    Raises:
      DataError: The benchmark or a file does not exist.
    """
    _check(name)
    items = [paths] if isinstance(paths, (str, pathlib.Path)) else paths
    patterns = _VERL[name] if name in _VERL else _BENCHMARKS[name].files
    return [path for item in items for path in find_files(pathlib.Path(item), patterns)]


def grader(name: str) -> Callable[[str | None, Question], float] | None:
    """Return a benchmark's grading function, or None if its paper uses a judge instead.

    OK-VQA, SlideVQA and MMLongBench-Doc have their own rules (`grading.py`). The function maps
    an answer (None if the episode has none) and its question to a grade in [0, 1].

    Raises:
      DataError: The benchmark does not exist.
    """
    _check(name)
    return _GRADERS.get(name)


def _questions(
    name: str,
    benchmark: _Benchmark,
    tables: Sequence[tuple[_Context, Iterator[tuple[int, Row]]]],
    max_bad_rows: int,
) -> Iterator[Question]:
    num_bad = num_questions = 0
    for context, rows in tables:
        file, excluded = str(context.path), collections.Counter[str]()
        for index, row in rows:
            try:
                fields = benchmark.question(row, context)
            except (BadFieldError, ImageError) as error:
                field = error.field if isinstance(error, BadFieldError) else "pages"
                bad_row = BadRow(file, index, field, str(error))
                log.warning("%s; skipped", bad_row)
                num_bad += 1
                if num_bad > max_bad_rows:
                    raise DataError(
                        f"{num_bad} unusable rows, more than "
                        f"config.data.max_bad_rows={max_bad_rows}; the last one is {bad_row}"
                    ) from None
                continue
            if isinstance(fields, str):
                excluded[fields] += 1
                continue
            num_questions += 1
            yield BenchmarkQuestion(**fields, source=name, file=file, row=index)
        for reason, count in excluded.items():
            log.info("%s: skipped %d rows: %s", file, count, reason)
    if not num_questions:
        paths = ", ".join(str(context.path) for context, _ in tables)
        raise DataError(f"{paths}: no usable question")


def _check(name: str) -> None:
    if name not in NAMES:
        raise DataError(f"unknown benchmark {name!r}; it must be one of {', '.join(NAMES)}")


def _validated(data: bytes | None, field: str, context: _Context) -> tuple[bytes, ...]:
    """Return a question's only image, after decoding it once for validation."""
    if data is None:
        raise BadFieldError(field, "has no image")
    try:
        size = image_size(data, max_pixels=context.max_file_pixels)
        context.processor.target_size(*size)  # raises for extreme aspect ratios
    except ImageError as error:
        raise BadFieldError(field, str(error)) from None
    return (data,)


def _unique(answers: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, answers)))


def _mmsearch(row: Row, context: _Context) -> dict[str, Any] | str:
    data = image_bytes(row, "query_image")
    if data is None:
        return "the question has no image"
    return {
        "id": text(row, "sample_id"),
        "question": text(row, "query"),
        "images": _validated(data, "query_image", context),
        "answers": _unique([text(row, "gt_answer"), *texts(row, "alternative_gt_answers")]),
        "category": text(row, "area", required=False),
    }


def _simplevqa(row: Row, context: _Context) -> dict[str, Any] | str:
    if text(row, "language") != "EN":
        return "the question is not in English"
    return {
        "id": text(row, "data_id"),
        "question": text(row, "question"),
        "images": _validated(image_bytes(row, "image"), "image", context),
        "answers": (text(row, "answer"),),
        "category": text(row, "vqa_category", required=False),
    }


def _livevqa(row: Row, context: _Context) -> dict[str, Any]:
    answers = _unique(texts(row, "gt_answer"))
    if not answers:
        raise BadFieldError("gt_answer", "empty")
    name, folder = text(row, "query_image").lstrip("/"), context.path.parent
    # Try the path as given, then in each folder beside the file.
    folders = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]
    path = next((f / name for f in folders if (f / name).is_file()), None)
    if path is None or ".." in pathlib.PurePath(name).parts:
        raise BadFieldError("query_image", f"{folder / name}: no such file, here or in a subfolder")
    try:
        data = read_regular(resolve_inside(path, folder, context.image_roots))
    except FileRefusedError as error:
        raise BadFieldError("query_image", str(error)) from None
    return {
        "id": text(row, "sample_id"),
        "question": text(row, "query"),
        "images": _validated(data, "query_image", context),
        "answers": answers,
        "category": text(row, "category", required=False),
    }


def _levels(item: Row) -> Sequence[Row]:
    """Return a benchmark.json object's two questions in qa.json's form; others unchanged."""
    questions = {level: item.get(f"{level}_qa") for level in ("level1", "level2")}
    if not any(questions.values()):
        return [item]
    return [
        {
            "sample_id": f"{item.get('id')}_{level}",
            "query": question.get("question"),
            "query_image": question.get("img_path") or item.get("img_path"),
            "gt_answer": question.get("Ground_Truth_List"),
            "category": level,
        }
        for level, question in questions.items()
        if isinstance(question, dict)
    ]


def _okvqa(row: Row, context: _Context) -> dict[str, Any]:
    references = texts(row, "answers")
    if len(references) != _NUM_ANNOTATORS or not any(references):
        raise BadFieldError(
            "answers", f"{len(references)} answers; must be {_NUM_ANNOTATORS}, not all empty"
        )
    return {
        "id": text(row, "question_id"),
        "question": text(row, "question"),
        "images": _validated(image_bytes(row, "image"), "image", context),
        "answers": _unique([answer for answer, _ in collections.Counter(references).most_common()]),
        "references": references,
        "category": text(row, "question_type", required=False),
    }


def _slidevqa(row: Row, context: _Context) -> dict[str, Any]:
    columns = sorted(filter(re.compile(_PAGE_COLUMN).fullmatch, row), key=lambda c: int(c[5:]))
    slides = [slide for slide in (image_bytes(row, column) for column in columns) if slide]
    if not slides:
        raise BadFieldError("page_1", "no page has an image")
    images, omitted = shrink_pages(
        slides, context.page_tokens, context.processor, max_file_pixels=context.max_file_pixels
    )
    name = text(row, "qa_id")
    _log_omitted(f"{context.path}, question {name}", omitted, context)
    return {
        "id": name,
        "question": text(row, "question"),
        "images": images,
        "answers": (text(row, "answer"),),
        "category": text(row, "reasoning_type", required=False),
        "omitted_pages": omitted,
    }


def _mmlongbench(row: Row, context: _Context) -> dict[str, Any]:
    answer_format, name = text(row, "answer_format"), text(row, "doc_id")
    if answer_format not in grading.FORMATS:
        formats = ", ".join(grading.FORMATS)
        raise BadFieldError("answer_format", f"{answer_format!r} is not one of {formats}")
    question = text(row, "question")
    digest = hashlib.blake2b(question.encode(), digest_size=4).hexdigest()
    fields = {
        "id": f"{name}-{digest}",  # the data set has no question IDs
        "question": question,
        "answers": (text(row, "answer"),),
        "answer_format": answer_format,
        "category": text(row, "doc_type", required=False),
    }
    if name not in context.document:
        folders = [folder / "documents" for folder in context.path.parents[:2]]
        path = next((f / name for f in folders if (f / name).is_file()), None)
        if path is None or pathlib.PurePath(name).name != name:
            raise BadFieldError("doc_id", f"{folders[0] / name}: no such file")
        try:
            path = resolve_inside(path.name, path.parent, context.image_roots)
            check_regular(path, max_bytes=_MAX_DOCUMENT_BYTES)
        except FileRefusedError as error:
            raise BadFieldError("doc_id", str(error)) from None
        images, omitted = render_pdf(path, context.page_tokens, context.processor)
        context.document.clear()
        context.document[name] = images, omitted
        _log_omitted(str(path), omitted, context)
    images, omitted = context.document[name]
    return fields | {"images": images, "omitted_pages": omitted}


def _log_omitted(document: str, omitted: int, context: _Context) -> None:
    if omitted:
        log.warning(
            "%s: omitted the last %d pages, which exceed page_tokens=%d even at minimum size",
            document, omitted, context.page_tokens,
        )  # fmt: skip


_VERL = {
    "fvqa-test": ("fvqa_test*.parquet", "*.parquet"),
    "infoseek": ("*infoseek*.parquet", "*.parquet"),
}
_BENCHMARKS = {
    "mmsearch": _Benchmark(
        files=("end2end*.parquet", "*.parquet"),
        required={
            "sample_id": "text",
            "query": "text",
            "query_image": "image",
            "gt_answer": "text",
            "alternative_gt_answers": "texts",
        },
        optional=("area",),
        question=_mmsearch,
    ),
    "simplevqa": _Benchmark(
        files=("*.parquet", "*/*.parquet"),
        required={
            "data_id": "text",
            "image": "image",
            "language": "text",
            "question": "text",
            "answer": "text",
        },
        optional=("vqa_category",),
        question=_simplevqa,
    ),
    "livevqa": _Benchmark(
        files=("qa.json", "benchmark.json", "*/benchmark.json"),
        required={"sample_id": "text", "query": "text", "query_image": "text", "gt_answer": "any"},
        expand=_levels,
        question=_livevqa,
    ),
    "okvqa": _Benchmark(
        files=("data/val2014-*.parquet", "*.parquet"),
        required={"question_id": "text", "image": "image", "question": "text", "answers": "texts"},
        optional=("question_type",),
        question=_okvqa,
    ),
    "slidevqa": _Benchmark(
        files=("test-*.parquet", "*/test-*.parquet", "*.parquet"),
        required={"qa_id": "text", "question": "text", "answer": "text", "page_1": "image"},
        optional=(_PAGE_COLUMN, "reasoning_type"),
        question=_slidevqa,
    ),
    "mmlongbench": _Benchmark(
        files=("data/train-*.parquet", "samples.json", "data/samples.json", "*.parquet"),
        required={"doc_id": "text", "question": "text", "answer": "text", "answer_format": "text"},
        optional=("doc_type",),
        question=_mmlongbench,
    ),
}
NAMES = (*_VERL, *_BENCHMARKS)
DOCUMENT_BENCHMARKS = ("slidevqa", "mmlongbench")  # benchmarks whose images are document pages
_GRADERS: dict[str, Callable[[str | None, Any], float]] = {
    "okvqa": lambda answer, q: grading.vqa_accuracy(answer, q.references),
    "slidevqa": lambda answer, q: grading.token_f1(answer, q.answers[0]),
    "mmlongbench": lambda answer, q: grading.document_grade(answer, q.answers[0], q.answer_format),
}
