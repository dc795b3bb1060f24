"""LoRA (arXiv 2106.09685): adapters of low rank are trained, the policy's own parameters stay.

    y = x W^T + s (x A^T) B^T       s = alpha / rank; A begins random, B zero, so y as it was

What is trained is saved apart, in the format of the PEFT library, or merged: `W + s B A`.
"""

# Not qwix: its provider makes A and B on the module that meets a kernel, and leaves counters there.
# Ours is one layer within a scan over stacked layers: they would have no layer axis, and be lost.

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

# What an adapter's directory is made of. Anything else in one is somebody's, and is not replaced.
_OURS = (CONFIG, WEIGHTS, "README.md", ".gitattributes")
_PREFIX = "base_model.model."  # PEFT's wrapper, before the names that modules have in memory
# The linear maps that can have an adapter, by the names of `config.choices.LORA_TARGETS`.
TARGETS: dict[str, tuple[str, ...]] = {
    **{name: ("text", "layers", "attention", name) for name in ("q", "k", "v", "out")},
    **{name: ("text", "layers", "mlp", name) for name in ("gate", "up", "down")},
    **{f"vision.{name}": ("vision", "blocks", "attention", name) for name in ("qkv", "out")},
    **{f"vision.{name}": ("vision", "blocks", "mlp", name) for name in ("gate", "up", "down")},
}
# Linear maps that only adapters of other programs have (PEFT's "all-linear"); not stacked.
_MERGER = (("vision", "merger", "fc1"), ("vision", "merger", "fc2"))


def attach(
    model: Qwen2_5_VL, *, rank: int, alpha: float, targets: Sequence[str], mesh: Mesh, seed: int = 0
) -> None:
    """Gives linear maps of the model fresh adapters, in float32 whatever its parameters are in.

    The entries of A are drawn from a Gaussian of variance 1 / inputs, B is zero (section 4.1).

    Args:
      model: is changed.
      rank: of the adapters.
      alpha: see above.
      targets: names out of `TARGETS`.
      mesh: on which the model's parameters are.
      seed: of the adapters' first values.
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
    """The kernels that have adapters, with what these add; at their paths in `base`, in its dtype.
    For use under `jit`.

    Args:
      adapters: A and B, `nnx.split(model, nnx.LoRAParam, ...)[1]`.
      base: the parameters, those without adapters too.
      scale: s.
    """
    factors, params = dict(nnx.to_flat_state(adapters)), dict(nnx.to_flat_state(base))
    merged = []
    for path in _paths(factors):
        kernel = params[*path, "kernel"]
        a, b = (factors[*path, "adapter", name].get_value() for name in "ab")
        merged.append(((*path, "kernel"), kernel.replace(_sum(kernel.get_value(), a, b, scale))))
    return nnx.from_flat_state(merged)


def merge_into(model: Qwen2_5_VL, adapters: nnx.State, scale: float) -> None:
    """Changes a model without adapters by those of `load`, one kernel after the other, so that no
    more than one is held twice."""
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
    """Writes a directory that the PEFT library loads, in the place of an adapter that is there
    (`outputs.new_directory`).

    Args:
      adapters: see `merge`.
      directory: made if need be.
      config: the policy's shape.
      alpha: see above.
      source: the HF directory that the adapters are for; it is named in the file.

    Raises:
      AdapterError: `directory` is there and holds other files too.
      LockedError: another process is writing it.
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
        # Whole names, since both towers have a `gate_proj`.
        "target_modules": "|".join(modules),
        "inference_mode": True,
    }
    with outputs.new_directory(target) as partial:
        safetensors.numpy.save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod(0o644)  # the library makes files that only the owner can read
        text = json.dumps(described, indent=2) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")


def load(directory, config: ModelConfig) -> tuple[nnx.State, float]:
    """Reads what `save`, the PEFT library or a program after its format wrote.

    Args:
      directory: `adapter_config.json` and `adapter_model.safetensors`.
      config: shape of the policy that the adapters are for.

    Returns:
      A and B as numpy arrays in float32, and s. Where ranks differ between layers the lower ones
      are padded with zeros, a layer without adapter is zero, and a scale other than s is in B.

    Raises:
      AdapterError: a file that is damaged or absent, tensors that the policy has no place for, a
        missing one, or a kind of adapter other than plain LoRA.
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
    """Path and layer of each linear map that can have an adapter, by its name in one style."""
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
    """Of the linear maps that have adapters, from a flat state of these."""
    return [path for path in TARGETS.values() if (*path, "adapter", "a") in factors]


def _linear(model: Qwen2_5_VL, path: Sequence[str]) -> Linear:
    for name in path:
        model = getattr(model, name)
    return model


def _abstract(
    model: Qwen2_5_VL, path: Sequence[str], rank: int
) -> tuple[nnx.LoRAParam, nnx.LoRAParam]:
    """A, [L, rank, *inputs], and B, [L, *outputs, rank], with the logical axes of the kernel;
    without L where the kernel is not stacked."""
    linear = _linear(model, path)
    shape, axes = linear.kernel.get_value().shape, linear.kernel.get_metadata("axes")
    start, cut = int(path not in _MERGER), len(shape) - linear.contracted

    def param(shape, axes):
        return nnx.LoRAParam(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)

    a = param((*shape[:start], rank, *shape[cut:]), (*axes[:start], None, *axes[cut:]))
    return a, param((*shape[:cut], rank), (*axes[:cut], None))


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + s B A, computed in float32, a layer at a time: the product is as large as W."""

    def of_layer(layer):
        w, a, b = (x.astype(jnp.float32) for x in layer)
        return (w + scale * jnp.tensordot(b, a, axes=1, precision="highest")).astype(kernel.dtype)

    return jax.lax.map(of_layer, (kernel, a, b))


def _sum_one(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """`_sum` of a kernel that is not stacked."""
    return _sum(kernel[None], a[None], b[None], scale)[0]
