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
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmsr1_jax.data.benchmarks import scores
from mmsr1_jax.data.benchmarks.pages import load_pdfium, page_processor, render_pdf, shrink_pictures
from mmsr1_jax.data.benchmarks.tables import (
    BadFieldError,
    Row,
    find,
    open_rows,
    picture,
    text,
    texts,
)
from mmsr1_jax.data.parquet import BadRow, DataError, Question
from mmsr1_jax.data.questions import QuestionSource
from mmsr1_jax.processing.image_files import DEFAULT_MAX_FILE_PIXELS, ImageError, image_size
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.utils.files import FileRefusedError, check_regular, inside, read_regular

_PEOPLE = 10  # annotators of each OK-VQA question
_PAGE = r"page_\d+"
_DOCUMENT_BYTES = 500_000_000  # maximum size of a PDF


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkQuestion(Question):
    """A question with the additional fields that scoring needs.

    Attributes:
      references: Answers of all annotators, with repeats (OK-VQA); empty for other benchmarks.
      answer_format: Format of the gold answer (MMLongBench-Doc), one of `scores.FORMATS`; "" for
        other benchmarks.
      pages_left_out: Number of document pages that are not among the images because they exceed the
        token budget.
    """

    references: tuple[str, ...] = ()
    answer_format: str = ""
    pages_left_out: int = 0


@dataclasses.dataclass(frozen=True)
class _Context:
    """The settings of `read`, the file, and a cache of the last document.

    `document` maps the last document's name to its pages and the number of pages left out, because
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
      files, needed, optional, expand: Arguments of `tables.find` and `tables.open_rows`.
      question: Function that returns the fields of a row's question, or the reason why the row is
        not part of the benchmark. Raises BadFieldError, and ImageError for pages.
    """

    files: tuple[str, ...]
    needed: dict[str, str]
    question: Callable[[Row, _Context], dict[str, Any] | str]
    optional: tuple[str, ...] = ()
    expand: Callable[[Row], Sequence[Row]] | None = None


def read(
    name: str,
    where: str | pathlib.Path | Sequence[str | pathlib.Path],
    *,
    processor: ImageProcessor | None = None,
    page_tokens: int = 6144,
    image_roots: Sequence[str] = (),
    max_bad_rows: int = 100,
    max_file_pixels: int = DEFAULT_MAX_FILE_PIXELS,
) -> Iterator[Question]:
    """Iterate over the questions of a benchmark, in the order of files and rows.

    Files are checked immediately. Rows are read lazily, with few in memory at a time. Unusable rows
    are reported on stderr and skipped.

    Args:
      name: Name of the benchmark, one of NAMES.
      where: Directory in its published layout, file, path with wildcards, or several of these.
      processor: Image processor of the policy; None means Qwen2.5-VL's. Document pages are resized
        with its `page_processor`, which must also be the one that shows them to the policy.
      page_tokens: Token budget for all pages of a question, see `pages.fit_pages`. The default
        leaves a quarter of the 8,192 tokens of an episode for the rest.
      image_roots: Directories, besides the data's folder, in which images and documents may lie
        that symbolic links in this folder point to.
      max_bad_rows: Number of unusable rows above which DataError is raised.
      max_file_pixels: Maximum size of an image in pixels, see `images.open_image`.

    Raises:
      DataError: The benchmark or a file does not exist, a file cannot be read or lacks a column, no
        question is usable, or too many rows are unusable.
    """
    paths = files(name, where)
    if name in _VERL:
        return iter(
            QuestionSource(
                paths,
                image_roots=image_roots,
                max_bad_rows=max_bad_rows,
                max_file_pixels=max_file_pixels,
            )
        )
    benchmark = _BENCHMARKS[name]
    if benchmark.question is _mmlongbench:
        load_pdfium()  # no row can be read without it
    processor = processor or ImageProcessor()
    if name in OF_DOCUMENTS:
        processor = page_processor(processor)
    tables = [
        (
            _Context(path, processor, page_tokens, max_file_pixels, tuple(image_roots)),
            open_rows(path, benchmark.needed, benchmark.optional, benchmark.expand),
        )
        for path in paths
    ]
    return _questions(name, benchmark, tables, max_bad_rows)


def files(
    name: str, where: str | pathlib.Path | Sequence[str | pathlib.Path]
) -> list[pathlib.Path]:
    """Return the files that `read` reads questions from, without images and documents beside them.

    Raises:
      DataError: The benchmark or a file does not exist.
    """
    _check(name)
    given = [where] if isinstance(where, (str, pathlib.Path)) else where
    patterns = _VERL[name] if name in _VERL else _BENCHMARKS[name].files
    return [path for item in given for path in find(pathlib.Path(item), patterns)]


def score(name: str) -> Callable[[str | None, Question], float] | None:
    """Return a benchmark's scoring function, or None if its paper uses a judge instead.

    OK-VQA, SlideVQA and MMLongBench-Doc have rules of their own (`scores.py`). The function maps an
    answer (None if the episode has none) and its question to a score in [0, 1].

    Raises:
      DataError: The benchmark does not exist.
    """
    _check(name)
    return _SCORES.get(name)


