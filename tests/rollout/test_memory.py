"""Memory that an engine takes when it is created."""

import jax
import pytest

from mmsr1_jax.apps.plan.memory import device_bytes
from mmsr1_jax.config import settings
from mmsr1_jax.rollout import build
from mmsr1_jax.rollout.device import Device
from tests.engines import make_config
from tests.live_arrays import LiveArrays


@pytest.mark.parametrize("tensor", [8, 4], ids=["one engine", "two engines"])
def test_weights_exist_once_when_the_caches_are_allocated(tiny_dir, monkeypatch, tensor):
    """The loaded checkpoint is freed before, though its arrays are still referenced."""
    config, seen, live = make_config(precompile=True), [], LiveArrays()
    config.mesh = settings.Mesh(tensor=tensor)

    def observe(device):  # instead of compiling all programs, which needs the caches
        if jax.devices()[0] in device._programs.replicated.device_set:
            seen.append(live.bytes() / device_bytes(device._programs.abstract_params()))

    monkeypatch.setattr(Device, "warm_up", observe)
    build.make_engine(config, str(tiny_dir)).close()
    assert len(seen) == 1 and 1 <= seen[0] < 1.1
