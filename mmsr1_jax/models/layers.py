"""Building blocks of towers and decoders: linear maps, norms, SwiGLU, rotary embedding, layer scan.

The parameters of all layers of a tower are stacked along a leading axis L and the tower is one
scan, so program size and compile time do not grow with depth. With `layers=None`, a module has no
layer axis.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from mmsr1_jax.models import sharding
from mmsr1_jax.models.config import VisionConfig
from mmsr1_jax.models.gated_linear import gated_linear, gated_mlp
from mmsr1_jax.models.sharding import param
from mmsr1_jax.utils.arrays import AnyArray

_LINEAR = "linear"  # checkpoint name of the results that `remat="dots"` keeps


def stacked(
    layers: int | None, shape: Sequence[int], axes: Sequence[str | None]
) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    """Return shape and logical axes, with a leading layer axis unless `layers` is None."""
    if layers is None:
        return tuple(shape), tuple(axes)
    return (layers, *shape), ("layers", *axes)


class Linear(nnx.Module):
    """Linear map `y = x W + b` from the last `len(inputs)` dimensions of x to `outputs`.

    kernel: [L, *outputs, *inputs]; bias: [L, *outputs]. Dimensions are (size, logical axis) pairs.
    Outputs come first, as in the checkpoints. `rl/lora.py` may set an `adapter`, whose output is
    added to y.
    """

    adapter: "Adapter | None" = (
        None  # a class attribute: NNX rejects arrays in an instance attribute that was None
    )

    def __init__(
        self,
        inputs: Sequence[tuple[int, str | None]],
        outputs: Sequence[tuple[int, str | None]],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        layers: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        sizes, names = zip(*outputs, *inputs, strict=True)
        fan_in = math.prod(size for size, _ in inputs)
        init = jax.nn.initializers.normal(fan_in**-0.5)
        self.kernel = param(rngs, *stacked(layers, sizes, names), init, dtype)
        sizes, names = zip(*outputs, strict=True)
        zeros = jax.nn.initializers.zeros
        self.bias = param(rngs, *stacked(layers, sizes, names), zeros, dtype) if bias else None
        self.contracted = len(inputs)

    def __call__(self, x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        """Apply the map to float[..., *inputs], which gives float[..., *outputs].

        Elements of the last input dimension beyond those of the map are ignored.
        """
        y = _apply(x, *_weights(self.kernel, x, x.shape[-1]), self.contracted)
        if self.adapter is not None:
            y = y + self.adapter(x, self.contracted)
        y = checkpoint_name(y, _LINEAR)
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)

    def split(self, x: Float[jax.Array, "..."], size: int) -> list[Float[jax.Array, "..."]]:
        """Return the parts of the map's output along its first dimension, one array each.

        Each part is the result of a product of its own with padded weights, so nothing as large as
        the output is split or padded.

        Args:
          x: float[..., *inputs].
          size: Size to which the last output dimension is padded with zeros.
        """
        kernel, axes = _weights(self.kernel, x)
        last = len(axes) - 1 - self.contracted  # last output dimension
        kernels = _split_and_pad(kernel, last, size)
        ys = [_apply(x, part, axes[1:], self.contracted) for part in kernels]
        if self.adapter is not None:
            update = jnp.moveaxis(self.adapter(x, self.contracted), x.ndim - self.contracted, 0)
            ys = [y + part for y, part in zip(ys, _split_and_pad(update, -1, size), strict=True)]
        ys = [checkpoint_name(y, _LINEAR) for y in ys]
        if self.bias is None:
            return ys
        biases = _split_and_pad(self.bias.get_value().astype(x.dtype), -1, size)
        return [y + bias for y, bias in zip(ys, biases, strict=True)]


class Adapter(nnx.Module):
    """LoRA update of a linear map, `s (x A^T) B^T` (arXiv 2106.09685, equation 3).

    x is multiplied with A, then with B, so no pass materialises the product of A and B.

    a: [L, rank, *inputs]; b: [L, *outputs, rank]; scale: s.
    """

    def __init__(self, a: nnx.Param, b: nnx.Param, scale: float):
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x: Float[jax.Array, "..."], contracted: int) -> Float[jax.Array, "..."]:
        """Return the update for float[..., *inputs] with `contracted` input dimensions."""
        projected = _apply(x, *_weights(self.a, x, x.shape[-1]), contracted) * self.scale
        return _apply(projected, *_weights(self.b, x), 1)


def _weights(
    variable: nnx.Variable, x: jax.Array, size: int | None = None
) -> tuple[jax.Array, tuple[str | None, ...]]:
    """Return the value of a parameter of one layer in the dtype of x, and its logical axes.

    With a size, the last dimension is padded to it with zeros.
    """
    value = variable.get_value().astype(x.dtype)
    axes = tuple(variable.get_metadata("axes")[-value.ndim :])
    return value if size is None else _pad(value, -1, size), axes


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pad an axis with zeros at its end."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def _split_and_pad(x: jax.Array, axis: int, size: int) -> list[jax.Array]:
    """Return the slices of x along its first axis, each with another axis of x padded to a size."""
    return [part.squeeze(0) for part in jnp.split(_pad(x, axis, size), len(x))]


def _contract(x: jax.Array, kernel: jax.Array, axes: tuple[str | None, ...], n: int) -> jax.Array:
    """Contract the last n dimensions of x with the last n dimensions of the kernel.

    The kernel, which has the logical axes `axes`, is gathered from the devices that split the
    batch. Left to itself, XLA may move partial sums of the result between them instead, in the
    dtype of x and several times the size of the kernel.
    """
    last = (tuple(range(x.ndim - n, x.ndim)), tuple(range(kernel.ndim - n, kernel.ndim)))
    return jax.lax.dot_general(x, sharding.gather(kernel, *axes), (last, ((), ())))


def _apply_forward(x, kernel, axes, n):
    return _contract(x, kernel, axes, n), (x, kernel)


def _apply_backward(axes, n, saved, g):
    x, kernel = saved
    dx, d_kernel = _gradients(x, sharding.gather(kernel, *axes), n, g)
    return dx, sharding.constrain(d_kernel, *axes)


def _gradients(x, kernel, n: int, g):
    """Return the gradients of x and of the kernel.

    The kernel's contracts over tokens, so one operand is transposed in memory. XLA's CPU backend
    always transposes the left one and recomputes its producers in the transposed order, which can
    take a third of a training step. Therefore the smaller one is on the left there.
    """
    outputs = kernel.ndim - n
    tokens = tuple(range(x.ndim - n))
    sums = (tuple(range(len(tokens), g.ndim)), tuple(range(outputs)))
    dx = jax.lax.dot_general(g, kernel, (sums, ((), ())))
    if x.size < g.size and sharding.platform() == "cpu":
        transposed = jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())))
        return dx, transposed.transpose(*range(n, kernel.ndim), *range(n))
    return dx, jax.lax.dot_general(g, x, ((tokens, tokens), ((), ())))


_apply = jax.custom_vjp(_contract, nondiff_argnums=(2, 3))
_apply.defvjp(_apply_forward, _apply_backward)


class RMSNorm(nnx.Module):
    """Root mean square layer norm (arXiv 1910.07467), computed in float32."""

    def __init__(
        self, size: int, eps: float, *, rngs: nnx.Rngs, layers: int | None = None, dtype: DTypeLike
    ):
        ones = jax.nn.initializers.ones
        self.scale = param(rngs, *stacked(layers, (size,), (None,)), ones, dtype)
        self.eps = eps

    def __call__(self, x: Float[jax.Array, "*rows D"]) -> Float[jax.Array, "*rows D"]:
        return _normalize(x, self.eps) * self.scale.get_value().astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=1, prevent_cse=False)
def _normalize(x: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm (arXiv 1607.06450) over the last dimension, computed in float32."""

    def __init__(
        self, size: int, eps: float, *, rngs: nnx.Rngs, layers: int | None = None, dtype: DTypeLike
    ):
        shape = stacked(layers, (size,), (None,))
        self.scale = param(rngs, *shape, jax.nn.initializers.ones, dtype)
        self.bias = param(rngs, *shape, jax.nn.initializers.zeros, dtype)
        self.eps = eps

    def __call__(self, x: Float[jax.Array, "*rows D"]) -> Float[jax.Array, "*rows D"]:
        return _layer_norm(x, self.scale.get_value(), self.bias.get_value(), self.eps)


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """Gated feed-forward layer `(silu(x Wg) * (x Wu)) Wd` (arXiv 2002.05202, equation 6).

    Attributes:
      separate: Whether the layer serves inference, without a gradient. Then several tokens per row
        on a GPU use `gated_linear`, on a TPU `gated_mlp`.

    On a TPU, barriers keep the compiler from computing `x Wu` or the gating inside of the last
    product, which takes up to 1.4 times as long as all products apart from each other.
    """

    separate = False

    def __init__(
        self, width: int, hidden: int, *, bias: bool, rngs: nnx.Rngs, layers: int, dtype: DTypeLike
    ):
        D, F = [(width, "embed")], [(hidden, "ffn")]
        linear = functools.partial(Linear, bias=bias, rngs=rngs, layers=layers, dtype=dtype)
        self.gate = linear(D, F)
        self.up = linear(D, F)
        self.down = linear(F, D)

    def __call__(self, x: Float[jax.Array, "*rows D"]) -> Float[jax.Array, "*rows D"]:
        platform, several = sharding.platform(), x.shape[-2] > 1
        if self.separate and several and platform != "cpu":
            weights = (_weights(m.kernel, x)[0] for m in (self.gate, self.up, self.down))
            gate, up, down = weights
            if platform == "gpu":
                return self.down(gated_linear(x, gate, up))
            return gated_mlp(x, gate, up, down)
        gate, up = self.gate(x), self.up(x)
        if platform != "tpu":
            return self.down(_gated(gate, up))
        if not several:
            gate, up = jax.lax.optimization_barrier((gate, up))
        return self.down(jax.lax.optimization_barrier(_gated(gate, up)))


