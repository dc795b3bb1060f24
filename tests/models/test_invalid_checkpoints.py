"""Invalid checkpoints are rejected with a one-line message before any tensor is loaded."""

import json

import numpy as np
import pytest
import safetensors.numpy

from mmsr1_jax.models import checkpoint
from mmsr1_jax.models.weight_files import INDEX, SINGLE, CheckpointError, WeightFiles
from mmsr1_jax.scripts import random_policy
from tests.models.checkpoints import (
    TIED,
    assert_bit_identical,
    random_tensors,
    read_tensors,
    write_hf,
)


def damage(kind, directory):
    """Damage a sharded checkpoint. Return the required parts of the error message."""
    index = json.loads((directory / INDEX).read_text())
    weight_map = index["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    file = directory / weight_map[name]
    tensors = safetensors.numpy.load_file(file)
    if kind == "missing tensor":
        del tensors[name], weight_map[name]
        parts = [f"{INDEX}: tensor {name} is missing"]
    elif kind == "missing tensor that the index names":
        del tensors[name]
        parts = [
            file.name,
            f"tensor {name} is missing",
            f"although {INDEX} lists it",
        ]
    elif kind == "unexpected tensor":
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros(3, np.float32)
        weight_map["model.layers.9.mlp.up_proj.weight"] = weight_map[name]
        parts = [
            file.name,
            "tensor model.layers.9.mlp.up_proj.weight is not part of the model",
        ]
    elif kind == "tensor that the index does not name":
        del weight_map[name]
        parts = [file.name, f"tensor {name} is not in the index"]
    elif kind == "wrong shape":
        tensors[name] = tensors[name][:-1]
        parts = [
            file.name,
            f"tensor {name} has shape [255, 128], the model needs [256, 128]",
        ]
    elif kind == "wrong dtype":
        tensors[name] = tensors[name].astype(np.int32)
        parts = [file.name, f"tensor {name} has dtype I32"]
    elif kind == "missing shard":
        weight_map[name] = "model-00009-of-00003.safetensors"
        parts = [INDEX, "names model-00009-of-00003.safetensors, which does not exist", name]
    safetensors.numpy.save_file(tensors, file)
    (directory / INDEX).write_text(json.dumps(index))
    if kind == "truncated file":
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        parts = [file.name, "truncated"]
    elif kind == "not safetensors":
        file.write_bytes(b"<html>404</html>")
        parts = [file.name, "truncated or not a safetensors file"]
    elif kind == "empty index":
        (directory / INDEX).write_text("[]")
        parts = [INDEX, "not a safetensors index"]
    elif kind == "no weights":
        for path in directory.glob("*.safetensors*"):
            path.unlink()
        parts = [SINGLE, "no such file"]
    return parts


@pytest.mark.parametrize(
    "kind",
    [
        "missing tensor",
        "missing tensor that the index names",
        "unexpected tensor",
        "tensor that the index does not name",
        "wrong shape",
        "wrong dtype",
        "missing shard",
        "truncated file",
        "not safetensors",
        "empty index",
        "no weights",
    ],
)
def test_damaged_checkpoints_are_rejected_before_loading(tmp_path, mesh, kind, monkeypatch):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG), shards=3)
    parts = damage(kind, source)

    def load(*args):
        raise AssertionError("a tensor was loaded before all checks")

    monkeypatch.setattr(WeightFiles, "load", load)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(source, mesh=mesh)
    message = str(caught.value)
    assert "\n" not in message and str(source) in message
    for part in parts:
        assert part in message


def test_a_stored_tied_head_must_equal_the_embedding(tmp_path, mesh):
    tensors = random_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_hf(tmp_path / "same", tensors, TIED)
    model = checkpoint.load(tmp_path / "same", mesh=mesh)
    assert model.text.head is None
    checkpoint.save(model, tmp_path / "out", source=tmp_path / "same")
    assert_bit_identical(read_tensors(tmp_path / "out"), tensors)
    tensors["lm_head.weight"][3, 5] += 1
    write_hf(tmp_path / "other", tensors, TIED)
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens"):
        checkpoint.load(tmp_path / "other", mesh=mesh)


def test_a_single_file_takes_precedence_over_an_index(tmp_path, mesh, capsys):
    """As in `transformers`; a warning names the file."""
    from tests.reference import AutoModelForImageTextToText

    new, old = (random_tensors(random_policy.CONFIG, seed=seed) for seed in (1, 2))
    source = write_hf(tmp_path / "in", old, shards=3)
    safetensors.numpy.save_file(new, source / SINGLE, metadata={"format": "pt"})
    theirs = AutoModelForImageTextToText.from_pretrained(source, dtype="float32")
    name = "model.embed_tokens.weight"
    ours = checkpoint.load(source, mesh=mesh)
    np.testing.assert_array_equal(theirs.get_input_embeddings().weight.detach().numpy(), new[name])
    np.testing.assert_array_equal(ours.text.embedding.get_value(), new[name])
    assert f"{SINGLE} is used and {INDEX} ignored" in capsys.readouterr().err
    del new[name]  # missing tensors are not taken from the index
    safetensors.numpy.save_file(new, source / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{SINGLE}: tensor {name} is missing"):
        checkpoint.load(source, mesh=mesh)


def test_other_weights_that_transformers_would_read_are_rejected(tmp_path, mesh):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG), shards=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": "x.json"}))
    with pytest.raises(CheckpointError, match=r"config.json: transformers_weights='x.json'"):
        checkpoint.load(source, mesh=mesh)
    (source / "config.json").write_text(json.dumps(config))
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter_config.json: .* contains an adapter"):
        checkpoint.load(source, mesh=mesh)


@pytest.mark.parametrize(
    "index",
    [b"{", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 5}}', b"\xff", b"[" * 5000,
     b'{"weight_map": {"a": "../in/model-00001-of-00003.safetensors"}}'],
)  # fmt: skip
def test_invalid_indexes_are_rejected_in_one_line(tmp_path, mesh, index):
    source = write_hf(tmp_path / "in", random_tensors(random_policy.CONFIG), shards=3)
    (source / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(source, mesh=mesh)
    assert f"{source / INDEX}: not a safetensors index" in str(caught.value)
    assert "\n" not in str(caught.value)
