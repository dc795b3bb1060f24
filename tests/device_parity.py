"""Parity of the kernels that a platform uses with XLA in float32, on the device itself.

Differences of outputs are absolute; inputs are bounded and of variance 1. Those of gradients are
relative to the gradient's largest entry, and those of the gated product, which is not bounded, to
its value where that exceeds 1.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmsr1_jax.config.choices import Attention
from mmsr1_jax.models import (
    attention,
    gpu_gated_linear,
    gpu_paged_attention,
    paged_attention,
    sharding,
    tpu_gated_mlp,
)
from mmsr1_jax.models.paged_attention import PagedRows
from mmsr1_jax.rollout import sampler

BARS = {"bfloat16": 2e-2, "float32": 1e-5}  # of differences


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A measurement of a part.

    Attributes:
      name: Name in the results.
      run: Function that returns its values, numbers and texts that JSON can hold.
    """

    name: str
    run: Callable[[], dict[str, Any]]


def parity(tiny: bool) -> list[Measurement]:
    """Compare every kernel that the platform uses with XLA in float32, or NumPy in float64.

    Attention in float32 has no kernel on a GPU; `demo` compares its log-probs.
    """
    return [
        *_attention_parity(tiny),
        *_paged_parity(tiny),
        *_gated_parity(tiny),
        *_sampler_parity(tiny),
    ]


def uniform(rng, *shape: int, dtype) -> jax.Array:
    """Return bounded random numbers of variance 1."""
    return jnp.asarray(rng.uniform(-(3**0.5), 3**0.5, shape), dtype)


def _compared(dtype: str, **differences: float) -> dict[str, Any]:
    """Return differences with the bar of their dtype; NaN does not pass."""
    bar = BARS[dtype]
    passed = all(difference <= bar for difference in differences.values())
    return {**differences, "bar": bar, "passed": passed}


