"""Pools of engines: the episodes equal those of a single engine, and all engines stop if one fails
or the consumer closes the iterator."""

import asyncio
import itertools
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.rollout import build
from mmsr1_jax.rollout.active import RolloutStopped
from mmsr1_jax.rollout.device import EngineStats
from mmsr1_jax.rollout.dispatcher import Dispatcher
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool, _Examples
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.utils import compile_counter
from tests.engines import VOCAB_SIZE, by_index, examples, make_config, search_tools
from tests.scripted_policy import config_for, scripted_processor


@pytest.fixture(scope="module")
def processor():
    return scripted_processor(VOCAB_SIZE)


@pytest.fixture(scope="module")
def other():
    """Return parameters of another policy, sharded over all devices as by a trainer."""
    params = nnx.split(random_policy.random_model(config_for(VOCAB_SIZE), seed=4))[1]
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    return jax.device_put(params, sharding.param_shardings(params, mesh))


@pytest.fixture(scope="module")
def single(model, processor):
    engine = Engine(model, processor, make_config(), search_tools())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(single):
    return list(single.rollout(examples(6), group_size=4))


def meshes(*groups):
    """Return a mesh along the tensor axis for each list of device indices."""
    devices = jax.devices()
    return [
        sharding.make_mesh(1, 1, len(group), devices=[devices[n] for n in group])
        for group in groups
    ]


@pytest.fixture(scope="module")
def pool(model, processor):
    """Return a pool of two engines on devices other than the default one."""
    models = build.replicate(model, meshes([2], [5]))
    pool = EnginePool(models, processor, make_config(precompile=True), search_tools())
    yield pool
    pool.close()


@pytest.mark.parametrize("engines", [1, 2])
def test_a_rollout_stops_while_its_tools_block(model, processor, engines):
    """With one engine and with a pool of two."""
    started = threading.Event()

    async def block(query):
        started.set()
        await asyncio.sleep(60)

    tools = {"text_search": block, "image_search": block}
    if engines == 1:
        engine = Engine(model, processor, make_config(), tools)
    else:
        engine = EnginePool(
            build.replicate(model, meshes([2], [5])), processor, make_config(), tools
        )
    begin = time.monotonic()
    with pytest.raises(RolloutStopped):
        for _ in engine.rollout(examples(6), group_size=4, must_stop=started.is_set):
            pass
    assert time.monotonic() - begin < 50  # programs are compiled before the first search
    engine.close()


def is_intact(pool, expected) -> bool:
    """Return whether the pool still produces the expected episodes."""
    return by_index(pool.rollout(examples(6), group_size=4)) == by_index(expected)


def engine_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("engine ")]


