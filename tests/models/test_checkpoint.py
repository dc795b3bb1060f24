"""HF checkpoints are loaded onto the mesh and saved bit for bit."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.models.checkpoint import CheckpointError
from mmsr1_jax.models.tensors import LAYOUTS
from mmsr1_jax.models.weight_files import INDEX, SINGLE, WeightFiles
from mmsr1_jax.scripts import random_policy
from tests.models.checkpoints import (
    CONFIGS,
    assert_bit_identical,
    random_tensors,
    read_tensors,
    write_hf,
)


@pytest.mark.parametrize("param_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout, shards", [(LAYOUTS[0], 1), (LAYOUTS[1], 3)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_load_then_save_is_bit_identical(
    tmp_path, mesh, config, layout, shards, dtype, param_dtype
):
    source = write_hf(tmp_path / "in", random_tensors(config, layout, dtype), config, shards)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("template")
    model = checkpoint.load(source, mesh=mesh, param_dtype=param_dtype)
    expected = jnp.dtype(param_dtype or dtype)
    assert all(x.dtype == expected for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    checkpoint.save(model, tmp_path / "out", source=source)
    assert_bit_identical(read_tensors(source), read_tensors(tmp_path / "out"))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_mixed_dtypes_are_preserved(tmp_path, mesh):
    tensors = random_tensors(random_policy.CONFIG, dtype=ml_dtypes.bfloat16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32) * np.float32(1.001)
    source = write_hf(tmp_path / "in", tensors)
    model = checkpoint.load(source, mesh=mesh, param_dtype="float32")
    checkpoint.save(model, tmp_path / "out", source=source)
    assert_bit_identical(read_tensors(source), read_tensors(tmp_path / "out"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_loads_saved_checkpoints(tmp_path, config):
    from tests.reference import AutoModelForImageTextToText, torch_model

    model = random_policy.random_model(config, seed=4)
    checkpoint.save(model, tmp_path / "out", shard_bytes=10**6)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert INDEX in files and sum(name.startswith("model-00") for name in files) >= 4
    assert all(p.stat().st_size < 10**6 + 50_000 for p in (tmp_path / "out").glob("*.safetensors"))
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="float32"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = torch_model(model).state_dict()
    for name, value in loaded.state_dict().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_checkpoints_saved_by_transformers_load(tmp_path, mesh, config):
    from tests.reference import torch_model

    model = random_policy.random_model(config, seed=4)
    torch_model(model).save_pretrained(tmp_path)
    loaded = checkpoint.load(tmp_path, mesh=mesh)
    assert loaded.config == model.config
    ours, theirs = (dict(checkpoint.hf_tensors(m)) for m in (model, loaded))
    assert_bit_identical(ours, theirs)


def test_save_can_cast_to_another_dtype(tmp_path, mesh):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG))
    model = checkpoint.load(source, mesh=mesh)
    checkpoint.save(model, tmp_path / "out", source=source, dtype=jnp.bfloat16)
    expected = {k: v.astype(ml_dtypes.bfloat16) for k, v in read_tensors(source).items()}
    assert_bit_identical(expected, read_tensors(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_save_replaces_a_directory_atomically(tmp_path, mesh, monkeypatch):
    old = write_hf(tmp_path / "policy", random_tensors(random_policy.CONFIG, seed=1), shards=3)
    before = read_tensors(old)
    model = checkpoint.load(old, mesh=mesh)

    def fail(*args, **keywords):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(model, old)
    assert_bit_identical(before, read_tensors(old))
    checkpoint.save(model, old, source=old)
    assert sorted(p.name for p in old.iterdir()) == ["config.json", SINGLE]
    assert_bit_identical(before, read_tensors(old))
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_only_checkpoints_are_replaced(tmp_path):
    model = random_policy.random_model(random_policy.CONFIG, seed=0)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    checkpoint.save(model, tmp_path / "empty")
    (tmp_path / "empty" / "notes.py").write_text("mine")
    for name, message in (
        ("file", "file: is a file"),
        ("folder", "folder: contains thesis.txt and is not a checkpoint"),
        ("empty", "empty: contains notes.py, which is not part of a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.save(model, tmp_path / name)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "empty" / SINGLE).exists()


@pytest.mark.parametrize(
    "shape",
    [(1, 4, 2)]
    + [pytest.param(s, marks=pytest.mark.proof) for s in ((1, 8, 1), (1, 2, 4), (2, 2, 2))],
)
def test_each_device_reads_and_holds_its_slice(tmp_path, shape, monkeypatch):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG))
    mesh = sharding.make_mesh(*shape)
    sizes = []

    class CountingSlice:
        """Safetensors slice that records the sizes of the parts read from it."""

        def __init__(self, tensor):
            self.tensor = tensor

        def get_shape(self):
            return self.tensor.get_shape()

        def get_dtype(self):
            return self.tensor.get_dtype()

        def __getitem__(self, index):
            part = self.tensor[index]
            sizes.append(part.size)
            return part

    original = WeightFiles.open_tensor
    monkeypatch.setattr(WeightFiles, "open_tensor", lambda *a: CountingSlice(original(*a)))
    model = checkpoint.load(source, mesh=mesh)
    total = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    # Nothing is read twice, except for the tower's fused qkv, whose heads are not its first
    # dimension, and its patch embedding, whose HF tensor has five dimensions.
    qkv = model.vision.blocks.attention.qkv
    qkv_size = qkv.kernel.get_value().size + qkv.bias.get_value().size
    twice = qkv_size * (shape[2] - 1)
    assert total <= sum(sizes) <= total + twice
    gate = model.text.layers.mlp.gate.kernel.get_value()
    L, F, D = gate.shape
    assert {s.data.shape for s in gate.addressable_shards} == {(L, F // shape[2], D // shape[1])}
    assert_bit_identical(dict(checkpoint.hf_tensors(model)), read_tensors(source))


MEMORY = """
import pathlib, sys, threading
import jax
from flax import nnx
from mmsr1_jax.models import checkpoint, sharding

def anonymous():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

mesh = sharding.make_mesh()
jax.block_until_ready(jax.device_put(0.0))
before, peak, stop = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.0005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = checkpoint.load(sys.argv[1], mesh=mesh, param_dtype=sys.argv[2])
jax.block_until_ready(nnx.state(model))
stop.set()
thread.join()
leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
print(peak - before, sum(x.nbytes for x in leaves), max(x.nbytes for x in leaves))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.proof)])
def test_host_memory_is_bounded_by_the_largest_tensor(tmp_path, dtype):
    """On a CPU the parameters are in host memory too, and are subtracted."""
    text = dataclasses.replace(random_policy.CONFIG.text, intermediate_size=65536)
    config = dataclasses.replace(random_policy.CONFIG, text=text)
    source = write_hf(tmp_path, random_tensors(config, dtype=ml_dtypes.bfloat16), config)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), dtype], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    peak, parameters, largest = map(int, run.stdout.split())
    assert largest > 40e6  # large compared with the interpreter's own memory
    assert peak - parameters <= 1.5 * largest
