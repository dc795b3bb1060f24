"""The learning rate by step.

A schedule maps a step, counted from 0, to a rate; optax takes it as a learning rate. All rise
along a straight line from 0 to the full rate over the warm-up steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmsr1_jax.config.choices import SCHEDULES

Schedule = Callable[[int | jax.Array], jax.Array]


def make_schedule(
    kind: str,
    rate: float,
    *,
    steps: int | None = None,
    warmup_steps: int = 0,
    final: float = 0.0,
    centre: float = 45.0,
    width: float = 4.5,
) -> Schedule:
    """A schedule.

    Args:
      kind: `constant`; `linear` and `cosine` (half a period, arXiv 1608.03983, eq. 5): from the
        end of the warm-up down to `final` at `steps`, and `final` from there on; `sigmoid`, the
        published decay of MMSearch-R1: final + (1 - final) / (1 + exp((step - centre) / width)),
        published with `final` 0.05 and the defaults of `centre` and `width`.
      rate: the full rate.
      steps: of the run, for `linear` and `cosine`.
      warmup_steps: for `sigmoid` a factor on top, which does not move `centre`.
      final: share of the full rate at the end.
      centre: step at which the sigmoid is half way down.
      width: steps in which its odds change by a factor of e.

    Returns:
      From a step, int[...], to float32[...].

    Raises:
      ValueError: an unknown kind, or values that do not fit together.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: {kind!r} is not one of {', '.join(SCHEDULES)}")
    if warmup_steps < 0:
        raise ValueError(f"schedule: warmup_steps={warmup_steps} must not be negative")
    if kind == "sigmoid" and not width > 0:
        raise ValueError(f"schedule: width={width} must be over 0")
    if kind in ("linear", "cosine") and (steps is None or steps <= warmup_steps):
        raise ValueError(f"schedule {kind}: steps={steps} must be over warmup_steps={warmup_steps}")

    def schedule(step: int | jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else jnp.ones_like(step)
        if kind == "constant":
            share = jnp.ones_like(step)
        elif kind == "sigmoid":
            share = jax.nn.sigmoid((centre - step) / width)
        else:
            progress = jnp.clip((step - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
            share = 1 - progress if kind == "linear" else (1 + jnp.cos(jnp.pi * progress)) / 2
        if kind != "constant":
            share = final + (1 - final) * share
        return rate * warm * share

    return schedule
