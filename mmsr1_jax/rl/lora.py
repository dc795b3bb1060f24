"""LoRA (arXiv 2106.09685): low-rank adapters are trained while the base parameters stay fixed.

    y = x W^T + s (x A^T) B^T       s = alpha / rank; initially A is random, B = 0

Adapters are saved separately, in the format of the PEFT library, or merged as `W + s B A`.
"""

# qwix is not used: its provider creates A, B and counters on the module that applies a kernel. Here
# that module is one layer within a scan over stacked layers, so they would lack the layer axis and
# be lost.

import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Float32

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models.checkpoint import abstract_model
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import tensor_table
from mmsr1_jax.models.layers import Adapter, Linear
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.models.sharding import abstract_params, is_abstract, param_shardings, to_host
from mmsr1_jax.models.tensors import LAYOUTS, Layout, Tensor
from mmsr1_jax.models.weight_files import DTYPES
from mmsr1_jax.rl import adapter_files
from mmsr1_jax.rl.adapter_files import CONFIG, WEIGHTS, AdapterError
from mmsr1_jax.utils import outputs, processes
from mmsr1_jax.utils.logs import log

Path = tuple[str, ...]  # of a linear map in the module tree
# Files of an adapter directory. A directory with any other file is not replaced, since the file
# may belong to the user.
_ADAPTER_FILES = (CONFIG, WEIGHTS, "README.md", ".gitattributes")
_PREFIX = "base_model.model."  # PEFT's wrapper, before the in-memory names of modules
# Linear maps that can have an adapter, keyed by the names in `config.choices.LORA_TARGETS`.
TARGETS: dict[str, Path] = {
    **{name: ("text", "layers", "attention", name) for name in ("q", "k", "v", "out")},
    **{name: ("text", "layers", "mlp", name) for name in ("gate", "up", "down")},
    **{f"vision.{name}": ("vision", "blocks", "attention", name) for name in ("qkv", "out")},
    **{
        f"vision.{name}": ("vision", "blocks", "mlp", name)
        for name in ("gate", "up", "down", "fc1", "fc2")
    },
}
# Linear maps that only adapters from other programs cover (PEFT's "all-linear").
_MERGERS = tuple(
    ("vision", merger, name) for merger in ("merger", "deepstack") for name in ("fc1", "fc2")
)


