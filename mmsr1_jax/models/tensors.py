"""Mapping between the parameters of the model and the tensors of HF checkpoints.

A parameter of a layer stacks the checkpoint's tensors of all layers and may have a different shape:
a `nn.Linear` weight is [out, in], while our kernels have a separate axis for heads. Loading, saving
and the tests use `families.tensor_table`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mmsr1_jax.models.config import TextConfig

# Prefixes of the text decoder and the vision tower: those of the released files, and those of the
# modules of `transformers` since 4.52. The head is `lm_head.weight` in both.
Layout = tuple[str, str]
LAYOUTS: tuple[Layout, Layout] = (("model.", "visual."), ("model.language_model.", "model.visual."))


@runtime_checkable
class TensorSlice(Protocol):
    """Tensor of a safetensors file, of which parts can be read."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Representation of a parameter in a checkpoint.

    Attributes:
      name: HF name without layout prefix; `{}` stands for the layer.
      tower: Part of the model: "text", "vision" or "head".
      shape: HF shape of one layer.
      layers: Number of layers, or None for a parameter that is not stacked.
    """

    name: str
    tower: str
    shape: tuple[int, ...]
    layers: int | None

    def hf_name(self, layout: Layout, layer: int | None) -> str:
        """Return the name of the tensor of one layer, or of the parameter if it is not stacked."""
        prefix = {"text": layout[0], "vision": layout[1], "head": ""}[self.tower]
        return prefix + (self.name if layer is None else self.name.format(layer))

    def layer_indices(self) -> Sequence[int | None]:
        """Return the layers of the parameter, or (None,) if it is not stacked."""
        return (None,) if self.layers is None else range(self.layers)

    def read(
        self, tensor: TensorSlice, shape: tuple[int, ...], index: tuple[slice, ...]
    ) -> np.ndarray:
        """Read `parameter[index]` of one layer from a safetensors slice.

        Slices along the parameter's first output dimension (heads, feed-forward, vocabulary) and
        first input dimension read only those rows and columns. Slices along other dimensions are
        taken in memory.

        Args:
          tensor: Safetensors slice of the layer's tensor.
          shape: Shape of one layer of our parameter.
          index: Slices of our parameter, one per dimension.
        """
        # Our first `outputs` dimensions make up the first dimension of the HF tensor.
        outputs = next(n for n in range(1, len(shape) + 1) if math.prod(shape[:n]) == self.shape[0])
        bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
        file_slices = [slice(*(x * (self.shape[0] // shape[0]) for x in bounds[0]))]
        read_shape = [bounds[0][1] - bounds[0][0], *shape[1:outputs]]
        remaining = [slice(None), *index[1:outputs]]
        if len(self.shape) == 2:
            scale = self.shape[1] // shape[outputs]
            file_slices.append(slice(*(x * scale for x in bounds[outputs])))
            read_shape.append(bounds[outputs][1] - bounds[outputs][0])
            remaining.append(slice(None))
        read_shape += shape[len(read_shape) :]
        remaining += index[len(remaining) :]
        return np.asarray(tensor[tuple(file_slices)]).reshape(read_shape)[tuple(remaining)]


class TensorTable(dict[tuple[str, ...], Tensor]):
    """Checkpoint representation of parameters, by their path in the module tree."""

    def add(self, path: str, name: str, shape: tuple[int, ...], layers: int | None = None) -> None:
        """Add a parameter; its path has slashes, and `{}` in the HF name stands for the layer."""
        tower = "head" if path == "text/head" else path.split("/")[0]
        self[tuple(path.split("/"))] = Tensor(name, tower, shape, layers)

    def add_linear(
        self, path: str, name: str, out: int, inp: int, *, bias: bool, layers: int | None = None
    ) -> None:
        """Add the kernel of a linear map, and its bias if it has one."""
        self.add(f"{path}/kernel", f"{name}.weight", (out, inp), layers)
        if bias:
            self.add(f"{path}/bias", f"{name}.bias", (out,), layers)

    def add_layer_norm(self, path: str, name: str, size: int, layers: int | None = None) -> None:
        """Add scale and bias of a layer norm."""
        self.add(f"{path}/scale", f"{name}.weight", (size,), layers)
        self.add(f"{path}/bias", f"{name}.bias", (size,), layers)


def text_tensors(t: TextConfig) -> TensorTable:
    """Return the parameters of the text decoder and the output head."""
    D, F, N, K, H = t.hidden_size, t.intermediate_size, t.num_heads, t.num_kv_heads, t.head_dim
    table = TensorTable()
    table.add("text/embedding", "embed_tokens.weight", (t.vocab_size, D))
    layer, path, L = "layers.{}.", "text/layers/", t.num_layers
    table.add(path + "attention_norm/scale", layer + "input_layernorm.weight", (D,), L)
    for key, out in (("q", N * H), ("k", K * H), ("v", K * H)):
        name = f"{layer}self_attn.{key}_proj"
        table.add_linear(f"{path}attention/{key}", name, out, D, bias=t.qkv_bias, layers=L)
    name = layer + "self_attn.o_proj"
    table.add_linear(path + "attention/out", name, D, N * H, bias=False, layers=L)
    for key in ("q_norm", "k_norm") if t.qk_norm else ():
        table.add(f"{path}attention/{key}/scale", f"{layer}self_attn.{key}.weight", (H,), L)
    table.add(path + "mlp_norm/scale", layer + "post_attention_layernorm.weight", (D,), L)
    for key, out, inp in (("gate", F, D), ("up", F, D), ("down", D, F)):
        name = f"{layer}mlp.{key}_proj"
        table.add_linear(f"{path}mlp/{key}", name, out, inp, bias=False, layers=L)
    table.add("text/norm/scale", "norm.weight", (D,))
    if not t.tie_embeddings:
        table.add("text/head", "lm_head.weight", (t.vocab_size, D))
    return table
