"""Advantages, the overlong penalty and filtering follow the equations of the papers."""

import math

import numpy as np
import pytest

from mmsr1_jax.rl.advantages import (
    ADVANTAGES,
    group_advantages,
    has_reward_variance,
    overlong_mask,
    overlong_penalty,
)


def reference_advantages(rewards, kind):
    n, mean = len(rewards), math.fsum(rewards) / len(rewards)
    if kind == "grpo":
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (n - 1))
        return [(r - mean) / (std + 1e-6) for r in rewards]
    if kind == "mean":
        return [r - mean for r in rewards]
    return [r - (math.fsum(rewards) - r) / (n - 1) for r in rewards]


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_match_the_papers(kind):
    rng = np.random.default_rng(0)
    for size in (2, 3, 8, 64):
        rewards = rng.choice([0, 0.1, 0.81, 0.9, 0.91, 1.0], size) + rng.normal(0, 0.01, size)
        actual = group_advantages(rewards, kind)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, reference_advantages(rewards.tolist(), kind), 1e-6, 1e-6)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_groups_with_identical_rewards_get_zero_advantage(kind):
    for rewards in ([0.91], [0.1] * 8, [0.81, 0.9 * 0.9 * 1.0, 0.1 + 0.71]):
        assert not has_reward_variance(rewards)
        assert (group_advantages(rewards, kind) == 0).all()
    assert has_reward_variance([0.91, 0.91, 0.9])
    assert has_reward_variance([0, 1])


@pytest.mark.parametrize(
    "rewards, message",
    [([0.1, float("nan")], r"rewards\[1\] is nan"), ([], "shape"), ([[1.0, 0.0]], "shape")],
)
def test_invalid_rewards_are_rejected_by_index(rewards, message):
    for function in (group_advantages, has_reward_variance):
        with pytest.raises(ValueError, match=message):
            function(rewards)


def test_overlong_penalty_matches_dapo_equation_13():
    limit, buffer = 100, 30
    for length in range(0, 150):
        if length <= limit - buffer:
            expected = 0.0
        elif length <= limit:
            expected = ((limit - buffer) - length) / buffer
        else:
            expected = -1.0
        assert overlong_penalty(length, limit, buffer) == pytest.approx(expected, abs=1e-7)
    np.testing.assert_allclose(overlong_penalty(np.array([70, 85, 100]), 100, 30), [0, -0.5, -1])
    for buffer in (0, 101):
        with pytest.raises(ValueError, match=f"buffer={buffer}"):
            overlong_penalty(5, 100, buffer)


def test_overlong_filtering_masks_truncated_episodes():
    mask = np.array([False, True, True])
    np.testing.assert_array_equal(overlong_mask(mask, False), mask)
    assert not overlong_mask(mask, True).any() and mask.any()
