"""Loading and saving of HF checkpoints: safetensors directly onto the mesh and back, bit for bit.

`families.tensor_table` maps the parameters of the model to the tensors of a checkpoint, and
`weight_files` reads and writes the safetensors files.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import family_of, read_config, tensor_table
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.models.sharding import param_shardings, to_host
from mmsr1_jax.models.tensors import Layout
from mmsr1_jax.models.weight_files import (
    DTYPES,
    INDEX,
    CheckpointError,
    ShardWriter,
    WeightFiles,
)
from mmsr1_jax.utils import outputs
from mmsr1_jax.utils.checked_json import load as load_json

Module = TypeVar("Module", bound=nnx.Module)


def abstract_model(config: ModelConfig, **keywords: Any) -> Policy:
    """Return a model with abstract parameters (shapes and dtypes); keywords as for `Policy`."""
    return nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0), **keywords))


def load(
    directory: str | pathlib.Path,
    *,
    mesh: Mesh,
    param_dtype: DTypeLike | None = None,
    **keywords: Any,
) -> Policy:
    """Load an HF directory onto a mesh. Each device receives its slice, read from the file.

    The host holds one stacked tensor (or this host's part of it) at a time.

    Args:
      directory: Directory with `config.json` and safetensors, single or sharded, in either layout
        of names.
      mesh: Mesh for the parameters (`sharding.make_mesh`).
      param_dtype: Dtype of the parameters. None selects the most common dtype of the checkpoint.
      **keywords: Keywords of `Policy` (dtype, attention, remat ...).

    Raises:
      ConfigError: If `config.json` cannot be used.
      CheckpointError: If a tensor is missing, unexpected or has the wrong shape, or a file is
        damaged or missing. Names and shapes are all checked before the first tensor is loaded.
    """
    config = read_config(directory)
    files = WeightFiles(pathlib.Path(directory), config)
    dtype = files.common_dtype() if param_dtype is None else np.dtype(param_dtype)
    return _read(files, config, abstract_model(config, param_dtype=dtype, **keywords), (), mesh)


def load_vision(directory: str | pathlib.Path, *, mesh: Mesh, param_dtype: DTypeLike) -> nnx.Module:
    """Load only the vision tower, see `load`.

    Names and shapes of the other tensors are checked too, but the tensors are not loaded.
    """
    config = read_config(directory)
    files = WeightFiles(pathlib.Path(directory), config)
    tower = nnx.eval_shape(
        lambda: family_of(config).tower(
            config.vision, rngs=nnx.Rngs(0), dtype=np.dtype(param_dtype)
        )
    )
    return _read(files, config, tower, ("vision",), mesh)


def _read(
    files: WeightFiles, config: ModelConfig, module: Module, prefix: tuple[str, ...], mesh: Mesh
) -> Module:
    """Return `module`, the abstract submodule at path `prefix` of the model, with its arrays."""
    graph, abstract = nnx.split(module)
    shardings = nnx.to_flat_state(param_shardings(abstract, mesh))
    table = tensor_table(config)
    arrays = []
    for (path, variable), (_, sharding) in zip(nnx.to_flat_state(abstract), shardings, strict=True):
        value = files.load(table[_path(*prefix, *path)], variable, sharding.get_value())
        # Wait for the transfer, so that the host never holds two tensors in flight.
        arrays.append((path, variable.replace(jax.block_until_ready(value))))
    return nnx.merge(graph, nnx.from_flat_state(arrays))


def _path(*keys: object) -> tuple[str, ...]:
    """Return a path in the module tree as a key of `tensor_table`."""
    return tuple(map(str, keys))


def hf_tensors(model: Policy, layout: Layout | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the HF name and host array of each tensor of the model, one at a time.

    Names have the prefixes of the released checkpoints, or those of `layout`.

    With several hosts, all must iterate together: a tensor sharded across hosts is gathered.
    """
    table, layout = tensor_table(model.config), layout or family_of(model.config).layout
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value, tensor = variable.get_value(), table[_path(*path)]
        for layer in tensor.layer_indices():
            array = value if layer is None else value[layer]
            yield tensor.hf_name(layout, layer), to_host(array).reshape(tensor.shape)


def save(
    model: Policy,
    directory: str | pathlib.Path,
    *,
    source: str | pathlib.Path | None = None,
    dtype: DTypeLike | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Save a model as an HF directory that `transformers` can load.

    The files are written to a temporary directory beside `directory`, which then replaces it
    atomically (`outputs.new_directory`).

    Args:
      model: Policy model.
      directory: Output directory: a new or empty one, or a checkpoint to replace.
      source: HF directory from which the model was loaded. Names, dtypes, `config.json`, tokenizer
        and processor files are taken from it. None writes the names of the released
        checkpoints and a new config.
      dtype: Dtype of the tensors. None keeps the dtype of each tensor in `source`, or of each
        parameter without a source.
      shard_bytes: Maximum size of a file in bytes, exceeded only by a single larger tensor.

    Raises:
      CheckpointError: If `directory` exists and is not a checkpoint, or contains other files.
      LockedError: If another process is writing `directory`.
    """
    target = pathlib.Path(os.path.abspath(directory))
    check_replaceable(target)
    files = None if source is None else WeightFiles(pathlib.Path(source), model.config)
    layout = family_of(model.config).layout if files is None else files.layout
    tied_copy = bool(files and model.text.head is None and "lm_head.weight" in files.file_of)
    is_writer = jax.process_index() == 0
    with outputs.new_directory(target) if is_writer else contextlib.nullcontext() as temporary:
        shards = ShardWriter(temporary, shard_bytes)
        for name, array in hf_tensors(model, layout):
            if dtype is not None:
                array = array.astype(dtype)
            elif files is not None:
                array = array.astype(DTYPES[files.open_tensor(name).get_dtype()], copy=False)
            shards.add(name, array)
            if name == layout[0] + "embed_tokens.weight" and tied_copy:
                shards.add("lm_head.weight", array)
        shards.finish()
        if temporary is not None:
            _write_other_files(model, temporary, source, dtype)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {target.name}")


def _write_other_files(
    model: Policy,
    directory: pathlib.Path,
    source: str | pathlib.Path | None,
    dtype: DTypeLike | None,
) -> None:
    """Write `config.json`, and copy tokenizer and processor files from `source`."""
    config = directory / "config.json"
    if source is None:
        name = jnp.dtype(dtype or model.text.embedding.get_value().dtype).name
        config.write_text(json.dumps(model.config.to_hf(name), indent=2))
        return
    for path in pathlib.Path(source).iterdir():
        has_weights = path.suffix in (".safetensors", ".bin", ".pt") or path.name == INDEX
        if path.is_file() and not has_weights:
            shutil.copy(path, directory / path.name)
    if dtype is not None:
        raw = load_json(config, dict[str, Any], large=True)
        sections = [raw, *(raw[k] for k in ("text_config", "vision_config") if k in raw)]
        for section in sections:
            for key in ("torch_dtype", "dtype"):
                if key in section:
                    section[key] = jnp.dtype(dtype).name
        config.write_text(json.dumps(raw, indent=2))


# Suffixes of a checkpoint's files. Other files may be the user's, so a directory that contains any
# is not replaced.
_SUFFIXES = (
    ".safetensors",
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".md",
    ".gitattributes",
)


def check_replaceable(directory: str | pathlib.Path) -> None:
    """Raise CheckpointError if `save` would refuse to replace a directory."""
    target = pathlib.Path(os.path.abspath(directory))
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file; a checkpoint needs a directory")
    entries = sorted(target.iterdir())
    unexpected = [e.name for e in entries if e.is_dir() or not e.name.endswith(_SUFFIXES)]
    if entries and not (target / "config.json").exists():
        raise CheckpointError(
            f"{target}: contains {entries[0].name} and is not a checkpoint; use another directory"
        )
    if unexpected:
        raise CheckpointError(
            f"{target}: contains {unexpected[0]}, which is not part of a checkpoint; move it or "
            "use another directory"
        )
