"""Loading and saving of HF checkpoints: safetensors directly onto the mesh and back, bit for bit.

`tensors.tensor_table` maps the parameters of the model to the tensors of a checkpoint.
"""

import collections
import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.experimental import multihost_utils

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig
from mmsr1_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from mmsr1_jax.models.qwen2_5_vl.tensors import LAYOUTS, Tensor, tensor_table
from mmsr1_jax.models.qwen2_5_vl.vision import VisionTower
from mmsr1_jax.models.sharding import param_shardings
from mmsr1_jax.utils import outputs
from mmsr1_jax.utils.checked_json import FormatError
from mmsr1_jax.utils.checked_json import load as load_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class CheckpointError(UserError):
    """Error for an unusable checkpoint. The message names the file and the tensor."""


def abstract_model(config: ModelConfig, **keywords) -> Qwen2_5_VL:
    """Return a model with abstract parameters (shapes and dtypes); keywords as for `Qwen2_5_VL`."""
    return nnx.eval_shape(lambda: Qwen2_5_VL(config, rngs=nnx.Rngs(0), **keywords))


def load(directory, *, mesh, param_dtype=None, **keywords) -> Qwen2_5_VL:
    """Load an HF directory onto a mesh. Each device receives its slice, read from the file.

    The host holds one stacked tensor (or this host's part of it) at a time.

    Args:
      directory: Directory with `config.json` and safetensors, single or sharded, in either layout
        of names.
      mesh: Mesh for the parameters (`sharding.make_mesh`).
      param_dtype: Dtype of the parameters. None selects the most common dtype of the checkpoint.
      **keywords: Keywords of `Qwen2_5_VL` (dtype, attention, remat ...).

    Raises:
      ConfigError: If `config.json` cannot be used.
      CheckpointError: If a tensor is missing, unexpected or has the wrong shape, or a file is
        damaged or missing. Names and shapes are all checked before the first tensor is loaded.
    """
    config = ModelConfig.from_directory(directory)
    files = _Files(pathlib.Path(directory), config)
    dtype = files.common_dtype() if param_dtype is None else np.dtype(param_dtype)
    return _read(files, config, abstract_model(config, param_dtype=dtype, **keywords), (), mesh)


def load_vision(directory, *, mesh, param_dtype) -> VisionTower:
    """Load only the vision tower, see `load`.

    Names and shapes of the other tensors are checked too, but the tensors are not loaded.
    """
    config = ModelConfig.from_directory(directory)
    files = _Files(pathlib.Path(directory), config)
    tower = nnx.eval_shape(
        lambda: VisionTower(config.vision, rngs=nnx.Rngs(0), dtype=np.dtype(param_dtype))
    )
    return _read(files, config, tower, ("vision",), mesh)


def _read(files: "_Files", config: ModelConfig, abstract, within: tuple[str, ...], mesh):
    """Return `abstract`, the submodule at path `within` of the model, with its arrays loaded."""
    graph, abstract = nnx.split(abstract)
    shardings = nnx.to_flat_state(param_shardings(abstract, mesh))
    table = tensor_table(config)
    arrays = []
    for (path, variable), (_, sharding) in zip(nnx.to_flat_state(abstract), shardings, strict=True):
        value = files.read(table[(*within, *path)], variable, sharding.get_value())
        # Wait for the transfer, so that the host never holds two tensors in flight.
        arrays.append((path, variable.replace(jax.block_until_ready(value))))
    return nnx.merge(graph, nnx.from_flat_state(arrays))


class _Index(TypedDict):
    weight_map: dict[str, str]


