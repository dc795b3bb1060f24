"""Cells of data sets are converted to the text that a person would have written."""

import base64
import datetime
import decimal
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmsr1_jax.data import DataError, QuestionSource, benchmarks
from mmsr1_jax.data.benchmarks.tables import BadFieldError, image_bytes
from mmsr1_jax.data.benchmarks.tables import text as text_in
from mmsr1_jax.data.cells import json_number, to_python, to_text
from mmsr1_jax.evaluation import records
from tests.benchmark_files import mmsearch, okvqa, png, simplevqa, write_table
from tests.question_files import read_row, reward_model, row, write_rows


@pytest.mark.parametrize(
    "value, text",
    [
        (1932.0, "1932"), (np.float32(1932), "1932"), (decimal.Decimal("1932.00"), "1932"),
        (-0.0, "0"), (2.5, "2.5"), (decimal.Decimal("2.50"), "2.5"), (0.1, "0.1"),
        (np.float32(0.1), "0.1"), (np.float16(0.1), "0.1"), (1e-7, "0.0000001"),
        (1e20, "1" + "0" * 20), (1e23, "1" + "0" * 23), (123456789012.0, "123456789012"),
        (np.float32(123456768), "123456768"), (decimal.Decimal("1E+3"), "1000"),
        (2**70, str(2**70)), (np.int64(-3), "-3"), (10**400, str(10**400)),
        (" None ", "None"), ("nan", "nan"), ("1932.0", "1932.0"), ("null", "null"), ("", ""),
        (None, ""), (math.nan, ""), (math.inf, ""), (np.float32("nan"), ""),
        (decimal.Decimal("NaN"), ""), (decimal.Decimal("-Infinity"), ""), (" \n\u2003", ""),
    ],
)  # fmt: skip
def test_values_are_converted_to_text(value, text):
    assert to_text(value) == text


@pytest.mark.parametrize(
    "value", [True, np.bool_(False), b"1", datetime.date(1932, 5, 1), [1], {"a": 1}, 1j, "\ud83c"]
)
def test_a_value_that_is_neither_text_nor_number_is_an_error(value):
    with pytest.raises(ValueError, match="must be text or a number|lone surrogate"):
        to_text(value)


@pytest.mark.parametrize(
    "text, read",
    [
        ("1932.0", "1932"), ("1.50", "1.50"), ("1e3", "1000"), ("-0.0", "0"), ("1e-3", "1e-3"),
        ("12345678901234567.0", "12345678901234567"), ("1e999999999", "1e999999999"),
    ],
)  # fmt: skip
def test_whole_json_numbers_lose_their_decimals_and_others_keep_their_spelling(text, read):
    assert json_number(text) == read


def test_single_precision_floats_keep_their_shortest_spelling():
    """Nested columns keep them too."""
    kind = pa.struct({"a": pa.list_(pa.float32()), "b": pa.struct({"c": pa.float16()})})
    value = to_python(pa.scalar({"a": [0.1, None], "b": {"c": np.float16(2.5)}}, kind))
    assert [to_text(item) for item in [*value["a"], value["b"]["c"]]] == ["0.1", "", "2.5"]
    for kind in (pa.large_list(pa.float32()), pa.list_(pa.float32(), 1)):
        assert [to_text(item) for item in to_python(pa.scalar([0.7], kind))] == ["0.7"]
    assert to_python(pa.scalar(None, kind)) is None


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.decimal128(8, 2), pa.int64()])
def test_a_numeric_gold_answer_becomes_text(tmp_path, kind):
    written = row(0)
    struct = pa.struct({"ground_truth": kind, "candidate_answers": pa.list_(kind)})
    truth = decimal.Decimal(1932) if pa.types.is_decimal(kind) else 1932
    written["reward_model"] = {"ground_truth": truth, "candidate_answers": [truth, None]}
    columns = pa.Table.from_pylist([written])
    index = columns.schema.get_field_index("reward_model")
    columns = columns.set_column(index, "reward_model", pa.array([written["reward_model"]], struct))
    parquet.write_table(columns, tmp_path / "a.parquet")
    (read,) = QuestionSource(tmp_path / "a.parquet")
    assert read.answers == ("1932",)


