"""Advantages, loss and schedules are what the papers' equations say, however rows are packed.

The references below go over episodes one by one, as the papers write them, in float64.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmsr1_jax.rl.advantages import (
    ADVANTAGES,
    group_advantages,
    has_reward_variance,
    overlong_mask,
    overlong_penalty,
)
from mmsr1_jax.rl.loss import (
    KL_ESTIMATORS,
    LOSS_AGGREGATIONS,
    RATIO_LEVELS,
    LossOptions,
    clipped_objective,
    importance_ratio,
    kl_estimate,
    policy_loss,
    token_weights,
    truncated_importance_weights,
    weighted_sum,
)
from mmsr1_jax.rl.schedules import SCHEDULES, make_schedule

FIXED = 40
FIELDS = ("new", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "entropies")
LAYOUTS = {  # micro-batches of rows of episodes, and the tokens of a row
    "one a row": ([[[0], [1], [2], [3], [4], [5], [6]]], 16),
    "one row": ([[[6, 0, 5, 1, 4, 2, 3]]], 98),
    "micro-batches": ([[[3, 1], [4]], [[0, 2], []], [[5], [6]]], 28),
}


# Advantages


def advantages_of(rewards, kind):
    n, mean = len(rewards), math.fsum(rewards) / len(rewards)
    if kind == "grpo":
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (n - 1))
        return [(r - mean) / (std + 1e-6) for r in rewards]
    if kind == "mean":
        return [r - mean for r in rewards]
    return [r - (math.fsum(rewards) - r) / (n - 1) for r in rewards]


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_are_those_of_the_papers(kind):
    rng = np.random.default_rng(0)
    for size in (2, 3, 8, 64):
        rewards = rng.choice([0, 0.1, 0.81, 0.9, 0.91, 1.0], size) + rng.normal(0, 0.01, size)
        found = group_advantages(rewards, kind)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, advantages_of(rewards.tolist(), kind), 1e-6, 1e-6)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_a_group_without_spread_teaches_nothing(kind):
    for rewards in ([0.91], [0.1] * 8, [0.81, 0.9 * 0.9 * 1.0, 0.1 + 0.71]):
        assert not has_reward_variance(rewards)
        assert (group_advantages(rewards, kind) == 0).all()
    assert has_reward_variance([0.91, 0.91, 0.9])
    assert has_reward_variance([0, 1])


@pytest.mark.parametrize(
    "rewards, message",
    [([0.1, float("nan")], r"rewards\[1\] is nan"), ([], "shape"), ([[1.0, 0.0]], "shape")],
)
def test_bad_rewards_are_named(rewards, message):
    for function in (group_advantages, has_reward_variance):
        with pytest.raises(ValueError, match=message):
            function(rewards)


def test_unknown_kinds_are_named():
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


def test_overlong_penalty_is_dapo_equation_13():
    limit, buffer = 100, 30
    for length in range(0, 150):
        if length <= limit - buffer:
            want = 0.0
        elif length <= limit:
            want = ((limit - buffer) - length) / buffer
        else:
            want = -1.0
        assert overlong_penalty(length, limit, buffer) == pytest.approx(want, abs=1e-7)
    np.testing.assert_allclose(overlong_penalty(np.array([70, 85, 100]), 100, 30), [0, -0.5, -1])
    for wrong in (0, 101):
        with pytest.raises(ValueError, match=f"buffer={wrong}"):
            overlong_penalty(5, 100, wrong)


def test_overlong_filtering_takes_the_loss_away():
    mask = np.array([False, True, True])
    np.testing.assert_array_equal(overlong_mask(mask, False), mask)
    assert not overlong_mask(mask, True).any() and mask.any()


# Loss: the reference


def episodes_of(seed, count=7):
    """Episodes with holes in their masks; the fourth carries no loss at all."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        size = int(rng.integers(2, 15))
        new = rng.normal(-1.5, 0.7, size)
        episode = {
            "new": new,
            "old_logprobs": new + rng.normal(0, 0.15, size),
            "ref_logprobs": new + rng.normal(0, 0.5, size),
            "advantages": np.full(size, rng.normal()),
            "entropies": rng.uniform(0, 3, size),
            "mask": (rng.random(size) < 0.7) & (number != 3),
        }
        episode["rollout_logprobs"] = episode["old_logprobs"] + rng.normal(0, 0.2, size)
        made.append(episode)
    made[0]["mask"][:2] = True
    return made


