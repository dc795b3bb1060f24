"""In steady state a rollout makes no implicit transfers between host and devices."""

import jax
import numpy as np
import pytest

from mmsr1_jax.models import sharding
from mmsr1_jax.rollout import build
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.scripts import random_policy
from tests.engines import VOCAB_SIZE, by_index, examples, make_config, search_tools
from tests.scripted_policy import config_for, scripted_processor


@pytest.fixture(
    scope="module",
    params=[[0], *(pytest.param(p, marks=pytest.mark.proof) for p in ([3], [1, 2]))],
    ids=str,
)
def engine(request):
    """An engine on the default device, on another one, and on a tensor group."""
    devices = [jax.devices()[index] for index in request.param]
    mesh = sharding.make_mesh(1, 1, len(devices), devices=devices)
    model = random_policy.random_model(config_for(VOCAB_SIZE), seed=3)
    (model,) = build.replicate(model, [mesh])
    config = make_config(lanes=4, image_cache_tokens=384, precompile=True)
    engine = Engine(model, scripted_processor(VOCAB_SIZE), config, search_tools())
    yield engine
    engine.close()


def test_rollouts_run_under_a_transfer_guard(engine):
    """Prompts with images, forks, searches, and images that are encoded again."""
    expected = by_index(engine.rollout(examples(5), group_size=3))
    list(engine.rollout(examples(10)[5:]))  # evicts the images of the others
    stats = engine.stats
    before = (stats.images, stats.prefill_tokens, stats.decoded_tokens)
    with jax.transfer_guard("disallow"):
        episodes = by_index(engine.rollout(examples(5), group_size=3))
    assert episodes == expected
    after = (stats.images, stats.prefill_tokens, stats.decoded_tokens)
    assert all(new > old for new, old in zip(after, before, strict=True))


def test_the_guard_notices_implicit_transfers(engine):
    """Without an explicit transfer, a program's host arrays would be transferred implicitly."""
    device = engine.device
    with jax.transfer_guard("disallow"):
        device._write_pages([0], device._read_pages([0]))
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            device.runner.programs.read_pages(device.runner._cache, np.array([0], np.int32))
