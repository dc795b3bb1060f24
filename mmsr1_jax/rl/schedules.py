"""Learning rate schedules.

A schedule maps a step, counted from 0, to a learning rate, in the form that optax accepts. All
schedules warm up linearly from 0 to the full rate.
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
    """Return a schedule.

    Args:
      kind: `constant`; `linear` or `cosine` (half a period, arXiv 1608.03983, eq. 5), which decay
        from the end of the warm-up to `final` at `steps` and stay there; `sigmoid`, the published
        decay of MMSearch-R1: final + (1 - final) / (1 + exp((step - centre) / width)), published
        with `final` 0.05 and the defaults of `centre` and `width`.
      rate: Full learning rate.
      steps: Total number of steps of the run, for `linear` and `cosine`.
      warmup_steps: Number of warm-up steps. For `sigmoid` the warm-up is an additional factor,
        which does not move `centre`.
      final: Final rate as a fraction of the full rate.
      centre: Step at which the sigmoid is halfway down.
      width: Number of steps in which the odds of the sigmoid change by a factor of e.

    Returns:
      A function from a step, int[...], to a rate, float32[...].

    Raises:
      ValueError: The kind is unknown or the values are inconsistent.
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
