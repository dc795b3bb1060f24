"""The policy's loss: clipped importance ratios, KL to a reference, entropy.

    loss = sum over tokens of weight * (-objective + kl * KL - entropy * H)

A token's weight is known on the host before (`token_weights`), from the lengths of all episodes of
the update. So the loss is a plain sum: of tokens, rows, micro-batches and devices, and does not
depend on how the episodes lie in them. Arrays are float32[B, T] unless said otherwise; T may
be the tokens of a row or only those that carry loss. What masked places hold is not looked at: it
reaches neither loss nor gradient, not even as NaN.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmsr1_jax.config.choices import AVERAGES, KLS, RATIOS

# Logarithms of ratios count as this where they are larger, so that exp stays finite; a sampled
# token would have to be 5e8 times less likely under one model than under the other. A ratio beyond
# has no gradient. Small ratios need no bound.
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Which loss. Defaults: the published ones.

    Attributes:
      ratio: level of the importance ratio, see `importance_ratio`.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      kl: factor of the KL term; 0 for none.
      kl_kind: estimator of the KL, see `kl_estimate`.
      entropy: factor of the entropy bonus; 0 for none.
      truncation: cap of `truncated_importance`; None for no correction.
    """

    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 1e-3
    kl_kind: str = "k3"
    entropy: float = 0.0
    truncation: float | None = None


def importance_ratio(
    new: jax.Array, old: jax.Array, mask: jax.Array, segment_ids: jax.Array, level: str
) -> jax.Array:
    """How much likelier the sampled tokens are under the policy than under that which drew them.

    Above token level all tokens of an episode have the same ratio, in the form of GSPO-token
    (arXiv 2507.18071, eq. 14): its value is the episode's, its gradient with respect to a token's
    log-prob is the ratio itself, as at token level. So at a ratio of 1 the gradient of the loss is
    the plain policy gradient, whatever the level and the average. With one advantage an episode and
    without correction of single tokens, `sequence` has the values and gradients of GSPO (eq. 5).

    Args:
      new, old: log-probs under the policy, and under that of the ratio's denominator.
      mask: bool[B, T], tokens that count.
      segment_ids: int32[B, T], number of the episode in the row from 1, 0: padding. An episode is
        whole in one row.
      level: `token`: exp(log-ratio), PPO. `sequence`: exp(mean of the episode's log-ratios), GSPO,
        eq. 7. `trajectory`: exp(sum of the episode's log-ratios), the ratio of the probabilities
        of all that the policy wrote in it.

    Returns:
      float32[B, T], 1 where the mask is not set.

    Raises:
      ValueError: an unknown level.
    """
    if level not in RATIOS:
        raise ValueError(f"ratio: {level!r} is not one of {', '.join(RATIOS)}")
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
    """What is to be made large: min(ratio * A, clip(ratio, 1 - low, 1 + high) * A).

    PPO (arXiv 1707.06347), eq. 7; with high > low, DAPO's clip-higher (arXiv 2503.14476, eq. 10).
    """
    # Of both bounds, only the one that the advantage pushes towards matters.
    bounded = jnp.where(advantage > 0, jnp.minimum(ratio, 1 + high), jnp.maximum(ratio, 1 - low))
    return bounded * advantage


def kl_estimate(new: jax.Array, reference: jax.Array, kind: str) -> jax.Array:
    """KL(policy || reference) from one sampled token, http://joschu.net/blog/kl-approx.html.

    With d = reference - new: `k1` = -d; `k2` = d^2 / 2; `k3` = exp(d) - 1 - d. The gradient is that
    of the estimate: in expectation over the policy's tokens, nothing for `k1`, that of
    KL(policy || reference) for `k2`, and that of KL(reference || policy) for `k3` (which near the
    reference is the same). In `k3`, d counts as at most `MAX_LOG_RATIO`.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KLS:
        raise ValueError(f"KL: {kind!r} is not one of {', '.join(KLS)}")
    d = reference - new
    if kind == "k1":
        return -d
    if kind == "k2":
        return d**2 / 2
    d = jnp.minimum(d, MAX_LOG_RATIO)
    return jnp.expm1(d) - d


def truncated_importance(trainer: jax.Array, behaviour: jax.Array, cap: float) -> jax.Array:
    """Weights that correct for the engine drawing from slightly other probabilities than the
    trainer computes for the same parameters: min(trainer / behaviour, cap), without gradient.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"); the cap is as in V-trace (arXiv 1802.01561, section 4.1).

    Args:
      trainer: log-probs by the trainer, with the parameters that the tokens were drawn with.
      behaviour: log-probs by the engine.
      cap: above 0.
    """
    log_ratio = jax.lax.stop_gradient(trainer - behaviour)
    return jnp.minimum(jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)), cap)


def token_weights(lengths: np.ndarray, how: str, fixed_length: int | None = None) -> np.ndarray:
    """The weight of each token in an average over all tokens of an update. Numpy, on the host.

    Args:
      lengths: int[N], tokens that carry loss in each episode of the update, over all
        micro-batches and processes.
      how: `token`: the mean over all tokens (DAPO, eq. 12). `sequence`: the mean over an episode's
        tokens, then over the episodes that have any (GRPO, arXiv 2402.03300, eq. 3). `fixed`: the
        sum over all tokens / (N * fixed_length), so that an episode's length does not change the
        weight of its tokens (Dr. GRPO, arXiv 2503.20783).
      fixed_length: tokens; for `fixed` only. Usually the tokens that an episode may have.

    Returns:
      float32[N]: of each token of an episode; 0 for one without any.

    Raises:
      ValueError: an unknown average, a negative length, or `fixed` without its length.
    """
    lengths = np.asarray(lengths, np.int64)
    if how not in AVERAGES:
        raise ValueError(f"average: {how!r} is not one of {', '.join(AVERAGES)}")
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError(f"lengths must be int[episodes], none negative, not {lengths}")
    some = lengths > 0
    if how == "token":
        weights = np.full(len(lengths), 1 / max(1, lengths.sum()))
    elif how == "sequence":
        weights = 1 / (np.maximum(1, lengths) * max(1, some.sum()))
    else:
        if fixed_length is None or fixed_length < 1:
            raise ValueError(f"average 'fixed': fixed_length={fixed_length} must be at least 1")
        weights = np.full(len(lengths), 1 / (max(1, len(lengths)) * fixed_length))
    return np.where(some, weights, 0.0).astype(np.float32)


def weighted_sum(values: jax.Array, weights: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum of weight * value where the mask is set; values elsewhere get no gradient."""
    return jnp.sum(jnp.where(mask, weights, 0.0) * jnp.where(mask, values, 0.0))