def _questions(
    name: str,
    benchmark: _Benchmark,
    tables: Sequence[tuple[_Context, Iterator[tuple[int, Row]]]],
    max_bad_rows: int,
) -> Iterator[Question]:
    bad = good = 0
    for context, rows in tables:
        file, others = str(context.path), collections.Counter[str]()
        for number, row in rows:
            try:
                fields = benchmark.question(row, context)
            except (BadFieldError, ImageError) as error:
                field = error.field if isinstance(error, BadFieldError) else "pages"
                found = BadRow(file, number, field, str(error))
                print(f"{found}; left out", file=sys.stderr)
                bad += 1
                if bad > max_bad_rows:
                    raise DataError(
                        f"rows that cannot be used: {bad}, more than "
                        f"config.data.max_bad_rows={max_bad_rows}; the last one is {found}"
                    ) from None
                continue
            if isinstance(fields, str):
                others[fields] += 1
                continue
            good += 1
            yield BenchmarkQuestion(**fields, source=name, file=file, row=number)
        for why, count in others.items():
            print(f"{file}: {count} rows left out, {why}", file=sys.stderr)
    if not good:
        paths = ", ".join(str(context.path) for context, _ in tables)
        raise DataError(f"{paths}: no question that can be used")


def _check(name: str) -> None:
    if name not in NAMES:
        raise DataError(f"no benchmark {name!r}; there are {', '.join(NAMES)}")


def _sound(data: bytes | None, field: str, context: _Context) -> tuple[bytes, ...]:
    """Return a question's only image, after decoding it once for validation."""
    if data is None:
        raise BadFieldError(field, "no picture")
    try:
        size = image_size(data, max_pixels=context.max_file_pixels)
        context.processor.target_size(*size)  # raises for extreme aspect ratios
    except ImageError as error:
        raise BadFieldError(field, str(error)) from None
    return (data,)


def _once(answers: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, answers)))


def _mmsearch(row: Row, context: _Context) -> dict[str, Any] | str:
    shown = picture(row, "query_image")
    if shown is None:
        return "whose question has no picture"
    return {
        "id": text(row, "sample_id"),
        "question": text(row, "query"),
        "images": _sound(shown, "query_image", context),
        "answers": _once([text(row, "gt_answer"), *texts(row, "alternative_gt_answers")]),
        "category": text(row, "area", needed=False),
    }


def _simplevqa(row: Row, context: _Context) -> dict[str, Any] | str:
    if text(row, "language") != "EN":
        return "which are not in English"
    return {
        "id": text(row, "data_id"),
        "question": text(row, "question"),
        "images": _sound(picture(row, "image"), "image", context),
        "answers": (text(row, "answer"),),
        "category": text(row, "vqa_category", needed=False),
    }


def _livevqa(row: Row, context: _Context) -> dict[str, Any]:
    answers = _once(texts(row, "gt_answer"))
    if not answers:
        raise BadFieldError("gt_answer", "empty")
    name, folder = text(row, "query_image").lstrip("/"), context.path.parent
    # Try the path as given, then in each folder beside the file.
    places = [folder, *sorted(place for place in folder.iterdir() if place.is_dir())]
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None or ".." in pathlib.PurePath(name).parts:
        raise BadFieldError("query_image", f"{folder / name}: no such file, nor a folder deeper")
    try:
        data = read_regular(inside(path, folder, context.image_roots))
    except FileRefusedError as error:
        raise BadFieldError("query_image", str(error)) from None
    return {
        "id": text(row, "sample_id"),
        "question": text(row, "query"),
        "images": _sound(data, "query_image", context),
        "answers": answers,
        "category": text(row, "category", needed=False),
    }


def _levels(item: Row) -> Sequence[Row]:
    """Return a benchmark.json object's two questions in qa.json's form; others unchanged."""
    asked = {level: item.get(f"{level}_qa") for level in ("level1", "level2")}
    if not any(asked.values()):
        return [item]
    return [
        {
            "sample_id": f"{item.get('id')}_{level}",
            "query": question.get("question"),
            "query_image": question.get("img_path") or item.get("img_path"),
            "gt_answer": question.get("Ground_Truth_List"),
            "category": level,
        }
        for level, question in asked.items()
        if isinstance(question, dict)
    ]


def _okvqa(row: Row, context: _Context) -> dict[str, Any]:
    references = texts(row, "answers")
    if len(references) != _PEOPLE or not any(references):
        raise BadFieldError("answers", f"{len(references)}; they must be those of {_PEOPLE} people")
    return {
        "id": text(row, "question_id"),
        "question": text(row, "question"),
        "images": _sound(picture(row, "image"), "image", context),
        "answers": _once([answer for answer, _ in collections.Counter(references).most_common()]),
        "references": references,
        "category": text(row, "question_type", needed=False),
    }


