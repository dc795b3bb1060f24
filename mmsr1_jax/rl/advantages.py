"""Rewards of a group to advantages, and what DAPO adds. Numpy, on the host.

A group holds the episodes of one prompt. Computed in float64, given back in float32.
"""

import numpy as np

from mmsr1_jax.config.choices import ADVANTAGES

_EPSILON = 1e-6  # what the published code adds to the standard deviation
_NO_SPREAD = 1e-6  # rewards that differ by less do so by rounding


def group_advantages(rewards: np.ndarray, kind: str = "grpo") -> np.ndarray:
    """How much better each episode of a group did than the others.

    A group without spread, as one of a single episode, says nothing: its advantages are 0.

    Args:
      rewards: float[G].
      kind: `grpo`: (r - mean) / (std + 1e-6), with the sample standard deviation (G - 1 in the
        denominator), as in the published training code; DeepSeekMath (arXiv 2402.03300), section
        4.1.2, does not say which. `mean`: r - mean, Dr. GRPO (arXiv 2503.20783), section 3.2.
        `rloo`: r - mean of the others' rewards (Kool et al. 2019; arXiv 2402.14740).

    Returns:
      float32[G].

    Raises:
      ValueError: an unknown kind, rewards of another shape, or one that is not finite.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantages: {kind!r} is not one of {', '.join(ADVANTAGES)}")
    rewards = _checked(rewards)
    if not has_spread(rewards):
        return np.zeros(len(rewards), np.float32)
    centred = rewards - rewards.mean()
    if kind == "grpo":
        centred /= rewards.std(ddof=1) + _EPSILON
    elif kind == "rloo":
        centred *= len(rewards) / (len(rewards) - 1)
    return centred.astype(np.float32)


def has_spread(rewards: np.ndarray) -> bool:
    """Whether a group teaches anything: dynamic sampling keeps only such groups and draws others
    for the rest. DAPO (arXiv 2503.14476), eq. 11.

    Args:
      rewards: float[G].

    Raises:
      ValueError: rewards of another shape, or one that is not finite.
    """
    return bool(np.ptp(_checked(rewards)) > _NO_SPREAD)


def overlong_penalty(length: np.ndarray | int, limit: int, buffer: int) -> np.ndarray:
    """What is added to the reward of a long response: 0 up to `limit - buffer` tokens, from there
    down a straight line to -1 at `limit`, and -1 beyond. DAPO, eq. 13.

    Args:
      length: int[...], tokens that the policy wrote.
      limit: tokens that it may write.
      buffer: the last of them, over which the penalty grows.

    Returns:
      float32[...].

    Raises:
      ValueError: a buffer that is not within the limit.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"overlong penalty: buffer={buffer} must be over 0, at most limit={limit}")
    room = (limit - buffer) - np.asarray(length, np.float64)
    return np.clip(room / buffer, -1.0, 0.0).astype(np.float32)


def overlong_mask(mask: np.ndarray, cut: bool) -> np.ndarray:
    """The loss mask of an episode under overlong filtering: one that was cut for its length carries
    no loss, as its reward says little about its reasoning. DAPO, section 3.4.

    Its reward still counts in its group's mean. The weights (`loss.token_weights`) are those of
    the lengths after filtering.

    Args:
      mask: bool[T], the tokens that were sampled.
      cut: whether the episode ended because its tokens were used up.

    Returns:
      bool[T].
    """
    mask = np.asarray(mask, bool)
    return np.zeros_like(mask) if cut else mask


def _checked(rewards: np.ndarray) -> np.ndarray:
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 1 or not len(rewards):
        raise ValueError(f"rewards of shape {rewards.shape}; a group has shape (episodes,)")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise ValueError(f"rewards[{bad[0]}] is {rewards[bad[0]]}, not a finite number")
    return rewards
