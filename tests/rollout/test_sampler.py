"""Sampled tokens and recorded log-probs follow the distribution of the settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mmsr1_jax.rollout.sampler import Sampling, sample, token_keys

V = 24
ALLOWED = np.arange(V) % 7 != 3


def expected_distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Return the distribution by its definition, float64[V]: sort, truncate, renormalise."""
    scores = np.where(ALLOWED, np.asarray(logits, np.float64) / temperature, -np.inf)
    order = np.argsort(-scores)
    if top_k:
        scores[order[top_k:]] = -np.inf
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += weights[token]
    result = np.zeros(V)
    result[kept] = weights[kept]
    return result / result.sum()


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_50000_samples_follow_the_distribution(setting):
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32) * 1.5
    expected = expected_distribution(logits, **setting)
    n = 50_000
    draw = jax.jit(sample)
    keys = token_keys(7, jnp.arange(n), jnp.full(n, 3))
    tokens, sampling_logprobs, logprobs = draw(
        jnp.tile(logits, (n, 1)), keys, Sampling.uniform(n, **setting), ALLOWED
    )
    counts = np.bincount(tokens, minlength=V)
    assert counts[expected == 0].sum() == 0
    real = expected > 0
    assert stats.chisquare(counts[real], expected[real] * n).pvalue > 0.001
    np.testing.assert_allclose(sampling_logprobs, np.log(expected[tokens]), atol=1e-5)
    scaled = np.asarray(logits, np.float64) / setting.get("temperature", 1.0)
    plain = scaled - np.log(np.exp(scaled).sum())
    np.testing.assert_allclose(logprobs, plain[tokens], atol=1e-5)


def test_a_wrong_distribution_fails_the_test():
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32) * 1.5
    n = 50_000
    keys = token_keys(7, jnp.arange(n), jnp.full(n, 3))
    tokens, _, _ = sample(jnp.tile(logits, (n, 1)), keys, Sampling.uniform(n), ALLOWED)
    wrong = expected_distribution(logits, temperature=0.97)
    counts, real = np.bincount(tokens, minlength=V), wrong > 0
    assert stats.chisquare(counts[real], wrong[real] * n).pvalue < 0.001


def test_settings_are_per_lane():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(3, V)), jnp.float32)
    sampling = Sampling(
        temperature=jnp.array([1.0, 0.5, 1.0]),
        top_k=jnp.array([0, 1, 0]),
        top_p=jnp.array([1.0, 1.0, 0.01]),
        greedy=jnp.array([True, False, False]),
    )
    tokens, sampling_logprobs, _ = sample(
        logits, token_keys(0, *[jnp.arange(3)] * 2), sampling, ALLOWED
    )
    likeliest = np.argmax(np.where(ALLOWED, logits, -np.inf), axis=-1)
    np.testing.assert_array_equal(tokens, likeliest)
    np.testing.assert_allclose(sampling_logprobs, 0, atol=1e-6)


def test_a_sample_depends_on_seed_episode_and_index_alone():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)
    episode, index = jnp.array([5, 9, 5, 2, 5, 9]), jnp.array([0, 0, 1, 7, 0, 4])

    def draw(lanes, seed=0):
        keys = token_keys(seed, episode[lanes], index[lanes])
        return np.asarray(
            sample(logits[lanes], keys, Sampling.uniform(len(lanes)), np.full(50, True))[0]
        )

    everything = draw(np.arange(6))
    for lanes in ([3], [5, 1, 0], [4, 2, 3, 0]):
        np.testing.assert_array_equal(draw(np.array(lanes)), everything[lanes])
    assert any((draw(np.arange(6), seed=s) != everything).any() for s in range(1, 4))


@pytest.mark.parametrize(
    "invalid", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_invalid_settings_are_refused(invalid):
    with pytest.raises(ValueError, match="sampling: "):
        Sampling.uniform(2, **invalid)
    assert Sampling.uniform(2, temperature=0).greedy.all()
