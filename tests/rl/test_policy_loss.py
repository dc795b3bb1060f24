"""The policy loss and its gradients match the reference, however episodes are packed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr1_jax.rl.loss import (
    LOSS_AGGREGATIONS,
    RATIO_LEVELS,
    LossOptions,
    policy_loss,
    token_weights,
)
from tests.rl.loss_reference import (
    FIELDS,
    FIXED,
    LAYOUTS,
    make_options,
    random_episodes,
    reference_loss,
    run,
)


@pytest.mark.parametrize(
    "ratio, aggregation, kl_estimator, tis_cap",
    [
        *itertools.product(RATIO_LEVELS, LOSS_AGGREGATIONS, ["k3"], [1.1]),
        ("token", "sequence", "k1", None),
        ("token", "token", "k2", None),
    ],
)
def test_loss_matches_the_papers(ratio, aggregation, kl_estimator, tis_cap):
    episodes, options = random_episodes(7), make_options(ratio, kl_estimator, tis_cap)
    expected = reference_loss(episodes, options, aggregation)
    with jax.enable_x64(True):  # the weights remain float32
        loss, sums, _ = run(episodes, options, aggregation)
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-7)
    policy_only = dataclasses.replace(options, kl_coef=0.0, entropy_coef=0.0)
    assert sums["policy_loss"] == pytest.approx(
        reference_loss(episodes, policy_only, aggregation), rel=1e-6
    )


@pytest.mark.parametrize("ratio, aggregation", itertools.product(RATIO_LEVELS, LOSS_AGGREGATIONS))
def test_gradient_matches_torch(ratio, aggregation):
    torch = pytest.importorskip("torch", reason="the reference's gradient needs torch")
    episodes, options = random_episodes(12), make_options(ratio)
    if ratio != "token":  # the papers define no per-token correction of an episode's ratio
        options = dataclasses.replace(options, tis_cap=None)
    if ratio == "trajectory":  # see the comment below
        options = dataclasses.replace(options, kl_coef=0.0)
    with jax.enable_x64(True):
        _, sums, gradients = run(episodes, options, aggregation)
    assert sums["clipped_low"] > 0 and sums["clipped_high"] > 0
    assert sums["clipped_low"] + sums["clipped_high"] < sums["tokens"]
    with torch.enable_grad():
        tensors = [{f: torch.tensor(v) for f, v in e.items()} for e in episodes]
        leaves = [e[f].requires_grad_() for e in tensors for f in ("new", "entropies")]
        reference_loss(tensors, options, aggregation, torch).backward()
    expected = [np.zeros(len(x)) if x.grad is None else x.grad.numpy() for x in leaves]
    for index, e in enumerate(episodes):
        d_new, d_entropies = gradients[index]
        if ratio == "trajectory":
            # In the reference, each token's term contains the ratio of the episode, so its gradient
            # is counted once per token; ours is counted once.
            d_new = d_new * max(1, e["mask"].sum())
        np.testing.assert_allclose(d_new, expected[2 * index], 1e-6, 1e-9)
        np.testing.assert_allclose(d_entropies, expected[2 * index + 1], 1e-6, 1e-9)


@pytest.mark.parametrize("ratio, aggregation", itertools.product(RATIO_LEVELS, LOSS_AGGREGATIONS))
def test_at_ratio_one_the_gradient_is_the_policy_gradient(ratio, aggregation):
    episodes = random_episodes(9)
    for e in episodes:
        e["old_logprobs"] = e["ref_logprobs"] = e["rollout_logprobs"] = e["new"]
    _, sums, gradients = run(episodes, make_options(ratio), aggregation, dtype=np.float32)
    weights = token_weights([e["mask"].sum() for e in episodes], aggregation, FIXED)
    for index, e in enumerate(episodes):
        expected = np.where(e["mask"], -weights[index] * e["advantages"], 0)
        np.testing.assert_allclose(gradients[index][0], expected, 1e-6)
    assert sums["ratio"] == sums["tokens"] == sum(e["mask"].sum() for e in episodes)
    for name in ("clipped_low", "clipped_high", "log_ratio_abs", "kl", "rollout_logprob_diff_abs"):
        assert sums[name] == 0


def test_the_policy_itself_can_be_the_old_policy():
    new = jnp.array([[-1.0, -2.0]])
    fixed = {"weights": jnp.ones((1, 2)), "mask": jnp.ones((1, 2), bool)}
    fixed |= {"segment_ids": jnp.ones((1, 2), jnp.int32), "advantages": jnp.array([[2.0, -3.0]])}
    options = LossOptions(kl_coef=0.0, tis_cap=1.5)

    def loss(new):
        return policy_loss(
            new, old_logprobs=new, rollout_logprobs=new - 0.1, options=options, **fixed
        )[0]

    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(new), [[-2 * np.exp(0.1), 3 * np.exp(0.1)]], 1e-6
    )


@pytest.mark.parametrize("ratio, aggregation", itertools.product(RATIO_LEVELS, LOSS_AGGREGATIONS))
def test_the_loss_does_not_depend_on_packing(ratio, aggregation):
    episodes, options = random_episodes(10), make_options(ratio)
    results = [run(episodes, options, aggregation, layout, np.float32) for layout in LAYOUTS]
    loss, sums, gradients = results[0]
    assert loss == pytest.approx(reference_loss(episodes, options, aggregation), rel=1e-6, abs=1e-6)
    for other_loss, other_sums, other_gradients in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
        assert other_sums == pytest.approx(sums, rel=2e-6, abs=1e-6)
        for index in range(len(episodes)):
            for mine, other in zip(gradients[index], other_gradients[index], strict=True):
                np.testing.assert_allclose(other, mine, 3e-6, 1e-8)


def test_sums_match_their_definitions():
    episodes, options = random_episodes(11), make_options()
    _, sums, _ = run(episodes, options, "token", dtype=np.float32)
    new, old, rollout_logprobs, reference, advantages, entropies = (
        np.concatenate([e[f][e["mask"]] for e in episodes]) for f in FIELDS
    )
    ratio, correction = np.exp(new - old), np.minimum(np.exp(old - rollout_logprobs), 1.1)
    expected = {
        "tokens": len(new),
        "ratio": ratio.sum(),
        "clipped_low": ((ratio < 0.97) & (advantages < 0)).sum(),
        "clipped_high": ((ratio > 1.05) & (advantages > 0)).sum(),
        "log_ratio_abs": np.abs(new - old).sum(),
        "log_ratio_squared": ((new - old) ** 2).sum(),
        "rollout_logprob_diff_abs": np.abs(old - rollout_logprobs).sum(),
        "rollout_logprob_diff_squared": ((old - rollout_logprobs) ** 2).sum(),
        "tis_weight": correction.sum(),
        "tis_capped": (correction == 1.1).sum(),
        "kl": (np.exp(reference - new) - 1 - (reference - new)).sum(),
        "entropy": entropies.sum(),
    }
    assert expected["clipped_low"] and expected["clipped_high"] and expected["tis_capped"]
    del sums["policy_loss"]
    assert sums == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("ratio", RATIO_LEVELS)
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_extreme_log_ratios_stay_finite(ratio, gap):
    """Even for a sampled token that has become nearly impossible under the policy."""
    size = (1, 4)
    old = jnp.full(size, -1.0)

    @jax.value_and_grad
    def loss(new, advantage):
        return policy_loss(
            new,
            old_logprobs=old,
            rollout_logprobs=new,
            ref_logprobs=old,
            advantages=jnp.full(size, advantage),
            weights=jnp.full(size, 0.25),
            mask=jnp.ones(size, bool),
            segment_ids=jnp.ones(size, jnp.int32),
            options=LossOptions(ratio_level=ratio, tis_cap=2.0),
        )[0]

    for advantage in (1.0, -1.0):
        value, gradient = jax.jit(loss)(old + gap, advantage)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (LossOptions(), "kl_coef=0.001 needs `ref_logprobs`"),
        (LossOptions(kl_coef=0.0, entropy_coef=0.1), "entropy_coef=0.1 needs `entropies`"),
        (LossOptions(kl_coef=0.0, tis_cap=2.0), "tis_cap=2.0 needs `rollout_logprobs`"),
    ],
)
def test_a_term_without_its_input_is_rejected(options, message):
    x = jnp.zeros((1, 2))
    arrays = dict.fromkeys(("old_logprobs", "advantages", "weights"), x)
    with pytest.raises(ValueError, match=message):
        policy_loss(x, mask=x == 0, segment_ids=x.astype(int), options=options, **arrays)
