"""Data: parquet files of questions (`parquet`), and their order in training (`questions`)."""

from mmsr1_jax.data.parquet import BadRow, DataError, Question, write_parquet
from mmsr1_jax.data.questions import Batches, QuestionSource, batches, validation

__all__ = [
    "BadRow",
    "Batches",
    "DataError",
    "Question",
    "QuestionSource",
    "batches",
    "validation",
    "write_parquet",
]