@pytest.mark.parametrize("truth", [math.nan, None, math.inf])
def test_a_row_with_a_null_or_nan_gold_answer_is_invalid(tmp_path, truth, capsys):
    path = write_rows(
        tmp_path / "a.parquet", [row(reward_model=reward_model(truth=truth)) for _ in "ab"]
    )
    with pytest.raises(DataError, match="ground_truth: empty|no usable question"):
        list(QuestionSource(path, max_bad_rows=0))


@pytest.mark.parametrize(
    "others, answers",
    [
        ("[NaN, Infinity, null, 1932.0, 1e3]", ("gold", "1932", "1000")),
        ("NaN", ("gold",)),
        ([1932.0, math.nan], ("gold", "1932")),
        ('["None", "null"]', ("gold", "None", "null")),
    ],
)
def test_null_and_nan_candidate_answers_are_dropped(tmp_path, others, answers):
    assert read_row(tmp_path, reward_model=reward_model(others=others)).answers == answers


@pytest.mark.parametrize("others", ["false", "0", '""', "{}"])
def test_candidate_answers_must_be_a_list(tmp_path, others):
    with pytest.raises(DataError, match="not a list"):
        read_row(tmp_path, reward_model=reward_model(others=others))


def test_benchmark_answers_are_converted_like_those_of_training_files(tmp_path):
    names = write_table(
        tmp_path / "a.parquet", mmsearch(gt_answer=1932.0, alternative_gt_answers=[math.nan])
    )
    (read,) = benchmarks.read("mmsearch", names)
    assert read.answers == ("1932",)
    with pytest.raises(BadFieldError, match="empty"):
        text_in({"answer": math.nan}, "answer")
    # Annotators without an answer agree with nobody.
    path = write_table(tmp_path / "b.parquet", okvqa(answers=[None] * 5 + ["surf"] * 5))
    (read,) = benchmarks.read("okvqa", path)
    assert read.answers == ("surf",) and len(read.references) == 10
    grade = benchmarks.grader("okvqa")
    assert grade("the", read) == 0 and grade("surf", read) == 1


def test_a_null_among_recorded_candidate_answers_is_dropped():
    recorded = {"question": "?", "ground_truth": "a", "candidate_answers": [None, "b"], "turns": []}
    assert records.parse(json.dumps(recorded).encode(), 1)["answers"] == ["a", "b"]


DATA = png(3)
PLAIN = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        base64.encodebytes(DATA).decode(),
        "\r\n".join(PLAIN[i : i + 64] for i in range(0, len(PLAIN), 64)) + "\r\n",
        f" \t{PLAIN[:10]} {PLAIN[10:]}\n",
        f"data:image/png;base64,{PLAIN}",
        f"data:image/png;base64,\n{base64.encodebytes(DATA).decode()}",
        PLAIN.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode(),
    ],
)
def test_common_spellings_of_base64_are_decoded(text):
    assert image_bytes({"image": text}, "image") == DATA


def test_simplevqa_images_may_contain_line_breaks(tmp_path):
    path = write_table(
        tmp_path / "a.parquet", simplevqa(3, image=base64.encodebytes(DATA).decode())
    )
    (question,) = benchmarks.read("simplevqa", path)
    assert question.images == (DATA,)


@pytest.mark.parametrize(
    "text", ["not base64!", "a", "=", "abc\u00e9", "http://x/y.png", PLAIN + "*"]
)
def test_invalid_base64_is_an_error(text):
    try:
        assert image_bytes({"image": text}, "image") is None
    except BadFieldError as error:
        assert error.field == "image" and str(error) == "not base64"
