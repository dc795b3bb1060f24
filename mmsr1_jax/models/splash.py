"""Attention over packed rows on TPUs, by JAX's splash kernel.

The kernel separates segments by their ids. A query whose segment continues another one attends in
two parts, to its own segment and to the prefix, each with the log of the sum of its exponentials:

    out = w1 out1 + w2 out2,    w = exp(l - logsumexp),    logsumexp = log(exp(l1) + exp(l2))

The backward kernels compute the weights of a part from its scores and the logsumexp that they are
given. With the merged output and logsumexp, the gradients of both parts are exact, and add up.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jaxtyping import Float, Int32

BLOCK, ROW_MULTIPLE = 512, 128


def attention(
    q: Float[jax.Array, "B T N H"],
    k: Float[jax.Array, "B T K H"],
    v: Float[jax.Array, "B T K H"],
    segment_ids: Int32[jax.Array, "B T"],
    prefix_ids: Int32[jax.Array, "B T"] | None = None,
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[jax.Array, "B T N H"]:
    """Compute `attention.attention` for rows whose length is a multiple of `ROW_MULTIPLE`.

    Args:
      q: float[B, T, N, H].
      k, v: float[B, T, K, H].
      segment_ids: int32[B, T].
      prefix_ids: int32[B, T], -1 for none; None: no segment continues another.
      causal: Whether to mask the keys after each query.
      interpret: Whether to run the kernel in Pallas' interpreter.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # The kernel needs a head dimension that is a multiple of 128. Zeros do not change the result.
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, -H % 128),)) for x in (q * H**-0.5, k, v))
    q = q.reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    if prefix_ids is None:
        kernel = _kernel(T, N // K, causal, save_residuals=False, interpret=interpret)
        out = _rows(kernel, q, k, v, segment_ids, segment_ids)
    else:
        kernel = _kernel(T, N // K, causal, save_residuals=True, interpret=interpret)
        out = _with_prefix(kernel, q, k, v, segment_ids, prefix_ids)
    return jnp.asarray(out).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)[..., :H].astype(v.dtype)


def _kernel(T: int, heads: int, causal: bool, *, save_residuals: bool, interpret: bool):
    mask_type = splash.CausalMask if causal else splash.FullMask
    mask = splash.MultiHeadMask([mask_type((T, T))] * heads)
    block = BLOCK if T % BLOCK == 0 else ROW_MULTIPLE
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash.make_splash_mqa_single_device(
        mask, block_sizes=sizes, save_residuals=save_residuals, interpret=interpret
    )


def _rows(kernel, q, k, v, q_ids, kv_ids):
    """Run the kernel for each row and kv head."""
    ids = splash.SegmentIds(q=q_ids, kv=kv_ids)
    return jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(q, k, v, ids)


def _forward(kernel, q, k, v, segment_ids, prefix_ids):
    parts = [_rows(kernel, q, k, v, ids, segment_ids) for ids in (segment_ids, prefix_ids)]
    outs, sums = [out for out, _ in parts], jnp.stack([sums for _, (sums,) in parts])
    # A query without a visible key has a finite sum, of masked scores, that weighs nothing.
    logsumexp = jax.nn.logsumexp(sums, axis=0)
    weights = jnp.exp(sums - logsumexp)[..., None]
    out = sum(w * out.astype(jnp.float32) for w, out in zip(weights, outs, strict=True))
    out = jnp.asarray(out).astype(q.dtype)
    return out, (kernel, q, k, v, segment_ids, prefix_ids, out, logsumexp)


def _backward(saved, g):
    kernel, q, k, v, segment_ids, prefix_ids, out, logsumexp = saved
    options = {name: x for name, x in kernel.kwargs.items() if name != "save_residuals"}

    def gradients(q, k, v, ids, out, logsumexp, g):
        masks = kernel.dq_mask_info, kernel.dkv_mask_info
        residuals = (q, k, v, ids, None, out, logsumexp, *masks)
        results = splash_attention_kernel._splash_attention_bwd(
            save_residuals=False, res=residuals, do=g, **options
        )
        return results[3:6]

    def add(ids):
        of_heads = jax.vmap(gradients, in_axes=(0, 0, 0, None, 0, 0, 0))
        ids = splash.SegmentIds(q=ids, kv=segment_ids)
        return jax.vmap(of_heads)(q, k, v, ids, out, logsumexp, g)

    own, prefix = add(segment_ids), add(prefix_ids)
    return (None, *(a + b for a, b in zip(own, prefix, strict=True)), None, None)


@jax.custom_vjp
def _with_prefix(kernel, q, k, v, segment_ids, prefix_ids):
    return _forward(kernel, q, k, v, segment_ids, prefix_ids)[0]


_with_prefix.defvjp(_forward, _backward)
