"""Episodes are packed into rows into which they fit."""

import numpy as np
import pytest

from mmsr1_jax.processing.batching import TooLongError
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.rl import packing
from tests.reference import random_conversation
from tests.rl.learners import CONFIG, make_samples


def test_first_fit_fills_rows_of_realistic_lengths():
    """Lengths like those of the published run: prompts with an image and up to two searches."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([
        rng.integers(500, 1500, 160), rng.integers(1200, 3500, 60), rng.integers(2500, 8192, 36)
    ])  # fmt: skip
    windows = rng.integers(24, 96, len(lengths))
    side = CONFIG.vision.window_side * CONFIG.vision.merge_size
    items = []
    for index, (length, width) in enumerate(zip(lengths.tolist(), windows.tolist(), strict=True)):
        patches = np.broadcast_to(np.float32(0), (width * side**2, 1))
        items.append((length, {str(index): Patches(patches, (1, side, width * side))}))
    rows = packing.first_fit(items, CONFIG, packing.RowShape(1, 8192, 768))
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= 8192 and windows[row].sum() <= 768 for row in rows)
    assert lengths.sum() / (len(rows) * 8192) >= 0.9


def test_small_images_of_several_episodes_share_the_windows_of_a_row():
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(5):
        prompt = random_conversation(rng, CONFIG, [4, (2, 2), 5])
        ones = np.ones(len(prompt.tokens), np.float32)
        samples.append(
            packing.Sample(
                prompt=prompt, mask=ones > 0, weights=ones, advantages=ones, rollout_logprobs=ones
            )
        )
    batches = packing.pack(samples, CONFIG, packing.RowShape(1, 100, 1))
    segments = [batch.rows.images.segment_ids for batch in batches]
    assert [ids.max() for ids in segments] == [4, 1] and (segments[0] > 0).all()


def test_episodes_longer_than_a_row_are_rejected():
    prompt = make_samples(CONFIG, 1)[0].prompt
    with pytest.raises(TooLongError, match="60 tokens, more than update.pack_length=50"):
        packing.check_fits(prompt, CONFIG, packing.RowShape(1, 50, 16))
    with pytest.raises(TooLongError, match="image windows, more than update.pack_windows=1"):
        packing.check_fits(prompt, CONFIG, packing.RowShape(1, 500, 1))
