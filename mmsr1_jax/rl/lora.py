"""LoRA (arXiv 2106.09685): low-rank adapters are trained while the base parameters stay fixed.

    y = x W^T + s (x A^T) B^T       s = alpha / rank; initially A is random, B = 0

Adapters are saved separately, in the format of the PEFT library, or merged as `W + s B A`.
"""

# qwix is not used: its provider creates A, B and counters on the module that applies a kernel. Here
# that module is one layer within a scan over stacked layers, so they would lack the layer axis and
# be lost.

import json
import pathlib
import re
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh

from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL, checkpoint
from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig
from mmsr1_jax.models.qwen2_5_vl.layers import Adapter, Linear
from mmsr1_jax.models.sharding import param_shardings
from mmsr1_jax.rl import adapter_files
from mmsr1_jax.rl.adapter_files import CONFIG, WEIGHTS, AdapterError
from mmsr1_jax.utils import outputs

# Files of an adapter directory. A directory with any other file is not replaced, since the file
# may belong to the user.
_OURS = (CONFIG, WEIGHTS, "README.md", ".gitattributes")
_PREFIX = "base_model.model."  # PEFT's wrapper, before the in-memory names of modules
# Linear maps that can have an adapter, keyed by the names in `config.choices.LORA_TARGETS`.
TARGETS: dict[str, tuple[str, ...]] = {
    **{name: ("text", "layers", "attention", name) for name in ("q", "k", "v", "out")},
    **{name: ("text", "layers", "mlp", name) for name in ("gate", "up", "down")},
    **{f"vision.{name}": ("vision", "blocks", "attention", name) for name in ("qkv", "out")},
    **{f"vision.{name}": ("vision", "blocks", "mlp", name) for name in ("gate", "up", "down")},
}
# Linear maps that only adapters from other programs cover (PEFT's "all-linear"); not stacked.
_MERGER = (("vision", "merger", "fc1"), ("vision", "merger", "fc2"))


def attach(
    model: Qwen2_5_VL, *, rank: int, alpha: float, targets: Sequence[str], mesh: Mesh, seed: int = 0
) -> None:
    """Attach newly initialised float32 adapters to linear maps of the model, in place.

    The entries of A are drawn from a Gaussian with variance 1 / inputs, and B is zero (section
    4.1). Adapters are float32 whatever the dtype of the model's parameters.

    Args:
      model: Policy to modify.
      rank: Rank of the adapters.
      alpha: Numerator of the scale, s = alpha / rank.
      targets: Names from `TARGETS`.
      mesh: Mesh of the model's parameters.
      seed: Seed of the initial values.
    """
    for number, (name, path) in enumerate(TARGETS.items()):
        if name not in targets:
            continue
        linear = _linear(model, path)
        a, b = _abstract(model, path, rank)

        def fresh(key, a=a, b=b):
            shape = a.get_value().shape
            random = jax.random.normal(key, shape) * np.prod(shape[2:]) ** -0.5
            return a.replace(random), b.replace(jnp.zeros(b.get_value().shape))

        key = jax.random.fold_in(jax.random.key(seed), number)
        a, b = jax.jit(fresh, out_shardings=param_shardings((a, b), mesh))(key)
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
        merged.append(((*path, "kernel"), kernel.replace(_sum(kernel.get_value(), a, b, scale))))
    return nnx.from_flat_state(merged)


def merge_into(model: Qwen2_5_VL, adapters: nnx.State, scale: float) -> None:
    """Merge adapters from `load` into a model without adapters, in place.

    Kernels are merged one at a time, so that at most one of them is in memory twice.
    """
    mesh = model.text.embedding.get_value().sharding.mesh
    adapters = jax.device_put(adapters, param_shardings(adapters, mesh))
    factors = dict(nnx.to_flat_state(adapters))
    for path in [*_paths(factors), *_MERGER]:
        if (*path, "adapter", "a") not in factors:
            continue
        kernel = _linear(model, path).kernel
        a, b = (factors[*path, "adapter", name].get_value() for name in "ab")
        layout = kernel.get_value().sharding
        program = jax.jit(
            _sum_one if path in _MERGER else _sum, static_argnums=3, out_shardings=layout
        )
        kernel.set_value(program(kernel.get_value(), a, b, scale))


