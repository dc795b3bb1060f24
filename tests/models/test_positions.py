"""M-RoPE positions equal those of `transformers` for images at any position."""

import numpy as np
import pytest

from mmsr1_jax.models.positions import mrope_positions
from mmsr1_jax.scripts import random_policy
from tests.reference import SMALL, random_conversation, torch, torch_inputs, torch_model

CONFIG = random_policy.CONFIG


def random_layout(rng):
    """Return texts and images in any order; images may be first, last and adjacent."""
    layout = []
    for _ in range(rng.integers(1, 9)):
        if rng.random() < 0.5:
            layout.append(int(rng.integers(1, 40)))
        else:
            layout.append((int(rng.integers(1, 12)), int(rng.integers(1, 12))))
    return layout


def positions(prompt, **keywords):
    return mrope_positions(
        prompt.tokens, prompt.grids, image_token_id=CONFIG.image_token_id, **keywords
    )


@pytest.fixture(scope="module", params=SMALL)
def reference(request):
    return torch_model(random_policy.random_model(SMALL[request.param], seed=0)).model


def test_random_layouts_match_transformers(reference):
    """Both families have the same positions, and the same ids of control tokens in tests."""
    rng = np.random.default_rng(0)
    with_images = 0
    for _ in range(200):
        prompt = random_conversation(rng, CONFIG, random_layout(rng))
        inputs = torch_inputs(prompt, CONFIG)
        expected, delta = reference.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
        )
        ours, following = positions(prompt)
        np.testing.assert_array_equal(ours, expected[:, 0])
        assert following == len(prompt.tokens) + int(delta)
        with_images += bool(prompt.images)
    assert with_images > 100


def test_positions_can_be_computed_turn_by_turn():
    rng = np.random.default_rng(1)
    for _ in range(50):
        turns = [random_conversation(rng, CONFIG, random_layout(rng)) for _ in range(3)]
        parts, start = [], 0
        for turn in turns:
            part, start = positions(turn, start=start)
            parts.append(part)
        expected, following = mrope_positions(
            np.concatenate([t.tokens for t in turns]),
            [g for t in turns for g in t.grids],
            image_token_id=CONFIG.image_token_id,
        )
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
        assert following == start


def test_frames_advance_the_temporal_position(reference):
    """An image of several frames, as in `transformers` without a time scale."""
    tokens = np.array([7, *[CONFIG.image_token_id] * 12, 8])
    ours, _ = mrope_positions(tokens, [(2, 4, 6)], image_token_id=CONFIG.image_token_id)
    ids = torch.tensor(tokens)[None]
    expected, _ = reference.get_rope_index(
        ids, (ids == CONFIG.image_token_id).int(), torch.tensor([[2, 4, 6]])
    )
    np.testing.assert_array_equal(ours, expected[:, 0])


def test_placeholders_must_match_the_images():
    image = CONFIG.image_token_id
    with pytest.raises(ValueError, match="3 image placeholders .* 4 merged tokens"):
        mrope_positions(np.array([9, image, image, image]), [(1, 4, 4)], image_token_id=image)
    with pytest.raises(ValueError, match="image at token 0 are not contiguous"):
        mrope_positions(np.array([image, 9, image]), [(1, 4, 2)], image_token_id=image)
