"""Properties of every command of the package."""

import importlib
import pathlib

import pytest
from absl import flags

import mmsr1_jax

PACKAGE = pathlib.Path(mmsr1_jax.__file__).parent
COMMANDS = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text()
)


def test_commands_are_discovered():
    assert {"mmsr1_jax.train", "mmsr1_jax.serve", "mmsr1_jax.scripts.random_policy"} < set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_importing_a_command_defines_no_flags(name):
    """Several commands have flags of the same name, and a program may import more than one."""
    importlib.import_module(name)
    # `--config` counts as defined by `mmsr1_jax.cli`.
    modules = [m for m in flags.FLAGS.flags_by_module_dict() if m.startswith("mmsr1_jax")]
    assert modules == []
