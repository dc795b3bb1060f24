"""The engine: episodes do not depend on the schedule, log-probs equal those of `score`, nothing is
computed twice, and nothing is compiled in steady state."""

import asyncio
import dataclasses
import random
import threading

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Example
from mmsr1_jax.models import sharding
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.prefill import chunk_length
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.utils import compile_counter
from tests.engines import (
    LIMITS,
    VOCAB_SIZE,
    assert_logprobs_match_score,
    by_index,
    examples,
    make_config,
    random_image,
    search_tools,
)
from tests.reference import FAMILIES_PROVED, FAMILIES_TESTED
from tests.scripted_policy import scripted_processor


@pytest.fixture(scope="module")
def processor(model):
    images = random_policy.image_processor(model.config)
    return scripted_processor(VOCAB_SIZE, images=images)


@pytest.fixture(scope="module")
def engine(model, processor):
    engine = Engine(model, processor, make_config(), search_tools())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def episodes(engine):
    """Roll out five questions four times each at temperature 1."""
    return list(engine.rollout(examples(5), group_size=4))


@FAMILIES_PROVED
def test_the_sample_covers_all_actions_and_lengths(episodes):
    """The tests below do not compare trivial episodes."""
    assert sorted(episode.index for episode in episodes) == list(range(20))
    actions = [turn.action for episode in episodes for turn in episode.turns]
    assert {"answer", "image_search", "text_search", None} <= set(actions)
    assert {episode.end for episode in episodes} == {"answer", "turns"}
    assert {len(episode.turns) for episode in episodes} == {1, 2, 3}
    assert sum(len(episode.images) for episode in episodes) > 20


@FAMILIES_PROVED
@pytest.mark.parametrize("lanes, chunk", [(4, 1), (64, 32)])
def test_lanes_chunks_and_tool_latencies_do_not_change_episodes(
    model, processor, episodes, lanes, chunk
):
    order = random.Random(lanes)
    tools = search_tools(lambda: order.choice([0.0, 0.0, 0.01, 0.05]))
    engine = Engine(model, processor, make_config(lanes=lanes, decode_steps=chunk), tools)
    again = list(engine.rollout(examples(5), group_size=4))
    engine.close()
    assert by_index(again) == by_index(episodes)


@FAMILIES_PROVED
def test_another_seed_changes_all_episodes(engine, episodes):
    again = by_index(engine.rollout(examples(5), group_size=4, sampling=settings.Sampling(seed=1)))
    assert all(again[i]["tokens"] != r["tokens"] for i, r in by_index(episodes).items())


@FAMILIES_PROVED
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.proof), 0.7])
def test_logprobs_equal_those_of_score(engine, model, temperature):
    sampling = settings.Sampling(temperature=temperature, top_p=0.9, seed=6)
    finished = list(engine.rollout(examples(5), group_size=2, sampling=sampling))
    assert_logprobs_match_score(model, finished, temperature)


@FAMILIES_TESTED
def test_logprobs_equal_those_of_score_if_images_are_split_over_chunks(model, processor):
    """Chunks begin and end inside images, and a question contains the same image twice."""
    config = make_config(prefill_buckets=(8, 32), prefill_tokens=32)
    engine = Engine(model, processor, config, search_tools())
    twice = dataclasses.replace(
        examples(2)[1], images=[random_image(5), random_image(5), random_image(6)]
    )
    finished = list(engine.rollout([*examples(5), twice], group_size=2))
    engine.close()
    assert engine.device.stats.images == len({i.digest for e in finished for i in e.images})
    assert_logprobs_match_score(model, finished, 1.0)
    num_split = 0
    for episode in finished:
        prompt, end = episode.segments[0].tokens, 0
        while end < len(prompt) - 1:
            end += chunk_length(len(prompt) - end, config.rollout.prefill_buckets)
            num_split += end < len(prompt) and prompt[end - 1] == prompt[end] == 5
    assert num_split > 5


@FAMILIES_PROVED
def test_only_sampled_tokens_carry_loss(episodes, processor):
    end = processor.control["<|im_end|>"]
    for episode in episodes:
        kinds = [segment.kind for segment in episode.segments]
        rounds = len(episode.turns) - 1
        assert kinds == ["prompt", *["model", "forced", "tool"] * rounds, "model"]
        sampled = [s.kind == "model" for s in episode.segments for _ in s.tokens]
        assert episode.loss_mask.tolist() == sampled
        for model, forced in zip(episode.segments[1::3], episode.segments[2::3], strict=False):
            closing = [*model.tokens, *forced.tokens]
            assert closing.count(end) == 1  # sampled or forced, never both


@FAMILIES_PROVED
def test_only_text_and_end_tokens_are_sampled(episodes, processor):
    """No other control tokens, and no ids beyond the tokenizer's."""
    sampled = np.concatenate([e.tokens[e.loss_mask] for e in episodes])
    known = len(processor.token_bytes())
    assert known < VOCAB_SIZE and sampled.max() < known
    ends = {processor.control[name] for name in ("<|im_end|>", "<|endoftext|>")}
    assert not set(sampled.tolist()) & (set(processor.control.values()) - ends)


