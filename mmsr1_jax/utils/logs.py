"""Logging: the logger of the package, whose lines go to stderr through absl's handler.

    from mmsr1_jax.utils.logs import log

    log.warning("step %d: dropped %d of %d episodes", step, dropped, total)

The logger is not absl's own, which Orbax and other libraries write to as well.
"""

import io
import logging
import sys

from absl import logging as absl_logging
from tqdm import tqdm

log = logging.getLogger("mmsr1_jax")


class _AboveProgressBars(io.TextIOBase):
    """Text stream that writes lines to the current `sys.stderr`, above active progress bars."""

    def write(self, text: str) -> int:
        tqdm.write(text, file=sys.stderr, end="")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def close(self) -> None:
        """Do nothing: the stream is not ours, and logging may close its handlers early."""


def set_up() -> None:
    """Send log lines to stderr without a prefix: ours from level INFO, others from WARNING."""
    handler = absl_logging.get_absl_handler()
    handler.python_handler.setStream(_AboveProgressBars())
    handler.setFormatter(logging.Formatter("%(message)s"))
    absl_logging.use_absl_handler()
    for name in ("jax", "absl"):  # JAX logs every missing backend, and Orbax every written file
        logging.getLogger(name).setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
