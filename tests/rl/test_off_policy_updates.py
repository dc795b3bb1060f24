"""Importance ratios that differ from 1: several updates per step, or the engine's log-probs."""

import jax
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.rl import packing
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.train_batch import make_loss, update_metrics, with_logprobs
from mmsr1_jax.scripts import random_policy
from tests.episode_factory import TEXT, episode_of, reward_of
from tests.rl.groups import group_samples

LIMIT, BUFFER = 60, 20  # tokens of an episode, and how many of them are too many
SHAPE = packing.RowShape(2, 64, 0)
CAP = 1.2
LEARNING_RATE = 1e-2  # one update moves ratios out of the clip range


def random_groups():
    """Return four groups of three episodes, with engine log-probs close to a random policy's."""
    rng = np.random.default_rng(0)
    return [
        [
            (episode_of(TEXT["nonsense"], TEXT["nonsense"], sampled=int(rng.integers(4, 16)),
                        seed=3 * question + i, index=3 * question + i), reward_of(value))
            for i, value in enumerate(rng.permutation([1.0, 0.1, 0.0]))
        ]
        for question in range(4)
    ]  # fmt: skip


def make_objective(**fields):
    return settings.Objective(**{"num_minibatches": 2, "kl_coef": 0.0, "tis_cap": CAP} | fields)


def make_learner_and_batches(objective):
    """Return a learner of a random policy, and the micro-batches of a step's two updates."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = checkpoint.abstract_model(random_policy.CONFIG, attention="xla", logprob_chunk=16)
    graph, params = nnx.split(model)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), params)
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    learner = Learner(nnx.merge(graph, params), make_loss(objective), settings.Update(), mesh)
    groups, packed = random_groups(), []
    for part in (groups[0::2], groups[1::2]):
        samples, skipped = group_samples(part, objective, LIMIT, random_policy.CONFIG, SHAPE)
        assert len(samples) == 6 and not skipped
        packed.append(packing.pack(samples, random_policy.CONFIG, SHAPE))
        assert len(packed[-1]) > 1  # gradients of several micro-batches are accumulated
    return learner, packed


def loss_token_values(batches, values):
    """Return the values of the loss tokens of all micro-batches, float64[tokens].

    Args:
      batches: Micro-batches.
      values: Arrays of the micro-batches, or the name of a field.
    """
    if isinstance(values, str):
        values = [getattr(batch, values) for batch in batches]
    arrays = [x[batch.mask] for x, batch in zip(values, batches, strict=True)]
    return np.concatenate(arrays).astype(np.float64)


def assert_sums(actual, batches, new, old, *, corrected):
    """Assert that the sums of an update are those of GRPO at these log-probs.

    arXiv 2402.03300, eq. 3, with DAPO's average over tokens.
    """
    new, old, rollout_logprobs, advantages = (
        loss_token_values(batches, x) for x in (new, old, "rollout_logprobs", "advantages")
    )
    ratio = np.exp(new - old)
    clipped = np.clip(ratio, 0.8, 1.2)
    objective = np.minimum(ratio * advantages, clipped * advantages)
    expected = {
        "tokens": len(new),
        "ratio": ratio.sum(),
        "clipped_low": ((ratio < 0.8) & (advantages < 0)).sum(),
        "clipped_high": ((ratio > 1.2) & (advantages > 0)).sum(),
        "log_ratio_abs": np.abs(new - old).sum(),
        "log_ratio_squared": ((new - old) ** 2).sum(),
    }
    if corrected:
        diff = old - rollout_logprobs
        correction = np.minimum(np.exp(diff), CAP)
        objective = objective * correction
        expected |= {
            "rollout_logprob_diff_abs": np.abs(diff).sum(),
            "rollout_logprob_diff_squared": (diff**2).sum(),
            "tis_weight": correction.sum(),
            "tis_capped": (diff >= np.log(CAP)).sum(),
        }
    expected["policy_loss"] = expected["loss"] = -objective.mean()
    assert expected["clipped_low"] > 0 and expected["clipped_high"] > 0
    actual = {k: v for k, v in actual.items() if k not in ("entropy", "finite", "gradient_norm")}
    assert actual == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5, abs=1e-5)


@pytest.mark.proof
def test_the_second_update_of_a_step_is_off_policy():
    """Old log-probs come from `Learner.logprobs`, new ones from the gradient program."""
    learner, packed = make_learner_and_batches(make_objective(old_logprobs="trainer"))
    start = learner.snapshot()
    packed = [with_logprobs(part, "old_logprobs", learner) for part in packed]
    for part in packed:
        old = loss_token_values(part, "old_logprobs")
        assert old.std() > 0.1 and (old < 0).all()
    first, second = packed

    metrics = update_metrics(learner.update(first, LEARNING_RATE))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["log_ratio_abs"] < 1e-5 and metrics["clip_fraction"] == 0.0
    assert metrics["finite"] == 1 and metrics["gradient_norm"] > 0

    old, new = [batch.old_logprobs for batch in second], learner.logprobs(second)
    sums = learner.update(second, LEARNING_RATE)
    assert abs(update_metrics(sums)["ratio"] - 1) > 1e-2
    assert_sums(sums, second, new, old, corrected=True)
    # A snapshot from before the updates gives the old log-probs, as for a reference policy.
    for actual, expected in zip(learner.logprobs(second, start), old, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_the_ratio_to_the_log_probs_of_the_engine():
    learner, (first, second) = make_learner_and_batches(make_objective(old_logprobs="engine"))
    for part in (first, second):
        logprobs = learner.logprobs(part)
        sums = learner.update(part, LEARNING_RATE)
        assert_sums(
            sums, part, logprobs, [batch.rollout_logprobs for batch in part], corrected=False
        )
