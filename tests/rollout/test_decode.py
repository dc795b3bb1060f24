"""Decoding: greedy tokens equal transformers', chunk sizes have no effect, log-probs are exact."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.models.paged_attention import PagedRows
from mmsr1_jax.models.positions import mrope_positions
from mmsr1_jax.processing.batching import Bucket, make_rows
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.rollout import cache, decode, stop
from mmsr1_jax.rollout.sampler import Sampling
from mmsr1_jax.scripts import random_policy
from tests.reference import (
    FAMILIES_PROVED,
    FAMILIES_TESTED,
    SMALL,
    random_conversation,
    torch_inputs,
    torch_model,
)

LANES, LENGTH, WINDOWS = 8, 112, 6
PAGE, PAGES = 32, 8  # size of a page, pages of a lane
TABLE = np.random.default_rng(1).permutation(LANES * PAGES).reshape(LANES, PAGES).astype(np.int32)
SPECIAL = tuple(random_policy.CONFIG.token_ids().values())  # those of both families
IMAGE_TOKEN, VOCAB_SIZE = random_policy.CONFIG.image_token_id, random_policy.CONFIG.text.vocab_size


@pytest.fixture(scope="module")
def model(request):
    return random_policy.random_model(SMALL[request.param], seed=3)


@pytest.fixture(scope="module")
def table(processor):
    """Return a table with short stop strings, as a random policy writes no tags."""
    ends = {"<|im_end|>": processor.control["<|im_end|>"]}
    return stop.build(processor.token_bytes(), VOCAB_SIZE, ["e", "the"], ends)


@pytest.fixture(scope="module")
def programs(model):
    graph, params = nnx.split(model)

    def merged(function, **keywords):
        def run(params, *args, **more):
            return function(nnx.merge(graph, params), *args, **more)

        return functools.partial(jax.jit(run, **keywords), params)

    return {
        "extend": merged(cache.extend),
        "encode": merged(lambda model, images: model.encode_images(images)),
        "decode": merged(decode.decode, static_argnames=("steps", "running")),
        "score": merged(lambda model, rows: model.token_logprobs(rows)),
    }


def prompts(config, count, seed=0):
    """Return random prompts with 0 to 3 images."""
    rng = np.random.default_rng(seed)
    layouts = [[20], [9, (3, 5), 4], [3, (2, 3), 5, (4, 4), 2], [(1, 3), 2, (3, 3), 1, (2, 6), 7]]
    return [random_conversation(rng, config, layouts[i % 4]) for i in range(count)]


def ready_rows(programs, model, group, budget, sampling):
    """Return lanes that contain the prompts, and rows ready to decode."""
    lanes = cache.allocate(model.config.text, model.dtype, LANES, LANES * PAGES, PAGE)
    shape = Bucket(length=LENGTH, windows=WINDOWS, rows=LANES)
    rows = make_rows([[p] for p in group], shape, model.config, IMAGE_TOKEN)
    count = np.array([len(p.tokens) for p in group] + [0] * (LANES - len(group)), np.int32)
    lane = np.where(count > 0, np.arange(LANES), LANES).astype(np.int32)
    images = programs["encode"](rows.images)
    first = np.arange(LANES, dtype=np.int32)[:, None] * images.shape[1]
    new = cache.PrefillBatch(
        lane=lane,
        rows=PagedRows(table=TABLE, start=np.zeros(LANES, np.int32), count=count),
        tokens=rows.tokens,
        positions=rows.positions,
        image_index=np.where(rows.image_index >= 0, rows.image_index + first, np.int32(-1)),
    )
    _, lanes = programs["extend"](lanes, new, images.reshape(-1, images.shape[-1]))
    following = [mrope_positions(p.tokens, p.grids, image_token_id=IMAGE_TOKEN)[1] for p in group]
    return lanes, decode.Rows(
        lane=lane,
        table=TABLE,
        length=count,
        active=count > 0,
        stop_state=np.zeros(LANES, np.int32),
        position=np.array(following + [0] * (LANES - len(group)), np.int32),
        episode=np.arange(LANES, dtype=np.int32) + 40,
        num_sampled=np.zeros(LANES, np.int32),
        budget=np.full(LANES, budget, np.int32),
        sampling=sampling,
    )


def decode_chunk(programs, lanes, rows, next_state, running, steps, leave_at=0):
    """Decode a chunk; return its output, the lanes, and the rows to resume from."""
    allowed = np.ones(VOCAB_SIZE, bool)
    allowed[list(SPECIAL)] = False
    sampled, lanes = programs["decode"](
        lanes, rows, next_state, allowed, 5, leave_at, steps=steps, running=running
    )
    sampled = jax.device_get(sampled)
    budget = rows.budget - sampled.count
    return (
        sampled,
        lanes,
        rows.replace(
            active=rows.active & (sampled.stop_state < running) & (budget > 0),
            stop_state=sampled.stop_state,
            length=rows.length + sampled.count,
            position=rows.position + sampled.count,
            num_sampled=rows.num_sampled + sampled.count,
            budget=budget,
        ),
    )


def run(programs, start, next_state, running, chunk):
    """Decode until no row is active; return each row's tokens and log-probs, the stop states, and
    the lengths of the lanes."""
    (lanes, rows), parts = start, []
    while rows.active.any():
        sampled, lanes, rows = decode_chunk(programs, lanes, rows, next_state, running, chunk)
        parts.append(sampled)
    fields = ("tokens", "sampling_logprobs", "logprobs")
    return {
        field: [
            np.concatenate([getattr(p, field)[row, : p.count[row]] for p in parts])
            for row in range(LANES)
        ]
        for field in fields
    } | {"stop_state": rows.stop_state, "length": rows.length}


@FAMILIES_TESTED
@pytest.mark.parametrize("count", [8, pytest.param(64, marks=pytest.mark.proof)])
def test_greedy_tokens_equal_those_of_transformers(model, programs, count):
    """Prompts of 0 to 3 images, float32."""
    reference, new_tokens = torch_model(model), 12
    never = np.zeros((1, VOCAB_SIZE), np.int16)
    greedy = Sampling.uniform(LANES, greedy=True)
    everything = prompts(model.config, count)
    varied = set()
    for first in range(0, count, LANES):
        group = everything[first : first + LANES]
        ours = run(programs, ready_rows(programs, model, group, new_tokens, greedy), never, 1, 12)
        for prompt, tokens in zip(group, ours["tokens"], strict=True):
            inputs = torch_inputs(prompt, model.config)
            theirs = reference.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                suppress_tokens=list(SPECIAL),
            )
            assert tokens.tolist() == theirs[0, len(prompt.tokens) :].tolist()
            varied.update(tokens.tolist())
    assert len(varied) > count // 2  # not always the same token


SETTINGS = {"temperature": 0.7, "top_p": 0.9}


@FAMILIES_PROVED
def test_the_chunk_size_does_not_change_tokens(model, programs, table):
    sampling = Sampling.uniform(LANES, **SETTINGS)
    group = prompts(model.config, 5)
    results = []
    for chunk in (1, 8, 32):
        start = ready_rows(programs, model, group, 30, sampling)
        results.append(run(programs, start, table.next_state, table.running, chunk))
    for outcome in results[1:]:
        for field in outcome:
            for a, b in zip(outcome[field], results[0][field], strict=True):
                np.testing.assert_array_equal(a, b)


@FAMILIES_PROVED
def test_lanes_stop_at_final_states_of_the_automaton(model, programs, table):
    group = prompts(model.config, 6)
    start = ready_rows(programs, model, group, 40, Sampling.uniform(LANES))
    outcome = run(programs, start, table.next_state, table.running, 16)
    ends = outcome["stop_state"]
    for lane, prompt in enumerate(group):
        state, tokens = 0, outcome["tokens"][lane]
        for token in tokens:
            assert state < table.running  # no token is sampled after the end
            state = table.next_state[state, token]
        assert state == ends[lane]
        assert state >= table.running or len(tokens) == 40
        assert outcome["length"][lane] == len(prompt.tokens) + len(tokens)
        assert not set(tokens) & set(SPECIAL)
    assert (ends >= table.running).sum() >= 3
    assert not outcome["tokens"][7].size and outcome["length"][7] == 0


@FAMILIES_TESTED
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_equal_a_forward_pass(model, programs, table, temperature):
    """Sampled with top-p; recorded under temperature alone, as the trainer computes them."""
    group = prompts(model.config, LANES, seed=4)
    sampling = Sampling.uniform(LANES, temperature=temperature, top_p=0.8)
    never = np.zeros((1, VOCAB_SIZE), np.int16)
    outcome = run(programs, ready_rows(programs, model, group, 20, sampling), never, 1, 8)
    graph, params = nnx.split(model)

    @jax.jit
    def scaled(params, rows):  # log-probs of logits / temperature, over the full sequence
        model = nnx.merge(graph, params)
        hidden, _ = model(rows)
        return jax.nn.log_softmax(model.logits(hidden) / temperature, axis=-1)

    bucket = Bucket(length=LENGTH + 24, windows=WINDOWS, rows=1)
    for lane, prompt in enumerate(group):
        tokens = outcome["tokens"][lane]
        full = Prompt(np.concatenate([prompt.tokens, tokens]), prompt.images)
        rows = make_rows([[full]], bucket, model.config, IMAGE_TOKEN)
        expected = np.asarray(scaled(params, rows))[0]
        T = len(prompt.tokens)
        expected = expected[T - 1 + np.arange(20), tokens]
        np.testing.assert_allclose(outcome["logprobs"][lane], expected, atol=1e-4, rtol=0)
        assert (outcome["sampling_logprobs"][lane] >= outcome["logprobs"][lane] - 1e-5).all()


@FAMILIES_PROVED
def test_decode_returns_early(model, programs, table):
    """A chunk ends once at most `leave_at` rows are active, and can be resumed."""
    group, sampling = prompts(model.config, 6), Sampling.uniform(LANES)
    start = ready_rows(programs, model, group, 40, sampling)
    full = run(programs, start, table.next_state, table.running, 40)
    lengths = sorted(len(tokens) for tokens in full["tokens"][:6])
    assert lengths[0] < lengths[-1]
    for leave_at in (5, 3, 1):
        (lanes, rows), parts = ready_rows(programs, model, group, 40, sampling), []
        for few in (leave_at, 0):
            sampled, lanes, rows = decode_chunk(
                programs, lanes, rows, table.next_state, table.running, 40, few
            )
            parts.append(sampled)
        assert parts[0].count.max() == parts[0].steps == lengths[5 - leave_at]
        for lane in range(6):
            tokens = np.concatenate([p.tokens[lane, : p.count[lane]] for p in parts])
            np.testing.assert_array_equal(tokens, full["tokens"][lane])


@FAMILIES_PROVED
def test_the_assignment_of_lanes_to_rows_does_not_change_tokens(model, programs, table):
    """Lanes are decoded in other rows, and some of them wait."""
    group, sampling = prompts(model.config, 8), Sampling.uniform(LANES)
    start = ready_rows(programs, model, group, 30, sampling)
    full = run(programs, start, table.next_state, table.running, 30)
    lanes, rows = ready_rows(programs, model, group, 30, sampling)
    tokens = {lane: [] for lane in range(LANES)}
    for chosen in ([5, 2, 7], [0, 1, 3, 4, 6]):
        padding = LANES - len(chosen)
        order = np.array(chosen + chosen[:1] * padding)
        some = jax.tree.map(lambda x: np.asarray(x)[order], rows)
        some = some.replace(
            lane=np.array(chosen + [LANES] * padding, np.int32),
            active=np.arange(LANES) < len(chosen),
        )
        while some.active.any():
            sampled, lanes, some = decode_chunk(
                programs, lanes, some, table.next_state, table.running, 7
            )
            for row, lane in enumerate(chosen):
                tokens[lane] += sampled.tokens[row, : sampled.count[row]].tolist()
    assert [tokens[lane] for lane in range(LANES)] == [t.tolist() for t in full["tokens"]]
