"""Policy updates match torch, however episodes are packed, on one device and on eight."""

import math
import re

import jax
import numpy as np
import pytest

from mmsr1_jax.models import sharding
from mmsr1_jax.rl import packing
from mmsr1_jax.utils import compile_counter
from tests.reference import named_tensors, over_families, torch, torch_model, variant
from tests.rl.learners import (
    CONFIG,
    SHAPE,
    assert_same_update,
    flat,
    learned_config,
    make_learner,
    make_samples,
    metrics_and_moments,
    off_policy_batches,
    torch_loss,
)


@pytest.fixture(scope="module")
def config(request):
    return learned_config(request)


@pytest.fixture(scope="module")
def learner(config):
    return make_learner(config)


@pytest.fixture(scope="module")
def expected(config, learner):
    return metrics_and_moments(learner, off_policy_batches(learner, make_samples(config)))


@pytest.mark.proof
@over_families("config", proof=True)
@pytest.mark.parametrize("shape", [(1, 128, 16), (1, 512, 64)])
def test_the_update_does_not_depend_on_packing_and_micro_batches(config, learner, expected, shape):
    metrics, moments = expected
    assert metrics["finite"] == 1 and max(np.abs(m).max() for m in moments.values()) > 1e-3
    batches = off_policy_batches(learner, make_samples(config)[::-1], packing.RowShape(*shape))
    assert_same_update(metrics_and_moments(learner, batches), expected)


@over_families("config", proof=True)
@pytest.mark.parametrize("shape", [pytest.param((1, 8, 1), marks=pytest.mark.proof), (1, 4, 2)])
def test_eight_devices_equal_one(config, expected, shape):
    other = make_learner(config, sharding.make_mesh(*shape))
    batches = off_policy_batches(other, make_samples(config), packing.RowShape(8, 128, 16))
    assert_same_update(metrics_and_moments(other, batches), expected)
    moments = [x for x in jax.tree.leaves(other.optimizer) if x.ndim > 2]
    parts = [x.sharding.shard_shape(x.shape) for x in moments]
    assert any(part != x.shape for part, x in zip(parts, moments, strict=True)), "not sharded"


@over_families("config", proof=True)
@pytest.mark.parametrize("freeze_vision", [False, pytest.param(True, marks=pytest.mark.proof)])
def test_three_updates_equal_torch(config, freeze_vision):
    samples = make_samples(config, seed=2)
    learner = make_learner(config, freeze_vision=freeze_vision)
    batches = off_policy_batches(learner, samples)
    torch_policy = torch_model(learner.model())
    names = dict(torch_policy.named_parameters())
    trained = [x for n, x in names.items() if not (freeze_vision and "visual" in n)]
    start = {name: x.detach().clone() for name, x in names.items()}
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1)
    _, logprobs = torch_loss(torch_policy, samples, None, None)
    with torch.enable_grad():
        for step in range(3):
            optimizer.zero_grad()
            expected_loss, _ = torch_loss(torch_policy, samples, logprobs, logprobs)
            expected_loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
            assert norm > 0.5  # the gradient is clipped
            optimizer.step()
            metrics = learner.update(batches, 1e-4)
            assert metrics["loss"] == pytest.approx(expected_loss.item(), rel=1e-4), step
            assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    ours = named_tensors(learner.model())
    change = {name: np.abs((x.detach() - start[name]).numpy()).max() for name, x in names.items()}
    assert all((x > 2e-4) != (freeze_vision and "visual" in name) for name, x in change.items())
    errors = {name: np.abs(ours[name] - x.detach().numpy()).max() for name, x in names.items()}
    assert max(errors.values()) <= 1e-5, max(errors, key=errors.get)


def test_a_nonfinite_update_changes_nothing(learner):
    batches = off_policy_batches(learner, make_samples(CONFIG))
    before, moments = flat(learner.params), flat(learner.optimizer)
    nonfinite = [
        b.replace(advantages=np.where(b.mask, np.nan, 0).astype(np.float32)) for b in batches
    ]
    assert learner.update(nonfinite, 1e-3)["finite"] == 0
    for state, expected in ((learner.params, before), (learner.optimizer, moments)):
        for name, value in flat(state).items():
            np.testing.assert_array_equal(value, expected[name])
    assert learner.update(batches, 1e-3)["finite"] == 1


def test_a_reference_policy_can_be_kept_in_host_memory(learner):
    batches = packing.pack(make_samples(CONFIG), CONFIG, SHAPE)
    reference = learner.snapshot("pinned_host")
    assert {x.sharding.memory_kind for x in jax.tree.leaves(reference)} == {"pinned_host"}
    for actual, expected in zip(
        learner.logprobs(batches, reference), learner.logprobs(batches), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


def test_the_state_moves_to_host_memory_and_back(learner):
    batches = packing.pack(make_samples(CONFIG), CONFIG, SHAPE)
    learner.update(batches, 1e-3)
    before, compiled = (flat(learner.params), flat(learner.optimizer)), compile_counter.count()
    learner.offload()
    state = jax.tree.leaves((learner.trained, learner.frozen, learner.optimizer))
    assert {x.sharding.memory_kind for x in state} == {"pinned_host"}
    learner.restore()
    learner.restore()  # it is there already
    for moved, expected in zip((learner.params, learner.optimizer), before, strict=True):
        for name, value in flat(moved).items():
            np.testing.assert_array_equal(value, expected[name])
    learner.update(batches, 1e-3)
    assert compile_counter.count() == compiled


def test_no_update_materialises_tokens_by_vocabulary():
    """In the compiled program, with the released vocabulary and a row of 8k tokens."""
    config = variant(vocab_size=151_936)
    T, V = 8192, 151_936
    prompt = packing.Prompt(np.full(T, 9, np.int32), ())
    ones = np.ones(T, np.float32)
    sample = packing.Sample(
        prompt=prompt, mask=ones > 0, weights=ones, advantages=ones, rollout_logprobs=ones
    )
    (batch,) = packing.pack([sample], config, packing.RowShape(1, T, 0))
    learner = make_learner(config, attention="blockwise")
    text = learner.lower("gradient", batch).compile().as_text()
    shapes = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+)\]", text)}
    by_vocabulary = [math.prod(shape) // V for shape in shapes if V in shape]
    assert max(by_vocabulary) < T / 8, max(by_vocabulary)
    assert config.text.hidden_size in by_vocabulary  # the search finds such arrays
