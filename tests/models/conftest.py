"""Fixtures of the tests of models."""

import jax
import pytest

from mmsr1_jax.models import sharding


@pytest.fixture(scope="session")
def mesh():
    """A mesh of one device."""
    return sharding.make_mesh(devices=jax.devices()[:1])
