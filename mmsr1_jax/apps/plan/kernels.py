"""Costs of kernels: attention, paged attention, the gated product and the gated layer."""

import dataclasses
import math
from collections.abc import Sequence

from mmsr1_jax.apps.plan.hlo import Array
from mmsr1_jax.apps.plan.traffic import Kernel, KernelCost
from mmsr1_jax.models import (
    gpu_packed_attention,
    gpu_paged_attention,
    gpu_paged_prefill,
    paged_attention,
)

_BLOCK = 512  # queries and keys of a block of the TPU kernel for rows without a cache
# Products of [T, H] and [T, T] matrices in a kernel, by a part of its path: scores and output; with
# the gradients of q; of k and v; of all three.
_PRODUCTS = {
    "splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4,
    "mha_forward": 2, "mha_backward": 5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visible:
    """What the tokens and patches of packed rows see, on which the cost of their kernels depends.

    Rows of text are causal, and hold one segment, or a prompt and one segment that continues it: no
    others have more pairs of tokens that see each other. Those of the vision tower are not causal.

    Attributes:
      length: Number of tokens of a row of text; 0: there are none.
      parts: Number of runs of the TPU kernel that compute a row of text: 2 with prefixes.
      image_patches: Number of patches of an image.
      image_keys: Number of patches that a patch sees, mean over the layers of the vision tower.
    """

    length: int = 0
    parts: int = 1
    image_patches: int
    image_keys: float


def attention_kernels(visible: Visible) -> dict[str, Kernel]:
    """Return the costs of the kernels of packed rows, for `traffic.measure`."""

    def is_text(path: str, T: int) -> bool:
        return visible.length == T and "/cond" not in path

    def cost(path: str, operands: Sequence[Array]) -> KernelCost:
        # A device with a single kv head has k and v as matrices [T, H].
        matrices = [a for a in operands if len(a.shape) >= 2 and a.dtype in ("bf16", "f32")]
        is_splash, q = "splash" in path, matrices[0]
        once = sum(a.memory_bytes for a in operands) + q.memory_bytes
        products = next((n for name, n in _PRODUCTS.items() if name in path), 0)
        if not products:  # preparation of the backward pass
            return KernelCost(once)
        T = q.shape[-2] if is_splash else q.shape[1]  # [N, T, H], or [B, T, N, H]
        if not is_splash:  # on a GPU the L2 cache holds what is read again
            # The loops of the kernel know causality, but not the segments.
            share = 0.5 if is_text(path, T) else 1.0
            return KernelCost(once, 2.0 * products * q.size * T * share)
        indices = [a for a in operands if len(a.shape) == 2 and a.dtype == "s32"]
        share = min(1.0, (visible.image_keys + _BLOCK) / T)
        if len(indices) == 3:  # ids of queries and of keys, and the order of queries: causal
            share = 0.5 / visible.parts
        if "_fwd_" in path and "no_residuals" not in path:
            once += 4.0 * q.size  # the log-sum-exp, in all lanes
        # Each block of queries fetches the blocks of k and v that it sees, for each query head (or
        # each block of keys those of q and its output's gradient).
        k, v = matrices[1:3]
        blocks = max(1.0, math.ceil(T / _BLOCK) * share)
        streamed = 2 * q.bytes if "dkv" in path else (k.bytes + v.bytes) * q.size / k.size
        return KernelCost(once + streamed * (blocks - 1), 2.0 * products * q.size * T * share)

    def packed(name: str) -> Kernel:
        def cost(path: str, operands: Sequence[Array]) -> KernelCost:
            q, k = operands[:2]  # [B, T, N, H], [B, T, K, H]
            causal = is_text(path, q.shape[1])
            return KernelCost(
                *gpu_packed_attention.kernel_cost(
                    name, q.shape, k.shape[2], causal, visible.image_patches
                )
            )

        return cost

    names = ("packed_forward", "packed_dq", "packed_dkv")
    return {**{name: packed(name) for name in names}, "pallas_call": cost}


def engine_kernels(filled: int, visible: Visible) -> dict[str, Kernel]:
    """Return the costs of the kernels of an engine's programs, for `traffic.measure`.

    Args:
      filled: Number of tokens of each row's lane before the new ones.
      visible: What the patches of images see.
    """

    def ragged(path: str, operands: Sequence[Array]) -> KernelCost:
        q = next(a for a in operands if len(a.shape) == 3)  # [B T, N, H]
        pages = next(a for a in operands if len(a.shape) == 4)  # [pages, page_size, 2K, H]
        B, num_pages = next(a for a in operands if len(a.shape) == 2).shape
        T, size = q.shape[0] // B, pages.shape[1]
        fetched = paged_attention.tpu_fetched_tokens(T, filled + T, size, num_pages)
        of_all = pages.bytes / pages.shape[0] / size * fetched * B
        keys = paged_attention.tpu_fetched_tokens(1, filled + T, size, num_pages)
        return KernelCost(of_all + 2 * q.memory_bytes, 4.0 * q.size * keys)

    def paged_decode(path: str, operands: Sequence[Array]) -> KernelCost:
        q, pages = operands[:2]
        return KernelCost(*gpu_paged_attention.decode_cost(q.shape, pages.shape, filled + 1))

    def paged_prefill(path: str, operands: Sequence[Array]) -> KernelCost:
        return KernelCost(*gpu_paged_prefill.prefill_cost(operands[0].shape, filled))

    def gated_linear(path: str, operands: Sequence[Array]) -> KernelCost:
        x, gate, _ = operands[:3]  # [rows, D], [F, D], [F, D]
        (rows, D), F = x.shape, gate.shape[0]
        written = x.bytes * F / D
        return KernelCost(sum(a.memory_bytes for a in operands) + written, 4.0 * rows * D * F)

    def gated_mlp(path: str, operands: Sequence[Array]) -> KernelCost:
        x, gate = operands[:2]  # [rows, D], [F, D]
        moved = sum(a.memory_bytes for a in operands) + x.bytes
        return KernelCost(moved, 6.0 * x.shape[0] * gate.size)

    return {
        "ragged_paged_attention": ragged, "paged_decode": paged_decode,
        "paged_prefill": paged_prefill, "gated_linear": gated_linear,
        "gated_mlp": gated_mlp, **attention_kernels(visible),
    }  # fmt: skip
