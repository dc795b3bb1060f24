"""LoRA (arXiv 2106.09685): adapters of low rank are trained, the policy's own parameters stay.

    y = x W^T + s (x A^T) B^T       s = alpha / rank; A begins random, B zero, so y as it was

What is trained is saved apart, in the format of the PEFT library, or merged: `W + s B A`.
"""

# Not qwix: its provider makes A and B on the module that meets a kernel, and leaves counters there.
# Ours is one layer within a scan over stacked layers: they would have no layer axis, and be lost.

import json
import pathlib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh

from mmsr1_jax import outputs
from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL, checkpoint
from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig
from mmsr1_jax.models.qwen2_5_vl.layers import Adapter, Linear
from mmsr1_jax.rl.lora_targets import TARGETS
from mmsr1_jax.sharding import param_shardings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter's directory is made of. Anything else in one is somebody's, and is not replaced.
_OURS = (CONFIG, WEIGHTS, "README.md", ".gitattributes")
_PREFIX = "base_model.model."  # PEFT's wrapper, before the names that modules have in memory


class AdapterError(ValueError):
    """An adapter that cannot be read; the message names file and tensor."""


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
        a, b = _abstract(linear, rank)

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
    for path in _paths(factors):
        kernel = _linear(model, path).kernel
        a, b = (factors[*path, "adapter", name].get_value() for name in "ab")
        layout = kernel.get_value().sharding
        program = jax.jit(_sum, static_argnums=3, out_shardings=layout)
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
    """Reads what `save` or the PEFT library wrote.

    Args:
      directory: `adapter_config.json` and `adapter_model.safetensors`.
      config: shape of the policy that the adapters are for.

    Returns:
      A and B as numpy arrays in float32, and s.

    Raises:
      AdapterError: a file that is damaged or absent, tensors that the policy has no place for, a
        missing one, or a kind of adapter other than plain LoRA.
    """
    directory = pathlib.Path(directory)
    rank, scale = _read_config(directory / CONFIG)
    path = directory / WEIGHTS
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{path}: absent, truncated or not safetensors ({error})") from None

    table, model = checkpoint.tensor_table(config), checkpoint.abstract_model(config)
    arrays, wanted = [], {}
    for place in TARGETS.values():
        tensor = table[*place, "kernel"]
        rows, columns = tensor.shape
        # In the names of memory, or of the files as they were released.
        for layout in checkpoint.LAYOUTS:
            modules = [_PREFIX + tensor.hf_name(layout, i) for i in range(tensor.layers)]
            modules = [module.removesuffix(".weight") for module in modules]
            a_names = [f"{module}.lora_A.weight" for module in modules]
            b_names = [f"{module}.lora_B.weight" for module in modules]
            if tensors.keys().isdisjoint([*a_names, *b_names]):
                continue
            wanted |= dict.fromkeys(a_names, (rank, columns)) | dict.fromkeys(b_names, (rows, rank))
            for letter, names, like in zip(
                "ab", (a_names, b_names), _abstract(_linear(model, place), rank), strict=True
            ):
                _check(path, names, tensors, wanted)
                stacked = np.stack([tensors[name].astype(np.float32) for name in names])
                value = like.replace(stacked.reshape(like.get_value().shape))
                arrays.append(((*place, "adapter", letter), value))
    for name in sorted(tensors.keys() - wanted.keys()):
        raise AdapterError(f"{path}: tensor {name} is of no linear map that can have an adapter")
    if not arrays:
        raise AdapterError(f"{path}: holds no tensors")
    return nnx.from_flat_state(arrays), scale


def _check(path: pathlib.Path, names: Sequence[str], tensors: dict, shapes: dict) -> None:
    for name in names:
        if name not in tensors:
            raise AdapterError(f"{path}: tensor {name} is missing")
        if tensors[name].shape != shapes[name]:
            raise AdapterError(
                f"{path}: tensor {name} has shape {list(tensors[name].shape)}, "
                f"the policy and the rank need {list(shapes[name])}"
            )


def _read_config(path: pathlib.Path) -> tuple[int, float]:
    """Rank and s of an adapter."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, kind = int(raw["r"]), float(raw["lora_alpha"]), raw.get("peft_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path}: not the settings of a LoRA adapter ({error!r})") from None
    if kind != "LORA" or rank < 1:
        raise AdapterError(f"{path}: peft_type={kind!r} with r={rank} is not LoRA")
    # Variants that compute something else than what is said above.
    for field in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
                  "fan_in_fan_out", "bias"):  # fmt: skip
        if raw.get(field) and raw[field] != "none":
            raise AdapterError(f"{path}: {field}={raw[field]!r}: only plain LoRA can be read")
    return rank, alpha / rank


def _paths(factors: dict) -> list[tuple[str, ...]]:
    """Of the linear maps that have adapters, from a flat state of these."""
    return [path for path in TARGETS.values() if (*path, "adapter", "a") in factors]


def _linear(model: Qwen2_5_VL, path: Sequence[str]) -> Linear:
    for name in path:
        model = getattr(model, name)
    return model


def _abstract(linear: Linear, rank: int) -> tuple[nnx.LoRAParam, nnx.LoRAParam]:
    """A, [L, rank, *inputs], and B, [L, *outputs, rank], with the logical axes of the kernel."""
    shape, axes = linear.kernel.get_value().shape, linear.kernel.get_metadata("axes")
    cut = len(shape) - linear.contracted

    def param(shape, axes):
        return nnx.LoRAParam(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)

    a = param((shape[0], rank, *shape[cut:]), (axes[0], None, *axes[cut:]))
    return a, param((*shape[:cut], rank), (*axes[:cut], None))


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + s B A, computed in float32, a layer at a time: the product is as large as W."""

    def of_layer(layer):
        w, a, b = (x.astype(jnp.float32) for x in layer)
        return (w + scale * jnp.tensordot(b, a, axes=1, precision="highest")).astype(kernel.dtype)

    return jax.lax.map(of_layer, (kernel, a, b))
