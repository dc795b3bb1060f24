"""All settings as typed dataclasses with their defaults and allowed values.

Any package of `mmsr1_jax` may import this one. It imports none of the others, and no JAX.
"""

from mmsr1_jax.config.bounds import ConfigError
from mmsr1_jax.config.construction import Construction
from mmsr1_jax.config.settings import (
    Buckets,
    Config,
    Eval,
    Images,
    Mesh,
    Model,
    Rewards,
    Rollout,
    Sampling,
    Turns,
    get_config,
    validate,
    validate_sampling,
)
from mmsr1_jax.config.tools import Services, Tools
from mmsr1_jax.config.training import Data, Objective, Run, Update

__all__ = [
    "Buckets",
    "Config",
    "ConfigError",
    "Construction",
    "Data",
    "Eval",
    "Images",
    "Mesh",
    "Model",
    "Objective",
    "Rewards",
    "Rollout",
    "Run",
    "Sampling",
    "Services",
    "Tools",
    "Turns",
    "Update",
    "get_config",
    "validate",
    "validate_sampling",
]
