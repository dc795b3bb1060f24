"""Engines in lockstep: their episodes equal those of independent engines, and none waits for the
tools of another."""

import itertools
import threading

import jax
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.models import sharding
from mmsr1_jax.rollout import build
from mmsr1_jax.rollout.lockstep import Lockstep, choose
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.utils import compile_counter
from tests.engines import VOCAB_SIZE, by_index, examples, make_config, search_tools
from tests.scripted_policy import config_for, scripted_processor


@pytest.fixture(scope="module")
def processor():
    return scripted_processor(VOCAB_SIZE)


def sharded(model, mesh):
    graph, params = nnx.split(model)
    return nnx.merge(graph, jax.device_put(params, sharding.param_shardings(params, mesh)))


def lockstep_pool(model, processor, engines, tensor, tools=None, **keywords):
    devices = jax.devices()[: engines * tensor]
    mesh = sharding.make_mesh(1, engines, tensor, devices=devices)
    config, model = make_config(**keywords), sharded(model, mesh)
    together = Lockstep(model, config)
    return EnginePool(
        [model] * engines, processor, config, tools or search_tools(), lockstep=together
    )


def independent_pool(model, processor, engines, tensor, **keywords):
    devices = jax.devices()[: engines * tensor]
    meshes = [
        sharding.make_mesh(1, 1, tensor, devices=devices[tensor * n : tensor * (n + 1)])
        for n in range(engines)
    ]
    models = build.replicate(model, meshes)
    return EnginePool(models, processor, make_config(**keywords), search_tools())


@pytest.mark.parametrize(
    ("engines", "tensor"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.proof)]
)
def test_episodes_equal_those_of_independent_engines(model, processor, engines, tensor):
    """They are bit-identical, with images, several turns and shared prompts; nothing is compiled
    after the start, and parameters of a trainer are loaded."""
    alone = independent_pool(model, processor, engines, tensor)
    expected = by_index(alone.rollout(examples(6), group_size=4))
    alone.close()
    pool = lockstep_pool(model, processor, engines, tensor, precompile=True)
    compiled = compile_counter.count()
    assert by_index(pool.rollout(examples(6), group_size=4)) == expected
    assert compile_counter.count() == compiled
    other = random_policy.random_model(config_for(VOCAB_SIZE), seed=4)
    mesh = sharding.make_mesh(1, engines, tensor, devices=jax.devices()[: engines * tensor])
    pool.load(nnx.split(sharded(other, mesh))[1])
    changed = by_index(pool.rollout(examples(6), group_size=4))
    assert changed != expected and changed.keys() == expected.keys()
    pool.load(nnx.split(sharded(model, mesh))[1])
    assert by_index(pool.rollout(examples(6), group_size=4)) == expected
    pool.close()


@pytest.mark.proof
def test_a_full_cache_moves_lanes_to_host_memory(model, processor):
    settings = dict(lanes=12, cache_tokens=18 * 128)
    pool = lockstep_pool(model, processor, 2, 2, **settings)
    episodes = by_index(pool.rollout(examples(6), group_size=4))
    assert pool.stats.offloaded_pages > 0
    pool.close()
    roomy = lockstep_pool(model, processor, 2, 2)
    assert by_index(roomy.rollout(examples(6), group_size=4)) == episodes
    roomy.close()


def test_an_exception_of_an_engine_ends_the_rollout(model, processor):
    pool = lockstep_pool(model, processor, 2, 1)

    def fail(episode, event):
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        list(pool.rollout(examples(6), group_size=4, on_event=fail))
    assert not [t for t in threading.enumerate() if t.name.startswith("engine ")]
    assert len(list(pool.rollout(examples(2), group_size=2))) == 4
    pool.rollout(examples(6), group_size=4).close()
    partly = pool.rollout(examples(6), group_size=4)
    next(partly)
    partly.close()
    assert len(list(pool.rollout(examples(2), group_size=2))) == 4
    pool.close()


def test_a_program_that_fails_ends_the_rollout_and_the_next_one_is_intact(model, processor):
    """It has taken the caches of all engines, with the images that they had encoded."""
    pool = lockstep_pool(model, processor, 2, 1)
    expected = by_index(pool.rollout(examples(6), group_size=4))
    programs = pool.engines[0].lockstep.programs
    decode, calls = programs.decode, itertools.count()

    def fail(params, cache, *args, **keywords):
        if next(calls) == 3:
            jax.tree.map(lambda x: x.delete(), cache)
            raise ZeroDivisionError
        return decode(params, cache, *args, **keywords)

    programs.decode = fail
    with pytest.raises(ZeroDivisionError):
        list(pool.rollout(examples(6), group_size=4))
    assert by_index(pool.rollout(examples(6), group_size=4)) == expected
    pool.close()


def test_an_engine_that_frees_its_caches_leaves_those_of_others_in_use(model, processor):
    pool = lockstep_pool(model, processor, 2, 1)
    lockstep, (first, second) = pool.engines[0].lockstep, pool.engines

    def roll_out(interrupt):
        with lockstep.running():
            episodes = first.rollout(examples(6), group_size=4)
            begun = [next(episodes)]
            interrupt()
            return by_index([*begun, *episodes])

    assert roll_out(second.device.release_caches) == roll_out(lambda: None)
    pool.close()


def test_the_next_program_is_the_shortest_unless_a_call_has_waited_for_eight():
    assert choose([], 5) is None
    calls = [("decode", 3), ("extend 512 tokens", 5), ("encode 4 windows", 5), ("fork", 5)]
    assert choose(calls, 5) == "fork"
    assert choose(calls[:3], 5) == "encode 4 windows"
    assert choose(calls[:2], 5) == "extend 512 tokens"
    assert choose(calls, 3 + 8) == "decode"
    assert choose([("decode", 3), ("read_pages", 2)], 11) == "read_pages"


def test_every_call_runs_within_a_bounded_number_of_programs():
    """Of sixteen engines that call programs at random."""
    rng = np.random.default_rng(0)
    names = ["fork", "encode 4 windows", "extend 32 tokens", "extend 512 tokens", "decode"]
    calls, longest = {}, 0
    for now in range(2000):
        for engine in range(16):
            if engine not in calls and rng.random() < 0.7:
                calls[engine] = (names[rng.integers(len(names))], now)
        name = choose([*calls.values()], now)
        served = [engine for engine, call in calls.items() if call[0] == name]
        longest = max([longest, *(now - calls[engine][1] for engine in served)])
        for engine in served:
            del calls[engine]
    assert longest <= 8 + len(names)