def test_episodes_equal_those_of_one_engine(pool, expected):
    """They are bit-identical, nothing is compiled after the start, and counters are summed."""
    before, compiled = pool.stats, compile_counter.count()
    decoded = [engine.stats.decoded_tokens for engine in pool.engines]
    episodes = list(pool.rollout(examples(6), group_size=4))
    assert by_index(episodes) == by_index(expected)
    assert {e.index: e.group for e in episodes} == {n: n // 4 for n in range(24)}
    assert all(
        engine.stats.decoded_tokens > d for engine, d in zip(pool.engines, decoded, strict=True)
    )
    assert pool.stats.decoded_tokens - before.decoded_tokens == sum(
        int(e.loss_mask.sum()) for e in episodes
    )
    assert isinstance(pool.stats, EngineStats)
    assert compile_counter.count() == compiled


def test_examples_are_read_on_demand(pool, single):
    """No more examples are read than fill the lanes, and one more per engine."""
    read, ended, ahead = 0, 0, []

    def on_event(episode, event):
        nonlocal ended
        ended += event == "end"

    def questions():
        nonlocal read
        for example in examples(16):
            read += 1
            ahead.append(read - ended)
            yield example

    sampling = settings.Sampling(seed=7, top_p=0.9)
    episodes = by_index(pool.rollout(questions(), sampling=sampling, on_event=on_event))
    assert max(ahead) <= 2 * (6 + 1) and len(ahead) == 16
    assert episodes == by_index(single.rollout(examples(16), sampling=sampling))
    assert list(pool.rollout(iter([]))) == []


def test_the_next_example_goes_to_the_engine_with_the_lowest_load():
    source = _Examples("abcdefgh", itertools.count(), on_event=None)
    dispatcher = Dispatcher(
        [None, None], source, max_load=6, group_size=4, sampling=settings.Sampling()
    )

    def takes(engine, count=9):
        return "".join(example for _, example in dispatcher.next_examples(engine, count))

    def end(engine, episodes):
        for _ in range(episodes):
            dispatcher.finish_episode(engine)

    assert takes(0) == "a"  # loads 4, 0: no second example, though the other engine is not running
    assert takes(0) == takes(1, 0) == ""
    assert takes(1) == "bc"  # 4, 8
    assert takes(1) == "" and takes(0) == "d"  # 8, 8: both exceed their six lanes
    assert takes(0) == takes(1) == ""
    end(1, 3)  # 8, 5
    assert takes(0) == "" and takes(1) == "e"  # 8, 9
    end(0, 8)
    assert takes(0, 1) == "f"  # 4, 9: at most as many as requested
    assert dispatcher.next_examples(0, 9) == [(6, "g")]
    end(1, 9)
    assert takes(1) == "h"
    end(0, 8), end(1, 4)
    assert takes(0) == takes(1) == ""


def test_load_accepts_the_parameters_of_a_trainer_on_all_devices(
    pool, single, model, other, expected
):
    """One program is compiled once, and the engines use its outputs without a copy."""
    single.load(other)
    changed = by_index(single.rollout(examples(6), group_size=4))
    single.load(nnx.split(model)[1])
    pool.load(other)
    images, compiled = pool.stats.images, compile_counter.count()
    pool.load(other)
    assert by_index(pool.rollout(examples(6), group_size=4)) == changed != by_index(expected)
    assert compile_counter.count() == compiled
    assert pool.stats.images > images  # images encoded by the old parameters are discarded
    prepared = pool.engines[0].device.runner.prepare(other)
    for engine in pool.engines:
        engine.device.install(prepared)
        (device,) = jax.tree.leaves(engine.device.runner._params)[0].devices()
        for whole, part in zip(
            *map(jax.tree.leaves, (prepared, engine.device.runner._params)), strict=True
        ):
            (local,) = [s.data for s in whole.addressable_shards if s.device == device]
            assert part.devices() == {device}
            assert part.unsafe_buffer_pointer() == local.unsafe_buffer_pointer()
    # The trainer donates its own parameters, so the engines must not use them.
    given = jax.tree.map(lambda x: x + 0, nnx.split(model)[1])  # on a device without an engine
    pool.load(given)
    jax.tree.map(lambda x: x.delete(), given)
    assert is_intact(pool, expected)


@pytest.mark.proof
def test_engines_on_tensor_groups_of_devices(model, processor, other, expected):
    """Each group holds its shards; the trainer may shard its parameters differently."""
    groups = [[0, 1], [3, 2]]
    models = build.replicate(model, meshes(*groups))
    pool = EnginePool(models, processor, make_config(precompile=True), search_tools())
    again = {episode.index: episode for episode in pool.rollout(examples(6), group_size=4)}
    for episode in expected:
        other_episode = again[episode.index]
        assert other_episode.tokens.tolist() == episode.tokens.tolist()
        np.testing.assert_allclose(other_episode.logprobs, episode.logprobs, atol=1e-4, rtol=0)
    for engine in pool.engines:
        assert not engine.device.runner._cache.pages[0].sharding.is_fully_replicated
    params = nnx.split(model)[1]
    first = [jax.tree.leaves(engine.device.runner._params) for engine in pool.engines]
    layouts = [[x.sharding for x in leaves] for leaves in first]
    values = [jax.device_get(leaves) for leaves in first]
    del first
    for fsdp, tensor in ((4, 2), (8, 1)):
        mesh = sharding.make_mesh(1, fsdp, tensor, devices=jax.devices()[: fsdp * tensor])
        pool.load(jax.device_put(params, sharding.param_shardings(params, mesh)))
        for engine, group, *before in zip(pool.engines, groups, layouts, values, strict=True):
            taken = jax.tree.leaves(engine.device.runner._params)
            assert taken[0].devices() == {jax.devices()[n] for n in group}
            assert [x.sharding for x in taken] == before[0]
            assert all(np.array_equal(x, y) for x, y in zip(taken, before[1], strict=True))
    # A slightly different layout would recompile all programs.
    compiled = compile_counter.count()
    assert by_index(pool.rollout(examples(6), group_size=4)) == by_index(again.values())
    assert compile_counter.count() == compiled
    pool.close()


def test_a_tool_that_raises_does_not_stop_the_pool(pool, expected):
    async def broken(query):
        raise SystemExit("no more searches")

    tools_before = [engine.tools for engine in pool.engines]
    for engine in pool.engines:
        engine.tools = {"text_search": broken, "image_search": broken}
    episodes = list(pool.rollout(examples(6), group_size=4))
    for engine, tools in zip(pool.engines, tools_before, strict=True):
        engine.tools = tools
    assert {episode.end for episode in episodes} <= {"answer", "turns", "tokens"}
    assert "failed" in {call.status for episode in episodes for call in episode.calls}
    assert len(episodes) == 24 and is_intact(pool, expected)


def test_an_exception_of_an_engine_stops_the_pool(pool, expected, monkeypatch):
    def fails(*args, **keywords):
        raise RuntimeError("out of memory on this device")

    with monkeypatch.context() as patch:
        patch.setattr(pool.engines[1].device, "start_decode", fails)
        with pytest.raises(RuntimeError, match="out of memory on this device"):
            list(pool.rollout(examples(6), group_size=4))
        assert engine_threads() == []
    assert is_intact(pool, expected)


def test_exceptions_of_examples_and_callbacks_are_raised(pool, expected):
    def questions():
        yield from examples(3)
        raise OSError("the dataset is gone")

    def on_event(episode, event):
        if event == "end":
            raise KeyError(episode.index)

    with pytest.raises(OSError, match="the dataset is gone"):
        list(pool.rollout(questions(), group_size=4))
    with pytest.raises(KeyError):
        list(pool.rollout(examples(6), group_size=4, on_event=on_event))
    assert engine_threads() == [] and is_intact(pool, expected)


def test_callbacks_are_called_by_one_thread_at_a_time(pool):
    inside, together, ends = 0, 0, []

    def on_event(episode, event):
        nonlocal inside, together
        inside += 1
        together = max(together, inside)
        time.sleep(0.002)
        inside -= 1
        if event == "end":
            ends.append(episode.index)

    episodes = list(pool.rollout(examples(6), group_size=4, on_event=on_event))
    assert together == 1 and sorted(ends) == sorted(e.index for e in episodes) == [*range(24)]


def test_closing_the_iterator_early_does_not_wait_for_tools(pool, expected):
    """Tools may hang; while the rollout runs, no other can start."""

    async def hangs(query):
        await asyncio.sleep(60)

    tools_before = [engine.tools for engine in pool.engines]
    for engine in pool.engines:
        engine.tools = {"text_search": hangs, "image_search": hangs}
    running = pool.rollout(examples(6), group_size=4)
    next(running)
    with pytest.raises(RuntimeError, match="in progress"):
        pool.load(None)
    with pytest.raises(RuntimeError, match="in progress"):
        next(pool.rollout(examples(1)))
    time.sleep(0.5)
    assert len(engine_threads()) == 2  # waiting for their tools
    begin = time.monotonic()
    running.close()
    assert time.monotonic() - begin < 5.0 and engine_threads() == []
    for engine, tools in zip(pool.engines, tools_before, strict=True):
        engine.tools = tools
    assert is_intact(pool, expected)


def test_invalid_sampling_settings_are_refused(pool):
    with pytest.raises(settings.ConfigError, match="temperature=-1"):
        next(pool.rollout(examples(1), sampling=settings.Sampling(temperature=-1)))
    assert engine_threads() == []


@pytest.mark.proof
def test_make_engine_uses_all_devices(tiny_dir):
    def engine_devices(tensor, **keywords):
        config = make_config()
        config.mesh = settings.Mesh(tensor=tensor, fsdp=1 if tensor == -1 else -1)
        engine = build.make_engine(config, str(tiny_dir), **keywords)
        engine.close()
        engines = engine.engines if isinstance(engine, EnginePool) else [engine]
        return [
            sorted(d.id for d in jax.tree.leaves(e.device.runner._params)[0].devices())
            for e in engines
        ]

    assert engine_devices(4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert engine_devices(3) == [[0, 1, 2], [3, 4, 5]]  # two devices remain unused
    assert engine_devices(1, engines=1) == [[0]]
    assert engine_devices(-1) == [[*range(8)]]
    with pytest.raises(settings.ConfigError, match="config.mesh.tensor=16: an engine needs 16"):
        engine_devices(16)
