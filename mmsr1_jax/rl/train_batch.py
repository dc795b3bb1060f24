"""Conversion of a step's episodes into training samples, and metrics of its updates."""

from collections.abc import Sequence

import numpy as np
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.models.qwen2_5_vl import ModelConfig
from mmsr1_jax.processing.batching import TooLongError
from mmsr1_jax.rewards.reward_function import Reward
from mmsr1_jax.rl import advantages, packing
from mmsr1_jax.rl.advantages import overlong_mask, overlong_penalty
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.loss import LossOptions, policy_loss, token_weights
from mmsr1_jax.rl.packing import RowShape, Sample, TrainBatch

Group = Sequence[tuple[Episode, Reward]]  # episodes of one question, with rewards


def loss_options(objective: settings.Objective) -> LossOptions:
    corrects = objective.old_logprobs == "trainer" and objective.tis_cap > 0
    return LossOptions(
        ratio_level=objective.ratio_level,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        kl_coef=objective.kl_coef,
        kl_estimator=objective.kl_estimator,
        entropy_coef=objective.entropy_coef,
        tis_cap=objective.tis_cap if corrects else None,
    )


def make_loss(objective: settings.Objective):
    """Return the loss function of the objective, for `learner.Learner`."""
    options = loss_options(objective)

    def loss(logprobs, entropies, batch: TrainBatch):
        # With one update per step, the policy is still the one at the beginning of the step.
        at_start = logprobs if objective.num_minibatches == 1 else batch.old_logprobs
        engine = objective.old_logprobs == "engine"
        return policy_loss(
            logprobs,
            old_logprobs=batch.rollout_logprobs if engine else at_start,
            rollout_logprobs=None if engine else batch.rollout_logprobs,
            ref_logprobs=batch.ref_logprobs if objective.kl_coef else None,
            advantages=batch.advantages,
            weights=batch.weights,
            mask=batch.mask,
            segment_ids=batch.segment_ids,
            entropies=entropies,
            options=options,
        )

    return loss


def shape_rewards(group: Group, objective: settings.Objective, limit: int) -> np.ndarray:
    """Return the rewards of a group, float64[G], including the penalty for overlong episodes.

    Args:
      group: Episodes of one question and their rewards.
      objective: Settings of the objective.
      limit: Maximum length of an episode in tokens. Prompt and tool results count too, since they
        consume the same token budget and the policy chooses what to search for.
    """
    rewards = np.array([reward.reward for _, reward in group], np.float64)
    if objective.overlong == "penalty":
        lengths = np.array([len(episode) for episode, _ in group])
        rewards += overlong_penalty(lengths, limit, objective.overlong_buffer)
    return rewards


def has_reward_variance(group: Group, objective: settings.Objective, limit: int) -> bool:
    """Return whether the shaped rewards of a group differ."""
    return len(group) > 1 and advantages.has_reward_variance(shape_rewards(group, objective, limit))


def split(groups: Sequence[Group], num_minibatches: int) -> list[list[Group]]:
    """Deal the groups that have episodes out to minibatches, one for each update of a step."""
    return [
        [group for group in groups[i::num_minibatches] if group] for i in range(num_minibatches)
    ]


def make_samples(
    groups: Sequence[Group],
    group_advantages: Sequence[np.ndarray],
    objective: settings.Objective,
    limit: int,
    config: ModelConfig,
    shape: RowShape,
) -> tuple[list[Sample], list[str]]:
    """Return the training samples of an update.

    Args:
      groups: Groups of the update; the loss is averaged over the tokens of all their episodes.
      group_advantages: Advantages of each group, see `advantages.group_advantages`.
      objective: Settings of the objective.
      limit: Maximum length of an episode in tokens.
      config: Model configuration of the policy.
      shape: Shape of the packed rows.

    Returns:
      The samples, and for each episode that does not fit into a row, why it was skipped.
    """
    chosen, skipped = [], []
    for group, values in zip(groups, group_advantages, strict=True):
        for (episode, _), value in zip(group, values, strict=True):
            try:
                packing.check_fits(episode.conversation, config, shape)
            except TooLongError as error:
                skipped.append(f"episode {episode.index}: {error}")
                continue
            mask = episode.loss_mask
            if objective.overlong == "mask":
                mask = overlong_mask(mask, episode.end == "tokens")
            chosen.append((episode, mask, value))
    lengths = np.array([mask.sum() for _, mask, _ in chosen], np.int64)
    weights = token_weights(lengths, objective.loss_aggregation, fixed_length=limit)
    policy_loss_only = not objective.kl_coef and not objective.entropy_coef
    samples = [
        Sample(
            prompt=episode.conversation,
            mask=mask,
            weights=np.full(len(mask), weight, np.float32),
            advantages=np.full(len(mask), value, np.float32),
            rollout_logprobs=episode.logprobs,
        )
        for (episode, mask, value), weight in zip(chosen, weights, strict=True)
        if mask.any() and not (policy_loss_only and value == 0)  # otherwise its gradient is zero
    ]
    return samples, skipped


def with_logprobs(
    batches: Sequence[TrainBatch], field: str, learner: Learner, params: nnx.State | None = None
) -> list[TrainBatch]:
    """Return micro-batches with `field` set to the log-probs of their tokens.

    Args:
      batches: Micro-batches of host arrays.
      field: `old_logprobs` or `ref_logprobs`.
      learner: Learner that computes them.
      params: Snapshot of the trained parameters to use; None: the current ones.
    """
    logprobs = learner.score(batches, params)
    return [b.replace(**{field: x}) for b, x in zip(batches, logprobs, strict=True)]


def update_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Return the sums of an update as means over its tokens."""
    tokens = max(1.0, sums["tokens"])
    whole = ("loss", "policy_loss", "gradient_norm", "tokens", "finite")
    figures = {name: value for name, value in sums.items() if name in whole}
    for name, value in sums.items():
        if name.endswith("_squared"):
            figures[name.removesuffix("_squared") + "_rms"] = (value / tokens) ** 0.5
        elif name not in whole:
            figures[name] = value / tokens
    figures["clip_fraction"] = figures["clipped_low"] + figures["clipped_high"]
    return figures


def mean_update_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean metrics of a step's updates as `update/NAME`, and `update/nonfinite`."""
    names = sorted({name for update in updates for name in update})
    means = {f"update/{n}": float(np.mean([update[n] for update in updates])) for n in names}
    return means | {"update/nonfinite": float(sum(not update["finite"] for update in updates))}
