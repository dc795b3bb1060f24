"""What a plan says is resident between the phases of a step is what lies on the devices."""

import gc

import jax
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.apps.plan import memory, programs
from mmsr1_jax.apps.plan.engine import make_engine as abstract_engine
from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.rl import train_batch
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rollout import build
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.scripts import random_policy
from tests.engines import VOCAB_SIZE, examples, make_config, search_tools
from tests.scripted_policy import config_for, scripted_processor


class LiveArrays:
    """Counter of the bytes on the first device of arrays that were created since."""

    def __init__(self):
        gc.collect()
        self._known = jax.live_arrays()  # kept, so that no new array gets the id of one of them
        self._ids = {id(array) for array in self._known}

    def bytes(self) -> int:
        gc.collect()
        shards = {}
        for array in jax.live_arrays():
            if id(array) not in self._ids:
                for shard in array.addressable_shards:
                    if shard.device == jax.devices()[0]:
                        shards[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        return sum(shards.values())


@pytest.fixture(scope="module")
def config():
    config = make_config(cache_tokens=64 * 128, image_cache_tokens=1024)
    config.mesh = settings.Mesh(replica=1, fsdp=4, tensor=2)
    config.objective.kl_coef = 0.0
    return config


def test_live_arrays_between_phases_are_those_of_the_plan(config):
    mesh = sharding.make_mesh(1, 4, 2)
    model_config = config_for(VOCAB_SIZE)
    live = LiveArrays()
    graph, params = nnx.split(random_policy.random_model(model_config, seed=3))
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    groups = [sharding.make_mesh(1, 1, 2, devices=jax.devices()[n : n + 2]) for n in (0, 2, 4, 6)]
    pool = EnginePool(
        build.replicate(nnx.merge(graph, params), groups), scripted_processor(VOCAB_SIZE), config,
        search_tools(),
    )  # fmt: skip
    loss = train_batch.make_loss(config.objective)
    learner = Learner(nnx.merge(graph, params), loss, config.update, mesh)
    del params
    pool.load(learner.params)

    abstract = programs.make_learner(config, model_config, mesh)
    engine = abstract_engine(config, model_config, jax.devices(), 2)
    state = memory.state_bytes(config, abstract, engine)
    absent = memory.absent_state(config)
    planned = {phase.name: phase.bytes for phase in memory.phases(state, (), 1e9, {}, absent)}
    assert live.bytes() == pytest.approx(planned["rollout"], rel=0.1)
    assert len(list(pool.rollout(examples(2), group_size=2))) == 4
    assert live.bytes() == pytest.approx(planned["rollout"], rel=0.1)
    pool.release()
    assert live.bytes() == pytest.approx(planned["update"], rel=0.1)
    assert planned["update"] < 0.8 * planned["rollout"]

    # While the trainer's parameters are loaded, the engine has none of its own.
    device, seen = pool.engines[0].device, []
    prepare = device.prepare

    def observe(params):
        seen.append(live.bytes())
        return prepare(params)

    device.prepare = observe
    pool.load(learner.params)
    pool.load(learner.params)  # the engines hold parameters
    assert np.ptp(seen) == 0 and seen[0] == pytest.approx(planned["load"], rel=0.1)
    assert live.bytes() == pytest.approx(planned["rollout"], rel=0.1)
    pool.close()


def test_a_released_engine_is_loaded_again(config):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    (model,) = build.replicate(random_policy.random_model(config_for(VOCAB_SIZE), seed=3), [mesh])
    engine = EnginePool([model], scripted_processor(VOCAB_SIZE), config, search_tools())
    expected = [e.tokens.tolist() for e in engine.rollout(examples(2))]
    params = nnx.split(model)[1]
    engine.release()
    engine.load(params)
    assert [e.tokens.tolist() for e in engine.rollout(examples(2))] == expected
    engine.close()
