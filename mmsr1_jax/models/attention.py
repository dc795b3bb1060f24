"""One attention, several implementations behind it.

    q: [B, T, N, H]   k, v: [B, S, K, H]   ->   [B, T, N, H]      (G = N / K query heads a kv head)

Who sees whom is said by segment ids, int32 [B, T] and [B, S]: a query sees the keys of its own
segment, and with `causal=True` only those at or before its own index. Two conversations packed into
one row of eight, padded with segment 0:

    segment ids   1 1 1 2 2 2 2 0          query 4 (segment 2) sees keys 3, 4
                                           query 2 (segment 1) sees keys 0, 1, 2

Queries of segment 0 are padding: their result is finite and means nothing.

| name        | where  | memory for scores | packing               |
|-------------|--------|-------------------|-----------------------|
| `xla`       | all    | [T, S]            | mask                  |
| `blockwise` | all    | [T, block]        | mask, a block a time  |
| `cudnn`     | GPU    | none              | only rows of a single segment, padded at the end |
| `triton`    | GPU    | none              | segment ids in the kernel |
| `splash`    | TPU    | none              | segment ids in the kernel |

`auto` picks per platform and shape: see `choose`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmsr1_jax import sharding

Implementation = Literal["auto", "xla", "blockwise", "cudnn", "triton", "splash"]
IMPLEMENTATIONS: tuple[str, ...] = ("auto", "xla", "blockwise", "cudnn", "triton", "splash")

# Up to this many keys the plain form is the fastest everywhere and its scores are small.
_PLAIN_KEYS = 1024
_BLOCK = 512  # keys of one step of `blockwise`; also the block of the TPU kernel
_MASKED = -1e30  # finite: a row with no visible key gives a mean, not NaN


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    causal: bool,
    single_segment: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped queries over packed rows.

    Args:
      q: float[B, T, N, H].
      k: float[B, T, K, H], N a multiple of K.
      v: float[B, T, K, H].
      segment_ids: int32[B, T], 0 for padding.
      causal: a query sees no key after it.
      single_segment: a promise that each row holds one segment, padded at its end; lets cuDNN run.
      implementation: see the table above. Softmax is in float32 in all of them.

    Returns:
      float[B, T, N, H] in the dtype of `q`.

    Raises:
      ValueError: an unknown implementation, or `cudnn` without `single_segment`.
    """
    k, v = _expand_kv(q, k, v)
    name = choose(implementation, k.shape[1], q.dtype, single_segment)
    if name == "xla":
        return _xla(q, k, v, segment_ids, causal)
    if name == "blockwise":
        return _blockwise(q, k, v, segment_ids, causal)
    if name == "cudnn":
        return _cudnn(q, k, v, segment_ids, causal)
    if name == "triton":
        return _per_device(functools.partial(_triton, causal=causal), q, k, v, segment_ids)
    return _per_device(functools.partial(_splash, causal=causal), q, k, v, segment_ids)


