"""What a plan says is resident between the phases of a step is what lies on the devices."""

import copy

import jax
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
from mmsr1_jax.training.train_utils import memory_for_rollouts
from tests.engines import VOCAB_SIZE, examples, make_config, search_tools
from tests.live_arrays import LiveArrays
from tests.scripted_policy import config_for, scripted_processor


@pytest.fixture(scope="module")
def config():
    config = make_config(cache_tokens=64 * 128, image_cache_tokens=1024)
    config.mesh = settings.Mesh(replica=1, fsdp=4, tensor=2)
    config.objective.kl_coef = 0.0
    return config


@pytest.mark.parametrize(
    "settings_of_offload", [(True,), pytest.param((False, True), marks=pytest.mark.proof)]
)
def test_live_arrays_between_phases_are_those_of_the_plan(config, settings_of_offload):
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

    abstract = programs.make_learner(config, model_config, mesh)
    engine = abstract_engine(config, model_config, jax.devices(), 2)
    state = memory.state_bytes(config, abstract, engine)
    extra = memory.phase_extras(config, abstract, state, ())

    def planned(offload):
        run = copy.deepcopy(config)
        run.update.offload = offload
        absent = memory.absent_state(run)
        return {p.name: p.bytes for p in memory.phases(state, (), 1e9, extra, absent)}

    def observe(owner, name):
        """Measure at the end of the first calls of a method."""
        seen, method = [], getattr(owner, name)

        def observed(*args):
            result = method(*args)
            if len(seen) < 4:
                seen.append(live.bytes())
            return result

        setattr(owner, name, observed)
        return seen

    device = pool.engines[0].device
    decoding, prepared = observe(device, "finish_decode"), observe(device.runner, "prepare")
    for offload in settings_of_offload:
        phases = planned(offload)
        pool.load(learner.params)
        pool.load(learner.params)  # the engines hold parameters
        assert prepared[-1] == prepared[-2] == pytest.approx(phases["load"], rel=0.1)
        # Nothing else is there until the rollout begins.
        assert live.bytes() == pytest.approx(phases["load"], rel=0.1)
        decoding.clear(), prepared.clear()
        with memory_for_rollouts(pool, learner, offload):
            assert len(list(pool.rollout(examples(4), group_size=2))) == 8
            assert live.bytes() == pytest.approx(phases["rollout"], rel=0.1)
        assert max(decoding) == pytest.approx(phases["rollout"], rel=0.1)
        assert live.bytes() == pytest.approx(phases["load" if offload else "rollout"], rel=0.1)
        pool.release()
        assert live.bytes() == pytest.approx(phases["update"], rel=0.1)
        assert phases["update"] < 0.8 * phases["load"] < 0.64 * planned(False)["rollout"]
    pool.close()


def test_a_released_engine_is_loaded_again(config):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    (model,) = build.replicate(random_policy.random_model(config_for(VOCAB_SIZE), seed=3), [mesh])
    engine = EnginePool([model], scripted_processor(VOCAB_SIZE), config, search_tools())
    expected = [e.tokens.tolist() for e in engine.rollout(examples(2))]
    params = nnx.split(model)[1]
    engine.release()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="has no parameters.*call `load` before"):
            list(engine.rollout(examples(2)))
        with pytest.raises(IndexError):  # a load that fails
            engine.load(None)
    engine.load(params)
    assert [e.tokens.tolist() for e in engine.rollout(examples(2))] == expected
    engine.close()
