"""Learning rate schedules match the published decay and those of optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmsr1_jax.rl.schedules import SCHEDULES, make_schedule


def test_sigmoid_matches_the_published_decay():
    schedule = make_schedule("sigmoid", 2e-6, final=0.05)
    published = {0: 1.0, 30: 0.967, 40: 0.765, 45: 0.525, 50: 0.285, 60: 0.083, 80: 0.05, 500: 0.05}
    for step, multiplier in published.items():
        assert schedule(step) / 2e-6 == pytest.approx(multiplier, abs=6e-4)
    for step in (0, 3, 45, 70):
        expected = 2e-6 * min(1, step / 10) * (0.05 + 0.95 / (1 + math.exp((step - 45) / 4.5)))
        actual = make_schedule("sigmoid", 2e-6, final=0.05, warmup_steps=10)(step)
        assert actual == pytest.approx(expected, rel=1e-5)


def test_other_schedules_match_optax():
    steps, warmup, rate = np.arange(140), 10, 1e-5
    rise = optax.linear_schedule(0, rate, warmup)
    line = optax.linear_schedule(rate, 0.1 * rate, 90)
    flat = optax.constant_schedule(rate)
    references = {
        "cosine": optax.warmup_cosine_decay_schedule(0, rate, warmup, 100, 0.1 * rate),
        "linear": optax.join_schedules([rise, line], [warmup]),
        "constant": optax.join_schedules([rise, flat], [warmup]),
    }
    assert {*references, "sigmoid"} == set(SCHEDULES)
    for kind, reference in references.items():
        schedule = make_schedule(kind, rate, steps=100, warmup_steps=warmup, final=0.1)
        np.testing.assert_allclose(schedule(steps), jax.vmap(reference)(steps), 1e-5, 1e-12)
        assert schedule(0) == 0
        assert make_schedule(kind, rate, steps=100)(0) == np.float32(rate)


def test_optax_accepts_a_schedule():
    optimizer = optax.sgd(make_schedule("linear", 0.5, steps=2))
    state = optimizer.init(jnp.zeros(1))
    for expected in (-0.5, -0.25, 0.0):
        update, state = jax.jit(optimizer.update)(jnp.ones(1), state)
        assert update[0] == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "cosine"}, "steps=None must be over warmup_steps=0"),
        ({"kind": "linear", "steps": 5, "warmup_steps": 5}, "steps=5 must be over"),
        ({"kind": "constant", "warmup_steps": -1}, "warmup_steps=-1"),
        ({"kind": "sigmoid", "width": 0.0}, "width=0.0"),
    ],
)
def test_invalid_schedules_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(learning_rate=1.0, **settings)
