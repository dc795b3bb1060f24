"""Policy loss: clipped importance ratios, KL penalty to a reference, and entropy bonus.

    loss = sum over tokens of weight * (-objective + kl_coef * KL - entropy_coef * entropy)

Token weights are computed beforehand on the host (`token_weights`) from the lengths of all episodes
of the update. The loss is therefore a plain sum over tokens, rows, micro-batches and devices, and
does not depend on how episodes are distributed over them. Arrays are float32[B, C] unless stated
otherwise; the C columns of a row hold its tokens that carry loss, or all its tokens. Values at
masked positions are ignored: they reach neither loss nor gradient, not even as NaN.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32
from numpy.typing import ArrayLike

from mmsr1_jax.config.choices import KL_ESTIMATORS, LOSS_AGGREGATIONS, RATIO_LEVELS
from mmsr1_jax.utils.arrays import AnyArray

# Upper bound on log-ratios, so that exp stays finite. To exceed it, a sampled token would have to
# be 5e8 times less likely under one model than under the other. A ratio above the bound has no
# gradient. Small ratios need no bound.
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Options of the policy loss. The defaults are the published values.

    Attributes:
      ratio_level: Level of the importance ratio, see `importance_ratio`.
      clip_low, clip_high: Bounds of the clip range [1 - clip_low, 1 + clip_high] of the ratio.
      kl_coef: Coefficient of the KL term; 0 disables it.
      kl_estimator: KL estimator, see `kl_estimate`.
      entropy_coef: Coefficient of the entropy bonus; 0 disables it.
      tis_cap: Cap of `truncated_importance_weights`; None disables the correction.
    """

    ratio_level: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 1e-3
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    tis_cap: float | None = None


def importance_ratio(
    logprobs: Float[jax.Array, "B C"],
    old_logprobs: Float[AnyArray, "B C"],
    mask: Bool[AnyArray, "B C"],
    segment_ids: Int32[AnyArray, "B C"],
    level: str,
) -> Float[jax.Array, "B C"]:
    """Return the importance ratio of each sampled token between the policy and the old policy.

    At the sequence and trajectory levels all tokens of an episode share one ratio, in the form of
    GSPO-token (arXiv 2507.18071, eq. 14): the value is the episode's ratio, and its gradient with
    respect to a token's log-prob is the ratio itself, as at token level. At a ratio of 1 the
    gradient of the loss is therefore the plain policy gradient, whatever the level and the loss
    aggregation. With one advantage per episode and no per-token correction, `sequence` has the
    values and gradients of GSPO (eq. 5).

    Args:
      logprobs: Log-probs under the policy.
      old_logprobs: Log-probs under the policy in the ratio's denominator.
      mask: bool[B, C], True for tokens that count.
      segment_ids: int32[B, C], index of the episode within its row, from 1; 0 for padding. An
        episode never spans rows.
      level: `token`: exp(log-ratio), PPO. `sequence`: exp(mean of the episode's log-ratios), GSPO,
        eq. 7. `trajectory`: exp(sum of the episode's log-ratios), the probability ratio of all
        tokens that the policy wrote in the episode.

    Returns:
      float32[B, C], 1 where the mask is False.

    Raises:
      ValueError: The level is unknown.
    """
    if level not in RATIO_LEVELS:
        raise ValueError(f"ratio level: {level!r} is not one of {', '.join(RATIO_LEVELS)}")
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    if level != "token":
        value = jax.lax.stop_gradient(log_ratio)
        total = _episode_sums(value, segment_ids)
        if level == "sequence":
            count = _episode_sums(jnp.where(mask, 1.0, 0.0).astype(total.dtype), segment_ids)
            total = total / jnp.maximum(count, 1.0)
        log_ratio = jnp.where(mask, total + (log_ratio - value), 0.0)
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def clipped_objective(
    ratio: Float[jax.Array, "*shape"],
    advantages: Float[jax.Array, "*shape"],
    clip_low: float,
    clip_high: float,
) -> Float[jax.Array, "*shape"]:
    """Return the clipped objective min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    PPO (arXiv 1707.06347), eq. 7; with clip_high > clip_low, DAPO's clip-higher (arXiv 2503.14476,
    eq. 10).
    """
    # Only the bound towards which the advantage pushes the ratio matters.
    low, high = 1 - clip_low, 1 + clip_high
    bounded = jnp.where(advantages > 0, jnp.minimum(ratio, high), jnp.maximum(ratio, low))
    return bounded * advantages