class _Files:
    """Safetensors files of a directory, checked against the parameters of the model."""

    def __init__(self, directory: pathlib.Path, config: ModelConfig):
        self.directory = directory
        self.handles: dict[str, safetensors.safe_open] = {}
        self.where = self._tensor_files()
        self.layout = _find_layout(self.where)
        self._check(config)

    def _tensor_files(self) -> dict[str, str]:
        """Return the file name of each tensor, by HF name."""
        self._refuse_other_weights()
        index, single = self.directory / INDEX, self.directory / SINGLE
        if single.is_file() and index.is_file():
            print(f"{single} is used and {INDEX} ignored, as in transformers", file=sys.stderr)
        if single.is_file() or not index.is_file():
            return dict.fromkeys(self._names(SINGLE), SINGLE)
        try:
            where = load_json(index, _Index)["weight_map"]
            files = sorted(set(where.values()))
            if any(os.path.basename(file) != file for file in files):
                raise FormatError(f"{index}: files must be in this directory: {files}")
        except FormatError as error:
            reason = str(error).removeprefix(f"{index}: ")
            raise CheckpointError(f"{index}: not a safetensors index ({reason})") from None
        for file in files:
            if not (self.directory / file).is_file():
                names = sorted(n for n, f in where.items() if f == file)
                raise CheckpointError(
                    f"{index}: names {file}, which is absent ({len(names)} tensors, "
                    f"first {names[0]})"
                )
        held = {name: file for file in files for name in self._names(file)}
        for name in sorted(where.keys() ^ held.keys()):
            if name in where:
                raise CheckpointError(
                    f"{self.directory / where[name]}: tensor {name} is missing; the index says it "
                    "is here"
                )
            raise CheckpointError(
                f"{self.directory / held[name]}: tensor {name} is not in the index"
            )
        return held

    def _refuse_other_weights(self) -> None:
        """Raise CheckpointError if `transformers` would read other files than the usual ones."""
        adapter = self.directory / "adapter_config.json"
        if adapter.is_file():
            raise CheckpointError(
                f"{adapter}: an adapter beside the policy, which transformers would add; merge it "
                "(python -m mmsr1_jax.scripts.merge) or move it to another directory"
            )
        config = self.directory / "config.json"
        named = load_json(config, dict[str, Any], large=True).get("transformers_weights")
        if named is not None:
            raise CheckpointError(
                f"{config}: transformers_weights={named!r} is not supported; remove the field and "
                f"name the file {SINGLE}"
            )

    def _open(self, file: str):
        if file not in self.handles:
            path = self.directory / file
            try:
                self.handles[file] = safetensors.safe_open(path, framework="numpy")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file (nor {INDEX})") from None
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(
                    f"{path}: truncated or not a safetensors file ({error})"
                ) from None
        return self.handles[file]

    def _names(self, file: str) -> list[str]:
        return list(self._open(file).keys())

    def _slice(self, name: str):
        return self._open(self.where[name]).get_slice(name)

    def _check(self, config: ModelConfig) -> None:
        needed: dict[str, tuple[int, ...]] = {}
        for tensor in tensor_table(config).values():
            for layer in _layers(tensor):
                needed[tensor.hf_name(self.layout, layer)] = tensor.shape
        known = dict(needed)
        if config.text.tie_embeddings and "lm_head.weight" in self.where:
            known["lm_head.weight"] = self._check_tied()
        listing = SINGLE if (self.directory / SINGLE).is_file() else INDEX
        for name in sorted(needed.keys() - self.where.keys()):
            raise CheckpointError(f"{self.directory / listing}: tensor {name} is missing")
        for name in sorted(self.where):
            path = self.directory / self.where[name]
            if name not in known:
                raise CheckpointError(f"{path}: tensor {name} is not part of the model")
            found = self._slice(name)
            if tuple(found.get_shape()) != known[name]:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(found.get_shape())}, "
                    f"the model needs {list(known[name])}"
                )
            if found.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} has dtype {found.get_dtype()}, "
                    f"not one of {sorted(DTYPES)}"
                )

    def _check_tied(self) -> tuple[int, ...]:
        """Check that the stored head of a tied model equals the embedding. Return its shape."""
        embedding = self.layout[0] + "embed_tokens.weight"
        path = self.directory / self.where["lm_head.weight"]
        if embedding not in self.where:
            raise CheckpointError(f"{self.directory}: tensor {embedding} is missing")
        head, table = self._slice("lm_head.weight"), self._slice(embedding)
        size, step = head.get_shape()[0], 4096  # rows per step: the whole table takes a gigabyte
        same = head.get_shape() == table.get_shape() and all(
            np.array_equal(head[i : min(i + step, size)], table[i : min(i + step, size)])
            for i in range(0, size, step)
        )
        if not same:
            raise CheckpointError(
                f"{path}: tensor lm_head.weight differs from {embedding}, though config.json says "
                "that they are tied"
            )
        return tuple(head.get_shape())

    def common_dtype(self) -> np.dtype:
        """Return the most common dtype of the tensors."""
        counts = collections.Counter(self._slice(name).get_dtype() for name in self.where)
        return DTYPES[counts.most_common(1)[0][0]]

    def read(self, tensor: Tensor, abstract: nnx.Variable, sharding) -> jax.Array:
        shape, dtype = abstract.get_value().shape, abstract.get_value().dtype
        parts: dict[tuple, np.ndarray] = {}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            """Return one device's part. Devices with the same part share the array."""
            key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
            if key not in parts:
                parts[key] = self._read_part(tensor, shape, index, key, dtype)
            return parts[key]

        return jax.make_array_from_callback(shape, sharding, part)

    def _read_part(self, tensor, shape, index, bounds, dtype) -> np.ndarray:
        out = np.empty([stop - start for start, stop in bounds], dtype)
        if tensor.layers is None:
            name = tensor.hf_name(self.layout, None)
            out[...] = tensor.read(self._slice(name), shape, index)
            return out
        for row, layer in enumerate(range(*bounds[0])):
            name = tensor.hf_name(self.layout, layer)
            out[row] = tensor.read(self._slice(name), shape[1:], index[1:])
        return out


def _layers(tensor: Tensor):
    return (None,) if tensor.layers is None else range(tensor.layers)


def _find_layout(names) -> tuple[str, str]:
    nested = any(name.startswith(LAYOUTS[1]) for name in names)
    return LAYOUTS[1] if nested else LAYOUTS[0]


