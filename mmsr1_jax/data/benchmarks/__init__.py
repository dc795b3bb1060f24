"""Benchmarks: questions from their published files (`readers`), how many pages fit (`pages`), and
how their answers are scored (`scores`)."""

from mmsr1_jax.data.benchmarks.pages import Fit, fit_pages, page_processor
from mmsr1_jax.data.benchmarks.readers import (
    NAMES,
    OF_DOCUMENTS,
    BenchmarkQuestion,
    files,
    read,
    score,
)
from mmsr1_jax.data.benchmarks.scores import accuracy_and_f1

__all__ = [
    "NAMES",
    "OF_DOCUMENTS",
    "BenchmarkQuestion",
    "Fit",
    "accuracy_and_f1",
    "files",
    "fit_pages",
    "page_processor",
    "read",
    "score",
]