def kl_estimate(
    logprobs: Float[jax.Array, "*shape"], ref_logprobs: Float[jax.Array, "*shape"], estimator: str
) -> Float[jax.Array, "*shape"]:
    """Estimate KL(policy || reference) per sampled token, http://joschu.net/blog/kl-approx.html.

    With d = ref_logprobs - logprobs: `k1` = -d; `k2` = d^2 / 2; `k3` = exp(d) - 1 - d. The gradient
    is that of the estimate. Its expectation over the policy's tokens is zero for `k1`, the gradient
    of KL(policy || reference) for `k2`, and the gradient of KL(reference || policy) for `k3`, which
    is the same close to the reference. In `k3`, d is clipped to at most `MAX_LOG_RATIO`.

    Raises:
      ValueError: The estimator is unknown.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"KL estimator: {estimator!r} is not one of {', '.join(KL_ESTIMATORS)}")
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d**2 / 2
    d = jnp.minimum(d, MAX_LOG_RATIO)
    return jnp.expm1(d) - d


def truncated_importance_weights(
    trainer_logprobs: Float[jax.Array, "*shape"],
    rollout_logprobs: Float[jax.Array, "*shape"],
    cap: float,
) -> Float[jax.Array, "*shape"]:
    """Return importance weights min(p_trainer / p_rollout, cap), without gradient.

    They correct for the mismatch between the engine's probabilities and those that the trainer
    computes with the same parameters.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"); the cap is as in V-trace (arXiv 1802.01561, section 4.1).

    Args:
      trainer_logprobs: Log-probs from the trainer, with the parameters that sampled the tokens.
      rollout_logprobs: Log-probs from the engine.
      cap: Upper bound of the weights, greater than 0.
    """
    log_ratio = jax.lax.stop_gradient(trainer_logprobs - rollout_logprobs)
    return jnp.minimum(jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)), cap)


def token_weights(
    lengths: ArrayLike, aggregation: str, fixed_length: int | None = None
) -> Float32[np.ndarray, "E"]:
    """Return the weight of each episode's tokens in the loss aggregation. NumPy, on the host.

    Args:
      lengths: int[E], number of tokens that carry loss in each episode of the update, over all
        micro-batches and processes.
      aggregation: `token`: mean over all tokens (DAPO, eq. 12). `sequence`: mean over the tokens of
        each episode, then over the episodes with such tokens (GRPO, arXiv 2402.03300, eq. 3).
        `fixed`: sum over all tokens / (E * fixed_length), so that the length of an episode does not
        change the weight of its tokens (Dr. GRPO, arXiv 2503.20783).
      fixed_length: Constant length for `fixed`, in tokens; usually the maximum length of an
        episode.

    Returns:
      float32[E], weight of every token of an episode; 0 for episodes without loss tokens.

    Raises:
      ValueError: The aggregation is unknown, a length is negative, or `fixed` lacks a positive
        `fixed_length`.
    """
    lengths = np.asarray(lengths, np.int64)
    if aggregation not in LOSS_AGGREGATIONS:
        names = ", ".join(LOSS_AGGREGATIONS)
        raise ValueError(f"loss aggregation: {aggregation!r} is not one of {names}")
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError(f"lengths must be int[episodes], none negative, not {lengths}")
    has_loss = lengths > 0
    if aggregation == "token":
        weights = np.full(len(lengths), 1 / max(1, lengths.sum()))
    elif aggregation == "sequence":
        weights = 1 / (np.maximum(1, lengths) * max(1, has_loss.sum()))
    else:
        if fixed_length is None or fixed_length < 1:
            raise ValueError(
                f"loss aggregation 'fixed': fixed_length={fixed_length} must be at least 1"
            )
        weights = np.full(len(lengths), 1 / (max(1, len(lengths)) * fixed_length))
    return np.where(has_loss, weights, 0.0).astype(np.float32)


def weighted_sum(
    values: Float[AnyArray, "*shape"],
    weights: Float[AnyArray, "*shape"],
    mask: Bool[AnyArray, "*shape"],
) -> Float[jax.Array, ""]:
    """Return the sum of weight * value over the mask; values elsewhere get no gradient."""
    return jnp.sum(jnp.where(mask, weights, 0.0) * jnp.where(mask, values, 0.0))


def policy_loss(
    logprobs: Float[jax.Array, "B C"],
    *,
    old_logprobs: Float[AnyArray, "B C"],
    advantages: Float[AnyArray, "B C"],
    weights: Float[AnyArray, "B C"],
    mask: Bool[AnyArray, "B C"],
    segment_ids: Int32[AnyArray, "B C"],
    options: LossOptions,
    rollout_logprobs: Float[AnyArray, "B C"] | None = None,
    ref_logprobs: Float[AnyArray, "B C"] | None = None,
    entropies: Float[AnyArray, "B C"] | None = None,
) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
    """Return the loss of a micro-batch and metrics, both to be summed over micro-batches.

    Args:
      logprobs: Log-probs of the tokens under the policy, through which gradients flow.
      old_logprobs: Log-probs in the ratio's denominator, without gradient: the engine's, the
        trainer's own at the beginning of the step, or `logprobs` itself if the step has a single
        update. In the last two cases the engine's log-probs are passed as `rollout_logprobs`, and
        `options.tis_cap` corrects for the remaining mismatch.
      advantages: Advantage of each token.
      weights: Weight of each token, from `token_weights`.
      mask: bool[B, C], True for sampled tokens, which carry loss.
      segment_ids: int32[B, C], index of the episode within its row, from 1; 0 for padding.
      options: Options of the loss; static.
      rollout_logprobs: Log-probs from the engine; None if `old_logprobs` already holds them.
      ref_logprobs: Log-probs under the reference policy, if any.
      entropies: Entropy of the policy's distribution at each token, with gradient, if computed.

    Returns:
      The loss, float32[], and sums over the masked-in tokens, float32[] each. `tokens` is their
      number, and `policy_loss` is weighted, so that it sums to an average like the loss. The others
      must be divided by `tokens`: those of `_ratio_sums`; `kl` (with a reference); `entropy` (with
      entropies); with `rollout_logprobs`, `rollout_logprob_diff_abs` and
      `rollout_logprob_diff_squared`, of old - rollout; and with `tis_cap`, `tis_weight`, the
      importance weights, and `tis_capped`, the number of tokens at the cap.

    Raises:
      ValueError: A term is enabled without its input.
    """
    _check_inputs(options, rollout_logprobs, ref_logprobs, entropies)

    def masked(x):
        return jnp.where(mask, x, 0.0)

    def total(x):
        return jnp.sum(masked(jax.lax.stop_gradient(x)), dtype=logprobs.dtype)

    new, old, advantages = (
        masked(logprobs), masked(jax.lax.stop_gradient(old_logprobs)), masked(advantages)
    )  # fmt: skip
    ratio = importance_ratio(new, old, mask, segment_ids, options.ratio_level)
    objective = clipped_objective(ratio, advantages, options.clip_low, options.clip_high)
    sums = _ratio_sums(new, old, ratio, advantages, options, total)
    if rollout_logprobs is not None:
        rollout = masked(rollout_logprobs)
        diff = old - rollout
        sums["rollout_logprob_diff_abs"] = total(jnp.abs(diff))
        sums["rollout_logprob_diff_squared"] = total(diff**2)
        if options.tis_cap is not None:
            tis_weights = truncated_importance_weights(old, rollout, options.tis_cap)
            objective = objective * tis_weights
            sums["tis_weight"] = total(tis_weights)
            sums["tis_capped"] = total(tis_weights >= options.tis_cap)
    loss = weighted_sum(-objective, weights, mask)
    sums["policy_loss"] = jax.lax.stop_gradient(loss)
    if ref_logprobs is not None:
        kl = kl_estimate(new, masked(ref_logprobs), options.kl_estimator)
        sums["kl"] = total(kl)
        if options.kl_coef:
            loss = loss + options.kl_coef * weighted_sum(kl, weights, mask)
    if entropies is not None:
        sums["entropy"] = total(entropies)
        if options.entropy_coef:
            loss = loss - options.entropy_coef * weighted_sum(entropies, weights, mask)
    return loss, sums


def _check_inputs(options: LossOptions, rollout_logprobs, ref_logprobs, entropies) -> None:
    """Raise ValueError if a term is enabled without its input."""
    for name, enabled, required, value in (
        ("kl_coef", options.kl_coef, "ref_logprobs", ref_logprobs),
        ("entropy_coef", options.entropy_coef, "entropies", entropies),
        ("tis_cap", options.tis_cap is not None, "rollout_logprobs", rollout_logprobs),
    ):
        if enabled and value is None:
            raise ValueError(f"loss: {name}={getattr(options, name)} needs `{required}`")


def _ratio_sums(new, old, ratio, advantages, options: LossOptions, total) -> dict[str, jax.Array]:
    """Return sums over tokens that describe the importance ratio.

    `tokens`; `ratio`; `clipped_low` and `clipped_high`, numbers of tokens without gradient because
    their ratio is too low or too high; `log_ratio_abs` and `log_ratio_squared`, of new - old.
    """
    return {
        "tokens": total(jnp.ones_like(new)),
        "ratio": total(ratio),
        "clipped_low": total((ratio < 1 - options.clip_low) & (advantages < 0)),
        "clipped_high": total((ratio > 1 + options.clip_high) & (advantages > 0)),
        "log_ratio_abs": total(jnp.abs(new - old)),
        "log_ratio_squared": total((new - old) ** 2),
    }


def _episode_sums(
    values: Float[jax.Array, "B C"], segment_ids: Int32[AnyArray, "B C"]
) -> Float[jax.Array, "B C"]:
    """Return at each column the sum of the values over its episode.

    A scatter is avoided because its summation order is nondeterministic on GPUs. The number of
    episodes in a row is unbounded, and columns are compared in batches to limit memory.

    Args:
      values: float32[B, C].
      segment_ids: int32[B, C].
    """

    def sum_at(column):
        same_episode = segment_ids == segment_ids[:, column, None]
        return jnp.sum(jnp.where(same_episode, values, 0.0), axis=1)

    return jax.lax.map(sum_at, jnp.arange(values.shape[1]), batch_size=128).T
