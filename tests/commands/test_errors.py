"""Errors end every command with one line, and unexpected exceptions with their traceback."""

import json
import subprocess
import sys

import pytest

from mmsr1_jax import cli
from tests.failing_commands import CALLS, EXCEPTIONS
from tests.programs import ROOT, environment


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(exit code, output) of each command with each exception."""
    folder = tmp_path_factory.mktemp("failing")
    subprocess.run(
        [sys.executable, "-m", "tests.failing_commands", folder],
        cwd=ROOT, env=environment(), check=True, timeout=600,
    )  # fmt: skip
    return json.loads((folder / "results.json").read_text())


def test_every_command_is_tested():
    assert set(CALLS) == {*cli.COMMANDS, *cli.SCRIPTS}


@pytest.mark.parametrize("command", CALLS)
@pytest.mark.parametrize("name", EXCEPTIONS)
def test_errors_of_a_command(results, command, name):
    code, output = results[f"{command}/{name}"]
    assert code == (2 if name == "UserError" else 1), output
    if name == "UserError":
        assert output == "error: injected\n"
    else:
        assert output.startswith("Traceback (most recent call last):\n"), output
        assert output.endswith(f"\n{name}: injected\n"), output