def _slidevqa(row: Row, context: _Context) -> dict[str, Any]:
    columns = sorted(filter(re.compile(_PAGE).fullmatch, row), key=lambda c: int(c[5:]))
    slides = [slide for slide in (picture(row, column) for column in columns) if slide]
    if not slides:
        raise BadFieldError("page_1", "no page has a picture")
    shown, left_out = shrink_pictures(
        slides, context.page_tokens, context.processor, max_file_pixels=context.max_file_pixels
    )
    name = text(row, "qa_id")
    _tell(f"{context.path}, question {name}", left_out, context)
    return {
        "id": name,
        "question": text(row, "question"),
        "images": shown,
        "answers": (text(row, "answer"),),
        "category": text(row, "reasoning_type", needed=False),
        "pages_left_out": left_out,
    }


def _mmlongbench(row: Row, context: _Context) -> dict[str, Any]:
    answer_format, name = text(row, "answer_format"), text(row, "doc_id")
    if answer_format not in scores.FORMATS:
        formats = ", ".join(scores.FORMATS)
        raise BadFieldError("answer_format", f"{answer_format!r} is not one of {formats}")
    question = text(row, "question")
    digest = hashlib.blake2b(question.encode(), digest_size=4).hexdigest()
    fields = {
        "id": f"{name}-{digest}",  # the data set has no question IDs
        "question": question,
        "answers": (text(row, "answer"),),
        "answer_format": answer_format,
        "category": text(row, "doc_type", needed=False),
    }
    if name not in context.document:
        folders = [folder / "documents" for folder in context.path.parents[:2]]
        path = next((f / name for f in folders if (f / name).is_file()), None)
        if path is None or pathlib.PurePath(name).name != name:
            raise BadFieldError("doc_id", f"{folders[0] / name}: no such file")
        try:
            path = inside(path.name, path.parent, context.image_roots)
            check_regular(path, max_bytes=_DOCUMENT_BYTES)
        except FileRefusedError as error:
            raise BadFieldError("doc_id", str(error)) from None
        shown, left_out = render_pdf(path, context.page_tokens, context.processor)
        context.document.clear()
        context.document[name] = shown, left_out
        _tell(str(path), left_out, context)
    shown, left_out = context.document[name]
    return fields | {"images": shown, "pages_left_out": left_out}


def _tell(what: str, left_out: int, context: _Context) -> None:
    if left_out:
        print(
            f"{what}: the last {left_out} pages left out; even at the least size they do not fit "
            f"into page_tokens={context.page_tokens}",
            file=sys.stderr,
        )


_VERL = {
    "fvqa-test": ("fvqa_test*.parquet", "*.parquet"),
    "infoseek": ("*infoseek*.parquet", "*.parquet"),
}
_BENCHMARKS = {
    "mmsearch": _Benchmark(
        files=("end2end*.parquet", "*.parquet"),
        needed={
            "sample_id": "text",
            "query": "text",
            "query_image": "picture",
            "gt_answer": "text",
            "alternative_gt_answers": "texts",
        },
        optional=("area",),
        question=_mmsearch,
    ),
    "simplevqa": _Benchmark(
        files=("*.parquet", "*/*.parquet"),
        needed={
            "data_id": "text",
            "image": "picture",
            "language": "text",
            "question": "text",
            "answer": "text",
        },
        optional=("vqa_category",),
        question=_simplevqa,
    ),
    "livevqa": _Benchmark(
        files=("qa.json", "benchmark.json", "*/benchmark.json"),
        needed={"sample_id": "text", "query": "text", "query_image": "text", "gt_answer": "any"},
        expand=_levels,
        question=_livevqa,
    ),
    "okvqa": _Benchmark(
        files=("data/val2014-*.parquet", "*.parquet"),
        needed={"question_id": "text", "image": "picture", "question": "text", "answers": "texts"},
        optional=("question_type",),
        question=_okvqa,
    ),
    "slidevqa": _Benchmark(
        files=("test-*.parquet", "*/test-*.parquet", "*.parquet"),
        needed={"qa_id": "text", "question": "text", "answer": "text", "page_1": "picture"},
        optional=(_PAGE, "reasoning_type"),
        question=_slidevqa,
    ),
    "mmlongbench": _Benchmark(
        files=("data/train-*.parquet", "samples.json", "data/samples.json", "*.parquet"),
        needed={"doc_id": "text", "question": "text", "answer": "text", "answer_format": "text"},
        optional=("doc_type",),
        question=_mmlongbench,
    ),
}
NAMES = (*_VERL, *_BENCHMARKS)
OF_DOCUMENTS = ("slidevqa", "mmlongbench")  # benchmarks whose images are document pages
_SCORES: dict[str, Callable[[str | None, Any], float]] = {
    "okvqa": lambda answer, q: scores.vqa_accuracy(answer, q.references),
    "slidevqa": lambda answer, q: scores.token_f1(answer, q.answers[0]),
    "mmlongbench": lambda answer, q: scores.document_score(answer, q.answers[0], q.answer_format),
}
