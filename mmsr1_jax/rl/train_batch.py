"""Conversion of a step's episodes into training samples, and metrics of its updates."""

from collections.abc import Sequence
from itertools import chain

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32, Float64

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.processing.batching import TooLongError
from mmsr1_jax.rewards.reward_function import Reward
from mmsr1_jax.rl import advantages, packing
from mmsr1_jax.rl.advantages import overlong_mask, overlong_penalty
from mmsr1_jax.rl.learner import Learner, LossFunction
from mmsr1_jax.rl.loss import LossOptions, policy_loss, token_weights
from mmsr1_jax.rl.packing import RowShape, Sample, TrainBatch
from mmsr1_jax.utils import processes

Group = Sequence[tuple[Episode, Reward]]  # episodes of one question, with rewards
# Values from `Learner.update` that are totals of an update, not sums over its tokens.
_UPDATE_TOTALS = ("loss", "policy_loss", "gradient_norm", "tokens", "finite")


def _loss_options(objective: settings.Objective) -> LossOptions:
    """Return the options of the policy loss for the settings of the objective."""
    has_tis = objective.old_logprobs == "trainer" and objective.tis_cap > 0
    return LossOptions(
        ratio_level=objective.ratio_level,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        kl_coef=objective.kl_coef,
        kl_estimator=objective.kl_estimator,
        entropy_coef=objective.entropy_coef,
        tis_cap=objective.tis_cap if has_tis else None,
    )


def make_loss(objective: settings.Objective) -> LossFunction:
    """Return the loss function of the objective, for `learner.Learner`."""
    options = _loss_options(objective)

    def loss(
        logprobs: jax.Array, entropies: jax.Array, batch: TrainBatch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        # With one update per step, the policy is still the one at the beginning of the step.
        trainer_logprobs = logprobs if objective.num_minibatches == 1 else batch.old_logprobs
        use_engine = objective.old_logprobs == "engine"
        return policy_loss(
            logprobs,
            old_logprobs=batch.rollout_logprobs if use_engine else trainer_logprobs,
            rollout_logprobs=None if use_engine else batch.rollout_logprobs,
            ref_logprobs=batch.ref_logprobs if objective.kl_coef else None,
            advantages=batch.advantages,
            weights=batch.weights,
            mask=batch.mask,
            segment_ids=batch.segment_ids,
            entropies=entropies,
            options=options,
        )

    return loss


def shape_rewards(
    group: Group, objective: settings.Objective, max_episode_tokens: int
) -> Float64[np.ndarray, "G"]:
    """Return the rewards of a group, float64[G], including the penalty for overlong episodes.

    Args:
      group: Episodes of one question and their rewards.
      objective: Settings of the objective.
      max_episode_tokens: Maximum length of an episode in tokens. Prompt and tool results count
        too, since they consume the same budget and the policy chooses what to search for.
    """
    rewards = np.array([reward.reward for _, reward in group], np.float64)
    if objective.overlong == "penalty":
        lengths = np.array([len(episode) for episode, _ in group])
        rewards += overlong_penalty(lengths, max_episode_tokens, objective.overlong_buffer)
    return rewards


def has_reward_variance(
    group: Group, objective: settings.Objective, max_episode_tokens: int
) -> bool:
    """Return whether the shaped rewards of a group differ."""
    return len(group) > 1 and advantages.has_reward_variance(
        shape_rewards(group, objective, max_episode_tokens)
    )


def split(
    groups: Sequence[Group], positions: Sequence[int], total: int, num_minibatches: int
) -> list[list[Group]]:
    """Distribute non-empty groups over minibatches, one for each update of a step, in order.

    Args:
      groups: Groups of this process.
      positions: Position of each among the groups of all processes, which decides.
      total: Number of the groups of all processes.
      num_minibatches: Number of updates.
    """
    minibatches: list[list[Group]] = [[] for _ in range(num_minibatches)]
    for group, position in zip(groups, positions, strict=True):
        if group:
            minibatches[position * num_minibatches // total].append(group)
    return minibatches


def make_samples(
    groups: Sequence[Group],
    group_advantages: Sequence[Float32[np.ndarray, "..."]],
    objective: settings.Objective,
    max_episode_tokens: int,
    config: ModelConfig,
    shape: RowShape,
) -> tuple[list[Sample], list[str]]:
    """Return the training samples of an update. All processes must call this together.

    Args:
      groups: Groups of the update in this process; the loss is averaged over the tokens of all
        episodes, those of other processes too.
      group_advantages: Advantages of each group, float32[G], see `advantages.group_advantages`.
      objective: Settings of the objective.
      max_episode_tokens: Maximum length of an episode in tokens.
      config: Model configuration of the policy.
      shape: Shape of the packed rows.

    Returns:
      The samples, without episodes whose gradient is zero, and a message for each episode that is
      skipped because it does not fit into a row.
    """
    kept, skipped = [], []
    for group, values in zip(groups, group_advantages, strict=True):
        for (episode, _), advantage in zip(group, values, strict=True):
            try:
                packing.check_fits(episode.conversation, config, shape)
            except TooLongError as error:
                skipped.append(f"episode {episode.index}: {error}")
                continue
            mask = episode.loss_mask
            if objective.overlong == "mask":
                mask = overlong_mask(mask, episode.end == "tokens")
            kept.append((episode, mask, advantage))
    lengths = processes.exchange("lengths", [int(mask.sum()) for _, mask, _ in kept])
    weights = token_weights(
        np.array([*chain(*lengths)], np.int64), objective.loss_aggregation,
        fixed_length=max_episode_tokens,
    )  # fmt: skip
    first = sum(map(len, lengths[: processes.index()]))
    weights = weights[first : first + len(kept)]
    policy_loss_only = not objective.kl_coef and not objective.entropy_coef
    samples = [
        Sample(
            prompt=episode.conversation,
            mask=mask,
            weights=np.full(len(mask), weight, np.float32),
            advantages=np.full(len(mask), advantage, np.float32),
            rollout_logprobs=episode.logprobs,
            prefix=len(episode.segments[0].tokens),
        )
        for (episode, mask, advantage), weight in zip(kept, weights, strict=True)
        if mask.any() and not (policy_loss_only and advantage == 0)  # else its gradient is 0
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
    logprobs = learner.logprobs(batches, params)
    return [b.replace(**{field: x}) for b, x in zip(batches, logprobs, strict=True)]


def update_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an update: means and RMS values over its tokens, and its totals."""
    tokens = max(1.0, sums["tokens"])
    metrics = {name: value for name, value in sums.items() if name in _UPDATE_TOTALS}
    for name, value in sums.items():
        if name.endswith("_squared"):
            metrics[name.removesuffix("_squared") + "_rms"] = (value / tokens) ** 0.5
        elif name not in _UPDATE_TOTALS:
            metrics[name] = value / tokens
    metrics["clip_fraction"] = metrics["clipped_low"] + metrics["clipped_high"]
    return metrics


def mean_update_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean metrics of a step's updates as `update/NAME`, and `update/nonfinite`."""
    names = sorted({name for update in updates for name in update})
    means = {f"update/{n}": float(np.mean([update[n] for update in updates])) for n in names}
    return means | {"update/nonfinite": float(sum(not update["finite"] for update in updates))}
