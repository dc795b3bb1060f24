"""Fixtures for tests of the tiny world."""

import pytest

from mmsr1_jax.data.tiny_world import (
    World,
    demonstrations,
    memories,
    pages,
    train_tokenizer,
    write_index,
)
from mmsr1_jax.tools.local_index import LocalIndex


@pytest.fixture(scope="session")
def world():
    return World.generate()


@pytest.fixture(scope="session")
def index(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    assert write_index(world, folder) == (len(pages(world)), 4 * len(world.landmarks))
    return LocalIndex(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="session")
def demonstrated(world):
    """Demonstrations over training questions."""
    return demonstrations(world, 1600)


@pytest.fixture(scope="session")
def remembered(world):
    """Demonstrations of remembered facts."""
    return memories(world, 900)
