"""Parquet files of questions are read and written in veRL's schema; invalid rows are skipped."""

import dataclasses
import json
import os

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmsr1_jax.data import (
    BadRow,
    DataError,
    QuestionSource,
    batches,
    validation,
    write_parquet,
)
from mmsr1_jax.processing.images import open_image
from tests.question_files import (
    damaged,
    ids,
    png,
    question,
    read_row,
    reward_model,
    row,
    write_rows,
)

# Released files


@pytest.mark.parametrize("name, rows", [("fvqa_mini", 26), ("infoseek_mini", 5)])
def test_rows_of_released_files_are_read_unchanged(shared, name, rows):
    path = shared / "data" / f"{name}.parquet"
    source = QuestionSource(path, max_bad_rows=0)
    raw = parquet.read_table(path).to_pylist()
    assert len(source) == len(raw) == rows
    for number, (read, r) in enumerate(zip(source, raw, strict=True)):
        aliases = json.loads(r["reward_model"]["candidate_answers"])
        assert read.question == r["prompt"][0]["content"]
        assert read.images == (r["images"][0]["bytes"],)
        assert read.answers[0] == r["reward_model"]["ground_truth"]
        assert set(read.answers) == {*aliases, read.answers[0]}
        assert len(set(read.answers)) == len(read.answers)
        assert read.source == r["data_source"]
        assert read.id == r.get("data_id", f"{name}_{number}")
        assert read.category == r.get("category", "")
        assert (read.file, read.row) == (str(path), number)
        example = read.example()
        assert (example.id, example.question) == (read.id, read.question)
        assert open_image(example.images[0]).size == open_image(read.images[0]).size
    assert source[rows - 1] == read and source[-1] == read


def test_a_directory_of_files_is_read_in_name_order(shared):
    source = QuestionSource(shared / "data")
    assert len(source) == 31
    assert [q.source for q in validation(source, 27)][25:] == [
        "mmsearch_r1/fvqa_train",
        "mmsearch_r1/infoseek_train_split",
    ]


@pytest.mark.parametrize(
    "others, answers",
    [
        ('["Tajo", "Tejo"]', ("gold", "Tajo", "Tejo")),
        ('["gold", " Tajo", "Tajo", "", null]', ("gold", "Tajo")),
        ('[1.50, 12, "\\u00e9"]', ("gold", "1.50", "12", "é")),
        ("[]", ("gold",)),
        ("null", ("gold",)),
        (" ", ("gold",)),
        (None, ("gold",)),
        (["Tajo", "gold", None], ("gold", "Tajo")),
        ([], ("gold",)),
        ([1889, 1890], ("gold", "1889", "1890")),
    ],
)
def test_candidate_answers_follow_the_ground_truth_without_duplicates(tmp_path, others, answers):
    assert read_row(tmp_path, reward_model=reward_model(others=others)).answers == answers


@pytest.mark.parametrize(
    "content, text",
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("<image> <image>What is it?\n<image>", "What is it?"),
        ("What does <image> mean in HTML?", "What does <image> mean in HTML?"),
        ("Is this an assistant?\nuser\nassistant\n", "Is this an assistant?\nuser\nassistant"),
    ],
)
def test_image_marks_around_a_question_are_removed(tmp_path, content, text):
    prompt = [{"content": "Be brief.", "role": "system"}, {"content": content, "role": "user"}]
    assert read_row(tmp_path, prompt=prompt).question == text


