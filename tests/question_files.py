"""Builders of questions and of parquet files for the tests."""

import io

import numpy as np
import PIL.Image
import pyarrow as pa
from pyarrow import parquet

from mmsr1_jax.data import (
    Question,
    QuestionSource,
)


def png(seed=0, size=(8, 6), kind="png"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def question(number, **fields):
    defaults = {
        "id": f"id{number}",
        "question": f"What is it? {number}",
        "images": (png(number),),
        "answers": (f"gold {number}", f"alias {number}"),
        "source": "made",
        "category": "search_free",
    }
    return Question(**(defaults | fields))


def row(number=0, **fields):
    """Return a row like those of the released files, with some fields replaced."""
    return {
        "data_id": f"id{number}",
        "category": "search_free",
        "data_source": "made",
        "prompt": [{"content": f"What is it? {number}", "role": "user"}],
        "images": [{"bytes": png(number), "path": None}],
        "reward_model": {
            "candidate_answers": '["alias"]',
            "ground_truth": "gold",
            "style": "rule",
        },
        "image_urls": None,
    } | fields


def reward_model(truth="gold", others="[]"):
    return {"candidate_answers": others, "ground_truth": truth, "style": "rule"}


def write_rows(path, rows, **options):
    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def damaged(number):
    """Return a question with a truncated image."""
    return question(number, images=(png(number, (40, 40))[:400],))


def ids(questions):
    return [q.id for q in questions]


def read_row(tmp_path, **fields):
    """Write a file of one `row`, and return its question."""
    (read,) = QuestionSource(write_rows(tmp_path / "one.parquet", [row(**fields)]), max_bad_rows=0)
    return read
