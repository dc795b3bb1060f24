"""Policy loss: clipped importance ratios, KL penalty to a reference, and entropy bonus.

    loss = sum over tokens of weight * (-objective + kl * KL - entropy * H)

Token weights are computed beforehand on the host (`token_weights`) from the lengths of all episodes
of the update. The loss is therefore a plain sum over tokens, rows, micro-batches and devices, and
does not depend on how episodes are distributed over them. Arrays are float32[B, T] unless stated
otherwise, where T counts either all tokens of a row or only those that carry loss. Values at masked
positions are ignored: they reach neither loss nor gradient, not even as NaN.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmsr1_jax.config.choices import KL_ESTIMATORS, LOSS_AGGREGATIONS, RATIO_LEVELS

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
    new: jax.Array, old: jax.Array, mask: jax.Array, segment_ids: jax.Array, level: str
) -> jax.Array:
    """Return the importance ratio of each sampled token between the policy and the old policy.

    At the sequence and trajectory levels all tokens of an episode share one ratio, in the form of
    GSPO-token (arXiv 2507.18071, eq. 14): the value is the episode's ratio, and its gradient with
    respect to a token's log-prob is the ratio itself, as at token level. At a ratio of 1 the
    gradient of the loss is therefore the plain policy gradient, whatever the level and the loss
    aggregation. With one advantage per episode and no per-token correction, `sequence` has the
    values and gradients of GSPO (eq. 5).

    Args:
      new, old: Log-probs under the policy and under the policy in the ratio's denominator.
      mask: bool[B, T], True for tokens that count.
      segment_ids: int32[B, T], index of the episode within its row, from 1; 0 for padding. An
        episode never spans rows.
      level: `token`: exp(log-ratio), PPO. `sequence`: exp(mean of the episode's log-ratios), GSPO,
        eq. 7. `trajectory`: exp(sum of the episode's log-ratios), the probability ratio of all
        tokens that the policy wrote in the episode.

    Returns:
      float32[B, T], 1 where the mask is False.

    Raises:
      ValueError: The level is unknown.
    """
    if level not in RATIO_LEVELS:
        raise ValueError(f"ratio level: {level!r} is not one of {', '.join(RATIO_LEVELS)}")
    log_ratio = jnp.where(mask, new - old, 0.0)
    if level != "token":
        value = jax.lax.stop_gradient(log_ratio)
        total = _episode_sums(value, segment_ids)
        if level == "sequence":
            count = _episode_sums(jnp.where(mask, 1.0, 0.0).astype(total.dtype), segment_ids)
            total = total / jnp.maximum(count, 1.0)
        log_ratio = jnp.where(mask, total + (log_ratio - value), 0.0)
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def clipped_objective(ratio: jax.Array, advantage: jax.Array, low: float, high: float) -> jax.Array:
    """Return the clipped surrogate objective min(ratio * A, clip(ratio, 1 - low, 1 + high) * A).

    PPO (arXiv 1707.06347), eq. 7; with high > low, DAPO's clip-higher (arXiv 2503.14476, eq. 10).
    """
    # Only the bound towards which the advantage pushes the ratio matters.
    bounded = jnp.where(advantage > 0, jnp.minimum(ratio, 1 + high), jnp.maximum(ratio, 1 - low))
    return bounded * advantage


def kl_estimate(new: jax.Array, reference: jax.Array, kind: str) -> jax.Array:
    """Estimate KL(policy || reference) per sampled token, http://joschu.net/blog/kl-approx.html.

    With d = reference - new: `k1` = -d; `k2` = d^2 / 2; `k3` = exp(d) - 1 - d. The gradient is that
    of the estimate. Its expectation over the policy's tokens is zero for `k1`, the gradient of
    KL(policy || reference) for `k2`, and the gradient of KL(reference || policy) for `k3`, which is
    the same close to the reference. In `k3`, d is clipped to at most `MAX_LOG_RATIO`.

    Raises:
      ValueError: The kind is unknown.
    """
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"KL estimator: {kind!r} is not one of {', '.join(KL_ESTIMATORS)}")
    d = reference - new
    if kind == "k1":
        return -d
    if kind == "k2":
        return d**2 / 2
    d = jnp.minimum(d, MAX_LOG_RATIO)
    return jnp.expm1(d) - d


def truncated_importance_weights(
    trainer: jax.Array, rollout_logprobs: jax.Array, cap: float
) -> jax.Array:
    """Return importance weights min(trainer / rollout_logprobs, cap), without gradient.

    They correct for the mismatch between the engine's probabilities and those that the trainer
    computes with the same parameters.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"); the cap is as in V-trace (arXiv 1802.01561, section 4.1).

    Args:
      trainer: Log-probs from the trainer, with the parameters that the tokens were sampled with.
      rollout_logprobs: Log-probs from the engine.
      cap: Upper bound of the weights, greater than 0.
    """
    log_ratio = jax.lax.stop_gradient(trainer - rollout_logprobs)
    return jnp.minimum(jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)), cap)


def token_weights(lengths: np.ndarray, how: str, fixed_length: int | None = None) -> np.ndarray:
    """Return the weight of each episode's tokens in the loss aggregation. NumPy, on the host.

    Args:
      lengths: int[N], number of tokens that carry loss in each episode of the update, over all
        micro-batches and processes.
      how: `token`: mean over all tokens (DAPO, eq. 12). `sequence`: mean over the tokens of each
        episode, then over the episodes with such tokens (GRPO, arXiv 2402.03300, eq. 3). `fixed`:
        sum over all tokens / (N * fixed_length), so that the length of an episode does not change
        the weight of its tokens (Dr. GRPO, arXiv 2503.20783).
      fixed_length: Constant length for `fixed`, in tokens; usually the maximum length of an
        episode.

    Returns:
      float32[N], weight of every token of an episode; 0 for episodes without loss tokens.

    Raises:
      ValueError: The aggregation is unknown, a length is negative, or `fixed` lacks a positive
        `fixed_length`.
    """
    lengths = np.asarray(lengths, np.int64)
    if how not in LOSS_AGGREGATIONS:
        raise ValueError(f"loss aggregation: {how!r} is not one of {', '.join(LOSS_AGGREGATIONS)}")
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError(f"lengths must be int[episodes], none negative, not {lengths}")
    some = lengths > 0
    if how == "token":
        weights = np.full(len(lengths), 1 / max(1, lengths.sum()))
    elif how == "sequence":
        weights = 1 / (np.maximum(1, lengths) * max(1, some.sum()))
    else:
        if fixed_length is None or fixed_length < 1:
            raise ValueError(
                f"loss aggregation 'fixed': fixed_length={fixed_length} must be at least 1"
            )
        weights = np.full(len(lengths), 1 / (max(1, len(lengths)) * fixed_length))
    return np.where(some, weights, 0.0).astype(np.float32)


def weighted_sum(values: jax.Array, weights: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the sum of weight * value over the mask; values elsewhere get no gradient."""
    return jnp.sum(jnp.where(mask, weights, 0.0) * jnp.where(mask, values, 0.0))


def policy_loss(
    logprobs: jax.Array,
    *,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    weights: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array,
    options: LossOptions,
    rollout_logprobs: jax.Array | None = None,
    ref_logprobs: jax.Array | None = None,
    entropies: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of a micro-batch and metrics, both to be summed over micro-batches.

    Args:
      logprobs: Log-probs of the tokens under the policy, through which gradients flow.
      old_logprobs: Log-probs in the ratio's denominator, without gradient: the engine's, the
        trainer's own at the beginning of the step, or `logprobs` itself if the step has a single
        update. In the last two cases the engine's log-probs are passed as `rollout_logprobs`, and
        `options.tis_cap` corrects for the remaining mismatch.
      advantages: Advantage of each token.
      weights: Weight of each token, from `token_weights`.
      mask: bool[B, T], True for sampled tokens, which carry loss.
      segment_ids: int32[B, T], index of the episode within its row, from 1; 0 for padding.
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
    for name, enabled, needed, given in (
        ("kl_coef", options.kl_coef, "ref_logprobs", ref_logprobs),
        ("entropy_coef", options.entropy_coef, "entropies", entropies),
        ("tis_cap", options.tis_cap is not None, "rollout_logprobs", rollout_logprobs),
    ):
        if enabled and given is None:
            raise ValueError(f"loss: {name}={getattr(options, name)} needs `{needed}`")

    def clean(x):
        return jnp.where(mask, x, 0.0)

    def total(x):
        return jnp.sum(clean(jax.lax.stop_gradient(x)), dtype=logprobs.dtype)

    new, old, advantages = (
        clean(logprobs), clean(jax.lax.stop_gradient(old_logprobs)), clean(advantages)
    )  # fmt: skip
    ratio = importance_ratio(new, old, mask, segment_ids, options.ratio_level)
    objective = clipped_objective(ratio, advantages, options.clip_low, options.clip_high)
    sums = _ratio_sums(new, old, ratio, advantages, options, total)
    if rollout_logprobs is not None:
        diff = old - clean(rollout_logprobs)
        sums["rollout_logprob_diff_abs"] = total(jnp.abs(diff))
        sums["rollout_logprob_diff_squared"] = total(diff**2)
    if options.tis_cap is not None:
        correction = truncated_importance_weights(old, clean(rollout_logprobs), options.tis_cap)
        objective = objective * correction
        sums["tis_weight"] = total(correction)
        sums["tis_capped"] = total(correction >= options.tis_cap)
    loss = weighted_sum(-objective, weights, mask)
    sums["policy_loss"] = jax.lax.stop_gradient(loss)
    if ref_logprobs is not None:
        kl = kl_estimate(new, clean(ref_logprobs), options.kl_estimator)
        sums["kl"] = total(kl)
        if options.kl_coef:
            loss = loss + options.kl_coef * weighted_sum(kl, weights, mask)
    if entropies is not None:
        sums["entropy"] = total(entropies)
        if options.entropy_coef:
            loss = loss - options.entropy_coef * weighted_sum(entropies, weights, mask)
    return loss, sums


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


def _episode_sums(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Return at each position the sum of the values over its episode.

    A scatter is avoided because its summation order is nondeterministic on GPUs. The number of
    episodes in a row is unbounded, and positions are compared in batches to limit memory.

    Args:
      values: float32[B, T].
      segment_ids: int32[B, T].
    """

    def at(place):
        same = segment_ids == segment_ids[:, place, None]
        return jnp.sum(jnp.where(same, values, 0.0), axis=1)

    return jax.lax.map(at, jnp.arange(values.shape[1]), batch_size=128).T
