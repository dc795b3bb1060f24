"""What an update is made from, and its importance ratio where it is not 1 by itself: with several
updates a step, or against the engine's log-probs.

The references are numpy in float64, from the papers.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.config.training import OVERLONG
from mmsr1_jax.models import sharding
from mmsr1_jax.models.qwen2_5_vl import checkpoint
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.rl import packing
from mmsr1_jax.rl.advantages import ADVANTAGES, group_advantages
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.loss import LOSS_AGGREGATIONS
from mmsr1_jax.rl.train_batch import (
    has_reward_variance,
    make_loss,
    make_samples,
    shape_rewards,
    update_metrics,
    with_logprobs,
)
from mmsr1_jax.scripts import random_policy
from tests.episode_factory import TEXT, episode_of, reward_of

LIMIT, BUFFER = 60, 20  # tokens of an episode, and how many of them are too many
WIDE = packing.RowShape(1, 128, 3)
SHAPE = packing.RowShape(2, 64, 0)
CAP = 1.2
RATE = 1e-2  # one update moves ratios beyond their clip


# Samples


def random_groups(seed=0):
    """Groups as they come: of all sizes, one without spread, some episodes cut for their length."""
    rng = np.random.default_rng(seed)
    groups, number = [], 0
    for size in (4, 1, 0, 3, 6):
        group = []
        for _ in range(size):
            turns = int(rng.integers(1, 4))
            episode = episode_of(
                *[TEXT["nonsense"]] * turns, sampled=int(rng.integers(1, 20)), seed=number,
                end=str(rng.choice(["answer", "turns", "tokens"])), index=number,
            )  # fmt: skip
            value = 0.1 if size == 3 else rng.choice([0.0, 0.1, 0.81, 0.91, 1.0])
            group.append((episode, reward_of(float(value))))
            number += 1
        groups.append(group)
    return groups


def shaped(group, overlong):
    """Rewards with DAPO's soft punishment, arXiv 2503.14476, eq. 13."""
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


def advantages_of(rewards, kind):
    """arXiv 2402.03300, 4.1.2; Dr. GRPO, 2503.20783; leave-one-out, 2402.14740."""
    G = len(rewards)
    if G < 2 or rewards.max() - rewards.min() < 1e-9:
        return np.zeros(G)
    if kind == "rloo":
        return np.array([rewards[i] - np.delete(rewards, i).mean() for i in range(G)])
    centred = rewards - rewards.sum() / G
    if kind == "mean":
        return centred
    return centred / (np.sqrt((centred**2).sum() / (G - 1)) + 1e-6)


def average(terms, how):
    """Of the terms of each episode's tokens: DAPO's eq. 12 (token), GRPO's eq. 3 (sequence; of the
    episodes with any loss), Dr. GRPO's (fixed length)."""
    if how == "token":
        return sum(t.sum() for t in terms) / sum(len(t) for t in terms)
    if how == "sequence":
        return sum(t.mean() for t in terms if len(t)) / sum(len(t) > 0 for t in terms)
    return sum(t.sum() for t in terms) / (len(terms) * LIMIT)


def keeping(**fields):
    return settings.Objective(**{"kl_coef": 1e-3, "overlong_buffer": BUFFER} | fields)


def samples_of(groups, objective, limit, config, shape):
    """The samples of groups, with the advantages that a training step computes."""
    groups = [group for group in groups if group]
    values = [
        group_advantages(shape_rewards(group, objective, limit), objective.advantage)
        for group in groups
    ]
    return make_samples(groups, values, objective, limit, config, shape)


@pytest.mark.parametrize("overlong", OVERLONG)
@pytest.mark.parametrize("how", LOSS_AGGREGATIONS)
@pytest.mark.parametrize("kind", ADVANTAGES)
def test_samples_make_the_objective_of_the_papers(kind, how, overlong):
    rng = np.random.default_rng(1)
    groups = random_groups()
    objective = keeping(advantage=kind, loss_aggregation=how, overlong=overlong)
    samples, odd = samples_of(groups, objective, LIMIT, random_policy.CONFIG, WIDE)
    assert not odd
    terms, found, left = [], 0.0, list(samples)
    for group in groups:
        values = advantages_of(shaped(group, overlong), kind)
        for (episode, _), value in zip(group, values, strict=True):
            drawn = [s for s in episode.segments if s.kind == "model"]
            if overlong == "mask" and episode.end == "tokens":
                terms.append(np.zeros(0))
                continue
            factors = rng.normal(size=len(episode))  # as ratios are: another one at each token
            sample = left.pop(0)
            np.testing.assert_array_equal(sample.prompt.tokens, episode.tokens)
            tokens = np.concatenate([s.tokens for s in drawn])
            np.testing.assert_array_equal(episode.tokens[sample.mask], tokens)
            logprobs = np.concatenate([s.logprobs for s in drawn])
            np.testing.assert_array_equal(sample.rollout_logprobs[sample.mask], logprobs)
            np.testing.assert_allclose(sample.advantages, value, 1e-6, 1e-7)
            terms.append(value * factors[sample.mask])
            weighted = sample.weights.astype(float) * sample.advantages * factors
            found += weighted[sample.mask].sum()
    assert not left
    scale = average([np.abs(t) for t in terms], how)
    assert abs(found - average(terms, how)) <= 1e-6 * scale and scale > 0.01
    cut = sum(e.end == "tokens" for group in groups for e, _ in group)
    assert cut > 2 and any(shaped(g, "penalty").sum() < shaped(g, "").sum() for g in groups if g)