def test_images_are_bytes_or_paths_and_may_be_several(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(png(1, kind="jpeg"))
    images = [
        {"bytes": None, "path": "images/a.jpg"},
        {"bytes": png(2), "path": "missing.png"},
        {"bytes": png(3), "path": None},
    ]
    expected = (png(1, kind="jpeg"), png(2), png(3))
    assert read_row(tmp_path, images=images).images == expected


def test_optional_columns_may_be_absent_or_null(tmp_path):
    bare = {k: v for k, v in row(7).items() if k in ("prompt", "images", "reward_model")}
    del bare["reward_model"]["candidate_answers"]
    nulls = row(8, data_id=None, category=None, data_source=None)
    for name, r in (("bare", bare), ("nulls", nulls)):
        path = write_rows(tmp_path / f"{name}.parquet", [r])
        (read,) = QuestionSource(path)
        assert (read.id, read.source, read.category) == (f"{name}_0", name, "")
    (read,) = QuestionSource(write_rows(tmp_path / "n.parquet", [row(data_id=17)]))
    assert read.id == "17"


# Bad rows

LONG = png(0, (1, 900))
BAD = [
    ({"prompt": [{"content": " <image>\n", "role": "user"}]}, "prompt.content", "empty"),
    ({"prompt": [{"content": None, "role": "user"}]}, "prompt.content", "empty"),
    ({"prompt": []}, "prompt", "exactly one user message"),
    ({"prompt": None}, "prompt", "exactly one user message"),
    ({"prompt": [{"content": "a", "role": "user"}] * 2}, "prompt", "['user', 'user']"),
    ({"prompt": [{"content": "a", "role": "assistant"}]}, "prompt", "['assistant']"),
    ({"reward_model": reward_model("")}, "reward_model.ground_truth", "empty"),
    ({"reward_model": reward_model(" \n")}, "reward_model.ground_truth", "empty"),
    ({"reward_model": reward_model(None)}, "reward_model.ground_truth", "empty"),
    ({"reward_model": None}, "reward_model.ground_truth", "empty"),
    ({"reward_model": reward_model(others="['a']")}, "reward_model.candidate_answers", "not JSON"),
    (
        {"reward_model": reward_model(others="[" * 99999)},
        "reward_model.candidate_answers",
        "nested",
    ),
    ({"reward_model": reward_model(others='"a"')}, "reward_model.candidate_answers", "not a list"),
    (
        {"reward_model": reward_model(others='[{"a": 1}]')},
        "reward_model.candidate_answers",
        "not dict",
    ),
    ({"reward_model": reward_model(others="[true]")}, "reward_model.candidate_answers", "not bool"),
    (
        {"reward_model": reward_model(others='["\\ud83c"]')},
        "reward_model.candidate_answers",
        "surrogate",
    ),
    ({"images": []}, "images", "has no image"),
    ({"images": None}, "images", "has no image"),
    ({"images": [{"bytes": None, "path": None}]}, "images[0]", "has neither bytes nor path"),
    ({"images": [{"bytes": b"", "path": None}]}, "images[0]", "has neither bytes nor path"),
    ({"images": [{"bytes": None, "path": "no.png"}]}, "images[0]", "no.png: no such file"),
    ({"images": [{"bytes": b"<html>", "path": None}]}, "images[0]", "not an image"),
    (
        {"images": [{"bytes": png(), "path": None}, {"bytes": png()[:99], "path": None}]},
        "images[1]",
        "cannot be decoded",
    ),
    ({"images": [{"bytes": LONG, "path": None}]}, "images[0]", "aspect ratio is more than 200"),
]


def test_bad_rows_are_reported_once_and_skipped(tmp_path, capsys):
    rows = [row(999)]
    for number, (fields, _, _) in enumerate(BAD):
        rows += [row(number, **fields), row(1000 + number)]
    path = write_rows(tmp_path / "bad.parquet", rows, row_group_size=7)
    source = QuestionSource(path, max_bad_rows=len(BAD))
    expected = ["id999", *(f"id{1000 + number}" for number in range(len(BAD)))]
    assert ids(validation(source)) == expected
    assert ids(validation(source)) == expected  # again: nothing is reported twice
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(BAD) == len(source.bad_rows)
    for number, (_, field, reason) in enumerate(BAD):
        (bad,) = [bad for bad in source.bad_rows if bad.row == 1 + 2 * number]
        assert bad.file == str(path) and bad.field == field and reason in bad.reason
        assert f"{path}, row {bad.row}: {field}: {bad.reason}; skipped" in lines


def test_a_row_with_invalid_utf8_is_skipped(tmp_path):
    table = pa.Table.from_pylist([row(1), row(2)])
    broken = pa.array([b"\xff\xfe", b"id2"]).view(pa.string())
    table = table.set_column(0, "data_id", broken)
    parquet.write_table(table, tmp_path / "a.parquet")
    source = QuestionSource(tmp_path / "a.parquet")
    assert source.bad_rows == [BadRow(str(tmp_path / "a.parquet"), 0, "data_id", "not UTF-8")]
    assert ids(source) == ["id2"]


def test_more_than_max_bad_rows_is_an_error(tmp_path):
    bad = [row(i, reward_model=reward_model("")) for i in range(3)]
    path = write_rows(tmp_path / "a.parquet", [*bad, row(9)])
    assert len(QuestionSource(path, max_bad_rows=3)) == 1
    with pytest.raises(DataError, match=r"config\.data\.max_bad_rows=2; .*row 2: reward_model"):
        QuestionSource(path, max_bad_rows=2)


def test_invalid_images_count_as_bad_rows(tmp_path):
    write_parquet(tmp_path / "a.parquet", [question(0), damaged(1), damaged(2), question(3)])
    assert len(list(QuestionSource(tmp_path, max_bad_rows=2))) == 2
    with pytest.raises(DataError, match=r"max_bad_rows=1; .*row 2: images\[0\]"):
        list(QuestionSource(tmp_path, max_bad_rows=1))
    stream = batches(QuestionSource(tmp_path, max_bad_rows=1), 4, seed=0)
    with pytest.raises(DataError, match="max_bad_rows=1"):
        next(stream)
    stream.close()


def test_a_file_without_any_valid_image_is_an_error_when_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", [damaged(1), damaged(2)])
    source = QuestionSource(tmp_path)
    with pytest.raises(DataError, match="no row has valid images"):
        source.read([1])
    assert list(validation(source)) == []


def test_images_above_max_file_pixels_are_skipped(tmp_path):
    write_parquet(tmp_path / "a.parquet", [question(0), question(1, images=(png(1, (40, 40)),))])
    assert ids(QuestionSource(tmp_path, max_file_pixels=1599)) == ["id0"]
    assert ids(QuestionSource(tmp_path, max_file_pixels=1600)) == ["id0", "id1"]


# Bad files


@pytest.mark.parametrize("column", ["prompt", "images", "reward_model"])
def test_a_missing_column_is_reported_before_any_row_is_read(tmp_path, capsys, column):
    write_rows(tmp_path / "a.parquet", [row(reward_model=reward_model(""))])
    rows = [{k: v for k, v in row().items() if k != column}]
    path = write_rows(tmp_path / "b.parquet", rows)
    with pytest.raises(DataError) as error:
        QuestionSource(tmp_path)
    assert str(error.value).startswith(f"{path}: no column '{column}'; it has data_id, ")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"reward_model": {"style": "rule"}},
            "'reward_model' must be {ground_truth}; it is struct<",
        ),
        ({"reward_model": "gold"}, "'reward_model' must be {ground_truth}; it is string"),
        ({"prompt": "What?"}, "'prompt' must be a list of {content, role}; it is string"),
        (
            {"prompt": {"content": "a", "role": "user"}},
            "'prompt' must be a list of {content, role}",
        ),
        ({"images": [b"bytes"]}, "'images' must be a list of {bytes}; it is list<"),
    ],
)
def test_a_column_of_the_wrong_type_is_an_error(tmp_path, fields, message):
    write_rows(tmp_path / "a.parquet", [row(**fields)])
    with pytest.raises(DataError) as error:
        QuestionSource(tmp_path)
    assert message in str(error.value) and "a.parquet" in str(error.value)


