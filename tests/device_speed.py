"""Speed of the kernels that a platform uses, each beside what else could compute the same."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmsr1_jax.models import attention, gpu_gated_linear, paged_attention, sharding
from tests.bench import model as model_bench
from tests.bench import rollout as rollout_bench
from tests.device_parity import Measurement, paged_inputs, uniform

CALLS = 10  # of a program, one after the other, whose time is measured together


def speed(tiny: bool) -> list[Measurement]:
    """Measure attention with its gradient, attention over pages, and the gated product."""
    measurements = [
        Measurement(
            f"attention {name}, {tower}, rows of {shape[1]} tokens, segments of {segment}",
            functools.partial(attention_speed, name, *shape, segment, causal),
        )
        for name, tower, shape, segment, causal in _attention_cases(tiny)
    ]
    B, N, K, H, size, pages = (4, 4, 2, 32, 16, 4) if tiny else (64, 28, 4, 128, 128, 16)
    paged = functools.partial(paged_speed, B, N, K, H, size, pages)
    measurements.append(Measurement(f"paged attention, {B} lanes of {size * pages} tokens", paged))
    if jax.default_backend() == "gpu":
        for kernel in (True, False):
            name = f"gated product, {'kernel' if kernel else 'XLA'}, 1024 rows, 3584 to 18944"
            gated = functools.partial(gated_speed, 1024, 3584, 18944, kernel)
            measurements.append(Measurement(name, gated))
    return measurements


def _attention_cases(tiny: bool):
    """Yield an implementation, a tower, the shape [B, T, N, K, H], a segment, and causality."""
    if tiny:
        yield "blockwise", "text", (1, 128, 4, 2, 32), 64, True
        return
    text, vision = (1, 8192, 28, 4, 128), (1, 8192, 16, 16, 80)
    if jax.default_backend() == "tpu":
        packed, single = ["splash"], []
    elif sharding.is_hopper():
        packed, single = ["mosaic", "triton"], ["mosaic", "cudnn"]
    else:
        packed, single = ["triton"], ["triton", "cudnn"]
    for name in packed:
        yield name, "text", text, 2048, True
    for name in single:
        yield name, "text", text, 8192, True
    for name in packed:
        yield name, "vision", vision, 2048, False


def _seconds(program: Callable, *arrays) -> float:
    def run():
        for _ in range(CALLS):
            out = program(*arrays)
        jax.block_until_ready(out)

    return model_bench.best_seconds({"": run}, 5)[""] / CALLS


def attention_speed(
    name, B: int, T: int, N: int, K: int, H: int, segment: int, causal: bool
) -> dict[str, Any]:
    """Measure attention of packed rows, and attention with its gradient.

    FLOPs are those of the pairs of tokens that see each other: 4 H a pair and head forward, and
    10 H more for the gradient (five products, one of which computes the scores again).
    """
    rng = np.random.default_rng(0)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    q, k, v = (uniform(rng, B, T, n, H, dtype=dtype) for n in (N, K, K))
    ids = jnp.asarray(np.broadcast_to(1 + np.arange(T) // segment, (B, T)), jnp.int32)

    def output(q, k, v):
        return attention.attention(
            q, k, v, ids, None, causal=causal, implementation=name,
            single_segment=name == "cudnn",
        )  # fmt: skip

    def loss(*arrays):
        return output(*arrays).astype(jnp.float32).sum()

    forward, both = jax.jit(output), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    seconds = [_seconds(program, q, k, v) for program in (forward, both)]
    pairs = B * N * T * segment / (2 if causal else 1)
    return {
        "forward_tflops": 4 * H * pairs / seconds[0] / 1e12,
        "forward_and_gradient_tflops": 14 * H * pairs / seconds[1] / 1e12,
        "milliseconds": [round(1e3 * s, 3) for s in seconds],
    }


def paged_speed(B: int, N: int, K: int, H: int, size: int, pages: int) -> dict[str, Any]:
    """Measure attention of one new token a row over full pages, and its share of the bandwidth.

    A program computes it for several caches after each other, as the layers of a decoding step do,
    so that no cache is read from the L2 cache of the chip.
    """
    dtype, layers = ("float32" if jax.default_backend() == "cpu" else "bfloat16"), 4
    q, cache, rows = paged_inputs(B, 1, N, K, H, size, pages, dtype)
    rows = rows.replace(start=np.full(B, size * pages - 1, np.int32), count=np.ones(B, np.int32))
    if paged_attention.token_major(H):
        cache = cache.transpose(0, 3, 1, 2, 4).reshape(B * pages, size, 2 * K, H)
    caches = [jnp.array(cache) for _ in range(layers)]

    @jax.jit
    def run(q, caches, rows):
        for cache in caches:
            q = paged_attention.paged_attention(q, cache, rows)
        return q

    seconds = _seconds(run, q, caches, jax.device_put(rows)) / layers
    bandwidth = rollout_bench.copy_bandwidth()
    return {
        "microseconds": seconds * 1e6,
        "gigabytes_per_second": cache.nbytes / seconds / 1e9,
        "share_of_copy_bandwidth": cache.nbytes / seconds / bandwidth,
    }


def gated_speed(rows: int, D: int, F: int, kernel: bool) -> dict[str, Any]:
    """Measure the gated product of an extend, by the kernel for GPUs or by XLA."""
    rng = np.random.default_rng(0)
    x = uniform(rng, rows, D, dtype="bfloat16")
    gate, up = (uniform(rng, F, D, dtype="bfloat16") * D**-0.5 for _ in range(2))

    def by_xla(x, gate, up):
        return jax.nn.silu(x @ gate.T) * (x @ up.T)

    program = jax.jit(gpu_gated_linear.gated_linear if kernel else by_xla)
    seconds = _seconds(program, x, gate, up)
    return {"tflops": 4 * rows * D * F / seconds / 1e12, "microseconds": seconds * 1e6}
