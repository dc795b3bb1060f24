"""Learning rate schedules.

A schedule maps a step, counted from 0, to a learning rate, in the form that optax accepts. All
schedules warm up linearly from 0 to the full rate.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmsr1_jax.config.choices import SCHEDULES
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils.arrays import AnyArray

Step = int | AnyArray
Schedule = Callable[[Step], jax.Array]


def make_schedule(
    kind: str,
    learning_rate: float,
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
      learning_rate: Full learning rate.
      steps: Total number of steps of the run, for `linear` and `cosine`.
      warmup_steps: Number of warm-up steps. For `sigmoid` the warm-up is an additional factor,
        which does not move `centre`.
      final: Final rate as a fraction of the full rate.
      centre: Step at which the sigmoid is halfway down.
      width: Number of steps in which the odds of the sigmoid change by a factor of e.

    Returns:
      A function from a step, int[...], to a learning rate, float32[...].

    Raises:
      UserError: The warm-up or `width` is invalid, or a decay has no steps after the warm-up.
      ValueError: The kind is unknown.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: {kind!r} is not one of {', '.join(SCHEDULES)}")
    if warmup_steps < 0:
        raise UserError(f"schedule: warmup_steps={warmup_steps} must not be negative")
    if kind == "sigmoid" and not width > 0:
        raise UserError(f"schedule: width={width} must be over 0")
    decays = kind in ("linear", "cosine")
    if decays and (steps is None or steps <= warmup_steps):
        raise UserError(f"schedule {kind}: steps={steps} must be over warmup_steps={warmup_steps}")
    decay_steps = (steps or 0) - warmup_steps

    def schedule(step: Step) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else jnp.ones_like(step)
        if kind == "constant":
            fraction = jnp.ones_like(step)
        elif kind == "sigmoid":
            fraction = jax.nn.sigmoid((centre - step) / width)
        else:
            progress = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
            fraction = 1 - progress if kind == "linear" else (1 + jnp.cos(jnp.pi * progress)) / 2
        if kind != "constant":
            fraction = final + (1 - final) * fraction
        return learning_rate * warmup * fraction

    return schedule
