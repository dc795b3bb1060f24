"""A conversation that is extended in a lane has the logits of a single forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.models.image_rows import pack_images
from mmsr1_jax.models.paged_attention import PagedRows
from mmsr1_jax.models.positions import mrope_positions
from mmsr1_jax.processing.batching import Bucket, make_rows
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.rollout import cache
from mmsr1_jax.scripts import random_policy
from tests.reference import FAMILIES_PROVED, FAMILIES_TESTED, SMALL, random_conversation

LANES, CAPACITY, ROWS, WINDOWS = 5, 256, 2, 6
PAGE, PAGES = 32, 8  # size of a page, pages of a lane
NUM_PAGES = LANES * PAGES
TABLE = np.random.default_rng(1).permutation(NUM_PAGES).reshape(LANES, PAGES).astype(np.int32)
IMAGE_TOKENS = WINDOWS * 16  # in WINDOWS groups of 64 patches
IMAGE_TOKEN = random_policy.CONFIG.image_token_id  # of both families
# Lengths of text and grids of images in three turns of two conversations.
TURNS = [
    [[7, (3, 5), 11], [9], [5, (2, 3), 4, (4, 5), 6]],
    [[30, (4, 4), 3], [12, (2, 2), 5], [8]],
]


@pytest.fixture(scope="module")
def model(request):
    return random_policy.random_model(SMALL[request.param], seed=3)


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
        "config": model.config,
        "extend": merged(next_logits),
        "encode": merged(lambda model, images: model.encode_images(images)),
        "forward": merged(lambda model, rows: model.logits(model(rows)[0])),
    }


def turns_of(model, which):
    rng = np.random.default_rng(which)
    return [random_conversation(rng, model.config, layout) for layout in TURNS[which]]


def join(turns):
    images = tuple(i for t in turns for i in t.images)
    return Prompt(np.concatenate([t.tokens for t in turns]), images)


def allocate(model):
    return cache.allocate(model.config.text, model.dtype, LANES, NUM_PAGES, PAGE)


def extension(programs, items, length, table=TABLE):
    """Return the arguments of `extend`, and the next positions.

    An item is a lane, a turn, the position of its first token, and the number of tokens before it.
    """
    new = {
        "lane": np.full(ROWS, LANES, np.int32),
        "tokens": np.zeros((ROWS, length), np.int32),
        "positions": np.zeros((ROWS, 3, length), np.int32),
        "image_index": np.full((ROWS, length), -1, np.int32),
    }
    following = []
    paged = PagedRows(
        table=np.zeros((ROWS, PAGES), np.int32),
        start=np.zeros(ROWS, np.int32),
        count=np.zeros(ROWS, np.int32),
    )
    rows = [[(i.values, i.grid) for i in turn.images] for _, turn, _, _ in items]
    images, indices = pack_images(
        rows + [[]] * (ROWS - len(items)), WINDOWS, programs["config"].vision
    )
    for row, (lane, turn, start, filled) in enumerate(items):
        T = len(turn.tokens)
        positions, after = mrope_positions(
            turn.tokens, turn.grids, image_token_id=IMAGE_TOKEN, start=start
        )
        following.append(after)
        new["lane"][row], paged.count[row], paged.start[row] = lane, T, filled
        paged.table[row] = table[lane]
        new["tokens"][row, :T], new["positions"][row, :, :T] = turn.tokens, positions
        slots = indices[row] + row * IMAGE_TOKENS
        new["image_index"][row, :T][turn.tokens == IMAGE_TOKEN] = slots
    image_tokens = programs["encode"](images)
    assert image_tokens.shape[1] == IMAGE_TOKENS
    batch = cache.PrefillBatch(rows=paged, **new)
    return (batch, image_tokens.reshape(-1, image_tokens.shape[-1])), following


def full_logits(programs, prompt):
    bucket = Bucket(length=CAPACITY, windows=3 * WINDOWS, rows=1)
    logits = programs["forward"](make_rows([[prompt]], bucket, programs["config"], IMAGE_TOKEN))
    return np.asarray(logits[0, len(prompt.tokens) - 1])


@FAMILIES_TESTED
def test_three_turns_with_images(model, programs):
    """Two conversations side by side in lanes 3 and 1, turn by turn, then token by token."""
    lanes = allocate(model)
    # Stale contents of the pages must have no effect.
    lanes = lanes.replace(pages=tuple(pages + 9.0 for pages in lanes.pages))
    conversations = [turns_of(model, 0), turns_of(model, 1)]
    starts, lengths = [0, 0], [0, 0]
    for turn in range(3):
        items = [
            (lane, conversation[turn], start, length)
            for lane, conversation, start, length in zip(
                (3, 1), conversations, starts, lengths, strict=True
            )
        ]
        lengths = [sum(len(t.tokens) for t in c[: turn + 1]) for c in conversations]
        new, starts = extension(programs, items, length=64)
        logits, lanes = programs["extend"](lanes, new)
        for row, conversation in enumerate(conversations):
            expected = full_logits(programs, join(conversation[: turn + 1]))
            np.testing.assert_allclose(logits[row], expected, atol=1e-4, rtol=0)
    prompts = [join(c) for c in conversations]
    for _ in range(4):
        tokens = np.argmax(logits, axis=-1).astype(np.int32)
        items = [
            (
                lane,
                Prompt(np.asarray(tokens[row : row + 1]), ()),
                starts[row],
                len(prompts[row].tokens),
            )
            for row, lane in enumerate((3, 1))
        ]
        if IMAGE_TOKEN in tokens:
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


@FAMILIES_TESTED
def test_forked_lanes_are_independent(model, programs):
    """Lanes 2 and 4 share the full pages of lane 0's prompt, and have a copy of the last one."""
    prompt, ours, theirs = turns_of(model, 0)
    new, (start,) = extension(programs, [(0, prompt, 0, 0)], length=64)
    _, lanes = programs["extend"](allocate(model), new)
    T, hidden, table = len(prompt.tokens), lanes.hidden[0], TABLE.copy()
    full = T // PAGE
    assert full and T % PAGE
    for lane in (2, 4):
        table[lane, :full] = table[0, :full]
        source, target = table[0, full], table[lane, full]
        lanes = jax.jit(cache.fork)(lanes, source, target, np.int32(0), np.int32(lane))
    np.testing.assert_array_equal(lanes.hidden[jnp.array([2, 4])], np.stack([hidden] * 2))
    items = [(2, ours, start, T), (4, theirs, start, T)]
    new, _ = extension(programs, items, 64, table)
    logits, lanes = programs["extend"](lanes, new)
    for row, turn in enumerate((ours, theirs)):
        expected = full_logits(programs, join([prompt, turn]))
        np.testing.assert_allclose(logits[row], expected, atol=1e-4, rtol=0)
    new, _ = extension(programs, [(0, theirs, start, T)], length=64)
    again, _ = programs["extend"](lanes, new)  # the source lane is unchanged
    np.testing.assert_allclose(again[0], logits[1], atol=1e-5, rtol=0)


