"""Questions: parquet files in veRL's schema (`parquet`), their order in training (`questions`),
published benchmarks (`benchmarks/`), selection of questions (`curation`), and the embedded task
(`tiny_world/`).

Used by the commands, training and evaluation.
"""

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
