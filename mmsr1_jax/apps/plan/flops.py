"""FLOPs of the matrix products in a compiled program; element-wise operations are not counted."""

import math
import re

from mmsr1_jax.apps.plan.hlo import Computation, Module, Op

_CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
_CUBLAS_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\[\]]*)\]')
_LABELS = re.compile(r"\bdim_labels=([a-z0-9]+)_([a-z0-9]+)->([a-z0-9]+)")
_WINDOW = re.compile(r"\bwindow=\{([^{}]*)\}")
_BATCH_GROUPS = re.compile(r"\bbatch_group_count=(\d+)")


def fusion_flops(module: Module, name: str) -> float:
    """Return the FLOPs of all matrix products in a computation and in the fusions that it calls."""
    computation, total = module.computations.get(name), 0.0
    if computation is None:
        return 0.0
    for op in computation.ops.values():
        total += op_flops(module, computation, op)
    return total


def op_flops(module: Module, computation: Computation, op: Op) -> float:
    """Return the FLOPs of an instruction: 2 for each multiplication and addition of a product."""
    if op.opcode == "fusion":
        return fusion_flops(module, op.computation("calls"))
    if op.opcode == "dot":
        contracted = _integers(op.find(_CONTRACTED))
        return _product_flops(computation, op, contracted)
    if op.opcode == "convolution":
        return _convolution_flops(computation, op)
    if op.opcode == "custom-call" and "__cublas$" in op.attributes:
        dims = op.find(_CUBLAS_CONTRACTED)
        return _product_flops(computation, op, _integers((dims or "").replace('"', "")))
    return 0.0


def _product_flops(computation: Computation, op: Op, contracted: list[int]) -> float:
    left = computation.ops[op.operands[0]].result[0]
    return 2.0 * op.result[0].size * math.prod(left.shape[d] for d in contracted)


def _convolution_flops(computation: Computation, op: Op) -> float:
    """Return the FLOPs of a convolution, without the products with padding and dilation.

    On a TPU, matrix products with several or with batch dimensions are convolutions whose window
    lies mostly in the padding.
    """
    labels = _LABELS.search(op.attributes)
    if not labels:
        return 0.0
    left, right = (computation.ops[name].result[0] for name in op.operands[:2])
    inputs, kernel, output = labels.groups()
    window = _window(op.find(_WINDOW) or "")
    products = 1
    for index, dimension in enumerate(d for d in kernel if d.isdigit()):
        products *= _valid_products(
            left.shape[inputs.index(dimension)],
            right.shape[kernel.index(dimension)],
            op.result[0].shape[output.index(dimension)],
            window.get("stride", {}).get(index, 1),
            window.get("pad", {}).get(index, 0),
            window.get("lhs_dilate", {}).get(index, 1),
            window.get("rhs_dilate", {}).get(index, 1),
        )
    # `feature_group_count` divides the kernel's input features already.
    batch = op.result[0].shape[output.index("b")] * op.result[0].shape[output.index("f")]
    groups = int(op.find(_BATCH_GROUPS) or 1)
    return 2.0 * batch * right.shape[kernel.index("i")] * products / groups


def _window(text: str) -> dict[str, dict[int, int]]:
    """Return the fields of a window; of `pad=LOW_HIGH`, the low padding of each dimension."""
    fields = {}
    for field in text.split():
        name, _, values = field.partition("=")
        numbers = [int(value.split("_")[0]) for value in values.split("x")]
        fields[name] = dict(enumerate(numbers))
    return fields


def _valid_products(
    size: int, kernel: int, output: int, stride: int, low: int, dilate: int, kernel_dilate: int
) -> int:
    """Return the number of pairs (output, kernel) of a dimension that meet an input element."""
    count = 0
    last = (size - 1) * dilate
    for k in range(kernel):
        # Of the input positions o * stride + start, count those on an element of the input.
        start = k * kernel_dilate - low
        count += sum(
            0 <= position <= last and position % dilate == 0
            for position in range(start, start + output * stride, stride)
        )
    return count


def _integers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number.strip()]