def hf_tensors(
    model: Qwen2_5_VL, layout: tuple[str, str] = LAYOUTS[0]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the HF name and host array of each tensor of the model, one at a time.

    With several hosts, all must iterate together: a tensor sharded across hosts is gathered.
    """
    table = tensor_table(model.config)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable.get_value()
        for layer in _layers(table[path]):
            array = value if layer is None else value[layer]
            if not array.is_fully_addressable:
                array = multihost_utils.process_allgather(array, tiled=True)
            yield table[path].hf_name(layout, layer), np.asarray(array).reshape(table[path].shape)


def save(
    model: Qwen2_5_VL,
    directory,
    *,
    source=None,
    dtype=None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Save a model as an HF directory that `transformers` can load.

    The files are written to a temporary directory beside `directory`, which then replaces it
    atomically (`outputs.new_directory`).

    Args:
      model: Policy model.
      directory: Output directory: a new or empty one, or a checkpoint to replace.
      source: HF directory from which the model was loaded. Names, dtypes, `config.json`, tokenizer
        and processor files are taken from it. None writes flat names and a new config.
      dtype: Dtype of the tensors. None keeps the dtype of each tensor in `source`, or of each
        parameter without a source.
      shard_bytes: Maximum size of a file in bytes, exceeded only by a single larger tensor.

    Raises:
      CheckpointError: If `directory` exists and is not a checkpoint, or contains other files.
      LockedError: If another process is writing `directory`.
    """
    target = pathlib.Path(os.path.abspath(directory))
    check_replaceable(target)
    files = None if source is None else _Files(pathlib.Path(source), model.config)
    layout = LAYOUTS[0] if files is None else files.layout
    tied_copy = bool(files and model.text.head is None and "lm_head.weight" in files.where)
    writing = jax.process_index() == 0
    with outputs.new_directory(target) if writing else contextlib.nullcontext() as temporary:
        shards = _Shards(temporary, shard_bytes)
        for name, array in hf_tensors(model, layout):
            if dtype is not None:
                array = array.astype(dtype)
            elif files is not None:
                array = array.astype(DTYPES[files._slice(name).get_dtype()], copy=False)
            shards.add(name, array)
            if name == layout[0] + "embed_tokens.weight" and tied_copy:
                shards.add("lm_head.weight", array)
        shards.finish()
        if writing:
            _write_side_files(model, temporary, source, dtype)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {target.name}")


class _Shards:
    """Writer of tensors into files of bounded size. With a directory of None, it does nothing."""

    def __init__(self, directory: pathlib.Path | None, limit: int):
        self.directory, self.limit = directory, limit
        self.pending: dict[str, np.ndarray] = {}
        self.files: list[list[str]] = []
        self.pending_bytes = self.total_bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        if self.directory is None:
            return
        if self.pending and self.pending_bytes + array.nbytes > self.limit:
            self._flush()
        self.pending[name] = array
        self.pending_bytes += array.nbytes
        self.total_bytes += array.nbytes

    def _flush(self) -> None:
        path = self.directory / f"part-{len(self.files)}"
        safetensors.numpy.save_file(self.pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library creates files that only the owner can read
        self.files.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Write the remaining tensors, give the files their final names and write the index."""
        if self.directory is None:
            return
        self._flush()
        count, weight_map = len(self.files), {}
        for i, names in enumerate(self.files):
            final = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.directory / f"part-{i}").rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _write_side_files(model: Qwen2_5_VL, directory: pathlib.Path, source, dtype) -> None:
    config = directory / "config.json"
    if source is None:
        name = jnp.dtype(dtype or model.text.embedding.get_value().dtype).name
        config.write_text(json.dumps(model.config.to_hf(name), indent=2))
        return
    for path in pathlib.Path(source).iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt") or path.name == INDEX
        if path.is_file() and not weights:
            shutil.copy(path, directory / path.name)
    if dtype is not None:
        raw = load_json(config, dict[str, Any], large=True)
        fields = [raw, *(raw[k] for k in ("text_config", "vision_config") if k in raw)]
        for part in fields:
            for key in ("torch_dtype", "dtype"):
                if key in part:
                    part[key] = jnp.dtype(dtype).name
        config.write_text(json.dumps(raw, indent=2))


# Suffixes of the files of a checkpoint. Other files may be the user's, so a directory that contains
# any is not replaced.
_OURS = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".gitattributes")


def check_replaceable(directory) -> None:
    """Raise CheckpointError if `save` would refuse to replace a directory."""
    target = pathlib.Path(os.path.abspath(directory))
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file, not a directory to write a checkpoint to")
    entries = sorted(target.iterdir())
    other = [e.name for e in entries if e.is_dir() or not e.name.endswith(_OURS)]
    if entries and not (target / "config.json").exists():
        raise CheckpointError(f"{target}: holds {entries[0].name} and is not a checkpoint")
    if other:
        raise CheckpointError(f"{target}: holds {other[0]}, which is not of a checkpoint")