def average_of(values, how):
    """Of a list of arrays, one for each episode, of its tokens with loss."""
    some = [v for v in values if len(v)]
    if how == "token":
        return sum(v.sum() for v in some) / sum(len(v) for v in some)
    if how == "sequence":
        return sum(v.mean() for v in some) / len(some)
    return sum(v.sum() for v in some) / (len(values) * FIXED)


def loss_of(episodes, options, how, xp=np):
    """The loss as the papers write it; xp: numpy or torch."""
    objectives, kls, entropies = [], [], []
    for e in episodes:
        new, old, rollout_logprobs, reference, advantages, entropy = (
            e[f][e["mask"]] for f in FIELDS
        )
        if options.ratio_level == "token":
            ratio = xp.exp(new) / xp.exp(old)
        elif options.ratio_level == "sequence":
            ratio = xp.exp((new - old).sum() / max(1, len(new))) + 0 * new
        else:
            ratio = xp.prod(xp.exp(new) / xp.exp(old)) + 0 * new
        clipped = xp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
        objective = xp.minimum(ratio * advantages, clipped * advantages)
        if options.tis_cap is not None:
            objective = objective * xp.clip(xp.exp(old - rollout_logprobs), 0, options.tis_cap)
        r = xp.exp(reference) / xp.exp(new)
        kl = {"k1": -xp.log(r), "k2": xp.log(r) ** 2 / 2, "k3": r - 1 - xp.log(r)}
        objectives.append(objective)
        kls.append(kl[options.kl_estimator])
        entropies.append(entropy)
    return (
        -average_of(objectives, how)
        + options.kl_coef * average_of(kls, how)
        - options.entropy_coef * average_of(entropies, how)
    )


def pack(episodes, rows, length, weights, dtype):
    """Arrays of one micro-batch. What the mask hides is not a number."""
    arrays = {f: np.full((len(rows), length), np.nan, dtype) for f in (*FIELDS, "weights")}
    arrays["mask"] = np.zeros((len(rows), length), bool)
    arrays["segment_ids"] = np.zeros((len(rows), length), np.int32)
    places = {}
    for row, numbers in enumerate(rows):
        start = 0
        for segment, number in enumerate(numbers, start=1):
            e = episodes[number]
            place = (row, slice(start, start + len(e["mask"])))
            for field in FIELDS:
                arrays[field][place] = np.where(e["mask"], e[field], np.inf)
            arrays["weights"][place] = weights[number]
            arrays["mask"][place] = e["mask"]
            arrays["segment_ids"][place] = segment
            places[number] = place
            start += len(e["mask"])
    return {name: jnp.asarray(a) for name, a in arrays.items()}, places


@functools.partial(jax.jit, static_argnums=3)
def gradient_of(new, entropies, arrays, options):
    def loss(new, entropies):
        return policy_loss(new, entropies=entropies, options=options, **arrays)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(new, entropies)


def run(episodes, options, how, layout="micro-batches", dtype=np.float64):
    """Loss, sums, and gradients of `new` and `entropies` by episode, over all micro-batches."""
    weights = token_weights([e["mask"].sum() for e in episodes], how, FIXED)
    loss, sums, gradients = 0.0, {}, {}
    micro_batches, length = LAYOUTS[layout]

    for rows in micro_batches:
        arrays, places = pack(episodes, rows, length, weights, dtype)
        new, entropies = arrays.pop("new"), arrays.pop("entropies")
        (value, found), (d_new, d_entropies) = gradient_of(new, entropies, arrays, options)
        assert value.dtype == dtype and {v.dtype for v in found.values()} == {np.dtype(dtype)}
        loss += float(value)
        sums = {name: sums.get(name, 0.0) + float(v) for name, v in found.items()}
        hidden = ~np.asarray(arrays["mask"])
        assert (np.asarray(d_new)[hidden] == 0).all()
        assert (np.asarray(d_entropies)[hidden] == 0).all()
        for number, place in places.items():
            gradients[number] = (np.asarray(d_new)[place], np.asarray(d_entropies)[place])
    return loss, sums, gradients


def options_of(ratio="token", kl_kind="k3", truncation=1.1):
    return LossOptions(
        ratio_level=ratio,
        clip_low=0.03,
        clip_high=0.05,
        kl_coef=0.3,
        kl_estimator=kl_kind,
        entropy_coef=0.2,
        tis_cap=truncation,
    )