def precision(dtype: str):
    """Return the context in which commands run programs of this dtype."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


def _attention_parity(tiny: bool) -> list[Measurement]:
    shapes = {"text": (2, 2048, 28, 4, 128, True), "vision": (2, 2048, 16, 16, 80, False)}
    if tiny:
        shapes = {"text": (2, 128, 4, 2, 32, True)}
    of_gpu = ("cudnn", "triton", "mosaic") if sharding.is_hopper() else ("cudnn", "triton")
    kernels = {  # those that `attention.choose` may return for long rows
        ("gpu", "bfloat16"): of_gpu,
        ("gpu", "float32"): (),
        ("tpu", "bfloat16"): ("splash",),
        ("tpu", "float32"): ("splash",),
    }
    return [
        Measurement(
            f"attention {name}, {tower}, {dtype}",
            functools.partial(attention_difference, name, *shape, dtype),
        )
        for dtype in BARS
        for name in kernels.get((jax.default_backend(), dtype), ("blockwise",))
        for tower, shape in shapes.items()
    ]


@functools.cache
def _attention_program(implementation: Attention, causal: bool) -> Callable:
    """Return a program that computes attention and the gradients of a weighted sum of its output.

    Cached, so that the reference is compiled once for each shape.
    """

    def output(q, k, v, weights, segment_ids, prefix_ids):
        out = attention.attention(
            q, k, v, segment_ids, prefix_ids, causal=causal, implementation=implementation,
            single_segment=implementation == "cudnn",
        ).astype(jnp.float32)  # fmt: skip
        mask = (segment_ids != 0)[..., None, None]
        return (out * weights * mask).sum(), out * mask

    def program(*arrays):
        gradients, out = jax.grad(output, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return out, [gradient.astype(jnp.float32) for gradient in gradients]

    return jax.jit(program)


def attention_difference(
    name: Attention, B: int, T: int, N: int, K: int, H: int, causal: bool, dtype: str
) -> dict[str, Any]:
    """Compare an implementation of attention and its gradient with `xla` in float32."""
    rng = np.random.default_rng(0)
    q, k, v = (uniform(rng, B, T, n, H, dtype=dtype) for n in (N, K, K))
    ids = np.ones((B, T), np.int32)
    if name != "cudnn":  # which takes one segment
        ids[0, T // 3 :], ids[0, T // 2 :] = 2, 3
    ids[1, -T // 4 :] = 0
    prefixes = None if name in ("cudnn", "triton") else np.where(ids == 3, 1, 0).astype(np.int32)
    weights = uniform(rng, B, T, N, H, dtype=jnp.float32)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    with precision("float32"):
        reference = _attention_program("xla", causal)
        expected, expected_gradients = reference(*exact, weights, ids, prefixes)
    with precision(dtype):
        ours, gradients = _attention_program(name, causal)(q, k, v, weights, ids, prefixes)
    pairs = zip(gradients, expected_gradients, strict=True)
    relative = np.array([float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs])
    difference = float(jnp.abs(ours - expected).max())
    return _compared(dtype, difference=difference, gradient_difference=float(relative.max()))


def _paged_parity(tiny: bool) -> list[Measurement]:
    B, N, K, H, size, pages = (8, 4, 2, 32, 16, 4) if tiny else (16, 28, 4, 128, 128, 32)
    cases = [(T, dtype) for dtype in BARS for T in (1, 24 if tiny else 256)]
    if jax.default_backend() == "gpu":  # which in float32 uses the XLA form itself
        cases = [(T, dtype) for T, dtype in cases if dtype == "bfloat16"]
    measurements = [
        Measurement(
            f"paged attention, {T} new tokens, {dtype}",
            functools.partial(paged_difference, B, T, N, K, H, size, pages, dtype),
        )
        for T, dtype in cases
    ]
    decode_shapes = [(16, 28, 4, 128, 64, 64), (16, 28, 4, 128, 128, 32), (16, 28, 4, 64, 128, 32)]
    if tiny:
        decode_shapes = [(3, 4, 1, 64, 64, 2)]
    elif jax.default_backend() != "gpu":
        decode_shapes = []
    return measurements + [
        Measurement(
            f"paged_decode, pages of {shape[4]}, head dimension {shape[3]}",
            functools.partial(decode_kernel_difference, *shape),
        )
        for shape in decode_shapes
    ]


def paged_inputs(B, T, N, K, H, size, pages, dtype):
    """Return queries, shuffled head-major pages, and rows of all lengths, one of them skipped."""
    rng = np.random.default_rng(0)
    q = uniform(rng, B, T, N, H, dtype=dtype)
    cache = uniform(rng, B * pages, K, 2, size, H, dtype=dtype)
    table = rng.permutation(B * pages).reshape(B, pages).astype(np.int32)
    start = np.linspace(0, pages * size - T, B).astype(np.int32)
    count = np.full(B, T, np.int32)
    count[1] = 0
    count[2] = (T + 1) // 2
    return q, cache, PagedRows(table=table, start=start, count=count)


def _paged_reference(q, cache, rows: PagedRows) -> jax.Array:
    q, cache = q.astype(jnp.float32), cache.astype(jnp.float32)
    with precision("float32"):
        return jax.jit(paged_attention._xla)(q, cache, rows)


def paged_difference(
    B: int, T: int, N: int, K: int, H: int, size: int, pages: int, dtype: str
) -> dict[str, Any]:
    """Compare the platform's attention over pages with its XLA form in float32."""
    q, cache, rows = paged_inputs(B, T, N, K, H, size, pages, dtype)
    expected = _paged_reference(q, cache, rows)
    if paged_attention.token_major(H):
        cache = cache.transpose(0, 3, 1, 2, 4).reshape(B * pages, size, 2 * K, H)
    with precision(dtype):
        ours = jax.jit(paged_attention.paged_attention)(q, cache, rows).astype(jnp.float32)
    mask = (np.arange(T) < rows.count[:, None])[..., None, None]
    difference = float(jnp.abs(jnp.where(mask, ours - expected, 0)).max())
    return _compared(dtype, difference=difference)


def decode_kernel_difference(
    B: int, N: int, K: int, H: int, size: int, pages: int
) -> dict[str, Any]:
    """Compare the kernel for GPUs with the XLA form; on a CPU the interpreter runs it."""
    q, cache, rows = paged_inputs(B, 1, N, K, H, size, pages, "bfloat16")
    rows = rows.replace(count=np.ones(B, np.int32))
    expected = _paged_reference(q, cache, rows)[:, 0]
    interpret = jax.default_backend() == "cpu"
    kernel = jax.jit(functools.partial(gpu_paged_attention.paged_decode, interpret=interpret))
    kv = cache.reshape(B * pages, 2 * K, size, H)
    ours = kernel(q[:, 0], kv, rows.table, rows.start + 1).astype(jnp.float32)
    return _compared("bfloat16", difference=float(jnp.abs(ours - expected).max()))


def _gated_parity(tiny: bool) -> list[Measurement]:
    """Compare the gated product's kernel for GPUs, and the gated layer's for TPUs."""
    kernels = {"gpu": ("gated_linear",), "tpu": ("gated_mlp",)}.get(jax.default_backend(), ())
    rows, F, D = 1024, 18944, 3584
    if tiny:
        kernels, rows, F, D = ("gated_linear", "gated_mlp"), 256, 256, 256
    return [
        Measurement(
            f"{name}, {rows} rows, {D} to {F}",
            functools.partial(gated_difference, rows, F, D, whole_layer=name == "gated_mlp"),
        )
        for name in kernels
    ]