def save(adapters: nnx.State, directory, config: ModelConfig, *, alpha: float, source: str) -> None:
    """Write adapters to a directory that the PEFT library can load.

    An existing adapter in the directory is replaced (`outputs.new_directory`).

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
    others = [p.name for p in target.iterdir()] if target.is_dir() else []
    if odd := sorted(set(others) - set(_OURS)):
        raise AdapterError(f"{target}: holds {odd[0]}, which is not of an adapter")
    factors, tensors, modules = dict(nnx.to_flat_state(adapters)), {}, []
    table, layout = checkpoint.tensor_table(config), checkpoint.LAYOUTS[1]
    for path in _paths(factors):
        tensor = table[*path, "kernel"]
        a, b = (np.asarray(factors[*path, "adapter", name].get_value()) for name in "ab")
        rank, (rows, columns) = a.shape[1], tensor.shape
        for layer in range(tensor.layers):
            module = tensor.hf_name(layout, layer).removesuffix(".weight")
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a[layer].reshape(rank, columns)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b[layer].reshape(rows, rank)
        name = tensor.hf_name(layout, None).removesuffix(".weight")
        modules.append(re.escape(name).replace(re.escape("{}"), r"\d+"))
    described = {
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
    with outputs.new_directory(target) as partial:
        safetensors.numpy.save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod(0o644)  # safetensors creates files that only the owner can read
        text = json.dumps(described, indent=2) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")


def load(directory, config: ModelConfig) -> tuple[nnx.State, float]:
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
    settings = adapter_files.read_config(directory / CONFIG)
    path = directory / WEIGHTS
    tensors = _read_tensors(path)
    table, model = checkpoint.tensor_table(config), checkpoint.abstract_model(config)
    styles = [_modules(table, style) for style in adapter_files.STYLES]
    names, modules = adapter_files.modules_by_tensor(tensors, styles, path)
    scales = adapter_files.ranks_and_scales(settings, set(modules), names, styles, path)

    default, found = settings.default_scale, {}
    for (place, layer), factors in modules.items():
        rank, scale = scales[place, layer]
        outputs, inputs = table[*place, "kernel"].shape
        shapes = {"A": (rank, inputs), "B": (outputs, rank)}
        a, b = (_tensor(path, tensors, factors, letter, shapes[letter]) for letter in "AB")
        found.setdefault(place, {})[layer] = (a, b * (scale / default))
    arrays = []
    for place, layers in found.items():
        rank = max(len(a) for a, _ in layers.values())
        likes = _abstract(model, place, rank)
        shape = table[*place, "kernel"].shape
        a = np.zeros((table[*place, "kernel"].layers or 1, rank, shape[1]), np.float32)
        b = np.zeros((table[*place, "kernel"].layers or 1, shape[0], rank), np.float32)
        for layer, (low, high) in layers.items():
            a[layer or 0, : len(low)], b[layer or 0, :, : len(low)] = low, high
        for letter, value, like in zip("ab", (a, b), likes, strict=True):
            array = like.replace(value.reshape(like.get_value().shape))
            arrays.append(((*place, "adapter", letter), array))
    return nnx.from_flat_state(arrays), default


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    other = path.with_name("adapter_model.bin")
    if other.is_file() and not path.is_file():
        raise AdapterError(f"{other}: only safetensors are read; save the adapter as {WEIGHTS}")
    if other.is_file():
        print(f"{path} is used and {other.name} ignored, as in PEFT", file=sys.stderr)
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{path}: absent, truncated or not safetensors ({error})") from None
    if not tensors:
        raise AdapterError(f"{path}: holds no tensors")
    return tensors


def _modules(table: dict, layout: tuple[str, str]) -> adapter_files.Table:
    """Return path and layer of each linear map that can have an adapter, keyed by name."""
    modules = {}
    for path in (*TARGETS.values(), *_MERGER):
        tensor = table[*path, "kernel"]
        for layer in range(tensor.layers) if tensor.layers is not None else [None]:
            modules[tensor.hf_name(layout, layer).removesuffix(".weight")] = (path, layer)
    return modules


def _tensor(path: pathlib.Path, tensors: dict, factors: dict, letter: str, shape) -> np.ndarray:
    if letter not in factors:
        (other,) = factors.values()
        name = f".lora_{letter}".join(re.split(r"\.lora_[AB]", other))
        raise AdapterError(f"{path}: tensor {name} is missing")
    tensor = tensors[factors[letter]]
    if tensor.shape != shape:
        raise AdapterError(
            f"{path}: tensor {factors[letter]} has shape {list(tensor.shape)}, "
            f"the policy and the rank need {list(shape)}"
        )
    if tensor.dtype not in (*checkpoint.DTYPES.values(), np.dtype(np.float64)):
        raise AdapterError(f"{path}: tensor {factors[letter]} has dtype {tensor.dtype}")
    return tensor.astype(np.float32)


def _paths(factors: dict) -> list[tuple[str, ...]]:
    """Return the paths of the linear maps with an adapter in a flat state of adapters."""
    return [path for path in TARGETS.values() if (*path, "adapter", "a") in factors]


def _linear(model: Qwen2_5_VL, path: Sequence[str]) -> Linear:
    for name in path:
        model = getattr(model, name)
    return model


def _abstract(
    model: Qwen2_5_VL, path: Sequence[str], rank: int
) -> tuple[nnx.LoRAParam, nnx.LoRAParam]:
    """Return abstract A, [L, rank, *inputs], and B, [L, *outputs, rank].

    They have the logical axes of the kernel, and no L if the kernel is not stacked.
    """
    linear = _linear(model, path)
    shape, axes = linear.kernel.get_value().shape, linear.kernel.get_metadata("axes")
    start, cut = int(path not in _MERGER), len(shape) - linear.contracted

    def param(shape, axes):
        return nnx.LoRAParam(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)

    a = param((*shape[:start], rank, *shape[cut:]), (*axes[:start], None, *axes[cut:]))
    return a, param((*shape[:cut], rank), (*axes[:cut], None))


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Return W + s B A, computed in float32.

    Layers are processed one at a time, since the product is as large as W.
    """

    def of_layer(layer):
        w, a, b = (x.astype(jnp.float32) for x in layer)
        return (w + scale * jnp.tensordot(b, a, axes=1, precision="highest")).astype(kernel.dtype)

    return jax.lax.map(of_layer, (kernel, a, b))


def _sum_one(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Return `_sum` of a kernel that is not stacked."""
    return _sum(kernel[None], a[None], b[None], scale)[0]