def targets_of(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the linear maps of a policy that can have an adapter."""
    table = tensor_table(config)
    return tuple(name for name, path in TARGETS.items() if (*path, "kernel") in table)


def attach(
    model: Policy, *, rank: int, alpha: float, targets: Sequence[str], mesh: Mesh, seed: int = 0
) -> None:
    """Attach newly initialised float32 adapters to linear maps of the model, in place.

    The entries of A are drawn from a Gaussian with variance 1 / inputs, and B is zero (section
    4.1). Adapters are float32 whatever the dtype of the model's parameters.

    Args:
      model: Policy to modify. If it is abstract, so are the adapters.
      rank: Rank of the adapters.
      alpha: Numerator of the scale, s = alpha / rank.
      targets: Names from `targets_of`.
      mesh: Mesh of the model's parameters.
      seed: Seed of the initial values.

    Raises:
      UserError: The policy does not have one of the targets.
    """
    available = targets_of(model.config)
    if missing := [name for name in targets if name not in available]:
        raise UserError(
            f"config.update.lora_targets: the policy has no linear map {missing[0]!r}, only "
            f"{', '.join(available)}"
        )
    for index, (name, path) in enumerate(TARGETS.items()):
        if name not in targets:
            continue
        linear = _linear(model, path)
        a, b = _abstract(model, path, rank)

        def initialise(key, a=a, b=b):
            shape = a.get_value().shape
            gaussian = jax.random.normal(key, shape) * np.prod(shape[2:]) ** -0.5
            return a.replace(gaussian), b.replace(jnp.zeros(b.get_value().shape))

        key = jax.random.fold_in(jax.random.key(seed), index)
        if is_abstract(linear.kernel.get_value()):
            a, b = abstract_params((a, b), mesh)
        else:
            a, b = jax.jit(initialise, out_shardings=param_shardings((a, b), mesh))(key)
        linear.adapter = Adapter(a, b, alpha / rank)


def merge(adapters: nnx.State, base: nnx.State, scale: float) -> nnx.State:
    """Return the adapted kernels with adapters merged, at the paths and in the dtype of `base`.

    For use under `jit`.

    Args:
      adapters: A and B, `nnx.split(model, nnx.LoRAParam, ...)[1]`.
      base: Base parameters, including those without adapters.
      scale: Scale s.
    """
    factors, params = dict(nnx.to_flat_state(adapters)), dict(nnx.to_flat_state(base))
    merged = []
    for path in _paths(factors):
        kernel = params[*path, "kernel"]
        a, b = (factors[*path, "adapter", name].get_value() for name in "ab")
        merged.append(
            ((*path, "kernel"), kernel.replace(_merge_kernel(kernel.get_value(), a, b, scale)))
        )
    return nnx.from_flat_state(merged)


def merge_into(model: Policy, adapters: nnx.State, scale: float) -> None:
    """Merge adapters from `load` into a model without adapters, in place.

    Kernels are merged one at a time, so that at most one of them is in memory twice.
    """
    mesh = model.text.embedding.get_value().sharding.mesh
    adapters = jax.device_put(adapters, param_shardings(adapters, mesh))
    factors = dict(nnx.to_flat_state(adapters))
    for path in [*_paths(factors), *_MERGERS]:
        if (*path, "adapter", "a") not in factors:
            continue
        kernel = _linear(model, path).kernel
        a, b = (factors[*path, "adapter", name].get_value() for name in "ab")
        merge_kernel = jax.jit(
            _merge_kernel if _is_stacked(model.config, path) else _merge_unstacked_kernel,
            static_argnums=3,
            out_shardings=kernel.get_value().sharding,
        )
        kernel.set_value(merge_kernel(kernel.get_value(), a, b, scale))


def save(
    adapters: nnx.State,
    directory: str | pathlib.Path,
    config: ModelConfig,
    *,
    alpha: float,
    source: str,
) -> None:
    """Write adapters to a directory that the PEFT library can load.

    An existing adapter in the directory is replaced (`outputs.new_directory`). With several
    processes, process 0 writes, and all must call this together.

    Args:
      adapters: A and B, see `merge`.
      directory: Output directory, created if it does not exist.
      config: Model configuration of the policy.
      alpha: Numerator of the scale, s = alpha / rank.
      source: HF directory of the base model, recorded in the file.

    Raises:
      AdapterError: `directory` exists and contains other files.
      LockedError: Another process is writing `directory`.
    """
    target = pathlib.Path(directory)
    _check_replaceable(target)
    factors, tensors, modules = dict(nnx.to_flat_state(adapters)), {}, []
    table, layout = tensor_table(config), LAYOUTS[1]
    rank = 0
    for path in _paths(factors):
        tensor = table[*path, "kernel"]
        a, b = (to_host(factors[*path, "adapter", name].get_value()) for name in "ab")
        rank, (rows, columns) = a.shape[1], tensor.shape
        for layer in tensor.layer_indices():
            module = tensor.hf_name(layout, layer).removesuffix(".weight")
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a[layer].reshape(rank, columns)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b[layer].reshape(rows, rank)
        name = tensor.hf_name(layout, None).removesuffix(".weight")
        modules.append(re.escape(name).replace(re.escape("{}"), r"\d+"))
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # Full names, since both towers have a `gate_proj`.
        "target_modules": "|".join(modules),
        "inference_mode": True,
    }
    if not processes.main():
        return
    with outputs.new_directory(target) as temporary:
        weights = temporary / WEIGHTS
        safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors creates files that only the owner can read
        text = json.dumps(peft_config, indent=2) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def _check_replaceable(target: pathlib.Path) -> None:
    existing = {p.name for p in target.iterdir()} if target.is_dir() else set()
    if unexpected := sorted(existing - set(_ADAPTER_FILES)):
        raise AdapterError(
            f"{target}: contains {unexpected[0]}, which is not part of an adapter; move it or use "
            "another directory"
        )


def load(directory: str | pathlib.Path, config: ModelConfig) -> tuple[nnx.State, float]:
    """Load an adapter written by `save`, the PEFT library, or a program that uses its format.

    Args:
      directory: Directory with `adapter_config.json` and `adapter_model.safetensors`.
      config: Model configuration of the policy.

    Returns:
      A and B as float32 NumPy arrays, and the scale s. If ranks differ between layers, lower ranks
      are padded with zeros; a layer without an adapter is zero; a scale other than s is folded
      into B.

    Raises:
      AdapterError: A file is damaged or missing, the tensors do not match the policy's modules, a
        tensor is missing, or the adapter is not plain LoRA.
    """
    directory = pathlib.Path(directory)
    peft_config = adapter_files.read_config(directory / CONFIG)
    weights_path = directory / WEIGHTS
    tensors = _read_tensors(weights_path)
    table = tensor_table(config)
    schemes = [_modules(table, scheme) for scheme in adapter_files.NAMING_SCHEMES]
    names, modules = adapter_files.modules_by_tensor(tensors, schemes, weights_path)
    scales = adapter_files.ranks_and_scales(peft_config, set(modules), names, schemes, weights_path)

    default_scale = peft_config.default_scale
    # A and B of each layer, by path of the linear map.
    factors: dict[Path, dict[int | None, tuple[np.ndarray, np.ndarray]]] = {}
    for (path, layer), tensor_names in modules.items():
        rank, scale = scales[path, layer]
        outputs, inputs = table[*path, "kernel"].shape
        a = _tensor(weights_path, tensors, tensor_names, "A", (rank, inputs))
        b = _tensor(weights_path, tensors, tensor_names, "B", (outputs, rank))
        factors.setdefault(path, {})[layer] = (a, b * (scale / default_scale))
    model, adapters = abstract_model(config), []
    for path, by_layer in factors.items():
        abstract = _abstract(model, path, max(len(a) for a, _ in by_layer.values()))
        stacked = _stack(by_layer, table[*path, "kernel"])
        for name, value, variable in zip("ab", stacked, abstract, strict=True):
            array = value.reshape(variable.get_value().shape)
            adapters.append(((*path, "adapter", name), variable.replace(array)))
    return nnx.from_flat_state(adapters), default_scale


def _stack(
    by_layer: Mapping[int | None, tuple[np.ndarray, np.ndarray]], tensor: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Stack the factors of all layers: A, float32[L, rank, inputs], and B, [L, outputs, rank].

    The rank is the largest of any layer. Lower ranks and layers without factors are padded with
    zeros.
    """
    rank = max(len(a) for a, _ in by_layer.values())
    outputs, inputs = tensor.shape
    stacked_a = np.zeros((tensor.layers or 1, rank, inputs), np.float32)
    stacked_b = np.zeros((tensor.layers or 1, outputs, rank), np.float32)
    for layer, (a, b) in by_layer.items():
        stacked_a[layer or 0, : len(a)], stacked_b[layer or 0, :, : len(a)] = a, b
    return stacked_a, stacked_b


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    pickled = path.with_name("adapter_model.bin")
    if pickled.is_file() and not path.is_file():
        raise AdapterError(f"{pickled}: only safetensors are read; save the adapter as {WEIGHTS}")
    if pickled.is_file():
        log.warning("%s is used and %s ignored, as in PEFT", path, pickled.name)
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{path}: missing, truncated or not safetensors ({error})") from None
    if not tensors:
        raise AdapterError(f"{path}: contains no tensors")
    return tensors


def _modules(table: Mapping[tuple[Any, ...], Tensor], layout: Layout) -> adapter_files.ModuleTable:
    """Return path and layer of each linear map that can have an adapter, keyed by name."""
    modules = {}
    for path in (*TARGETS.values(), *_MERGERS):
        if (*path, "kernel") not in table:
            continue
        tensor = table[*path, "kernel"]
        for layer in tensor.layer_indices():
            modules[tensor.hf_name(layout, layer).removesuffix(".weight")] = (path, layer)
    return modules


def _tensor(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    factor: str,
    shape: tuple[int, int],
) -> np.ndarray:
    """Return one factor of a module in float32.

    Args:
      path: Path of the file, for error messages.
      tensors: Tensors of the file, by name.
      names: Names of the module's tensors, by factor.
      factor: "A" or "B".
      shape: Required shape.
    """
    if factor not in names:
        (other,) = names.values()
        name = f".lora_{factor}".join(re.split(r"\.lora_[AB]", other))
        raise AdapterError(f"{path}: tensor {name} is missing")
    tensor = tensors[names[factor]]
    if tensor.shape != shape:
        raise AdapterError(
            f"{path}: tensor {names[factor]} has shape {list(tensor.shape)}, "
            f"the policy and the rank need {list(shape)}"
        )
    if tensor.dtype not in (*DTYPES.values(), np.dtype(np.float64)):
        raise AdapterError(f"{path}: tensor {names[factor]} has dtype {tensor.dtype}")
    return tensor.astype(np.float32)


def _paths(factors: Mapping[Any, Any]) -> list[Path]:
    """Return the paths of the linear maps with an adapter in a flat state of adapters."""
    return [path for path in TARGETS.values() if (*path, "adapter", "a") in factors]


def _is_stacked(config: ModelConfig, path: Path) -> bool:
    """Return whether the kernel of a linear map has a layer axis."""
    return tensor_table(config)[*path, "kernel"].layers is not None


def _linear(model: Policy, path: Path) -> Linear:
    return functools.reduce(getattr, path, model)


def _abstract(model: Policy, path: Path, rank: int) -> tuple[nnx.LoRAParam, nnx.LoRAParam]:
    """Return abstract A, [L, rank, *inputs], and B, [L, *outputs, rank].

    They have the logical axes of the kernel, and no L if the kernel is not stacked.
    """
    linear = _linear(model, path)
    shape, axes = linear.kernel.get_value().shape, linear.kernel.get_metadata("axes")
    start = int(_is_stacked(model.config, path))  # after the layer axis
    inputs = len(shape) - linear.contracted  # first input axis

    def param(shape, axes):
        return nnx.LoRAParam(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)

    a = param((*shape[:start], rank, *shape[inputs:]), (*axes[:start], None, *axes[inputs:]))
    return a, param((*shape[:inputs], rank), (*axes[:inputs], None))


def _merge_kernel(
    kernel: Float[jax.Array, "L ..."],
    a: Float32[jax.Array, "L rank ..."],
    b: Float32[jax.Array, "L ..."],
    scale: float,
) -> Float[jax.Array, "L ..."]:
    """Return W + s B A, computed in float32.

    Layers are processed one at a time, since the product is as large as W.

    Args:
      kernel: W, [L, *outputs, *inputs].
      a: A, float32[L, rank, *inputs].
      b: B, float32[L, *outputs, rank].
      scale: Scale s.
    """

    def merge_layer(layer):
        w, a, b = (x.astype(jnp.float32) for x in layer)
        return (w + scale * jnp.tensordot(b, a, axes=1, precision="highest")).astype(kernel.dtype)

    return jax.lax.map(merge_layer, (kernel, a, b))


def _merge_unstacked_kernel(kernel, a, b, scale: float):
    """Return `_merge_kernel` of a kernel without the layer axis."""
    return _merge_kernel(kernel[None], a[None], b[None], scale)[0]
