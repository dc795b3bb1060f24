"""The policy that rollouts are tested with, unless a file defines another."""

import pytest

from mmsr1_jax.scripts import random_policy
from tests import kernels
from tests.engines import VOCAB_SIZE
from tests.reference import SMALL
from tests.scripted_policy import config_for


@pytest.fixture(scope="module")
def model(request):
    """A random policy of the family that the test names (`FAMILIES_TESTED`), or of the first."""
    base = SMALL[getattr(request, "param", "qwen2_5_vl")]
    return random_policy.random_model(config_for(VOCAB_SIZE, base), seed=3)


@pytest.fixture(scope="session", autouse=True)
def interpreted_kernels(request):
    """With `--kernels=tpu` or `gpu`, all engines use its kernels, in Pallas' interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        if platform := request.config.getoption("kernels"):
            kernels.INTERPRET[platform](patch)
        yield