def test_missing_empty_and_truncated_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="nowhere: no parquet file found"):
        QuestionSource(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no parquet file found"):
        QuestionSource(tmp_path)
    with pytest.raises(DataError, match="no parquet file given"):
        QuestionSource([])
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="text.parquet: not a readable parquet file"):
        QuestionSource(tmp_path)
    (tmp_path / "text.parquet").unlink()
    write_parquet(tmp_path / "cut.parquet", [question(i) for i in range(3)])
    data = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-100])
    with pytest.raises(DataError, match="cut.parquet: not a readable parquet file"):
        QuestionSource(tmp_path)


def test_a_file_that_changes_while_in_use_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [question(0), question(1)])
    source = QuestionSource(path)
    write_parquet(path, [question(1), question(0), question(2)])
    with pytest.raises(DataError, match="a.parquet: changed while in use"):
        source.read([0])
    path.unlink()
    with pytest.raises(DataError, match="a.parquet: cannot be read"):
        source.read([0])


def test_a_file_that_is_corrupt_inside_is_an_error_when_read(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [question(i) for i in range(4)])
    data, stat = bytearray(path.read_bytes()), path.stat()
    start = parquet.ParquetFile(path).metadata.row_group(0).column(5).data_page_offset
    data[start : start + 40] = b"\xff" * 40  # the header of the first page of images
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="a.parquet: cannot be read"):
        QuestionSource(path).read([0])


# Writing, and several files


def test_written_questions_are_read_back(tmp_path):
    written = [
        question(0),
        question(1, answers=("only",), category="", images=(png(1), png(2))),
        question(2, question='"Où?" <b>\n' * 3, answers=("ß", "\U0001f1ea", "x\ty")),
    ]
    path = tmp_path / "a.parquet"
    assert write_parquet(path, iter(written)) == 3
    assert os.listdir(tmp_path) == ["a.parquet"]
    read = [dataclasses.replace(q, file="", row=0) for q in QuestionSource(path)]
    expected = [dataclasses.replace(q, question=q.question.strip()) for q in written]
    assert read == expected
    table, released = parquet.read_table(path), row()
    assert set(table.column_names) == set(released)
    assert set(table.to_pylist()[0]["reward_model"]) == set(released["reward_model"])


def test_a_failed_write_leaves_no_file(tmp_path):
    def questions():
        yield question(0)
        raise RuntimeError("curation failed")

    with pytest.raises(RuntimeError, match="curation failed"):
        write_parquet(tmp_path / "a.parquet", questions())
    assert os.listdir(tmp_path) == []


def test_questions_are_indexed_across_files_and_row_groups(tmp_path):
    rows = [row(i) for i in range(30)]
    for name, part, size in (("b", rows[20:], 3), ("a", rows[:20], 6)):
        write_rows(tmp_path / f"{name}.parquet", part, row_group_size=size)
    expected = [f"id{i}" for i in range(30)]
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for paths in (tmp_path, f"{tmp_path}/*.parquet", [a, str(b)], [a, tmp_path]):
        assert ids(QuestionSource(paths)) == expected
    source = QuestionSource(str(tmp_path))
    assert ids(QuestionSource([b, a])) == expected[20:] + expected[:20]
    rng = np.random.default_rng(0)
    for _ in range(10):
        numbers = rng.integers(-30, 30, rng.integers(1, 12)).tolist()
        read = source.read(numbers)
        assert ids(read) == [expected[n] for n in numbers]
        assert [q.images for q in read] == [(png(n % 30),) for n in numbers]
    for number in (-31, 30):
        with pytest.raises(IndexError):
            source[number]