@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return `silu(gate) * up`. The backward pass keeps only the inputs and recomputes silu."""
    return jax.nn.silu(gate) * up


def rotate(
    x: Float[jax.Array, "*rows T N H"],
    cos: Float32[jax.Array, "*rows T half"],
    sin: Float32[jax.Array, "*rows T half"],
) -> Float[jax.Array, "*rows T N H"]:
    """Apply a rotary embedding (arXiv 2104.09864) in the half-split form.

    Args:
      x: float[..., T, N, H]. Elements of a head after the first 2 half are zeros.
      cos: float32[..., T, half]. Cosines of each position's angles.
      sin: float32[..., T, half]. Sines of the same angles.
    """
    (T, _, H), half = x.shape[-3:], cos.shape[-1]
    if (sharding.platform() == "tpu" and T > 1) or 2 * half < H:
        return _rotate_by_product(x, cos, sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def axial_angles(
    positions: Int32[AnyArray, "B P 2"], config: VisionConfig
) -> tuple[Float32[jax.Array, "B P half_H"], Float32[jax.Array, "B P half_H"]]:
    """Compute cosines and sines of the 2-D rotary embedding of vision towers.

    Half of the frequencies rotate with the row, half with the column.

    Args:
      positions: int32[B, P, 2]. Row and column of each patch.
      config: Configuration of the vision tower.

    Returns:
      Cosines and sines of the angles, float32[B, P, H/2] each.
    """
    quarter = config.head_dim // 4
    frequency = config.rope_theta ** -(np.arange(quarter, dtype=np.float32) / quarter)
    angles = positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    angles = angles.reshape(*angles.shape[:2], 2 * quarter)
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def _rotate_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate by `x cos + (x S) sin`, where x S = (-second, first) for x = (first, second).

    S permutes elements and changes signs, which a product does without rounding. A TPU moves
    elements between the lanes of its registers slowly, so that splitting and joining a head takes
    several passes over memory; a product with S takes one, which also computes the rest.
    """
    H, half = x.shape[-1], cos.shape[-1]
    swap = np.zeros((H, H), np.float32)
    index = np.arange(half)
    swap[half + index, index], swap[index, half + index] = -1.0, 1.0
    swapped = jax.lax.dot_general(
        x, jnp.asarray(swap, x.dtype), (((x.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    cos, sin = (_pad(jnp.concatenate([a, a], axis=-1), -1, H)[..., None, :] for a in (cos, sin))
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def _rotate_forward(x, cos, sin):
    return _rotate_by_product(x, cos, sin), (cos, sin)


def _rotate_backward(saved, g):
    """Rotate the gradient back; angles are not trained."""
    cos, sin = saved
    return _rotate_by_product(g, cos, -sin), None, None


_rotate_by_product.defvjp(_rotate_forward, _rotate_backward)


def unstack(layer: nnx.Module) -> nnx.List:
    """Return stacked layers as a list of modules whose parameters have no layer axis.

    A loop over stacked parameters slices one layer at a time, and a program that cannot fuse the
    slice with its product writes the layer's weights out to read them again. A list has nothing to
    slice, but its program grows with the number of layers.
    """
    graph, params = nnx.split(layer)
    L = len(jax.tree.leaves(params)[0])

    def take(variable: Any, index: int) -> Any:
        axes = variable.get_metadata("axes")[1:]
        return nnx.Param(variable.get_value()[index], axes=axes)

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    layers = []
    for index in range(L):
        one = jax.tree.map(lambda v, i=index: take(v, i), params, is_leaf=is_variable)
        layers.append(nnx.merge(graph, one))
    return nnx.List(layers)


def scan_layers(
    layer: nnx.Module | nnx.List,
    x: Any,
    call: Callable[[Any, Any, Any], Any],
    xs: Any = None,
    remat: str = "none",
) -> Any:
    """Run stacked layers in sequence: `x = call(layer_i, x, xs_i)` for each i.

    Args:
      layer: Module whose parameters all have a leading axis L, or a list from `unstack`, whose
        layers are not scanned but called in turn.
      x: Input of the first layer, float[..., D], or a pytree that contains it.
      call: Function `(layer without the leading axis, x, xs_i) -> x`.
      xs: Pytree of arrays with a leading axis L, one slice per layer.
      remat: Rematerialisation of a layer in the backward pass: `none` (keep everything), `dots`
        (keep the results of matrix products with parameters) or `full` (keep only x).

    Returns:
      Output of the last layer, of the form of x.
    """
    if isinstance(layer, nnx.List):
        for index, one in enumerate(layer):
            x = call(one, x, jax.tree.map(lambda array, i=index: array[i], xs))
        return x
    graph, params = nnx.split(layer)

    def body(x, slices):
        layer_params, extra = slices
        return call(nnx.merge(graph, layer_params), x, extra), None

    if remat != "none":
        keep_linear = jax.checkpoint_policies.save_only_these_names(_LINEAR)
        policy = keep_linear if remat == "dots" else None
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, _ = jax.lax.scan(body, x, (params, xs))
    return x
