"""Conversion of a step's episodes into training samples: shaped rewards, advantages, weights."""

from collections.abc import Sequence

import numpy as np

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.models.qwen2_5_vl import ModelConfig
from mmsr1_jax.processing.batching import TooLongError
from mmsr1_jax.rewards.reward_function import Reward
from mmsr1_jax.rl import advantages, packing
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
        rewards += advantages.overlong_penalty(lengths, limit, objective.overlong_buffer)
    return rewards


def has_reward_variance(group: Group, objective: settings.Objective, limit: int) -> bool:
    """Return whether the shaped rewards of a group differ."""
    return len(group) > 1 and advantages.has_reward_variance(shape_rewards(group, objective, limit))


def make_samples(
    groups: Sequence[Group],
    objective: settings.Objective,
    limit: int,
    config: ModelConfig,
    shape: RowShape,
) -> tuple[list[Sample], list[str]]:
    """Return the training samples of an update.

    Args:
      groups: Groups of the update; the loss is averaged over the tokens of all their episodes.
      objective: Settings of the objective.
      limit: Maximum length of an episode in tokens.
      config: Model configuration of the policy.
      shape: Shape of the packed rows.

    Returns:
      The samples, and the reasons why other episodes were skipped (they do not fit into a row).
    """
    chosen, odd = [], []
    for group in groups:
        if not group:
            continue
        advantage = advantages.group_advantages(
            shape_rewards(group, objective, limit), objective.advantage
        )
        for (episode, _), value in zip(group, advantage, strict=True):
            try:
                packing.check_fits(episode.conversation, config, shape)
            except TooLongError as error:
                odd.append(f"episode {episode.index}: {error}")
                continue
            mask = episode.loss_mask
            if objective.overlong == "mask":
                mask = advantages.overlong_mask(mask, episode.end == "tokens")
            chosen.append((episode, mask, value))
    lengths = np.array([mask.sum() for _, mask, _ in chosen], np.int64)
    weights = token_weights(lengths, objective.loss_aggregation, fixed_length=limit)
    idle = not objective.kl_coef and not objective.entropy_coef
    samples = [
        Sample(
            prompt=episode.conversation,
            mask=mask,
            weights=np.full(len(mask), weight, np.float32),
            advantages=np.full(len(mask), value, np.float32),
            rollout_logprobs=episode.logprobs,
        )
        for (episode, mask, value), weight in zip(chosen, weights, strict=True)
        if not (idle and value == 0) and mask.any()  # otherwise its gradient is zero
    ]
    return samples, odd


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