def test_length_can_make_a_group_worth_learning_from():
    short, long = (episode_of(TEXT["nonsense"], sampled=n) for n in (10, 50))
    group = [(short, reward_of(0.1)), (long, reward_of(0.1))]
    for overlong in OVERLONG:
        objective = keeping(overlong=overlong)
        rewards = shape_rewards(group, objective, LIMIT)
        np.testing.assert_allclose(rewards, shaped(group, overlong), rtol=0, atol=1e-7)
        assert has_reward_variance(group, objective, LIMIT) == (overlong == "penalty")
    assert shaped(group, "penalty").tolist() == pytest.approx([0.1, 0.1 - 15 / BUFFER])
    other = [(short, reward_of(1.0)), group[1]]
    assert has_reward_variance(other, keeping(), LIMIT)
    assert not has_reward_variance(other[:1], keeping(), LIMIT)
    assert not has_reward_variance([], keeping(), LIMIT)


def test_what_fits_no_row_is_named_and_the_others_stay():
    side = random_policy.CONFIG.vision.window_side * random_policy.CONFIG.vision.merge_size
    picture = Patches(np.zeros((4 * side**2, 1), np.float32), (1, 2 * side, 2 * side))  # 4 windows
    group = [
        (episode_of(TEXT["nonsense"], sampled=10, index=3), reward_of(1.0)),
        (episode_of(TEXT["nonsense"], sampled=124, index=4), reward_of(0.1)),
        (episode_of(TEXT["nonsense"], sampled=20, index=5), reward_of(0.0)),
        (episode_of(TEXT["nonsense"], index=6, images=[picture]), reward_of(0.5)),
    ]
    samples, odd = samples_of([group], keeping(), 2 * LIMIT, random_policy.CONFIG, WIDE)
    assert odd == [
        "episode 4: 129 tokens, more than update.pack_length=128",
        "episode 6: 4 image windows, more than update.pack_windows=3",
    ]
    assert [int(sample.mask.sum()) for sample in samples] == [10, 20]
    wanted = advantages_of(np.array([1.0, 0.1, 0.0, 0.5]), "grpo")  # their rewards still count
    for sample, value in zip(samples, wanted[[0, 2]], strict=True):
        np.testing.assert_allclose(sample.weights, 1 / 30, 1e-6)
        np.testing.assert_allclose(sample.advantages, value, 1e-6)


@pytest.mark.parametrize("how", LOSS_AGGREGATIONS)
def test_what_has_no_gradient_is_left_out_and_changes_no_weight(how):
    values = [[1.0, 0.5, 0.0], [0.1, 0.1], [0.91, 0.1]]
    groups = [
        [(episode_of(TEXT["nonsense"], sampled=3 + 2 * i + 5 * g), reward_of(r))
         for i, r in enumerate(rewards)]
        for g, rewards in enumerate(values)
    ]  # fmt: skip
    lengths = [3, 5, 7, 8, 10, 13, 15]

    def made(**terms):
        objective = keeping(loss_aggregation=how, **terms)
        samples, odd = samples_of(groups, objective, LIMIT, random_policy.CONFIG, WIDE)
        assert not odd
        return {int(sample.mask.sum()): sample.weights[0] for sample in samples}

    everything = made()
    assert list(everything) == list(made(kl_coef=0.0, entropy_coef=0.01)) == lengths
    taught = made(kl_coef=0.0)
    assert list(taught) == [3, 7, 13, 15]  # 0.5 is the mean of its group
    for length in lengths:
        wanted = {"token": 1 / 61, "sequence": 1 / (7 * length), "fixed": 1 / (7 * LIMIT)}[how]
        assert everything[length] == pytest.approx(wanted, rel=1e-6)
        assert taught.get(length, everything[length]) == everything[length]


# Ratios


