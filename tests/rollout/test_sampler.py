"""Sampled tokens and recorded log-probs follow the distribution of the settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special, stats

from mmsr1_jax.models import sharding
from mmsr1_jax.rollout import sampler
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


@functools.cache
def least_likely(bits):
    return jax.jit(functools.partial(sampler.least_likely, bits=bits))


def kept_by_sorting(logits, temperature, top_k, top_p):
    """Return the tokens kept by the definition, bool[V]: sort, cut after k, then after mass p.

    Masses are float32, as the sampler's, and added up in float64.
    """
    with np.errstate(over="ignore"):
        masses = np.exp((logits - logits.max()) / np.float32(temperature)).astype(np.float64)
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    before = np.cumsum(masses[order]) - masses[order]
    if top_p < 1:
        order = order[before < top_p * masses[order].sum()]
    return logits >= logits[order].min()


def assert_kept_sets_equal_those_of_a_sort(logits, allowed, sampling, bits):
    """Return how many sets are known exactly: their mass is not within rounding of p."""
    least = np.asarray(least_likely(bits)(logits, sampling, allowed))
    exact = 0
    for row, scores in enumerate(np.where(allowed, logits, -np.inf)):
        temperature, top_k = sampling.temperature[row], sampling.top_k[row]
        top_p = float(sampling.top_p[row])
        error = 2e-6 if top_p < 1 else 0
        fewest, most = (
            kept_by_sorting(scores, temperature, top_k, top_p * factor)
            for factor in (1 - error, 1 + error)
        )
        kept = allowed & (logits[row] >= least[row])
        message = f"row {row}: {temperature=} {top_k=} {top_p=}"
        assert (kept >= (fewest & allowed)).all() and (kept <= (most & allowed)).all(), message
        exact += (fewest == most).all()
    return exact


def random_logits(rng, kind, V):
    logits = rng.normal(size=V) * 10 ** rng.uniform(-1, 1.3) + rng.normal() * 10
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "equal":
        logits[:] = rng.choice([0.0, -0.0, 3.7, -1e30])
    elif kind == "dominant":
        logits[rng.integers(V)] += 200
    elif kind == "impossible":
        logits[rng.permutation(V)[: V // 2]] = -np.inf
    elif kind == "adjacent":  # neighbours among float32 numbers, positive and negative
        logits = rng.choice([-1, 1]) * (1 + rng.integers(0, 50, V) * 2.0**-23)
    elif kind == "range":  # normal numbers of all exponents, both zeros
        logits = rng.choice([-1, 1], V) * 2.0 ** rng.integers(-125, 126, V)
        logits[: V // 8] = rng.choice([0.0, -0.0], V // 8)
    return logits.astype(np.float32)


TEMPERATURES = [1e-30, 1e-3, 0.7, 1, 1.5, 1e3, 1e30]
TOP_P = [1e-45, 1e-30, 0.01, 0.5, 0.9, 0.99, 0.99999, np.nextafter(np.float32(1), 0), 1]
KINDS = ["normal", "ties", "equal", "dominant", "impossible", "adjacent", "range"]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("V", [1, 7, 400])
def test_top_k_and_top_p_keep_the_same_tokens_as_a_sort(V, bits):
    """84 random rows of each kind."""
    rng = np.random.default_rng(V)
    B, exact, num_rows = 28, 0, 0
    for _ in range(3):
        for kind in KINDS:
            logits = np.stack([random_logits(rng, kind, V) for _ in range(B)])
            allowed = (rng.random(V) < 0.9) | (np.arange(V) == 0)
            if kind == "impossible":
                logits[:, 0] = 1.0
            sampling = Sampling(
                temperature=rng.choice(TEMPERATURES, B).astype(np.float32),
                top_k=rng.choice([0, 1, 2, 5, V // 2, V - 1, V, V + 9, 2**31 - 1], B).astype(
                    np.int32
                ),
                top_p=rng.choice(TOP_P, B).astype(np.float32),
                greedy=np.full(B, False),
            )
            exact += assert_kept_sets_equal_those_of_a_sort(logits, allowed, sampling, bits)
            num_rows += B
    assert exact > 0.9 * num_rows


def test_top_p_applies_to_the_k_most_likely_tokens_renormalised():
    """Of the last two, tied for the third place, one counts to the mass, and both are kept."""
    probabilities = np.array([0.4, 0.2, 0.1, 0.1, 0.15, 0.05])
    logits = np.log(np.tile(probabilities, (6, 1))).astype(np.float32)
    sampling = Sampling(
        temperature=np.ones(6, np.float32),
        top_k=np.array([2, 2, 4, 4, 4, 0], np.int32),
        top_p=np.array([0.66, 0.67, 0.70, 0.71, 0.89, 0.89], np.float32),
        greedy=np.full(6, False),
    )
    least = least_likely(4)(logits, sampling, np.full(6, True))
    # After top-k: 0.4 of 0.6; 0.4, 0.6 and 0.75 of 0.85.
    kept = (logits >= np.asarray(least)[:, None]).sum(axis=1)
    np.testing.assert_array_equal(kept, [1, 2, 2, 3, 5, 5])


def test_limits_of_a_row_do_not_affect_other_rows():
    rng = np.random.default_rng(2)
    B, V = 6, 700
    logits = jnp.asarray(rng.normal(size=(B, V)) * 8, jnp.float32)
    allowed, keys = np.arange(V) % 5 != 1, token_keys(3, jnp.arange(B), jnp.arange(B))
    alone = [
        Sampling.uniform(B),
        Sampling.uniform(B, top_k=3),
        Sampling.uniform(B, top_p=0.8, temperature=0.6),
        Sampling.uniform(B, greedy=True, top_k=2, top_p=0.1),
    ]
    choice = np.array([0, 1, 2, 3, 0, 2])
    mixed = jax.tree.map(lambda *fields: np.choose(choice, fields), *alone)
    outputs = [sample(logits, keys, sampling, allowed) for sampling in alone]
    for together, *separate in zip(sample(logits, keys, mixed, allowed), *outputs, strict=True):
        for row, setting in enumerate(choice):
            assert together[row] == separate[setting][row]


@pytest.mark.parametrize("reduce", [sampler.reduce_in_passes, sampler.reduce_at_once])
def test_both_reductions_equal_numpy(reduce):
    """Also where tokens that may not be sampled are far more likely than all others, or less."""
    rng = np.random.default_rng(5)
    shifts = np.array([0, 0, 150, -150, 3000, -3000])[:, None]
    B, V = len(shifts), 513
    kept = rng.random((B, V)) < np.array([0.5, 1, 0.9, 0.9, 0.01, 0.99])[:, None]
    kept[:, 100] = True
    scaled = (rng.normal(size=(B, V)) * 5 + ~kept * shifts).astype(np.float32)
    scaled[:, 7:50:9] = -np.inf
    perturbed = np.where(kept, np.round(rng.normal(size=(B, V))), -np.inf).astype(np.float32)
    assert ((perturbed == perturbed.max(axis=1, keepdims=True)).sum(axis=1) > 1).any()
    tokens, kept_lse, other_lse = jax.jit(reduce)(perturbed, scaled, kept)
    np.testing.assert_array_equal(tokens, perturbed.argmax(axis=1))
    for result, mask in ((kept_lse, kept), (other_lse, ~kept)):
        exact = special.logsumexp(np.where(mask, scaled.astype(np.float64), -np.inf), axis=1)
        np.testing.assert_allclose(result, exact, rtol=1e-6)


@pytest.mark.parametrize("reduce", [sampler.reduce_in_passes, sampler.reduce_at_once])
def test_tokens_equal_those_of_jax_random_categorical(reduce, monkeypatch):
    monkeypatch.setattr(sampler, "reduce_in_passes", reduce)
    rng = np.random.default_rng(3)
    B, V = 200, 301
    logits = jnp.asarray(rng.normal(size=(B, V)) * 3, jnp.float32)
    allowed, keys = np.arange(V) % 7 != 3, token_keys(1, jnp.arange(B), jnp.arange(B) % 5)
    tokens, _, _ = sample(logits, keys, Sampling.uniform(B, temperature=0.8), allowed)
    candidates = jnp.where(allowed, logits / jnp.float32(0.8), -jnp.inf)
    np.testing.assert_array_equal(tokens, jax.vmap(jax.random.categorical)(keys, candidates))


@pytest.mark.parametrize("reduce", [sampler.reduce_in_passes, sampler.reduce_at_once])
def test_nan_logits_give_an_allowed_token_and_a_nan_logprob(reduce, monkeypatch):
    monkeypatch.setattr(sampler, "reduce_in_passes", reduce)
    logits = np.zeros((4, V), np.float32)
    logits[1], logits[2, 9] = np.nan, np.nan
    sampling = Sampling.uniform(4, top_p=0.9)
    tokens, _, logprobs = sample(
        jnp.asarray(logits), token_keys(0, jnp.arange(4), jnp.arange(4)), sampling, ALLOWED
    )
    assert ALLOWED[tokens].all()
    np.testing.assert_array_equal(np.isnan(logprobs), [False, True, True, False])


def test_logits_split_over_devices_are_neither_gathered_nor_sorted():
    """The vocabulary is split four ways; collectives carry a few numbers per row."""
    mesh = sharding.make_mesh(tensor=4, fsdp=1, devices=jax.devices()[:4])
    rng = np.random.default_rng(4)
    B, V = 8, 4096
    logits = (rng.normal(size=(B, V)) * 3).astype(np.float32)
    sampling = jax.tree.map(
        lambda a, b: np.where(np.arange(B) < 4, a, b),
        Sampling.uniform(B),
        Sampling.uniform(B, top_k=50, top_p=0.9),
    )
    keys, allowed = token_keys(0, jnp.arange(B), jnp.arange(B)), np.arange(V) < V - 9
    expected = sample(jnp.asarray(logits), keys, sampling, allowed)
    layout = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    split = jax.device_put(logits, layout)
    program = jax.jit(sample).lower(split, keys, sampling, allowed).compile()
    for ours, theirs in zip(program(split, keys, sampling, allowed), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert " sort(" not in program.as_text() and f"f32[{B},{V}]" not in program.as_text()
