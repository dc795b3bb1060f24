"""Helper: training samples of groups."""

from mmsr1_jax.rl.advantages import group_advantages
from mmsr1_jax.rl.train_batch import make_samples, shape_rewards


def group_samples(groups, objective, limit, config, shape):
    """Return the samples of groups with the advantages that a training step computes."""
    groups = [group for group in groups if group]
    values = [
        group_advantages(shape_rewards(group, objective, limit), objective.advantage)
        for group in groups
    ]
    return make_samples(groups, values, objective, limit, config, shape)