def gated_difference(rows: int, F: int, D: int, whole_layer: bool) -> dict[str, Any]:
    """Compare the kernel of the gated product or layer with XLA; a CPU runs it in the interpreter.

    The hidden units of the layer are rounded before its last product in both.
    """
    rng = np.random.default_rng(0)
    x = uniform(rng, rows, D, dtype="bfloat16")
    gate, up = (uniform(rng, F, D, dtype="bfloat16") * D**-0.5 for _ in range(2))
    with precision("float32"):
        gated, raw = (jax.jit(jnp.dot)(*map(jnp.float32, (x, w.T))) for w in (gate, up))
    expected, function, arrays = jax.nn.silu(gated) * raw, gpu_gated_linear.gated_linear, (gate, up)
    if whole_layer:
        down = uniform(rng, D, F, dtype="bfloat16") * F**-0.5
        hidden = jnp.float32(expected.astype(jnp.bfloat16))
        with precision("float32"):
            expected = jax.jit(jnp.dot)(hidden, jnp.float32(down.T))
        function, arrays = tpu_gated_mlp.gated_mlp, (gate, up, down)
    kernel = jax.jit(functools.partial(function, interpret=jax.default_backend() == "cpu"))
    difference = jnp.abs(kernel(x, *arrays) - expected) / jnp.maximum(1, jnp.abs(expected))
    return _compared("bfloat16", difference=float(difference.max()))


def _sampler_parity(tiny: bool) -> list[Measurement]:
    shape = (8, 512) if tiny else (64, 152064)
    reductions = [
        Measurement(
            f"sampler, {reduce.__name__}", functools.partial(reduction_error, reduce, shape)
        )
        for reduce in (sampler.reduce_in_passes, sampler.reduce_at_once)
    ]
    bits = 1 if jax.default_backend() == "cpu" and not tiny else 4  # as `sampler.sample` chooses
    limits = functools.partial(limits_error, bits, shape)
    return [*reductions, Measurement(f"sampler, top-k and top-p by {bits} bits", limits)]


def reduction_error(reduce: Callable, shape: tuple[int, int]) -> dict[str, Any]:
    """Compare a reduction of the sampler with NumPy in float64."""
    rng = np.random.default_rng(0)
    scaled = rng.normal(size=shape, scale=3).astype(np.float32)
    kept = rng.random(shape) < 0.7
    perturbed = np.where(kept, scaled + rng.gumbel(size=shape), -np.inf).astype(np.float32)
    tokens, *lses = jax.jit(reduce)(perturbed, scaled, kept)
    exponentials = np.exp(scaled.astype(np.float64))
    expected = [np.log(np.where(mask, exponentials, 0).sum(axis=1)) for mask in (kept, ~kept)]
    wrong = int((np.asarray(tokens) != perturbed.argmax(axis=1)).sum())
    return _compared(
        "float32",
        difference=float(np.abs(np.array(lses, np.float64) - np.array(expected)).max()),
        wrong_tokens=wrong,
    )


def limits_error(bits: int, shape: tuple[int, int]) -> dict[str, Any]:
    """Compare the least likely token that top-k and top-p keep with that of a sort.

    Returns:
      The largest share of the probability by which a row is beside its top-p, in `difference`, and
      the number of rows with another top-k, in `wrong_rows`.
    """
    rng = np.random.default_rng(0)
    B, V = shape
    logits, allowed = rng.normal(size=shape, scale=3).astype(np.float32), rng.random(V) < 0.9
    sampling = sampler.Sampling(
        temperature=np.full(B, 0.7, np.float32),
        top_k=np.resize(np.array([50, 0, 300, 1], np.int32), B),
        top_p=np.resize(np.array([1, 0.9, 0.95, 1], np.float32), B),
        greedy=np.zeros(B, bool),
    )
    search = jax.jit(functools.partial(sampler.least_likely, bits=bits))
    difference, wrong = 0.0, 0
    for row, least in enumerate(np.asarray(search(logits, sampling, allowed))):
        likely = np.sort(logits[row, allowed])[::-1][: sampling.top_k[row] or None]
        p, masses = sampling.top_p[row], np.exp((likely - likely[0]) / np.float64(0.7))
        if p == 1:
            wrong += int(least != likely[-1])
            continue
        kept, above = (
            masses[mask].sum() / masses.sum() for mask in (likely >= least, likely > least)
        )
        difference = max(difference, float(p - kept), float(above - p))
    return _compared("float32", difference=difference, wrong_rows=wrong)
