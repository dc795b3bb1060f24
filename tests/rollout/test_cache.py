"""A conversation that is extended in a lane has the logits of a single forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.models.qwen2_5_vl import mrope_positions
from mmsr1_jax.models.qwen2_5_vl.vision import pack_images
from mmsr1_jax.processing.batching import Bucket, make_rows
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.rollout import cache
from mmsr1_jax.scripts import random_policy
from tests.reference import random_conversation

CONFIG = random_policy.CONFIG
LANES, CAPACITY, ROWS, WINDOWS = 5, 256, 2, 6
IMAGE_TOKENS = WINDOWS * CONFIG.vision.window_patches // CONFIG.vision.merge_size**2
# Lengths of text and grids of images in three turns of two conversations.
TURNS = [
    [[7, (3, 5), 11], [9], [5, (2, 3), 4, (4, 5), 6]],
    [[30, (4, 4), 3], [12, (2, 2), 5], [8]],
]


@pytest.fixture(scope="module")
def model():
    return random_policy.random_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def programs(model):
    graph, params = nnx.split(model)

    def merged(function):
        return functools.partial(
            jax.jit(lambda params, *args: function(nnx.merge(graph, params), *args)), params
        )

    def next_logits(model, lanes, new):
        hidden, lanes = cache.extend(model, lanes, *new)
        return model.logits(hidden[:, None])[:, 0], lanes

    return {
        "extend": merged(next_logits),
        "encode": merged(lambda model, images: model.encode_images(images)),
        "forward": merged(lambda model, rows: model.logits(model(rows)[0])),
    }


def turns_of(which):
    rng = np.random.default_rng(which)
    return [random_conversation(rng, CONFIG, layout) for layout in TURNS[which]]


def join(turns):
    images = tuple(i for t in turns for i in t.images)
    return Prompt(np.concatenate([t.tokens for t in turns]), images)


def extension(programs, items, length):
    """Return the arguments of `extend` for (lane, turn, start position), and the next positions."""
    new = {
        "lane": np.full(ROWS, LANES, np.int32),
        "tokens": np.zeros((ROWS, length), np.int32),
        "count": np.zeros(ROWS, np.int32),
        "positions": np.zeros((ROWS, 3, length), np.int32),
        "image_index": np.full((ROWS, length), -1, np.int32),
    }
    following = []
    rows = [[(i.values, i.grid) for i in turn.images] for _, turn, _ in items]
    images, indices = pack_images(rows + [[]] * (ROWS - len(items)), WINDOWS, CONFIG.vision)
    for row, (lane, turn, start) in enumerate(items):
        T = len(turn.tokens)
        positions, after = mrope_positions(
            turn.tokens, turn.grids, image_token_id=CONFIG.image_token_id, start=start
        )
        following.append(after)
        new["lane"][row], new["count"][row] = lane, T
        new["tokens"][row, :T], new["positions"][row, :, :T] = turn.tokens, positions
        table = indices[row] + row * IMAGE_TOKENS
        new["image_index"][row, :T][turn.tokens == CONFIG.image_token_id] = table
    image_tokens = programs["encode"](images)
    assert image_tokens.shape[1] == IMAGE_TOKENS
    return (cache.PrefillBatch(**new), image_tokens.reshape(-1, image_tokens.shape[-1])), following


def full_logits(programs, prompt):
    bucket = Bucket(length=CAPACITY, windows=3 * WINDOWS, rows=1)
    logits = programs["forward"](make_rows([[prompt]], bucket, CONFIG, CONFIG.image_token_id))
    return np.asarray(logits[0, len(prompt.tokens) - 1])


def test_three_turns_with_images(model, programs):
    """Two conversations side by side in lanes 3 and 1, turn by turn, then token by token."""
    lanes = cache.allocate(model, LANES, CAPACITY)
    # Stale contents of the lanes must have no effect.
    lanes = lanes.replace(k=lanes.k + 9.0, v=lanes.v - 7.0)
    conversations = [turns_of(0), turns_of(1)]
    starts = [0, 0]
    for turn in range(3):
        items = [
            (lane, conversation[turn], start)
            for lane, conversation, start in zip((3, 1), conversations, starts, strict=True)
        ]
        new, starts = extension(programs, items, length=64)
        logits, lanes = programs["extend"](lanes, new)
        for row, conversation in enumerate(conversations):
            expected = full_logits(programs, join(conversation[: turn + 1]))
            np.testing.assert_allclose(logits[row], expected, atol=1e-4, rtol=0)
    prompts = [join(c) for c in conversations]
    lengths = [len(p.tokens) for p in prompts]
    assert cache.read(lanes).tolist() == [0, lengths[1], 0, lengths[0], 0]
    for _ in range(4):
        tokens = np.argmax(logits, axis=-1).astype(np.int32)
        items = [
            (lane, Prompt(np.asarray(tokens[row : row + 1]), ()), starts[row])
            for row, lane in enumerate((3, 1))
        ]
        if CONFIG.image_token_id in tokens:
            pytest.fail("the random policy sampled a placeholder; choose another seed")
        new, starts = extension(programs, items, length=1)
        logits, lanes = programs["extend"](lanes, new)
        prompts = [
            Prompt(np.append(p.tokens, tokens[row]), p.images) for row, p in enumerate(prompts)
        ]
        for row, prompt in enumerate(prompts):
            np.testing.assert_allclose(
                logits[row], full_logits(programs, prompt), atol=1e-4, rtol=0
            )


def test_forked_lanes_are_independent(model, programs):
    prompt, ours, theirs = turns_of(0)
    lanes = cache.allocate(model, LANES, CAPACITY)
    new, (start,) = extension(programs, [(0, prompt, 0)], length=64)
    _, lanes = programs["extend"](lanes, new)
    T, hidden = len(prompt.tokens), lanes.hidden[0]
    lanes = jax.jit(cache.fork)(lanes, 0, jnp.array([2, 4, LANES]), T, hidden)
    assert cache.read(lanes).tolist() == [T, 0, T, 0, T]
    new, _ = extension(programs, [(2, ours, start), (4, theirs, start)], length=64)
    logits, lanes = programs["extend"](lanes, new)
    for row, turn in enumerate((ours, theirs)):
        expected = full_logits(programs, join([prompt, turn]))
        np.testing.assert_allclose(logits[row], expected, atol=1e-4, rtol=0)
    new, _ = extension(programs, [(0, theirs, start)], length=64)
    again, _ = programs["extend"](lanes, new)  # the source lane is unchanged
    np.testing.assert_allclose(again[0], logits[1], atol=1e-5, rtol=0)


def test_a_cleared_lane_equals_a_new_one(model, programs):
    prompt = turns_of(1)[0]
    new, _ = extension(programs, [(2, prompt, 0)], length=64)
    fresh, lanes = programs["extend"](cache.allocate(model, LANES, CAPACITY), new)
    lanes = cache.clear(lanes, jnp.array([2]))
    again, _ = programs["extend"](lanes, new)
    np.testing.assert_array_equal(fresh[0], again[0])


def test_rows_do_not_depend_on_their_neighbours(model, programs):
    """Outputs are bit-identical alone, beside another row, and in another lane."""
    first, second = turns_of(0)[0], turns_of(1)[0]
    empty = cache.allocate(model, LANES, CAPACITY)
    alone, _ = programs["extend"](empty, extension(programs, [(0, first, 0)], 64)[0])
    beside, _ = programs["extend"](
        empty, extension(programs, [(4, first, 0), (1, second, 0)], 64)[0]
    )
    np.testing.assert_array_equal(alone[0], beside[0])
