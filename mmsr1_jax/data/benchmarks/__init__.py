"""Benchmarks: readers of their published files (`readers`), fitting of document pages into a token
budget (`pages`), and scoring of answers (`scores`).
"""

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