def choose(implementation: str, keys: int, dtype, single_segment: bool) -> str:
    """The implementation that `attention` runs for these static facts on this platform."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention: {implementation!r} is not one of {IMPLEMENTATIONS}")
    if implementation == "cudnn" and not single_segment:
        raise ValueError("attention: cudnn cannot keep packed segments apart; use triton")
    if implementation != "auto":
        return implementation
    platform = jax.default_backend()
    half = dtype in (jnp.bfloat16, jnp.float16)
    if keys <= _PLAIN_KEYS:
        return "xla"
    if platform == "gpu" and half:
        return "cudnn" if single_segment else "triton"
    if platform == "tpu" and keys % _BLOCK == 0:
        return "splash"
    return "blockwise"


def _expand_kv(q, k, v):
    """Repeats kv heads up to the tensor axis where that axis has more devices than there are."""
    ways, kv_heads = sharding.mesh_axis_size("kv_heads"), k.shape[2]
    if ways > kv_heads and ways % kv_heads == 0 and q.shape[2] % ways == 0:
        k, v = (jnp.repeat(x, ways // kv_heads, axis=2) for x in (k, v))
    return tuple(sharding.constrain(x, "batch", None, "kv_heads", None) for x in (k, v))


def _visible(q_ids, kv_ids, q_index, kv_index, causal: bool):
    """bool[B, T, S]: which key a query may see."""
    seen = q_ids[:, :, None] == kv_ids[:, None, :]
    return seen & (q_index[:, None] >= kv_index[None, :]) if causal else seen


def _scores(q, k, visible):
    """float32[B, K, G, T, S], masked; q is [B, T, K, G, H]."""
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None, None], scores * q.shape[-1] ** -0.5, _MASKED)


@functools.partial(jax.checkpoint, static_argnums=4)  # scores are made again for the gradient
def _xla(q, k, v, segment_ids, causal: bool):
    B, T, N, H = q.shape
    K = k.shape[2]
    index = jnp.arange(T)
    visible = _visible(segment_ids, segment_ids, index, index, causal)
    scores = _scores(q.reshape(B, T, K, N // K, H), k, visible)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


@functools.partial(jax.checkpoint, static_argnums=4)
def _blockwise(q, k, v, segment_ids, causal: bool):
    """The online softmax of FlashAttention (arXiv 2205.14135, algorithm 1), a block of keys a step.

    With m the largest score so far, total = sum exp(s - m) and o = sum exp(s - m) v, a new block
    with its own maximum rescales both by exp(m_old - m_new).
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    G, block = N // K, min(_BLOCK, T)
    pad = -T % block
    ids = jnp.pad(segment_ids, ((0, 0), (0, pad)), constant_values=-1)
    blocks = (T + pad) // block

    def split(x):  # [B, S, ...] -> [S / block, B, block, ...]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, blocks, block, *x.shape[2:]), 1, 0)

    grouped = q.reshape(B, T, K, G, H)
    q_index = jnp.arange(T)

    @jax.checkpoint
    def step(carry, xs):
        m, total, o = carry
        k_block, v_block, ids_block, start = xs
        kv_index = start + jnp.arange(block)
        visible = _visible(segment_ids, ids_block, q_index, kv_index, causal)
        scores = _scores(grouped, k_block, visible)
        m_new = jnp.maximum(m, scores.max(axis=-1))
        weights = jnp.exp(scores - m_new[..., None])
        scale = jnp.exp(m - m_new)
        total = total * scale + weights.sum(axis=-1)
        added = jnp.einsum(
            "bkgts,bskh->bkgth", weights.astype(v.dtype), v_block,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return (m_new, total, o * scale[..., None] + added), None

    zero = jnp.zeros((B, K, G, T), jnp.float32)
    carry = (zero + _MASKED, zero, jnp.zeros((B, K, G, T, H), jnp.float32))
    ids_blocks = jnp.moveaxis(ids.reshape(B, blocks, block), 1, 0)
    xs = (split(k), split(v), ids_blocks, jnp.arange(blocks) * block)
    (_, total, o), _ = jax.lax.scan(step, carry, xs)
    return jnp.moveaxis(o / total[..., None], 3, 1).reshape(B, T, N, H).astype(q.dtype)


def _cudnn(q, k, v, segment_ids, causal: bool):
    lengths = (segment_ids != 0).sum(axis=1).astype(jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        implementation="cudnn",
    )  # fmt: skip


def _triton(q, k, v, segment_ids, *, causal: bool, interpret: bool = False):
    from jax.experimental.pallas.ops.gpu import attention as kernel

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    block = 64 if q.shape[1] % 128 else 128
    sizes = kernel.BlockSizes(
        block_q=block, block_k=block, block_q_dkv=block // 2, block_kv_dkv=block // 2,
        block_q_dq=block // 2, block_kv_dq=block // 2,
    )  # fmt: skip
    return kernel.mha(
        q, k, v, segment_ids, sm_scale=q.shape[-1] ** -0.5, causal=causal, block_sizes=sizes,
        interpret=interpret,
    )  # fmt: skip


def _splash(q, k, v, segment_ids, *, causal: bool, interpret: bool = False):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, N, H = q.shape
    K = k.shape[2]
    mask_type = splash.CausalMask if causal else splash.FullMask
    mask = splash.MultiHeadMask([mask_type((T, T))] * (N // K))
    block = min(_BLOCK, T)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=interpret)
    # The kernel wants heads of a multiple of 128 lanes; zeros change neither scores nor sums.
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, -H % 128),)) for x in (q * H**-0.5, k, v))
    q = q.reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    ids = splash.SegmentIds(q=segment_ids, kv=segment_ids)
    out = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(q, k, v, ids)  # rows, kv heads
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)[..., :H].astype(v.dtype)


def _per_device(kernel, q, k, v, segment_ids):
    """Runs a kernel that knows no mesh on each device's own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segment_ids)
    names = ("batch", None, "heads", None)
    kv_spec = sharding.partition_spec(("batch", None, "kv_heads", None), k.shape, mesh)
    spec = sharding.partition_spec(names, q.shape, mesh)
    if kv_spec != spec:  # heads that cannot be split alike: every device computes all of them
        spec = kv_spec = PartitionSpec(spec[0])
    ids_spec = PartitionSpec(spec[0])
    return jax.shard_map(
        kernel, mesh=mesh, in_specs=(spec, kv_spec, kv_spec, ids_spec), out_specs=spec,
        check_vma=False,
    )(q, k, v, segment_ids)  # fmt: skip
