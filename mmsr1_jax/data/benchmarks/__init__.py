"""Benchmarks: readers of their published files (`readers`), fitting of document pages into a token
budget (`pages`), and grading of answers (`grading`).
"""

from mmsr1_jax.data.benchmarks.grading import accuracy_and_f1
from mmsr1_jax.data.benchmarks.pages import PageFit, fit_pages, page_processor
from mmsr1_jax.data.benchmarks.readers import (
    DOCUMENT_BENCHMARKS,
    NAMES,
    BenchmarkQuestion,
    files,
    grader,
    read,
)

__all__ = [
    "DOCUMENT_BENCHMARKS",
    "NAMES",
    "BenchmarkQuestion",
    "PageFit",
    "accuracy_and_f1",
    "files",
    "fit_pages",
    "grader",
    "page_processor",
    "read",
]
