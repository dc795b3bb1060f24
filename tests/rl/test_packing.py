"""Episodes are packed into rows into which they fit."""

import numpy as np
import pytest

from mmsr1_jax.processing.batching import TooLongError
from mmsr1_jax.rl import packing
from tests.rl.learners import CONFIG, make_samples


def test_first_fit_fills_rows_of_realistic_lengths():
    """Lengths like those of the published run: prompts with an image and up to two searches."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([
        rng.integers(500, 1500, 160), rng.integers(1200, 3500, 60), rng.integers(2500, 8192, 36)
    ])  # fmt: skip
    windows = rng.integers(24, 96, len(lengths))
    rows = packing.first_fit(list(zip(lengths.tolist(), windows.tolist(), strict=True)), 8192, 768)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= 8192 and windows[row].sum() <= 768 for row in rows)
    assert lengths.sum() / (len(rows) * 8192) >= 0.9


def test_episodes_longer_than_a_row_are_rejected():
    prompt = make_samples(CONFIG, 1)[0].prompt
    with pytest.raises(TooLongError, match="60 tokens, more than update.pack_length=50"):
        packing.check_fits(prompt, CONFIG, packing.RowShape(1, 50, 16))
    with pytest.raises(TooLongError, match="image windows, more than update.pack_windows=1"):
        packing.check_fits(prompt, CONFIG, packing.RowShape(1, 500, 1))
