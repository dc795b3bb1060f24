"""Values of `run.profile`; `test_train.py` profiles a step."""

import pytest

from mmsr1_jax.config import ConfigError, settings
from tests.programs import run
from tests.train_runs import train_command


def test_an_invalid_profile_ends_the_command_with_one_line(tmp_path):
    result = run(train_command(tmp_path / "run", "--config.run.profile=(2,1)"))
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: config.run.profile=(2, 1)")


@pytest.mark.parametrize("profile", [(1,), (0, 1), (3, 2), (1, 2, 3)])
def test_a_profile_must_be_a_first_and_a_last_step(profile):
    config = settings.Config(run=settings.Run(profile=profile))
    with pytest.raises(ConfigError, match="config.run.profile="):
        settings.validate(config)