def groups_of():
    """Four questions of three episodes; the engine's log-probs are noise around those of a random
    policy."""
    rng = np.random.default_rng(0)
    return [
        [
            (episode_of(TEXT["nonsense"], TEXT["nonsense"], sampled=int(rng.integers(4, 16)),
                        seed=3 * question + i, index=3 * question + i), reward_of(value))
            for i, value in enumerate(rng.permutation([1.0, 0.1, 0.0]))
        ]
        for question in range(4)
    ]  # fmt: skip


def objective_of(**fields):
    return settings.Objective(**{"num_minibatches": 2, "kl_coef": 0.0, "tis_cap": CAP} | fields)


def made(objective):
    """A random policy that learns, and the micro-batches of a step's two updates."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = checkpoint.abstract_model(random_policy.CONFIG, attention="xla", logprob_chunk=16)
    graph, params = nnx.split(model)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), params)
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    learner = Learner(nnx.merge(graph, params), make_loss(objective), settings.Update(), mesh)
    groups, packed = groups_of(), []
    for part in (groups[0::2], groups[1::2]):
        chosen, odd = samples_of(part, objective, LIMIT, random_policy.CONFIG, SHAPE)
        assert len(chosen) == 6 and not odd
        packed.append(packing.pack(chosen, random_policy.CONFIG, SHAPE))
        assert len(packed[-1]) > 1  # gradients of several micro-batches are added up
    return learner, packed


def tokens_of(batches, values):
    """float64[tokens]: values of the tokens with loss, of all micro-batches.

    values: arrays of the micro-batches, or the name of a field.
    """
    if isinstance(values, str):
        values = [getattr(batch, values) for batch in batches]
    chosen = [x[batch.mask] for x, batch in zip(values, batches, strict=True)]
    return np.concatenate(chosen).astype(np.float64)


def assert_sums(found, batches, new, old, *, corrected):
    """The sums of an update are those of GRPO (arXiv 2402.03300, eq. 3, with DAPO's average over
    tokens) at such log-probs."""
    new, old, rollout_logprobs, advantages = (
        tokens_of(batches, x) for x in (new, old, "rollout_logprobs", "advantages")
    )
    ratio = np.exp(new - old)
    clipped = np.clip(ratio, 0.8, 1.2)
    objective = np.minimum(ratio * advantages, clipped * advantages)
    wanted = {
        "tokens": len(new),
        "ratio": ratio.sum(),
        "clipped_low": ((ratio < 0.8) & (advantages < 0)).sum(),
        "clipped_high": ((ratio > 1.2) & (advantages > 0)).sum(),
        "log_ratio_abs": np.abs(new - old).sum(),
        "log_ratio_squared": ((new - old) ** 2).sum(),
    }
    if corrected:
        gap = old - rollout_logprobs
        correction = np.minimum(np.exp(gap), CAP)
        objective = objective * correction
        wanted |= {
            "rollout_logprob_diff_abs": np.abs(gap).sum(),
            "rollout_logprob_diff_squared": (gap**2).sum(),
            "tis_weight": correction.sum(),
            "tis_capped": (gap >= np.log(CAP)).sum(),
        }
    wanted["policy_loss"] = wanted["loss"] = -objective.mean()
    assert wanted["clipped_low"] > 0 and wanted["clipped_high"] > 0
    found = {k: v for k, v in found.items() if k not in ("entropy", "finite", "gradient_norm")}
    assert found == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-5, abs=1e-5)


def test_the_second_update_of_a_step_is_off_policy():
    """`old` comes of the score program, the new log-probs of that of gradients."""
    learner, packed = made(objective_of(old_logprobs="trainer"))
    start = learner.snapshot()
    packed = [with_logprobs(part, "old_logprobs", learner) for part in packed]
    for part in packed:
        old = tokens_of(part, "old_logprobs")
        assert old.std() > 0.1 and (old < 0).all()
    first, second = packed

    figures = update_metrics(learner.update(first, RATE))
    assert figures["ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["log_ratio_abs"] < 1e-5 and figures["clip_fraction"] == 0.0
    assert figures["finite"] == 1 and figures["gradient_norm"] > 0

    before, after = [batch.old_logprobs for batch in second], learner.score(second)
    sums = learner.update(second, RATE)
    assert abs(update_metrics(sums)["ratio"] - 1) > 1e-2
    assert_sums(sums, second, after, before, corrected=True)
    # The step's beginning can still be scored: as the reference policy's are.
    for found, wanted in zip(learner.score(second, start), before, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_ratio_against_the_engine():
    learner, (first, second) = made(objective_of(old_logprobs="engine"))
    for part in (first, second):
        now = learner.score(part)
        sums = learner.update(part, RATE)
        assert_sums(sums, part, now, [batch.rollout_logprobs for batch in part], corrected=False)