@FAMILIES_TESTED
def test_each_image_token_has_a_placeholder(episodes):
    for episode in episodes:
        tokens = sum(len(image.values) // 4 for image in episode.images)
        assert (episode.tokens == 5).sum() == tokens


@FAMILIES_PROVED
def test_nothing_is_computed_twice(model, processor):
    """With groups of 8 over 3 turns on 6 lanes, prompts and images are computed once."""
    engine = Engine(model, processor, make_config(lanes=6), search_tools())
    finished = list(engine.rollout(examples(6), group_size=8))
    counts = engine.device.stats
    engine.close()
    assert max(len(episode.turns) for episode in finished) == 3
    prompts = {e.group: len(e.segments[0].tokens) for e in finished}
    others = [s for e in finished for s in e.segments if s.kind in ("forced", "tool")]
    distinct = sum(prompts.values()) + sum(len(segment.tokens) for segment in others)
    assert 1.0 <= counts.prefill_tokens / distinct <= 1.05
    images = {image.digest for episode in finished for image in episode.images}
    assert counts.images / len(images) == 1.0 and len(images) > 10
    assert counts.decoded_tokens == sum(int(episode.loss_mask.sum()) for episode in finished)


@FAMILIES_PROVED
@pytest.mark.proof
def test_evicted_images_are_encoded_again(model, processor):
    """A small image cache changes no episode."""
    rounds, runs = [examples(5), examples(10)[5:], examples(5)], []
    for size in (3 * 128, 4096):
        engine = Engine(model, processor, make_config(image_cache_tokens=size), search_tools())
        finished = [list(engine.rollout(some, group_size=2)) for some in rounds]
        distinct = len({i.digest for run in finished for e in run for i in e.images})
        assert (engine.device.stats.images > distinct) == (size < 4096)
        runs.append([by_index(run) for run in finished])
        engine.close()
    assert runs[0] == runs[1] and runs[0][0] == runs[0][2]


@FAMILIES_PROVED
def test_nothing_is_compiled_after_the_second_of_twenty_batches(model, processor):
    before = compile_counter.count()
    engine = Engine(model, processor, make_config(precompile=True), search_tools())
    rng, compiled = np.random.default_rng(0), []
    for batch in range(20):
        questions = [
            Example(question="x" * int(rng.integers(1, 400)), images=[
                random_image(int(rng.integers(1000)), *rng.integers(40, 300, 2))
                for _ in range(rng.integers(3))
            ])
            for _ in range(3)
        ]  # fmt: skip
        sampling = settings.Sampling(seed=batch)
        finished = list(engine.rollout(questions, group_size=2, sampling=sampling))
        assert all(episode.end in ("answer", "turns", "tokens") for episode in finished)
        compiled.append(compile_counter.count())
    engine.close()
    assert compiled[19] == compiled[1] > before


@FAMILIES_PROVED
def test_load_installs_new_parameters(model, processor, episodes):
    other = random_policy.random_model(model.config, seed=4)
    fresh = Engine(other, processor, make_config(), search_tools())
    expected = by_index(fresh.rollout(examples(3), group_size=2))
    fresh.close()
    engine = Engine(model, processor, make_config(precompile=True), search_tools())
    before = by_index(engine.rollout(examples(3), group_size=2))
    engine.load(nnx.split(model)[1])  # compiles the program that converts them
    images, compiled = engine.device.stats.images, compile_counter.count()
    engine.load(nnx.split(other)[1])
    after = by_index(engine.rollout(examples(3), group_size=2))
    assert compile_counter.count() == compiled
    assert after == expected != before
    assert engine.device.stats.images > images  # images encoded by the old parameters are discarded
    running = engine.rollout(examples(3))
    next(running)
    with pytest.raises(RuntimeError, match="in progress"):
        engine.load(nnx.split(model)[1])
    with pytest.raises(RuntimeError, match="in progress"):
        next(engine.rollout(examples(1)))
    running.close()
    engine.load(nnx.split(model)[1])
    assert by_index(engine.rollout(examples(3), group_size=2)) == before
    engine.close()


@FAMILIES_PROVED
@pytest.mark.proof
def test_load_converts_the_parameters_of_a_trainer_on_eight_devices(model, processor, episodes):
    """They are sharded over a mesh and have another dtype; the engine has its own layout."""
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    params = nnx.split(model)[1]
    sharded = jax.device_put(params, sharding.param_shardings(params, mesh))
    engine = Engine(
        random_policy.random_model(model.config, seed=4),
        processor,
        make_config(),
        search_tools(),
    )
    for _ in range(2):
        compiled = compile_counter.count()
        engine.load(sharded)
    assert compile_counter.count() == compiled  # one program, compiled once
    assert by_index(engine.rollout(examples(5), group_size=4)) == by_index(episodes)
    engine.close()


@FAMILIES_PROVED
@pytest.mark.proof
def test_an_engine_on_two_devices_along_the_tensor_axis(model, processor, episodes):
    """Each holds half of the heads and of the cache, and no program is compiled twice."""
    mesh = sharding.make_mesh(1, 1, 2, devices=jax.devices()[:2])
    graph, params = nnx.split(model)
    sharded = nnx.merge(graph, jax.device_put(params, sharding.param_shardings(params, mesh)))
    engine = Engine(sharded, processor, make_config(), search_tools())
    again = list(engine.rollout(examples(5), group_size=4))
    engine.load(nnx.split(sharded)[1])
    compiled = compile_counter.count()
    assert by_index(engine.rollout(examples(5), group_size=4)) == by_index(again)
    assert compile_counter.count() == compiled
    assert not engine.device.runner._cache.pages[0].sharding.is_fully_replicated
    engine.close()
    expected = {episode.index: episode for episode in episodes}
    for episode in again:
        assert episode.tokens.tolist() == expected[episode.index].tokens.tolist()
        np.testing.assert_allclose(
            episode.logprobs, expected[episode.index].logprobs, atol=1e-4, rtol=0
        )


@FAMILIES_PROVED
def test_unusable_examples_do_not_affect_others(engine):
    good = examples(3)
    expected = by_index(engine.rollout(good))
    unusable = [
        Example(id="broken", question="?", images=[b"not a picture"]),
        Example(id="none", question="?", images=["no/such/file.jpg"]),
        Example(id="long", question="word " * 3000),
        Example(id="thin", question="?", images=[PIL.Image.new("RGB", (1, 900))]),
    ]
    mixed = list(engine.rollout([good[0], *unusable, good[1], good[2]]))
    errors = {e.example.id: e.error for e in mixed if e.end == "error"}
    assert set(errors) == {"broken", "none", "long", "thin"}
    assert "not an image" in errors["broken"] and "no such file" in errors["none"]
    assert "turns.max_episode_tokens" in errors["long"] and "more than 200" in errors["thin"]
    assert {e.index for e in mixed if e.end != "error"} == {0, 5, 6}
    usable = by_index(e for e in mixed if e.example.id == "0")
    assert usable[0] == expected[0]


@FAMILIES_PROVED
def test_rules_that_exceed_the_capacity_of_lanes_are_refused(engine):
    limits = dataclasses.replace(LIMITS, max_episode_tokens=LIMITS.max_episode_tokens + 1)
    with pytest.raises(
        ValueError, match="max_episode_tokens=1025 of these rules exceeds the engine's 1024"
    ):
        engine.make_rules(limits, {})


@FAMILIES_PROVED
def test_a_full_cache_changes_no_episode(model, processor, engine, episodes):
    """Lanes move to the host and come back, and no token is computed twice."""
    small = Engine(model, processor, make_config(cache_tokens=9 * 128), search_tools())
    again = list(small.rollout(examples(5), group_size=4))
    small.close()
    assert small.stats.offloaded_pages > 20
    assert by_index(again) == by_index(episodes)
    before = engine.stats.prefill_tokens
    list(engine.rollout(examples(5), group_size=4))
    assert small.stats.prefill_tokens == engine.stats.prefill_tokens - before


@FAMILIES_PROVED
def test_a_full_cache_does_not_let_others_wait_for_the_tool_of_one(model, processor):
    """One search is answered only once all other episodes have ended."""
    others_ended, delayed = threading.Event(), []
    tools = search_tools()

    def delay_first(tool):
        async def call(query):
            if not delayed:
                delayed.append(query)
                while not others_ended.is_set():
                    await asyncio.sleep(0.01)
            return await tool(query)

        return call

    tools = {name: delay_first(tool) for name, tool in tools.items()}
    config = make_config(lanes=12, cache_tokens=18 * 128)
    config.tools.timeout = config.tools.episode_timeout = 3600.0  # interpreted kernels are slow
    engine = Engine(model, processor, config, tools)
    episodes = []
    for episode in engine.rollout(examples(5), group_size=4):
        episodes.append(episode)
        if len(episodes) == 5 * 4 - 1:
            others_ended.set()
    engine.close()
    assert engine.stats.offloaded_pages > 0 and len(delayed) == 1
    assert {call.status for episode in episodes for call in episode.calls} <= {"ok", "refused"}


@FAMILIES_PROVED
def test_pages_of_a_prompt_are_kept_until_its_last_episode_has_them(model, processor):
    """Groups larger than the lanes: the last episode of one starts beside the first of the next."""
    lanes, tools = 5, search_tools()
    several = Engine(model, processor, make_config(lanes=lanes, page_size=32), tools)
    all_at_once = Engine(model, processor, make_config(lanes=64, page_size=32), tools)
    rollouts = [e.rollout(examples(4), group_size=lanes + 1) for e in (several, all_at_once)]
    assert by_index(rollouts[0]) == by_index(rollouts[1])
    several.close(), all_at_once.close()
