"""The terms of the loss follow the equations of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr1_jax.rl.advantages import (
    group_advantages,
)
from mmsr1_jax.rl.loss import (
    KL_ESTIMATORS,
    LOSS_AGGREGATIONS,
    RATIO_LEVELS,
    clipped_objective,
    importance_ratio,
    kl_estimate,
    token_weights,
    truncated_importance_weights,
    weighted_sum,
)
from mmsr1_jax.rl.schedules import make_schedule
from tests.rl.loss_reference import FIXED, LAYOUTS, aggregate, pack, random_episodes


def test_unknown_names_are_rejected():
    x = jnp.zeros((1, 2))
    for call in (
        lambda: group_advantages([1.0, 0.0], "other"),
        lambda: importance_ratio(x, x, x > 0, jnp.ones((1, 2), jnp.int32), "other"),
        lambda: kl_estimate(x, x, "other"),
        lambda: token_weights([1], "other"),
        lambda: make_schedule("other", 1.0),
    ):
        with pytest.raises(ValueError, match="'other' is not one of"):
            call()


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_kl_estimates_match_their_definitions(kind):
    rng = np.random.default_rng(1)
    new, reference = rng.normal(-1, 0.5, (2, 50))
    r = np.exp(reference - new)
    expected = {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": (r - 1) - np.log(r)}[kind]
    actual = kl_estimate(jnp.float32(new), jnp.float32(reference), kind)
    np.testing.assert_allclose(actual, expected, 1e-5, 1e-6)


def test_kl_estimates_and_their_gradients_in_expectation():
    rng = np.random.default_rng(2)
    logits, other = rng.normal(0, 1, (2, 7))
    with jax.enable_x64(True):
        p, q = jax.nn.softmax(logits), jax.nn.log_softmax(other)

        def mean(x, kind):
            return jnp.sum(p * kl_estimate(jax.nn.log_softmax(x), q, kind))

        def forward(x):
            return jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - q))

        def backward(x):
            return jnp.sum(jnp.exp(q) * (q - jax.nn.log_softmax(x)))

        logits = jnp.asarray(logits)
        for kind in ("k1", "k3"):
            np.testing.assert_allclose(mean(logits, kind), forward(logits), 1e-10)
        for kind, expected in (("k1", lambda x: 0.0 * x[0]), ("k2", forward), ("k3", backward)):
            actual = jax.jit(jax.grad(mean), static_argnums=1)(logits, kind)
            np.testing.assert_allclose(actual, jax.grad(expected)(logits), 1e-10, 1e-10)


def test_clipping_matches_ppo_equation_7():
    rng = np.random.default_rng(3)
    ratio, advantage = rng.uniform(0.3, 2, 500), rng.normal(0, 1, 500)
    for low, high in ((0.2, 0.2), (0.2, 0.28)):
        expected = np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
        actual = clipped_objective(jnp.float32(ratio), jnp.float32(advantage), low, high)
        np.testing.assert_allclose(actual, expected, 1e-6, 1e-6)


def test_importance_weights_are_truncated_and_have_no_gradient():
    rng = np.random.default_rng(4)
    trainer, rollout_logprobs = rng.normal(-1, 0.7, (2, 200))
    actual = truncated_importance_weights(jnp.float32(trainer), jnp.float32(rollout_logprobs), 2.0)
    expected = np.minimum(np.exp(trainer) / np.exp(rollout_logprobs), 2.0)
    np.testing.assert_allclose(actual, expected, 1e-6)
    assert (expected == 2).any() and (expected < 2).any()
    gradient = jax.grad(
        lambda x: truncated_importance_weights(x, jnp.float32(rollout_logprobs), 2.0).sum()
    )
    assert (gradient(jnp.float32(trainer)) == 0).all()


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_ratios_of_packed_rows(level):
    episodes = random_episodes(5)
    micro_batches, length = LAYOUTS["micro-batches"]
    for rows in micro_batches:
        arrays, slots = pack(episodes, rows, length, np.ones(7), np.float32)
        rows_of = (arrays[f] for f in ("new", "old_logprobs", "mask", "segment_ids"))
        actual = jax.jit(importance_ratio, static_argnums=4)(*rows_of, level)
        assert (np.asarray(actual)[~np.asarray(arrays["mask"])] == 1).all()
        for index, slot in slots.items():
            e = episodes[index]
            ratios = (np.exp(e["new"]) / np.exp(e["old_logprobs"]))[e["mask"]]
            if level == "sequence" and len(ratios):
                ratios = np.full(len(ratios), np.prod(ratios) ** (1 / len(ratios)))
            elif level == "trajectory":
                ratios = np.full(len(ratios), np.prod(ratios))
            np.testing.assert_allclose(actual[slot][e["mask"]], ratios, 2e-6)


@pytest.mark.parametrize("aggregation", LOSS_AGGREGATIONS)
def test_token_weights_turn_the_average_into_a_sum(aggregation):
    rng = np.random.default_rng(6)
    values = [rng.normal(size=n) for n in (3, 1, 0, 17, 8)]
    weights = token_weights([len(v) for v in values], aggregation, FIXED)
    assert weights.dtype == np.float32 and weights[2] == 0
    actual = sum(w * v.sum() for w, v in zip(weights.astype(float), values, strict=True))
    assert actual == pytest.approx(aggregate(values, aggregation), rel=1e-6)
    assert (token_weights([0, 0], aggregation, FIXED) == 0).all()
    assert token_weights([], aggregation, FIXED).shape == (0,)


def test_invalid_lengths_are_rejected():
    with pytest.raises(ValueError, match="none negative"):
        token_weights([3, -1], "token")
    with pytest.raises(ValueError, match="fixed_length=None"):
        token_weights([3], "fixed")


def test_masked_values_get_no_gradient():
    values, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    weights = jnp.array([0.5, jnp.inf, 2.0])
    assert weighted_sum(values, weights, mask) == 6.5
    np.testing.assert_array_equal(jax.grad(weighted_sum)(values, weights, mask), [0.5, 0, 2])
