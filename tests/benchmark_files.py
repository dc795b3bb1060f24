"""Builders of benchmark rows and files in their published formats."""

import base64
import functools
import io

import numpy as np
import PIL.Image
import pyarrow as pa
from pyarrow import parquet


@functools.cache
def png(seed=0, size=(60, 80)):
    """Return a PNG of random pixels; `size` is (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()


def hf_image(data):
    """Return an image in the form in which HF data sets store it in parquet."""
    return {"bytes": data, "path": None}


def mmsearch(number=0, **fields):
    return {
        "sample_id": f"s{number}",
        "query": f" Who won? {number} ",
        "query_image": hf_image(png(number)),
        "image_search_result": hf_image(png(99)),
        "area": "news",
        "subfield": "sports",
        "timestamp": "2024-08",
        "gt_requery": "winner",
        "gt_answer": "Ann",
        "alternative_gt_answers": ["Ann Lee", "Ann", ""],
    } | fields


def simplevqa(number=0, **fields):
    return {
        "data_id": number,
        "image": base64.b64encode(png(number)).decode(),
        "image_description": "",
        "language": "EN",
        "question": "What is it?",
        "answer": "a lighthouse",
        "original_category": "x",
        "source": "x",
        "atomic_question": "",
        "atomic_fact": "",
        "vqa_category": "object",
    } | fields


TEN = ["surf"] * 4 + ["surfing"] * 3 + ["sea", "", "water"]


def okvqa(number=0, **fields):
    return {
        "question_id": f"{number}",
        "image": hf_image(png(number)),
        "question": "What sport is this?",
        "answers": TEN,
        "question_type": "four",
        "answer_type": "other",
    } | fields


def slidevqa(number=0, pages=20, **fields):
    slides = {
        f"page_{page}": hf_image(png(page, (225, 300))) if page <= pages else None
        for page in reversed(range(1, 21))  # columns in reverse order
    }
    return {
        "qa_id": number,
        "question": "How many users?",
        "answer": "3 million users",
        "arithmetic_expression": "None",
        "evidence_pages": [1],
        "reasoning_type": "Single-Hop",
        **slides,
    } | fields


def mmlongbench(**fields):
    return {
        "doc_id": "report.pdf",
        "doc_type": "Research report / Introduction",
        "question": "Which year?",
        "answer": "2015",
        "evidence_pages": "[5]",
        "evidence_sources": "['Chart']",
        "answer_format": "Int",
    } | fields


def livevqa(number=0, **fields):
    return {
        "sample_id": f"{number}",
        "query": "Where is it?",
        "query_image": "/image/a.png",
        "gt_answer": "Augusta",
    } | fields


def write_table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def write_pdf(path, sizes):
    """Write a PDF whose pages have these (height, width) in points and different colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = [
        PIL.Image.new("RGB", (width, height), (40 * number, 0, 200))
        for number, (height, width) in enumerate(sizes)
    ]
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=72)
    return path
