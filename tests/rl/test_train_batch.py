"""The samples of an update make up the objective of the papers (NumPy, float64)."""

import numpy as np
import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.config.training import OVERLONG
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.rl import packing
from mmsr1_jax.rl.advantages import ADVANTAGES
from mmsr1_jax.rl.loss import LOSS_AGGREGATIONS
from mmsr1_jax.rl.train_batch import (
    has_reward_variance,
    shape_rewards,
)
from mmsr1_jax.scripts import random_policy
from tests.episode_factory import TEXT, episode_of, reward_of
from tests.rl.groups import group_samples

LIMIT, BUFFER = 60, 20  # tokens of an episode, and how many of them are too many
WIDE = packing.RowShape(1, 128, 3)


def random_groups(seed=0):
    """Return groups of several sizes, one with identical rewards, with some truncated episodes."""
    rng = np.random.default_rng(seed)
    groups, index = [], 0
    for size in (4, 1, 0, 3, 6):
        group = []
        for _ in range(size):
            turns = int(rng.integers(1, 4))
            episode = episode_of(
                *[TEXT["nonsense"]] * turns, sampled=int(rng.integers(1, 20)), seed=index,
                end=str(rng.choice(["answer", "turns", "tokens"])), index=index,
            )  # fmt: skip
            value = 0.1 if size == 3 else rng.choice([0.0, 0.1, 0.81, 0.91, 1.0])
            group.append((episode, reward_of(float(value))))
            index += 1
        groups.append(group)
    return groups


def reference_rewards(group, overlong):
    """Return rewards with DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13."""
    rewards = []
    for episode, reward in group:
        length, expected = sum(len(s.tokens) for s in episode.segments), LIMIT - BUFFER
        punishment = 0.0
        if length > LIMIT:
            punishment = -1.0
        elif length > expected:
            punishment = (expected - length) / BUFFER
        rewards.append(reward.reward + (punishment if overlong == "penalty" else 0.0))
    return np.array(rewards, np.float64)


def reference_advantages(rewards, kind):
    """Return advantages: arXiv 2402.03300, 4.1.2; Dr. GRPO, 2503.20783; RLOO, 2402.14740."""
    G = len(rewards)
    if G < 2 or rewards.max() - rewards.min() < 1e-9:
        return np.zeros(G)
    if kind == "rloo":
        return np.array([rewards[i] - np.delete(rewards, i).mean() for i in range(G)])
    centred = rewards - rewards.sum() / G
    if kind == "mean":
        return centred
    return centred / (np.sqrt((centred**2).sum() / (G - 1)) + 1e-6)


def aggregate(terms, aggregation):
    """Return the average of terms, one array per episode.

    `token` is DAPO's eq. 12, `sequence` GRPO's eq. 3 over the episodes with loss tokens, `fixed`
    Dr. GRPO's.
    """
    if aggregation == "token":
        return sum(t.sum() for t in terms) / sum(len(t) for t in terms)
    if aggregation == "sequence":
        return sum(t.mean() for t in terms if len(t)) / sum(len(t) > 0 for t in terms)
    return sum(t.sum() for t in terms) / (len(terms) * LIMIT)


def make_objective(**fields):
    return settings.Objective(**{"kl_coef": 1e-3, "overlong_buffer": BUFFER} | fields)


@pytest.mark.parametrize("overlong", OVERLONG)
@pytest.mark.parametrize("aggregation", LOSS_AGGREGATIONS)
@pytest.mark.parametrize("kind", ADVANTAGES)
def test_samples_make_up_the_objective_of_the_papers(kind, aggregation, overlong):
    rng = np.random.default_rng(1)
    groups = random_groups()
    objective = make_objective(advantage=kind, loss_aggregation=aggregation, overlong=overlong)
    samples, skipped = group_samples(groups, objective, LIMIT, random_policy.CONFIG, WIDE)
    assert not skipped
    terms, actual, remaining = [], 0.0, list(samples)
    for group in groups:
        values = reference_advantages(reference_rewards(group, overlong), kind)
        for (episode, _), value in zip(group, values, strict=True):
            segments = [s for s in episode.segments if s.kind == "model"]
            if overlong == "mask" and episode.end == "tokens":
                terms.append(np.zeros(0))
                continue
            ratios = rng.normal(size=len(episode))  # different at each token
            sample = remaining.pop(0)
            np.testing.assert_array_equal(sample.prompt.tokens, episode.tokens)
            tokens = np.concatenate([s.tokens for s in segments])
            np.testing.assert_array_equal(episode.tokens[sample.mask], tokens)
            logprobs = np.concatenate([s.logprobs for s in segments])
            np.testing.assert_array_equal(sample.rollout_logprobs[sample.mask], logprobs)
            np.testing.assert_allclose(sample.advantages, value, 1e-6, 1e-7)
            terms.append(value * ratios[sample.mask])
            weighted = sample.weights.astype(float) * sample.advantages * ratios
            actual += weighted[sample.mask].sum()
    assert not remaining
    scale = aggregate([np.abs(t) for t in terms], aggregation)
    assert abs(actual - aggregate(terms, aggregation)) <= 1e-6 * scale and scale > 0.01
    truncated = sum(e.end == "tokens" for group in groups for e, _ in group)
    assert truncated > 2
    assert any(
        reference_rewards(g, "penalty").sum() < reference_rewards(g, "").sum() for g in groups if g
    )