def policy_loss(
    new: jax.Array,
    *,
    old: jax.Array,
    advantages: jax.Array,
    weights: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array,
    options: LossOptions,
    behaviour: jax.Array | None = None,
    reference: jax.Array | None = None,
    entropies: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a micro-batch, to be added up over micro-batches.

    Args:
      new: log-probs of the tokens under the policy; the gradient's way.
      old: log-probs in the ratio's denominator, without gradient. The engine's; or the trainer's
        own at the beginning of the step; or `new` itself for a step of one update. In the last two
        cases the engine's are `behaviour`, and `options.truncation` corrects the rest.
      advantages: of each token.
      weights: of each token, from `token_weights`.
      mask: bool[B, T], tokens that carry loss: sampled ones.
      segment_ids: int32[B, T], number of the episode in the row from 1, 0: padding.
      options: which loss; static.
      behaviour: log-probs by the engine; None where `old` are these.
      reference: log-probs under the reference policy; None for none.
      entropies: of the policy's distribution at each token, with gradient; None where not computed.

    Returns:
      The loss, float32[], and sums over the tokens of the mask, float32[] each: `tokens`, how many;
      `policy_loss`, weighted, so that it adds up to an average as the loss does; the rest to be
      divided by `tokens`: `ratio`; `clipped_low` and `clipped_high`, tokens without gradient for
      the ratio being too low or too high; `log_ratio_abs` and `log_ratio_squared`, of new - old
      token by token; `kl` (with a reference); `entropy` (with entropies); with behaviour,
      `engine_gap_abs` and `engine_gap_squared`, of old - behaviour; and with truncation
      `correction`, its weights, and `corrections_capped`, tokens at the cap.

    Raises:
      ValueError: a term is asked for without what it is computed from.
    """
    for name, wanted, source, given in (
        ("kl", options.kl, "reference", reference),
        ("entropy", options.entropy, "entropies", entropies),
        ("truncation", options.truncation is not None, "behaviour", behaviour),
    ):
        if wanted and given is None:
            raise ValueError(f"loss: {name}={getattr(options, name)} needs `{source}`")

    def clean(x):
        return jnp.where(mask, x, 0.0)

    def total(x):
        return jnp.sum(jnp.where(mask, jax.lax.stop_gradient(x), 0.0), dtype=new.dtype)

    new, old, advantages = clean(new), clean(jax.lax.stop_gradient(old)), clean(advantages)
    ratio = importance_ratio(new, old, mask, segment_ids, options.ratio)
    objective = clipped_objective(ratio, advantages, options.clip_low, options.clip_high)
    sums = {
        "tokens": total(jnp.ones_like(new)),
        "ratio": total(ratio),
        "clipped_low": total((ratio < 1 - options.clip_low) & (advantages < 0)),
        "clipped_high": total((ratio > 1 + options.clip_high) & (advantages > 0)),
        "log_ratio_abs": total(jnp.abs(new - old)),
        "log_ratio_squared": total((new - old) ** 2),
    }
    if behaviour is not None:
        gap = old - clean(behaviour)
        sums["engine_gap_abs"] = total(jnp.abs(gap))
        sums["engine_gap_squared"] = total(gap**2)
    if options.truncation is not None:
        correction = truncated_importance(old, clean(behaviour), options.truncation)
        objective = objective * correction
        sums["correction"] = total(correction)
        sums["corrections_capped"] = total(correction >= options.truncation)
    loss = weighted_sum(-objective, weights, mask)
    sums["policy_loss"] = jax.lax.stop_gradient(loss)
    if reference is not None:
        kl = kl_estimate(new, clean(reference), options.kl_kind)
        sums["kl"] = total(kl)
        if options.kl:
            loss = loss + options.kl * weighted_sum(kl, weights, mask)
    if entropies is not None:
        sums["entropy"] = total(entropies)
        if options.entropy:
            loss = loss - options.entropy * weighted_sum(entropies, weights, mask)
    return loss, sums


def _episode_sums(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """At each place, the sum over its episode. No scatter, whose order of adding is left open on
    GPUs; no bound on the episodes of a row; and never all pairs of places at a time.

    values: float32[B, T]; segment_ids: int32[B, T].
    """

    def at(place):
        same = segment_ids == segment_ids[:, place, None]
        return jnp.sum(jnp.where(same, values, 0.0), axis=1)

    return jax.lax.map(at, jnp.arange(values.shape[1]), batch_size=128).T
