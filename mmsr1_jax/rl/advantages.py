"""Group-relative advantages, and DAPO's overlong penalty and filtering. NumPy, on the host.

A group consists of the episodes of one prompt. Values are computed in float64 and returned in
float32.
"""

import numpy as np
from jaxtyping import Bool, Float32
from numpy.typing import ArrayLike

from mmsr1_jax.config.choices import ADVANTAGES

_EPSILON = 1e-6  # added to the standard deviation, as in the published code
_MIN_VARIATION = 1e-6  # smaller differences between rewards are rounding errors


def group_advantages(rewards: ArrayLike, kind: str = "grpo") -> Float32[np.ndarray, "G"]:
    """Return the advantage of each episode of a group.

    Groups with identical rewards, including groups of one episode, get zero advantage.

    Args:
      rewards: float[G].
      kind: `grpo`: (r - mean) / (std + 1e-6), with the sample standard deviation (G - 1 in the
        denominator), as in the published training code; DeepSeekMath (arXiv 2402.03300), section
        4.1.2, does not specify which. `mean`: r - mean, Dr. GRPO (arXiv 2503.20783), section 3.2.
        `rloo`: r - mean of the other episodes' rewards (Kool et al. 2019; arXiv 2402.14740).

    Returns:
      float32[G].

    Raises:
      ValueError: The kind is unknown, or the rewards are not one-dimensional or are not all finite.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantages: {kind!r} is not one of {', '.join(ADVANTAGES)}")
    rewards = _validate_rewards(rewards)
    if not has_reward_variance(rewards):
        return np.zeros(len(rewards), np.float32)
    centred = rewards - rewards.mean()
    if kind == "grpo":
        centred /= rewards.std(ddof=1) + _EPSILON
    elif kind == "rloo":
        centred *= len(rewards) / (len(rewards) - 1)
    return centred.astype(np.float32)


def has_reward_variance(rewards: ArrayLike) -> bool:
    """Return whether the rewards of a group differ.

    Dynamic sampling keeps only such groups and resamples the others. DAPO (arXiv 2503.14476),
    eq. 11.

    Args:
      rewards: float[G].

    Raises:
      ValueError: The rewards are not one-dimensional or not all finite.
    """
    return bool(np.ptp(_validate_rewards(rewards)) > _MIN_VARIATION)


def overlong_penalty(length: ArrayLike, limit: int, buffer: int) -> Float32[np.ndarray, "..."]:
    """Return DAPO's soft overlong penalty (eq. 13), which is added to the reward.

    The penalty is 0 up to `limit - buffer` tokens, decreases linearly to -1 at `limit`, and is -1
    beyond.

    Args:
      length: int[...], length in tokens.
      limit: Maximum length in tokens.
      buffer: Number of tokens before the limit over which the penalty grows.

    Returns:
      float32[...].

    Raises:
      ValueError: `buffer` is not in (0, limit].
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"overlong penalty: buffer={buffer} must be over 0, at most limit={limit}")
    remaining = (limit - buffer) - np.asarray(length, np.float64)
    return np.asarray(np.clip(remaining / buffer, -1.0, 0.0), np.float32)


def overlong_mask(mask: Bool[np.ndarray, "T"], truncated: bool) -> Bool[np.ndarray, "T"]:
    """Return the loss mask of an episode under overlong filtering (DAPO, section 3.4).

    A truncated episode carries no loss, since its reward says little about its reasoning. Its
    reward still counts in the mean of its group. Token weights (`loss.token_weights`) are computed
    from the lengths after filtering.

    Args:
      mask: bool[T], True for sampled tokens.
      truncated: Whether the episode ended because its token budget was used up.

    Returns:
      bool[T].
    """
    return np.zeros_like(mask) if truncated else mask


def _validate_rewards(rewards: ArrayLike) -> np.ndarray:
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 1 or not len(rewards):
        raise ValueError(f"rewards of shape {rewards.shape}; a group has shape (episodes,)")
    nonfinite = np.flatnonzero(~np.isfinite(rewards))
    if len(nonfinite):
        index = nonfinite[0]
        raise ValueError(f"rewards[{index}] is {rewards[index]}, not a finite number")
    return rewards
