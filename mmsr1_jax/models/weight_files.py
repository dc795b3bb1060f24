"""Safetensors files of a checkpoint: checked before they are read, and written in shards."""

import collections
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, TypedDict

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Sharding

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import tensor_table
from mmsr1_jax.models.tensors import LAYOUTS, Layout, Tensor, TensorSlice
from mmsr1_jax.utils.checked_json import FormatError, load
from mmsr1_jax.utils.logs import log

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class CheckpointError(UserError):
    """Error for an unusable checkpoint. The message names the file and the tensor."""


class _Index(TypedDict):
    weight_map: dict[str, str]


class WeightFiles:
    """Safetensors files of a directory, checked against the parameters of the model.

    Attributes:
      file_of: File name of each tensor, by HF name.
      layout: Prefixes of the HF names, one of `LAYOUTS`.

    Raises:
      CheckpointError: If a tensor is missing, unexpected or has the wrong shape or dtype, or a file
        is damaged or missing.
    """

    def __init__(self, directory: pathlib.Path, config: ModelConfig):
        self.directory = directory
        self._handles: dict[str, safetensors.safe_open] = {}
        self.file_of = self._find_files()
        self.layout = _find_layout(self.file_of)
        self._check(config)

    def _find_files(self) -> dict[str, str]:
        """Return the file name of each tensor, by HF name."""
        self._check_no_other_weights()
        index, single = self.directory / INDEX, self.directory / SINGLE
        if single.is_file() and index.is_file():
            log.warning("%s is used and %s ignored, as in transformers", single, INDEX)
        if single.is_file() or not index.is_file():
            return dict.fromkeys(self._names(SINGLE), SINGLE)
        return self._read_index(index)

    def _read_index(self, index: pathlib.Path) -> dict[str, str]:
        """Return the file name of each tensor according to the index, checked against the files."""
        try:
            weight_map = load(index, _Index)["weight_map"]
            files = sorted(set(weight_map.values()))
            if any(os.path.basename(file) != file for file in files):
                raise FormatError(f"{index}: files must be in this directory: {files}")
        except FormatError as error:
            reason = str(error).removeprefix(f"{index}: ")
            raise CheckpointError(f"{index}: not a safetensors index ({reason})") from None
        for file in files:
            if not (self.directory / file).is_file():
                names = sorted(n for n, f in weight_map.items() if f == file)
                raise CheckpointError(
                    f"{index}: names {file}, which does not exist ({len(names)} tensors, "
                    f"first {names[0]})"
                )
        file_of = {name: file for file in files for name in self._names(file)}
        for name in sorted(weight_map.keys() ^ file_of.keys()):
            if name in weight_map:
                raise CheckpointError(
                    f"{self.directory / weight_map[name]}: tensor {name} is missing, although "
                    f"{INDEX} lists it for this file"
                )
            raise CheckpointError(
                f"{self.directory / file_of[name]}: tensor {name} is not in the index {INDEX}"
            )
        return file_of

    def _check_no_other_weights(self) -> None:
        """Raise CheckpointError if `transformers` would read other files than the usual ones."""
        adapter = self.directory / "adapter_config.json"
        if adapter.is_file():
            raise CheckpointError(
                f"{adapter}: the directory also contains an adapter, which transformers would add; "
                "merge it (python -m mmsr1_jax.scripts.merge) or move it to another directory"
            )
        config = self.directory / "config.json"
        file = load(config, dict[str, Any], large=True).get("transformers_weights")
        if file is not None:
            raise CheckpointError(
                f"{config}: transformers_weights={file!r} is not supported; remove the field and "
                f"rename the file to {SINGLE}"
            )

    def _open(self, file: str) -> safetensors.safe_open:
        if file not in self._handles:
            path = self.directory / file
            try:
                self._handles[file] = safetensors.safe_open(path, framework="numpy")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file (nor {INDEX})") from None
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(
                    f"{path}: truncated or not a safetensors file ({error})"
                ) from None
        return self._handles[file]

    def _names(self, file: str) -> list[str]:
        return list(self._open(file).keys())

    def open_tensor(self, name: str) -> TensorSlice:
        """Return a tensor of which parts can be read."""
        return self._open(self.file_of[name]).get_slice(name)

    def _check(self, config: ModelConfig) -> None:
        """Raise CheckpointError unless names, shapes and dtypes of all tensors fit the model."""
        required = {
            tensor.hf_name(self.layout, layer): tensor.shape
            for tensor in tensor_table(config).values()
            for layer in tensor.layer_indices()
        }
        allowed = dict(required)
        if config.text.tie_embeddings and "lm_head.weight" in self.file_of:
            allowed["lm_head.weight"] = self._check_tied()
        listing = SINGLE if (self.directory / SINGLE).is_file() else INDEX
        for name in sorted(required.keys() - self.file_of.keys()):
            raise CheckpointError(f"{self.directory / listing}: tensor {name} is missing")
        for name in sorted(self.file_of):
            path = self.directory / self.file_of[name]
            if name not in allowed:
                raise CheckpointError(f"{path}: tensor {name} is not part of the model")
            tensor = self.open_tensor(name)
            if tuple(tensor.get_shape()) != allowed[name]:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(tensor.get_shape())}, "
                    f"the model needs {list(allowed[name])}"
                )
            if tensor.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} has dtype {tensor.get_dtype()}, "
                    f"not one of {sorted(DTYPES)}"
                )

    def _check_tied(self) -> tuple[int, ...]:
        """Check that the stored head of a tied model equals the embedding. Return its shape."""
        embedding = self.layout[0] + "embed_tokens.weight"
        path = self.directory / self.file_of["lm_head.weight"]
        if embedding not in self.file_of:
            raise CheckpointError(f"{self.directory}: tensor {embedding} is missing")
        head, table = self.open_tensor("lm_head.weight"), self.open_tensor(embedding)
        size, step = head.get_shape()[0], 4096  # rows per step: the whole table takes a gigabyte
        equal = head.get_shape() == table.get_shape() and all(
            np.array_equal(head[i : min(i + step, size)], table[i : min(i + step, size)])
            for i in range(0, size, step)
        )
        if not equal:
            raise CheckpointError(
                f"{path}: tensor lm_head.weight differs from {embedding}, although config.json "
                "sets tie_word_embeddings"
            )
        return tuple(head.get_shape())

    def common_dtype(self) -> np.dtype:
        """Return the most common dtype of the tensors."""
        counts = collections.Counter(self.open_tensor(name).get_dtype() for name in self.file_of)
        return DTYPES[counts.most_common(1)[0][0]]

    def load(self, tensor: Tensor, abstract: nnx.Variable, sharding: Sharding) -> jax.Array:
        """Return a parameter with the shape and dtype of `abstract`, each device's part read."""
        shape, dtype = abstract.get_value().shape, abstract.get_value().dtype
        parts: dict[tuple, np.ndarray] = {}

        def read_part(index: tuple[slice, ...] | None) -> np.ndarray:
            """Return one device's part. Devices with the same part share the array."""
            assert index is not None
            key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
            if key not in parts:
                parts[key] = self._read_part(tensor, shape, index, key, dtype)
            return parts[key]

        return jax.make_array_from_callback(shape, sharding, read_part)

    def _read_part(
        self,
        tensor: Tensor,
        shape: tuple[int, ...],
        index: tuple[slice, ...],
        bounds: tuple[tuple[int, int], ...],
        dtype: np.dtype,
    ) -> np.ndarray:
        out = np.empty([stop - start for start, stop in bounds], dtype)
        if tensor.layers is None:
            name = tensor.hf_name(self.layout, None)
            out[...] = tensor.read(self.open_tensor(name), shape, index)
            return out
        for row, layer in enumerate(range(*bounds[0])):
            name = tensor.hf_name(self.layout, layer)
            out[row] = tensor.read(self.open_tensor(name), shape[1:], index[1:])
        return out


def _find_layout(names: Iterable[str]) -> Layout:
    nested = any(name.startswith(LAYOUTS[1]) for name in names)
    return LAYOUTS[1] if nested else LAYOUTS[0]


class ShardWriter:
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
            self._flush(self.directory)
        self.pending[name] = array
        self.pending_bytes += array.nbytes
        self.total_bytes += array.nbytes

    def _flush(self, directory: pathlib.Path) -> None:
        path = directory / f"part-{len(self.files)}"
        safetensors.numpy.save_file(self.pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library creates files that only the owner can read
        self.files.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Write the remaining tensors, give the files their final names and write the index."""
        if self.directory is None:
            return
        self._flush(self.directory)
        count, weight_map = len(self.files), {}
        for i, names in enumerate(self.files):
            final = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.directory / f"part-{i}").rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
