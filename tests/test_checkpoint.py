"""HF checkpoints: read onto the mesh, written bit for bit, refused with one clear line."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mmsr1_jax.models import qwen2_5_vl, sharding
from mmsr1_jax.models.qwen2_5_vl import checkpoint
from mmsr1_jax.models.qwen2_5_vl.checkpoint import INDEX, LAYOUTS, SINGLE, CheckpointError
from mmsr1_jax.models.qwen2_5_vl.config import ConfigError, ModelConfig
from mmsr1_jax.scripts import random_policy

TIED = dataclasses.replace(
    random_policy.CONFIG,
    text=dataclasses.replace(random_policy.CONFIG.text, tie_embeddings=True, num_kv_heads=1),
)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def random_tensors(config, layout=LAYOUTS[0], dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        tensor.hf_name(layout, layer): rng.normal(size=tensor.shape).astype(dtype)
        for tensor in checkpoint.tensor_table(config).values()
        for layer in checkpoint._layers(tensor)
    }


def write_hf(directory, tensors, config=random_policy.CONFIG, shards=1):
    """A checkpoint as others write it, without our own writer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    names = sorted(tensors)
    where = {}
    for i in range(shards):
        file = SINGLE if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, directory / file)
        where |= dict.fromkeys(part, file)
    if shards > 1:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def read_all(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("param_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout, shards", [(LAYOUTS[0], 1), (LAYOUTS[1], 3)])
@pytest.mark.parametrize("config", [random_policy.CONFIG, TIED], ids=["untied", "tied"])
def test_there_and_back_is_bit_identical(
    tmp_path, mesh, config, layout, shards, dtype, param_dtype
):
    source = write_hf(tmp_path / "in", random_tensors(config, layout, dtype), config, shards)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("template")
    model = qwen2_5_vl.load(source, mesh=mesh, param_dtype=param_dtype)
    expected = jnp.dtype(param_dtype or dtype)
    assert all(x.dtype == expected for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    qwen2_5_vl.save(model, tmp_path / "out", source=source)
    assert_same_bits(read_all(source), read_all(tmp_path / "out"))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_mixed_dtypes_are_kept(tmp_path, mesh):
    tensors = random_tensors(random_policy.CONFIG, dtype=ml_dtypes.bfloat16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32) * np.float32(1.001)
    source = write_hf(tmp_path / "in", tensors)
    model = qwen2_5_vl.load(source, mesh=mesh, param_dtype="float32")
    qwen2_5_vl.save(model, tmp_path / "out", source=source)
    assert_same_bits(read_all(source), read_all(tmp_path / "out"))


@pytest.mark.parametrize("config", [random_policy.CONFIG, TIED], ids=["untied", "tied"])
def test_transformers_loads_what_is_written(tmp_path, config):
    from tests.reference import Qwen2_5_VLForConditionalGeneration, torch_model

    model = random_policy.random_model(config, seed=4)
    qwen2_5_vl.save(model, tmp_path / "out", shard_bytes=10**6)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert INDEX in files and "model-00001-of-00004.safetensors" in files
    assert all(p.stat().st_size < 10**6 + 50_000 for p in (tmp_path / "out").glob("*.safetensors"))
    loaded, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="float32"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = torch_model(model).state_dict()
    for name, value in loaded.state_dict().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("config", [random_policy.CONFIG, TIED], ids=["untied", "tied"])
def test_what_transformers_writes_is_read(tmp_path, mesh, config):
    from tests.reference import torch_model

    model = random_policy.random_model(config, seed=4)
    torch_model(model).save_pretrained(tmp_path)
    loaded = qwen2_5_vl.load(tmp_path, mesh=mesh)
    assert loaded.config == model.config
    ours, theirs = (dict(checkpoint.hf_tensors(m)) for m in (model, loaded))
    assert_same_bits(ours, theirs)


def test_cast_on_the_way_out(tmp_path, mesh):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG))
    model = qwen2_5_vl.load(source, mesh=mesh)
    qwen2_5_vl.save(model, tmp_path / "out", source=source, dtype=jnp.bfloat16)
    expected = {k: v.astype(ml_dtypes.bfloat16) for k, v in read_all(source).items()}
    assert_same_bits(expected, read_all(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_writing_replaces_whole_directories(tmp_path, mesh, monkeypatch):
    old = write_hf(tmp_path / "policy", random_tensors(random_policy.CONFIG, seed=1), shards=3)
    before = read_all(old)
    model = qwen2_5_vl.load(old, mesh=mesh)

    def broken(*args, **keywords):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.numpy, "save_file", broken)
        with pytest.raises(OSError, match="disk full"):
            qwen2_5_vl.save(model, old)
    assert_same_bits(before, read_all(old))
    qwen2_5_vl.save(model, old, source=old)
    assert sorted(p.name for p in old.iterdir()) == ["config.json", SINGLE]
    assert_same_bits(before, read_all(old))
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_only_checkpoints_are_replaced(tmp_path):
    model = random_policy.random_model(random_policy.CONFIG, seed=0)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    qwen2_5_vl.save(model, tmp_path / "empty")
    (tmp_path / "empty" / "notes.py").write_text("mine")
    for name, words in (
        ("file", "file: is a file"),
        ("folder", "folder: holds thesis.txt and is not a checkpoint"),
        ("empty", "empty: holds notes.py, which is not of a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=words):
            qwen2_5_vl.save(model, tmp_path / name)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "empty" / SINGLE).exists()


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 2, 2)])
def test_devices_hold_and_read_their_slices(tmp_path, shape, monkeypatch):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG))
    mesh = sharding.make_mesh(*shape)
    read = []

    class Counting:
        """A safetensors slice that counts what is read of it."""

        def __init__(self, tensor):
            self.tensor = tensor

        def __getattr__(self, name):
            return getattr(self.tensor, name)

        def __getitem__(self, index):
            part = self.tensor[index]
            read.append(part.size)
            return part

    original = checkpoint._Files._slice
    monkeypatch.setattr(checkpoint._Files, "_slice", lambda *a: Counting(original(*a)))
    model = qwen2_5_vl.load(source, mesh=mesh)
    whole = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    # Nothing is read twice, but for the tower's fused qkv, whose heads are not its first dimension,
    # and its patches, whose HF tensor has five dimensions.
    tower = model.vision
    qkv = tower.blocks.attention.qkv
    qkv_size = qkv.kernel.get_value().size + qkv.bias.get_value().size
    twice = qkv_size * (shape[2] - 1)
    assert whole <= sum(read) <= whole + twice
    gate = model.text.layers.mlp.gate.kernel.get_value()
    L, F, D = gate.shape
    assert {s.data.shape for s in gate.addressable_shards} == {(L, F // shape[2], D // shape[1])}
    assert_same_bits(dict(checkpoint.hf_tensors(model)), read_all(source))


MEMORY = """
import pathlib, sys, threading
import jax
from flax import nnx
from mmsr1_jax.models import qwen2_5_vl, sharding

def anonymous():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

mesh = sharding.make_mesh()
jax.block_until_ready(jax.device_put(0.0))
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = qwen2_5_vl.load(sys.argv[1], mesh=mesh, param_dtype=sys.argv[2])
jax.block_until_ready(nnx.state(model))
done.set()
thread.join()
leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
print(peak - before, sum(x.nbytes for x in leaves), max(x.nbytes for x in leaves))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_host_memory_stays_within_the_largest_tensor(tmp_path, dtype):
    """On a CPU the parameters themselves lie in host memory too, and are taken off."""
    text = dataclasses.replace(random_policy.CONFIG.text, intermediate_size=65536)
    config = dataclasses.replace(random_policy.CONFIG, text=text)
    source = write_hf(tmp_path, random_tensors(config, dtype=ml_dtypes.bfloat16), config)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), dtype], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    peak, parameters, largest = map(int, run.stdout.split())
    assert largest > 40e6  # large enough that the interpreter's own memory does not count
    assert peak - parameters <= 1.5 * largest


def damaged(kind, directory):
    """Damages a sharded checkpoint; returns what the message has to say."""
    index = json.loads((directory / INDEX).read_text())
    where = index["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    file = directory / where[name]
    tensors = safetensors.numpy.load_file(file)
    if kind == "missing tensor":
        del tensors[name], where[name]
        words = [f"{INDEX}: tensor {name} is missing"]
    elif kind == "missing tensor that the index names":
        del tensors[name]
        words = [where[name], f"tensor {name} is missing", "the index"]
    elif kind == "unexpected tensor":
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros(3, np.float32)
        where["model.layers.9.mlp.up_proj.weight"] = where[name]
        words = [where[name], "tensor model.layers.9.mlp.up_proj.weight is not part of the model"]
    elif kind == "tensor that the index does not name":
        del where[name]
        words = [file.name, f"tensor {name} is not in the index"]
    elif kind == "wrong shape":
        tensors[name] = tensors[name][:-1]
        words = [where[name], f"tensor {name} has shape [255, 128], the model needs [256, 128]"]
    elif kind == "wrong dtype":
        tensors[name] = tensors[name].astype(np.int32)
        words = [where[name], f"tensor {name} has dtype I32"]
    elif kind == "absent shard":
        where[name] = "model-00009-of-00003.safetensors"
        words = [INDEX, "names model-00009-of-00003.safetensors, which is absent", name]
    safetensors.numpy.save_file(tensors, file)
    (directory / INDEX).write_text(json.dumps(index))
    if kind == "truncated file":
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        words = [file.name, "truncated"]
    elif kind == "not safetensors":
        file.write_bytes(b"<html>404</html>")
        words = [file.name, "truncated or not a safetensors file"]
    elif kind == "empty index":
        (directory / INDEX).write_text("[]")
        words = [INDEX, "not a safetensors index"]
    elif kind == "no weights":
        for path in directory.glob("*.safetensors*"):
            path.unlink()
        words = [SINGLE, "no such file"]
    return words


@pytest.mark.parametrize(
    "kind",
    [
        "missing tensor",
        "missing tensor that the index names",
        "unexpected tensor",
        "tensor that the index does not name",
        "wrong shape",
        "wrong dtype",
        "absent shard",
        "truncated file",
        "not safetensors",
        "empty index",
        "no weights",
    ],
)
def test_bad_checkpoints_are_refused(tmp_path, mesh, kind, monkeypatch):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG), shards=3)
    words = damaged(kind, source)

    def read(*args):
        raise AssertionError("a tensor was read before the checks were done")

    monkeypatch.setattr(checkpoint._Files, "read", read)
    with pytest.raises(CheckpointError) as caught:
        qwen2_5_vl.load(source, mesh=mesh)
    message = str(caught.value)
    assert "\n" not in message and str(source) in message
    for word in words:
        assert word in message


def test_a_tied_head_written_out_must_be_the_embedding(tmp_path, mesh):
    tensors = random_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_hf(tmp_path / "same", tensors, TIED)
    model = qwen2_5_vl.load(tmp_path / "same", mesh=mesh)
    assert model.text.head is None
    qwen2_5_vl.save(model, tmp_path / "out", source=tmp_path / "same")
    assert_same_bits(read_all(tmp_path / "out"), tensors)
    tensors["lm_head.weight"][3, 5] += 1
    write_hf(tmp_path / "other", tensors, TIED)
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens"):
        qwen2_5_vl.load(tmp_path / "other", mesh=mesh)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is not supported"),
        ({"hidden_size": None}, "field 'hidden_size' must be a positive int"),
        ({"num_attention_heads": 0}, "field 'num_attention_heads' must be a positive int"),
        ({"rms_norm_eps": float("nan")}, "field 'rms_norm_eps' must be a positive float"),
        ({"rope_theta": float("inf")}, "field 'rope_theta' must be a positive float"),
        ({"image_token_id": "x"}, "field 'image_token_id' must be a token id"),
        ({"text_config": []}, "field 'text_config' must be an object"),
        ({"rope_scaling": "mrope"}, "field 'rope_scaling' must be an object"),
        ({"rope_scaling": {"mrope_section": [-2, 5, 5]}}, "'mrope_section' must be three sizes"),
        ({"num_attention_heads": 7}, "num_attention_heads=7 does not divide hidden_size=128"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "must sum to half"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"vision_config": None}, "field 'vision_config' must be an object"),
    ],
)
def test_bad_configs_are_refused(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps({**random_policy.CONFIG.to_hf(), **change}))
    with pytest.raises(ConfigError, match=words) as caught:
        ModelConfig.from_directory(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_configs_in_every_form(tmp_path):
    """Flat, nested, and with what `transformers` leaves out of a nested section."""
    config = qwen2_5_vl.PRESETS["7b"]
    flat = config.to_hf()
    assert ModelConfig.from_hf(flat) == config
    trimmed = {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl"}
    assert ModelConfig.from_hf({**flat, "vision_config": trimmed}) == config
    pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig(**flat).save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig.from_directory(tmp_path) == config


def test_no_config_and_no_json(tmp_path):
    with pytest.raises(ConfigError, match="config.json: cannot be read"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not JSON"):
        ModelConfig.from_directory(tmp_path)
    shutil.rmtree(tmp_path)


def test_the_single_file_counts_beside_an_older_index(tmp_path, mesh, capsys):
    """As `transformers` reads them; the word says which."""
    from tests.reference import Qwen2_5_VLForConditionalGeneration

    new, old = (random_tensors(random_policy.CONFIG, seed=seed) for seed in (1, 2))
    source = write_hf(tmp_path / "in", old, shards=3)
    safetensors.numpy.save_file(new, source / SINGLE, metadata={"format": "pt"})
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype="float32")
    name = "model.embed_tokens.weight"
    ours = qwen2_5_vl.load(source, mesh=mesh)
    np.testing.assert_array_equal(theirs.get_input_embeddings().weight.detach().numpy(), new[name])
    np.testing.assert_array_equal(ours.text.embedding.get_value(), new[name])
    assert f"{SINGLE} is used and {INDEX} ignored" in capsys.readouterr().err
    del new[name]  # an incomplete single file is not filled up from the index
    safetensors.numpy.save_file(new, source / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{SINGLE}: tensor {name} is missing"):
        qwen2_5_vl.load(source, mesh=mesh)


def test_what_transformers_would_read_besides_is_refused(tmp_path, mesh):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG), shards=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": "x.json"}))
    with pytest.raises(CheckpointError, match=r"config.json: transformers_weights='x.json'"):
        qwen2_5_vl.load(source, mesh=mesh)
    (source / "config.json").write_text(json.dumps(config))
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter_config.json: an adapter beside the policy"):
        qwen2_5_vl.load(source, mesh=mesh)


@pytest.mark.parametrize(
    "index",
    [b"{", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 5}}', b"\xff", b"[" * 5000,
     b'{"weight_map": {"a": "../in/model-00001-of-00003.safetensors"}}'],
)  # fmt: skip
def test_indexes_of_another_shape_are_refused_in_one_line(tmp_path, mesh, index):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG), shards=3)
    (source / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError) as caught:
        qwen2_5_vl.load(source, mesh=mesh)
    assert f"{source / INDEX}: not a safetensors index" in str(caught.value)
    assert "\n" not in str(caught.value)