@FAMILIES_PROVED
def test_rows_depend_neither_on_neighbours_nor_on_their_pages(model, programs):
    """Outputs are bit-identical alone, beside another row, in other pages, and after stale ones."""
    first, second = turns_of(model, 0)[0], turns_of(model, 1)[0]
    alone, lanes = programs["extend"](
        allocate(model), extension(programs, [(0, first, 0, 0)], 64)[0]
    )
    both = [(4, first, 0, 0), (1, second, 0, 0)]
    beside, _ = programs["extend"](allocate(model), extension(programs, both, 64)[0])
    np.testing.assert_array_equal(alone[0], beside[0])
    again, _ = programs["extend"](lanes, extension(programs, [(0, first, 0, 0)], 64)[0])
    np.testing.assert_array_equal(alone[0], again[0])


@FAMILIES_PROVED
def test_pages_come_back_from_the_host_unchanged(model, programs):
    prompt, ours, _ = turns_of(model, 0)
    new, (start,) = extension(programs, [(0, prompt, 0, 0)], length=64)
    _, lanes = programs["extend"](allocate(model), new)
    T, table = len(prompt.tokens), TABLE.copy()
    new, _ = extension(programs, [(0, ours, start, T)], 64)
    expected, _ = programs["extend"](lanes, new)
    contents = jax.device_get(cache.read_pages(lanes, TABLE[0]))
    table[0] = TABLE[3]
    skipped = np.where(np.arange(PAGES) < 4, table[0], NUM_PAGES).astype(np.int32)
    lanes = cache.write_pages(jax.tree.map(jnp.zeros_like, lanes), skipped, contents)
    new, _ = extension(programs, [(0, ours, start, T)], 64, table)
    again, lanes = programs["extend"](lanes, new)
    np.testing.assert_array_equal(again[0], expected[0])
    assert not np.asarray(lanes.pages[0][TABLE[1]]).any()  # other pages are untouched
