"""Images of a row share groups of slots, and an image does not depend on the others."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.models import attention as attention_module
from mmsr1_jax.models.image_rows import num_windows, pack_images, place_windows
from mmsr1_jax.scripts import random_policy
from tests.reference import SMALL

CONFIG = random_policy.CONFIG.vision
NO_WINDOWS = SMALL["qwen3_vl"].vision
SIZES = [(1, 9), (5, 3), (7, 6), (2, 2), (2, 3, 2), (4, 4)]  # in merged tokens, and frames


def make_images(sizes=SIZES, config=CONFIG):
    rng = np.random.default_rng(0)
    grids = [((*size, 1)[2], 2 * size[0], 2 * size[1]) for size in sizes]
    return [
        (rng.normal(size=(int(np.prod(grid)), config.patch_dim)).astype(np.float32), grid)
        for grid in grids
    ]


def encode(tower, rows, windows, implementation="xla"):
    """Return the merged tokens of each image, float32[M, D], row after row."""
    graph, params = nnx.split(tower)
    images, indices = pack_images(rows, windows, tower.config)
    tokens = jax.jit(
        lambda params, images: nnx.merge(graph, params)(
            images, np.float32, implementation=implementation
        )
    )(params, images)
    return [
        part
        for row, images, index in zip(np.asarray(tokens), rows, indices, strict=True)
        for part in np.split(row[index], np.cumsum([len(p) // 4 for p, _ in images])[:-1])
    ]


@pytest.fixture(scope="module")
def tower():
    return random_policy.random_model(random_policy.CONFIG, seed=3).vision


def test_images_of_a_tower_without_windows_equal_images_one_by_one():
    """Images are placed one after another, and groups of slots are split between them."""
    tower = random_policy.random_model(SMALL["qwen3_vl"], seed=3).vision
    images = make_images(config=NO_WINDOWS)
    required = num_windows((grid for _, grid in images), NO_WINDOWS)
    assert required == -(-sum(len(patches) for patches, _ in images) // 64) == 7
    alone = encode(tower, [[image] for image in images], required)
    assert alone[0].shape[1] == NO_WINDOWS.token_width == 3 * NO_WINDOWS.out_hidden_size
    for order in (range(6), [3, 0, 5, 1, 4, 2]):
        together = encode(tower, [[images[i] for i in order]], required)
        for index, tokens in zip(order, together, strict=True):
            np.testing.assert_allclose(tokens, alone[index], rtol=0, atol=2e-5)


def test_images_that_share_windows_equal_images_one_by_one(tower):
    images = make_images()
    required = num_windows((grid for _, grid in images), CONFIG)
    assert required == 7 < sum(num_windows([grid], CONFIG) for _, grid in images)
    alone = encode(tower, [[image] for image in images], required)
    for order in (range(6), [3, 0, 5, 1, 4, 2]):
        together = encode(tower, [[images[i] for i in order]], required)
        for index, tokens in zip(order, together, strict=True):
            np.testing.assert_allclose(tokens, alone[index], rtol=0, atol=2e-5)


def test_splash_separates_windows_by_their_ids(tower, monkeypatch):
    interpreted = functools.partial(attention_module._splash, interpret=True)
    monkeypatch.setattr(attention_module, "_splash", interpreted)
    rows = [make_images([(5, 3), (2, 2), (1, 6)])]
    ours, expected = (encode(tower, rows, 2, name) for name in ("splash", "xla"))
    for tokens, image in zip(ours, expected, strict=True):
        np.testing.assert_allclose(tokens, image, rtol=0, atol=2e-5)


def test_windows_are_placed_by_first_fit_decreasing():
    sizes = np.array([16, 64, 48, 16, 12, 64, 20], np.int32)
    starts, groups = place_windows(sizes, CONFIG)
    assert starts.tolist() == [128 + 48, 0, 128, 192 + 20, 192 + 36, 64, 192]
    assert groups == 4
    assert place_windows(sizes[:0], CONFIG)[1] == num_windows([], CONFIG) == 0


def test_the_layout_of_a_row():
    """Two images of 10 x 6 and 4 x 4 patches, as in the module's docstring."""
    images = make_images([(5, 3), (2, 2)])
    rows, (index, empty) = pack_images([images, []], 2, CONFIG)
    expected = np.repeat([1, 2, 1, 0], [48, 16, 12, 52])
    assert rows.segment_ids.tolist() == [expected.tolist(), [0] * 128]
    assert rows.window_ids[0].tolist() == np.repeat([1, 2, 3, 0], [48, 16, 12, 52]).tolist()
    # The last row of the first image's tokens is a window of its own, and the processor's last.
    assert index.tolist() == [*range(12), 16, 17, 18, *range(12, 16)] and not len(empty)
    tokens = np.concatenate([patches.reshape(-1, 4, CONFIG.patch_dim) for patches, _ in images])
    np.testing.assert_array_equal(rows.patches[0].reshape(-1, 4, CONFIG.patch_dim)[index], tokens)
    assert rows.positions[0, [0, 64]].tolist() == [[0, 0], [8, 0]]


def test_images_that_do_not_fit_are_rejected():
    with pytest.raises(ValueError, match="row 1: images of 2 windows, of at most 1"):
        pack_images([[], make_images([(5, 3), (2, 2)])], 1, CONFIG)


def test_the_layout_of_a_row_without_windows():
    images = make_images([(5, 3), (2, 2, 2)], NO_WINDOWS)
    rows, (index, empty) = pack_images([images, []], 2, NO_WINDOWS)
    assert rows.window_ids is None
    assert rows.segment_ids.tolist() == [
        np.repeat([1, 2, 3, 0], [60, 16, 16, 36]).tolist(),
        [0] * 128,
    ]
    assert index.tolist() == list(range(23)) and not len(empty)
    patches = np.concatenate([patches for patches, _ in images])
    np.testing.assert_array_equal(rows.patches[0, :92], patches)
    assert rows.sizes[0].tolist() == [[10, 6]] * 60 + [[4, 4]] * 32 + [[1, 1]] * 36
    with pytest.raises(ValueError, match="row 0: images of 2 windows, of at most 1"):
        pack_images([images], 1, NO_WINDOWS)


def test_learned_positions_are_interpolated_as_torch_does():
    """A small grid is stretched and a large one is shrunk; their corners coincide."""
    torch = pytest.importorskip("torch")
    tower = random_policy.random_model(SMALL["qwen3_vl"], seed=3).vision
    side, D = NO_WINDOWS.position_side, NO_WINDOWS.hidden_size
    table = np.asarray(tower.position_embedding.get_value()).reshape(1, side, side, D)
    grid = torch.tensor(table).permute(0, 3, 1, 2)
    for rows, columns in ((1, 3), (7, 2), (3, 5)):
        (patches, size) = make_images([(rows, columns)], NO_WINDOWS)[0]
        images, _ = pack_images([[(patches, size)]], 2, NO_WINDOWS)
        ours = np.asarray(tower._learned_positions(images))[0, : len(patches)]
        expected = torch.nn.functional.interpolate(
            grid, size=size[1:], mode="bilinear", align_corners=True
        )[0]
        y, x = images.positions[0, : len(patches)].T
        np.testing.assert_allclose(ours, expected[:, y, x].T, atol=1e-5, rtol=0)