def test_overlong_penalty_can_create_reward_variance():
    short, long = (episode_of(TEXT["nonsense"], sampled=n) for n in (10, 50))
    group = [(short, reward_of(0.1)), (long, reward_of(0.1))]
    for overlong in OVERLONG:
        objective = make_objective(overlong=overlong)
        rewards = shape_rewards(group, objective, LIMIT)
        np.testing.assert_allclose(rewards, reference_rewards(group, overlong), rtol=0, atol=1e-7)
        assert has_reward_variance(group, objective, LIMIT) == (overlong == "penalty")
    assert reference_rewards(group, "penalty").tolist() == pytest.approx([0.1, 0.1 - 15 / BUFFER])
    other = [(short, reward_of(1.0)), group[1]]
    assert has_reward_variance(other, make_objective(), LIMIT)
    assert not has_reward_variance(other[:1], make_objective(), LIMIT)
    assert not has_reward_variance([], make_objective(), LIMIT)


def test_episodes_longer_than_a_row_are_skipped_and_reported():
    side = random_policy.CONFIG.vision.window_side * random_policy.CONFIG.vision.merge_size
    image = Patches(np.zeros((4 * side**2, 1), np.float32), (1, 2 * side, 2 * side))  # 4 windows
    group = [
        (episode_of(TEXT["nonsense"], sampled=10, index=3), reward_of(1.0)),
        (episode_of(TEXT["nonsense"], sampled=124, index=4), reward_of(0.1)),
        (episode_of(TEXT["nonsense"], sampled=20, index=5), reward_of(0.0)),
        (episode_of(TEXT["nonsense"], index=6, images=[image]), reward_of(0.5)),
    ]
    samples, skipped = group_samples(
        [group], make_objective(), 2 * LIMIT, random_policy.CONFIG, WIDE
    )
    assert skipped == [
        "episode 4: 129 tokens, more than update.pack_length=128",
        "episode 6: 4 image windows, more than update.pack_windows=3",
    ]
    assert [int(sample.mask.sum()) for sample in samples] == [10, 20]
    # The rewards of skipped episodes still count.
    expected = reference_advantages(np.array([1.0, 0.1, 0.0, 0.5]), "grpo")
    for sample, value in zip(samples, expected[[0, 2]], strict=True):
        np.testing.assert_allclose(sample.weights, 1 / 30, 1e-6)
        np.testing.assert_allclose(sample.advantages, value, 1e-6)


@pytest.mark.parametrize("aggregation", LOSS_AGGREGATIONS)
def test_samples_without_gradient_are_omitted_and_weights_unchanged(aggregation):
    values = [[1.0, 0.5, 0.0], [0.1, 0.1], [0.91, 0.1]]
    groups = [
        [(episode_of(TEXT["nonsense"], sampled=3 + 2 * i + 5 * g), reward_of(r))
         for i, r in enumerate(rewards)]
        for g, rewards in enumerate(values)
    ]  # fmt: skip
    lengths = [3, 5, 7, 8, 10, 13, 15]

    def weights_by_length(**terms):
        objective = make_objective(loss_aggregation=aggregation, **terms)
        samples, skipped = group_samples(groups, objective, LIMIT, random_policy.CONFIG, WIDE)
        assert not skipped
        return {int(sample.mask.sum()): sample.weights[0] for sample in samples}

    all_weights = weights_by_length()
    assert list(all_weights) == list(weights_by_length(kl_coef=0.0, entropy_coef=0.01)) == lengths
    policy_weights = weights_by_length(kl_coef=0.0)
    assert list(policy_weights) == [3, 7, 13, 15]  # 0.5 is the mean of its group
    for length in lengths:
        expected = {"token": 1 / 61, "sequence": 1 / (7 * length), "fixed": 1 / (7 * LIMIT)}[
            aggregation
        ]
        assert all_weights[length] == pytest.approx(expected, rel=1e-6)
        assert policy_weights.get(length, all_weights[length]) == all_weights[length]
