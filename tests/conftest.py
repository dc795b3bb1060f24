"""Shared by all tests: 8 virtual devices, a small random policy, and the same policy in torch."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import pathlib

import pytest

from mmsr1_jax import tiny
from mmsr1_jax.processor import Processor

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared():
    """The folder of real data beside the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name}/ with real data beside the project")
    return SHARED


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """An HF directory with a random policy, a small tokenizer and processor settings."""
    directory = tmp_path_factory.mktemp("policy") / "tiny"
    tiny.write(directory, seed=1)
    return directory


@pytest.fixture(scope="session")
def processor(tiny_dir):
    return Processor.from_directory(tiny_dir)
