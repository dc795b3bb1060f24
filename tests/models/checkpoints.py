"""Helpers: random checkpoints, written without the package's own writer."""

import dataclasses
import json

import numpy as np
import safetensors.numpy

from mmsr1_jax.models.families import FAMILIES, tensor_table
from mmsr1_jax.models.tensors import LAYOUTS
from mmsr1_jax.models.weight_files import INDEX, SINGLE
from mmsr1_jax.scripts import random_policy

TIED = dataclasses.replace(
    random_policy.CONFIG,
    text=dataclasses.replace(random_policy.CONFIG.text, tie_embeddings=True, num_kv_heads=1),
)
QWEN3 = FAMILIES["qwen3_vl"].small["random"]
QWEN3_TIED = dataclasses.replace(
    QWEN3, text=dataclasses.replace(QWEN3.text, tie_embeddings=True, num_kv_heads=1)
)
CONFIGS = {
    "untied": random_policy.CONFIG, "tied": TIED, "qwen3 untied": QWEN3, "qwen3 tied": QWEN3_TIED,
}  # fmt: skip


def random_tensors(config, layout=LAYOUTS[0], dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        tensor.hf_name(layout, layer): rng.normal(size=tensor.shape).astype(dtype)
        for tensor in tensor_table(config).values()
        for layer in tensor.layer_indices()
    }


def write_hf(directory, tensors, config=random_policy.CONFIG, shards=1):
    """Write a checkpoint in the form of other programs, without the package's writer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = SINGLE if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def read_tensors(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def assert_bit_identical(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name