# Loss: its parts


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_kl_estimates(kind):
    rng = np.random.default_rng(1)
    new, reference = rng.normal(-1, 0.5, (2, 50))
    r = np.exp(reference - new)
    want = {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": (r - 1) - np.log(r)}[kind]
    found = kl_estimate(jnp.float32(new), jnp.float32(reference), kind)
    np.testing.assert_allclose(found, want, 1e-5, 1e-6)


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
        for kind, want in (("k1", lambda x: 0.0 * x[0]), ("k2", forward), ("k3", backward)):
            found = jax.jit(jax.grad(mean), static_argnums=1)(logits, kind)
            np.testing.assert_allclose(found, jax.grad(want)(logits), 1e-10, 1e-10)


def test_clipping_is_ppo_equation_7():
    rng = np.random.default_rng(3)
    ratio, advantage = rng.uniform(0.3, 2, 500), rng.normal(0, 1, 500)
    for low, high in ((0.2, 0.2), (0.2, 0.28)):
        want = np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
        found = clipped_objective(jnp.float32(ratio), jnp.float32(advantage), low, high)
        np.testing.assert_allclose(found, want, 1e-6, 1e-6)


def test_importance_weights_are_truncated_and_have_no_gradient():
    rng = np.random.default_rng(4)
    trainer, rollout_logprobs = rng.normal(-1, 0.7, (2, 200))
    found = truncated_importance_weights(jnp.float32(trainer), jnp.float32(rollout_logprobs), 2.0)
    want = np.minimum(np.exp(trainer) / np.exp(rollout_logprobs), 2.0)
    np.testing.assert_allclose(found, want, 1e-6)
    assert (want == 2).any() and (want < 2).any()
    gradient = jax.grad(
        lambda x: truncated_importance_weights(x, jnp.float32(rollout_logprobs), 2.0).sum()
    )
    assert (gradient(jnp.float32(trainer)) == 0).all()


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_ratios_of_packed_rows(level):
    episodes = episodes_of(5)
    micro_batches, length = LAYOUTS["micro-batches"]
    for rows in micro_batches:
        arrays, places = pack(episodes, rows, length, np.ones(7), np.float32)
        rows_of = (arrays[f] for f in ("new", "old_logprobs", "mask", "segment_ids"))
        found = jax.jit(importance_ratio, static_argnums=4)(*rows_of, level)
        assert (np.asarray(found)[~np.asarray(arrays["mask"])] == 1).all()
        for number, place in places.items():
            e = episodes[number]
            ratios = (np.exp(e["new"]) / np.exp(e["old_logprobs"]))[e["mask"]]
            if level == "sequence" and len(ratios):
                ratios = np.full(len(ratios), np.prod(ratios) ** (1 / len(ratios)))
            elif level == "trajectory":
                ratios = np.full(len(ratios), np.prod(ratios))
            np.testing.assert_allclose(found[place][e["mask"]], ratios, 2e-6)


@pytest.mark.parametrize("how", LOSS_AGGREGATIONS)
def test_weights_make_the_average_a_sum(how):
    rng = np.random.default_rng(6)
    values = [rng.normal(size=n) for n in (3, 1, 0, 17, 8)]
    weights = token_weights([len(v) for v in values], how, FIXED)
    assert weights.dtype == np.float32 and weights[2] == 0
    found = sum(w * v.sum() for w, v in zip(weights.astype(float), values, strict=True))
    assert found == pytest.approx(average_of(values, how), rel=1e-6)
    assert (token_weights([0, 0], how, FIXED) == 0).all()
    assert token_weights([], how, FIXED).shape == (0,)


def test_bad_lengths_are_named():
    with pytest.raises(ValueError, match="none negative"):
        token_weights([3, -1], "token")
    with pytest.raises(ValueError, match="fixed_length=None"):
        token_weights([3], "fixed")


# Loss: the whole


@pytest.mark.parametrize(
    "ratio, how, kl_kind, truncation",
    [
        *itertools.product(RATIO_LEVELS, LOSS_AGGREGATIONS, ["k3"], [1.1]),
        ("token", "sequence", "k1", None),
        ("token", "token", "k2", None),
    ],
)
def test_loss_is_that_of_the_papers(ratio, how, kl_kind, truncation):
    episodes, options = episodes_of(7), options_of(ratio, kl_kind, truncation)
    want = loss_of(episodes, options, how)
    with jax.enable_x64(True):  # the weights are float32 still
        loss, sums, _ = run(episodes, options, how)
    assert loss == pytest.approx(want, rel=1e-6, abs=1e-7)
    policy_only = dataclasses.replace(options, kl_coef=0.0, entropy_coef=0.0)
    assert sums["policy_loss"] == pytest.approx(loss_of(episodes, policy_only, how), rel=1e-6)


@pytest.mark.parametrize("ratio, how", itertools.product(RATIO_LEVELS, LOSS_AGGREGATIONS))
def test_gradient_is_that_of_torch(ratio, how):
    torch = pytest.importorskip("torch", reason="the reference's gradient needs torch")
    episodes, options = episodes_of(12), options_of(ratio)
    if ratio != "token":  # the papers' gradient of an episode knows no corrections of its tokens
        options = dataclasses.replace(options, tis_cap=None)
    if ratio == "trajectory":  # see below
        options = dataclasses.replace(options, kl_coef=0.0)
    with jax.enable_x64(True):
        _, sums, gradients = run(episodes, options, how)
    assert sums["clipped_low"] > 0 and sums["clipped_high"] > 0
    assert sums["clipped_low"] + sums["clipped_high"] < sums["tokens"]
    with torch.enable_grad():
        tensors = [{f: torch.tensor(v) for f, v in e.items()} for e in episodes]
        leaves = [e[f].requires_grad_() for e in tensors for f in ("new", "entropies")]
        loss_of(tensors, options, how, torch).backward()
    wanted = [np.zeros(len(x)) if x.grad is None else x.grad.numpy() for x in leaves]
    for number, e in enumerate(episodes):
        d_new, d_entropies = gradients[number]
        if ratio == "trajectory":
            # An average over tokens meets the episode's one ratio at each of them, and so counts
            # its gradient as often; ours is that of one token at each.
            d_new = d_new * max(1, e["mask"].sum())
        np.testing.assert_allclose(d_new, wanted[2 * number], 1e-6, 1e-9)
        np.testing.assert_allclose(d_entropies, wanted[2 * number + 1], 1e-6, 1e-9)


@pytest.mark.parametrize("ratio, how", itertools.product(RATIO_LEVELS, LOSS_AGGREGATIONS))
def test_at_ratio_one_the_gradient_is_the_policy_gradient(ratio, how):
    episodes = episodes_of(9)
    for e in episodes:
        e["old_logprobs"] = e["ref_logprobs"] = e["rollout_logprobs"] = e["new"]
    _, sums, gradients = run(episodes, options_of(ratio), how, dtype=np.float32)
    weights = token_weights([e["mask"].sum() for e in episodes], how, FIXED)
    for number, e in enumerate(episodes):
        want = np.where(e["mask"], -weights[number] * e["advantages"], 0)
        np.testing.assert_allclose(gradients[number][0], want, 1e-6)
    assert sums["ratio"] == sums["tokens"] == sum(e["mask"].sum() for e in episodes)
    for name in ("clipped_low", "clipped_high", "log_ratio_abs", "kl", "rollout_logprob_diff_abs"):
        assert sums[name] == 0


def test_the_policy_itself_as_old():
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


@pytest.mark.parametrize("ratio, how", itertools.product(RATIO_LEVELS, LOSS_AGGREGATIONS))
def test_packing_changes_nothing(ratio, how):
    episodes, options = episodes_of(10), options_of(ratio)
    results = [run(episodes, options, how, layout, np.float32) for layout in LAYOUTS]
    loss, sums, gradients = results[0]
    assert loss == pytest.approx(loss_of(episodes, options, how), rel=1e-6, abs=1e-6)
    for other_loss, other_sums, other_gradients in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
        assert other_sums == pytest.approx(sums, rel=2e-6, abs=1e-6)
        for number in range(len(episodes)):
            for mine, other in zip(gradients[number], other_gradients[number], strict=True):
                np.testing.assert_allclose(other, mine, 3e-6, 1e-8)


def test_sums_count_what_they_say():
    episodes, options = episodes_of(11), options_of()
    _, sums, _ = run(episodes, options, "token", dtype=np.float32)
    new, old, rollout_logprobs, reference, advantages, entropies = (
        np.concatenate([e[f][e["mask"]] for e in episodes]) for f in FIELDS
    )
    ratio, correction = np.exp(new - old), np.minimum(np.exp(old - rollout_logprobs), 1.1)
    want = {
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
    assert want["clipped_low"] and want["clipped_high"] and want["tis_capped"]
    del sums["policy_loss"]
    assert sums == pytest.approx({k: float(v) for k, v in want.items()}, rel=1e-5)


@pytest.mark.parametrize("ratio", RATIO_LEVELS)
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_far_off_logprobs_stay_finite(ratio, gap):
    """Also where the policy has all but lost a token that it sampled."""
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


def test_a_masked_sum_has_no_gradient_where_nothing_counts():
    values, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    weights = jnp.array([0.5, jnp.inf, 2.0])
    assert weighted_sum(values, weights, mask) == 6.5
    np.testing.assert_array_equal(jax.grad(weighted_sum)(values, weights, mask), [0.5, 0, 2])


@pytest.mark.parametrize(
    "options, source",
    [
        (LossOptions(), "kl_coef=0.001 needs `ref_logprobs`"),
        (LossOptions(kl_coef=0.0, entropy_coef=0.1), "entropy_coef=0.1 needs `entropies`"),
        (LossOptions(kl_coef=0.0, tis_cap=2.0), "tis_cap=2.0 needs `rollout_logprobs`"),
    ],
)
def test_a_term_without_its_source_is_refused(options, source):
    x = jnp.zeros((1, 2))
    arrays = dict.fromkeys(("old_logprobs", "advantages", "weights"), x)
    with pytest.raises(ValueError, match=source):
        policy_loss(x, mask=x == 0, segment_ids=x.astype(int), options=options, **arrays)


# Schedules


def test_sigmoid_is_the_published_decay():
    schedule = make_schedule("sigmoid", 2e-6, final=0.05)
    published = {0: 1.0, 30: 0.967, 40: 0.765, 45: 0.525, 50: 0.285, 60: 0.083, 80: 0.05, 500: 0.05}
    for step, multiplier in published.items():
        assert schedule(step) / 2e-6 == pytest.approx(multiplier, abs=6e-4)
    for step in (0, 3, 45, 70):
        want = 2e-6 * min(1, step / 10) * (0.05 + 0.95 / (1 + math.exp((step - 45) / 4.5)))
        found = make_schedule("sigmoid", 2e-6, final=0.05, warmup_steps=10)(step)
        assert found == pytest.approx(want, rel=1e-5)


def test_other_schedules_are_those_of_optax():
    steps, warmup, rate = np.arange(140), 10, 1e-5
    rise = optax.linear_schedule(0, rate, warmup)
    line = optax.linear_schedule(rate, 0.1 * rate, 90)
    flat = optax.constant_schedule(rate)
    wanted = {
        "cosine": optax.warmup_cosine_decay_schedule(0, rate, warmup, 100, 0.1 * rate),
        "linear": optax.join_schedules([rise, line], [warmup]),
        "constant": optax.join_schedules([rise, flat], [warmup]),
    }
    assert {*wanted, "sigmoid"} == set(SCHEDULES)
    for kind, want in wanted.items():
        schedule = make_schedule(kind, rate, steps=100, warmup_steps=warmup, final=0.1)
        np.testing.assert_allclose(schedule(steps), jax.vmap(want)(steps), 1e-5, 1e-12)
        assert schedule(0) == 0
        assert make_schedule(kind, rate, steps=100)(0) == np.float32(rate)


def test_optax_takes_a_schedule():
    optimizer = optax.sgd(make_schedule("linear", 0.5, steps=2))
    state = optimizer.init(jnp.zeros(1))
    for want in (-0.5, -0.25, 0.0):
        update, state = jax.jit(optimizer.update)(jnp.ones(1), state)
        assert update[0] == want


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "cosine"}, "steps=None must be over warmup_steps=0"),
        ({"kind": "linear", "steps": 5, "warmup_steps": 5}, "steps=5 must be over"),
        ({"kind": "constant", "warmup_steps": -1}, "warmup_steps=-1"),
        ({"kind": "sigmoid", "width": 0.0}, "width=0.0"),
    ],
)
def test_schedules_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(rate=1.0, **settings)
