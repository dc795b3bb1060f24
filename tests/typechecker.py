"""Checks of array shapes and types at run time: jaxtyping's annotations, by beartype.

Functions under `jax.jit` are checked when they are traced.
"""

import functools

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

# Packages and modules that compute with arrays.
MODULES = (
    "mmsr1_jax.models",
    "mmsr1_jax.rl",
    "mmsr1_jax.rollout.cache",
    "mmsr1_jax.rollout.decode",
    "mmsr1_jax.rollout.sampler",
)
# An int is accepted for a float, as by type checkers (PEP 484).
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """Check every function and dataclass of `MODULES`, which must not have been imported yet."""
    jaxtyping.install_import_hook(MODULES, "tests.typechecker.check")


def check(function):
    """Return a function that checks the arguments and the result of `function`."""
    checked = _beartype(function)
    if function.__name__ != "__init__":
        return checked

    @functools.wraps(function)
    def init(self, *args, **keywords):
        # JAX also builds pytrees of shardings, specs, None and placeholders, without any shape.
        is_pytree = not jax.tree_util.all_leaves([self])
        leaves = jax.tree.leaves((args, keywords))
        if is_pytree and not (leaves and all(map(_is_array, leaves))):
            return None
        return checked(self, *args, **keywords)

    return init


def _is_array(leaf) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float))
