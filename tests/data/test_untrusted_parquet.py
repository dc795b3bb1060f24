"""Data sets from untrusted sources: bounded memory, and rows with long cells are skipped."""

import os
import subprocess
import sys

import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmsr1_jax.data import DataError
from mmsr1_jax.data.benchmarks import tables
from mmsr1_jax.data.questions import QuestionSource

IMAGES = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
PNG = [{"bytes": b"x", "path": None}]


def questions(path, prompts, images=None, answers=None, **options):
    count = len(prompts)
    columns = {
        "prompt": pa.array([[{"content": text, "role": "user"}] for text in prompts]),
        "images": images or pa.array([PNG] * count, IMAGES),
        "reward_model": pa.array(answers or [{"ground_truth": "x"}] * count),
    }
    parquet.write_table(pa.table(columns), path, compression="zstd", **options)
    return path


def one_picture_named(count, size):
    """Rows with the same image, stored once."""
    data = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [b"\0" * size])
    rows = pa.StructArray.from_arrays([data, pa.nulls(count, pa.string())], ["bytes", "path"])
    return pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), rows)


def bombs(folder):
    """Files of some kilobytes, what they would take, and the column that the error names."""
    q = "What?"
    yield "prompt", questions(folder / "cell", ["a" * (80 << 20)])
    yield "prompt", questions(folder / "plain", ["a" * (80 << 20)], use_dictionary=False)
    yield "prompt", questions(folder / "same", ["a" * 900_000] * 100)
    yield "images", questions(folder / "image", [q], pa.array([[{"bytes": b"\0" * (80 << 20),
                              "path": None}]], IMAGES), use_dictionary=False)  # fmt: skip
    yield "images", questions(folder / "named", [q] * 64, one_picture_named(64, 4_000_000),
                              dictionary_pagesize_limit=1 << 30)  # fmt: skip
    yield "reward_model", questions(folder / "answers", [q], answers=[
        {"ground_truth": "x", "candidate_answers": ["a"] * 1_200_000}])  # fmt: skip
    nulls = pa.nulls(10_000_000)
    parquet.write_table(
        pa.table({"prompt": nulls, "images": nulls, "reward_model": nulls}), folder / "rows"
    )
    yield "rows", folder / "rows"


MEASURE = """
import resource, sys
from mmsr1_jax.data.questions import DataError, QuestionSource
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
QuestionSource(sys.argv[1], max_bad_rows=9)
for path in sys.argv[2:]:
    before = peak()
    try: list(QuestionSource(path))
    except DataError as error: print((peak() - before) // 1024, error)
"""


def test_small_files_cannot_take_much_memory(tmp_path):
    small = questions(tmp_path / "small", ["What?"])
    paths = dict((path, column) for column, path in bombs(tmp_path))
    assert all(path.stat().st_size < 100_000 for path in paths)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, *paths], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths), done.stdout + done.stderr
    for (path, column), line in zip(paths.items(), lines, strict=True):
        taken, error = line.split(" ", 1)
        assert int(taken) < 200 and str(path) in error and column in error, line


def test_rows_with_long_cells_are_skipped_and_reported(tmp_path):
    image = tmp_path / "a.png"
    PIL.Image.new("RGB", (40, 40)).save(image)
    images = [[{"bytes": image.read_bytes(), "path": None}]] * 6
    images[4] = images[0] * 1001
    answers = [{"ground_truth": "x", "candidate_answers": answer}
               for answer in (None, None, ["a"] * 1001, ["a" * 600_000] * 2, [], [])]  # fmt: skip
    prompts = ["a" * 300_000, "a" * 1_000_001, "b", "c", "d", "e"]
    path = questions(tmp_path / "a.parquet", prompts, pa.array(images, IMAGES), answers,
                     use_dictionary=False)  # fmt: skip
    source = QuestionSource(path)
    assert [question.row for question in source] == [0, 5]
    assert [(bad.row, bad.field) for bad in source.bad_rows] == [
        (1, "prompt"), (2, "reward_model"), (3, "reward_model"), (4, "images")
    ]  # fmt: skip
    assert all("more than 1000 items" in bad.reason for bad in source.bad_rows)


def test_questions_do_not_depend_on_the_parquet_encoding(tmp_path):
    texts = [f"question {number % 7} " + "x" * (number % 50) for number in range(3000)]
    answers = [{"ground_truth": str(number % 3), "candidate_answers": ["a", str(number)]}
               for number in range(3000)]  # fmt: skip
    contents = []
    for number, options in enumerate((
        {"use_dictionary": False}, {"row_group_size": 700},
        {"dictionary_pagesize_limit": 500, "data_page_size": 1000, "row_group_size": 1300},
    )):  # fmt: skip
        path = questions(tmp_path / f"{number}.parquet", texts, answers=answers, **options)
        read = QuestionSource(path, max_bad_rows=3000)._questions
        contents.append([(question.question, question.answers) for question in read])
    assert contents[0] == contents[1] == contents[2]
    assert [question for question, _ in contents[0]] == [text.strip() for text in texts]


def test_benchmark_tables_are_bounded(tmp_path):
    path = tmp_path / "a.parquet"
    data = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), [b"\0" * 30_000_000])
    for column in (data, pa.array([b"\0" * (80 << 20)])):
        table = pa.table({"question": pa.array(["q"] * len(column)), "image": column})
        parquet.write_table(
            table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30
        )
        with pytest.raises(DataError, match="a.parquet: row group 0, column 'image'"):
            list(tables.open_rows(path, {"question": "text", "image": "image"}))
