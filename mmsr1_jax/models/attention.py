"""Multi-head attention with several implementations behind one function.

    q: [B, T, N, H]   k, v: [B, S, K, H]   ->   [B, T, N, H]    (N / K query heads per kv head)

Segment ids, int32[B, T] and int32[B, S], define the mask: a query attends to the keys of its own
segment, and with `causal=True` only to those at or before its own index. Two conversations packed
into one row of eight tokens, padded with segment 0:

    segment ids   1 1 1 2 2 2 2 0          query 4 (segment 2) attends to keys 3, 4
                                           query 2 (segment 1) attends to keys 0, 1, 2

Queries of segment 0 are padding: their output is finite but undefined. A segment may continue
another one, its prefix, which several segments may share: its queries see both.

| name        | where  | memory for scores | packing                   | prefixes |
|-------------|--------|-------------------|---------------------------|----------|
| `xla`       | all    | [T, S]            | mask                      | yes      |
| `blockwise` | all    | [T, block]        | mask, block by block      | yes      |
| `cudnn`     | GPU    | none              | single-segment rows only, padded at the end | no |
| `triton`    | GPU    | none              | segment ids in the kernel | no       |
| `mosaic`    | Hopper | none              | segment ids in the kernel | yes      |
| `splash`    | TPU    | none              | segment ids in the kernel | yes      |

The kernels with prefixes are `models.gpu_packed_attention` and `models.splash`. `auto` selects by
platform and shape, see `choose`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from mmsr1_jax.config.choices import ATTENTION, Attention
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import sharding
from mmsr1_jax.utils.arrays import AnyArray

# Up to this many keys, `xla` is the fastest on every platform and its scores are small.
_MAX_XLA_KEYS = 1024
_BLOCK = 512  # keys per step of `blockwise`; also the block size of the TPU kernel
# Row lengths must be a multiple of this.
_ROW_MULTIPLE = {"triton": 64, "mosaic": 128, "splash": 128}
_MASKED = -1e30  # finite, so that a row with no visible key yields a mean, not NaN


def attention(
    q: Float[jax.Array, "B T N H"],
    k: Float[jax.Array, "B T K H"],
    v: Float[jax.Array, "B T K H"],
    segment_ids: Int32[AnyArray, "B T"],
    prefix_ids: Int32[AnyArray, "B T"] | None = None,
    *,
    causal: bool,
    single_segment: bool = False,
    implementation: Attention = "auto",
) -> Float[jax.Array, "B T N H"]:
    """Compute scaled dot-product attention with grouped queries over packed rows.

    Args:
      q: float[B, T, N, H].
      k: float[B, T, K, H], N a multiple of K.
      v: float[B, T, K, H].
      segment_ids: int32[B, T], 0 for padding.
      prefix_ids: int32[B, T]. Segment whose tokens each token's segment continues, and sees; 0 for
        none. None: no segment continues another.
      causal: Whether to mask the keys after each query.
      single_segment: Promise that each row holds one segment, padded at its end. Required by cuDNN.
      implementation: Name from the table in the module's docstring. All compute the softmax in
        float32.

    Returns:
      float[B, T, N, H] in the dtype of `q`.

    Raises:
      UserError: If the implementation is unknown, `cudnn` is used without `single_segment`, or the
        named kernel does not support the row length.
    """
    k, v = _expand_kv(q, k, v)
    segment_ids = jnp.asarray(segment_ids)  # the custom gradients reject numpy constants
    name = choose(implementation, k.shape[1], q.dtype, single_segment)
    if prefix_ids is not None:
        if name in ("cudnn", "triton"):
            raise UserError(f"attention: {name} has no segments that continue others")
        # Padding is segment 0, which nothing continues
        prefix_ids = jnp.where(jnp.asarray(prefix_ids) > 0, prefix_ids, -1)
    if name in ("xla", "blockwise"):
        run = _xla if name == "xla" else _blockwise
        return run(q, k, v, (segment_ids, prefix_ids), causal)
    kernels = {"cudnn": _cudnn, "triton": _triton, "mosaic": _mosaic, "splash": _splash}
    ids = (segment_ids,) if prefix_ids is None else (segment_ids, prefix_ids)
    return _per_device(functools.partial(kernels[name], causal=causal), q, k, v, *ids)


def choose(implementation: str, keys: int, dtype: DTypeLike, single_segment: bool) -> str:
    """Return the implementation that `attention` uses for these arguments on this platform."""
    if implementation not in ATTENTION:
        raise UserError(f"attention: {implementation!r} is not one of {', '.join(ATTENTION)}")
    if implementation == "cudnn" and not single_segment:
        raise UserError("attention: cudnn cannot keep packed segments apart; use triton or mosaic")
    if keys % _ROW_MULTIPLE.get(implementation, 1):
        raise UserError(
            f"attention: {implementation} needs rows of a multiple of "
            f"{_ROW_MULTIPLE[implementation]} tokens, not {keys}"
        )
    if implementation != "auto":
        return implementation
    platform = sharding.platform()
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if keys <= _MAX_XLA_KEYS:
        return "xla"
    if platform == "gpu" and half and single_segment:
        return "cudnn"
    on_hopper = sharding.is_hopper() and jnp.dtype(dtype) == jnp.bfloat16
    if on_hopper and keys % _ROW_MULTIPLE["mosaic"] == 0:
        return "mosaic"
    if platform == "gpu" and half and keys % _ROW_MULTIPLE["triton"] == 0:
        return "triton"
    if platform == "tpu" and keys % _BLOCK == 0:
        return "splash"
    return "blockwise"


def supports_prefixes(implementation: str, keys: int, dtype: DTypeLike) -> bool:
    """Return whether the implementation for rows of several segments lets them continue others."""
    packed = choose(implementation, keys, dtype, single_segment=False)
    return packed not in ("cudnn", "triton")


def _expand_kv(q, k, v):
    """Repeat kv heads if the tensor axis has more devices than there are kv heads."""
    axis_size, kv_heads = sharding.mesh_axis_size("kv_heads"), k.shape[2]
    if axis_size > kv_heads and axis_size % kv_heads == 0 and q.shape[2] % axis_size == 0:
        k, v = (jnp.repeat(x, axis_size // kv_heads, axis=2) for x in (k, v))
    return tuple(sharding.constrain(x, "batch", None, "kv_heads", None) for x in (k, v))


def _visible(q_segments, kv_ids, q_index, kv_index, causal: bool):
    """Return the attention mask, bool[T, S].

    Args:
      q_segments: Segment and prefix of each query, int32[T] and int32[T] or None.
      kv_ids: Segment of each key, int32[S].
      q_index, kv_index: Position in the row of each query and key, int32[T] and int32[S].
      causal: Whether to mask the keys after each query.
    """
    ids, prefix_ids = q_segments
    visible = ids[:, None] == kv_ids[None, :]
    if prefix_ids is not None:
        visible |= prefix_ids[:, None] == kv_ids[None, :]
    return visible & (q_index[:, None] >= kv_index[None, :]) if causal else visible


def _xla(q, k, v, segments, causal: bool):
    """Compute attention with the full score matrix.

    On a CPU, large rows are computed one at a time, so that their scores reuse the same memory.
    Measured: 1.2 times the speed in the forward pass, 1.4 times with the gradient.
    """
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, N, T, H]
    B, N, T, _ = q.shape
    large = 4 * N * T * T >= 2**20
    if B > 1 and large and sharding.platform() == "cpu" and sharding.num_devices() == 1:
        out = jax.lax.map(lambda row: _row_attention(*row, causal), (q, k, v, segments))
    else:
        out = jax.vmap(functools.partial(_row_attention, causal=causal))(q, k, v, segments)
    return out.swapaxes(1, 2)


def _row_output(q, k, v, segments, causal: bool) -> jax.Array:
    """Compute attention of one row; q, k, v: [N, T, H] -> [N, T, H]."""
    return _row_attention_forward(q, k, v, segments, causal)[0]


def _row_mask(segments, causal: bool) -> jax.Array:
    """Return the attention mask of a row, bool[T, T]."""
    index = jnp.arange(segments[0].shape[0])
    return _visible(segments, segments[0], index, index, causal)


def _row_attention_forward(q, k, v, segments, causal):
    scores = jnp.einsum("nth,nsh->nts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(_row_mask(segments, causal), scores * q.shape[-1] ** -0.5, _MASKED)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("nts,nsh->nth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / total).astype(v.dtype)
    return out, (q, k, v, segments, out, (largest + jnp.log(total))[..., 0])


def _row_attention_backward(causal, saved, g):
    """Compute the gradients from scores that are computed again instead of stored.

    FlashAttention, arXiv 2205.14135, appendix B.2. Scores are transposed, keys by queries, so that
    the gradients of keys and values are plain products.
    """
    q, k, v, segments, out, logsumexp = saved
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("nsh,nth->nst", k, q, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(_row_mask(segments, causal).T, scores, _MASKED)
    weights = jnp.exp(scores - logsumexp[:, None])
    delta = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(axis=-1)
    d_weights = jnp.einsum("nsh,nth->nst", v, g, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - delta[:, None])).astype(q.dtype)
    dk = jnp.einsum("nst,nth->nsh", d_scores, q) * scale
    dv = jnp.einsum("nst,nth->nsh", weights.astype(v.dtype), g)
    d_scores = d_scores.swapaxes(1, 2)
    if sharding.platform() == "cpu":  # XLA's product of a transposed operand takes longer there
        d_scores = jax.lax.optimization_barrier(d_scores)
    dq = jnp.einsum("nts,nsh->nth", d_scores, k) * scale
    return dq, dk, dv, None


_row_attention = jax.custom_vjp(_row_output, nondiff_argnums=(4,))
_row_attention.defvjp(_row_attention_forward, _row_attention_backward)


def _blockwise(q, k, v, segments, causal: bool):
    """Compute FlashAttention (arXiv 2205.14135) in XLA.

    Keys are processed one block at a time, so no [T, T] array is materialised, neither in the
    forward nor in the backward pass.
    """
    B, T, _, H = q.shape
    block = min(_BLOCK, T)
    pad = -T % block

    def split(x):  # [B, S, K, H] -> [S / block, B, K, block, H]
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
        return x.reshape(B, -1, block, x.shape[2], H).transpose(1, 0, 3, 2, 4)

    kv_ids = jnp.pad(segments[0], ((0, 0), (0, pad)), constant_values=-2)
    kv_ids = kv_ids.reshape(B, -1, block).swapaxes(0, 1)
    out = _flash(q.swapaxes(1, 2), split(k), split(v), segments, kv_ids, causal)
    return out.swapaxes(1, 2)


def _flash_output(q, k, v, q_segments, kv_ids, causal: bool) -> jax.Array:
    """Compute blockwise attention.

    q: [B, N, T, H]; k, v: [blocks, B, K, block, H]; q_segments: ids and prefix ids, [B, T];
    kv_ids: [blocks, B, block].
    """
    return _flash_forward(q, k, v, q_segments, kv_ids, causal)[0]


def _block_scores(q, k, q_segments, kv_ids, block_index, causal: bool):
    """Return masked scores of all queries with one block of keys, float32[B, N, T, block].

    The block of keys has N heads, already repeated for grouped queries.
    """
    kv_index = block_index * k.shape[2] + jnp.arange(k.shape[2])
    visible = functools.partial(_visible, causal=causal)
    visible = jax.vmap(visible, (0, 0, None, None))(
        q_segments, kv_ids, jnp.arange(q.shape[2]), kv_index
    )
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None], scores * q.shape[-1] ** -0.5, _MASKED)


def _flash_forward(q, k, v, q_segments, kv_ids, causal):
    """Run algorithm 1 of FlashAttention.

    With m the largest score so far, total = sum of exp(s - m) and o = sum of exp(s - m) v. Each
    block updates the maximum and rescales both sums by exp(m_old - m_new).
    """
    heads_per_kv = q.shape[1] // k.shape[2]

    def step(carry, block):
        m, total, o = carry
        k, v, ids, index = block
        k, v = (jnp.repeat(x, heads_per_kv, axis=1) for x in (k, v))
        scores = _block_scores(q, k, q_segments, ids, index, causal)
        m_new = jnp.maximum(m, scores.max(axis=-1))
        weights = jnp.exp(scores - m_new[..., None])
        scale = jnp.exp(m - m_new)
        total = total * scale + weights.sum(axis=-1)
        o_block = jnp.einsum("bnts,bnsh->bnth", weights.astype(v.dtype), v)
        return (m_new, total, o * scale[..., None] + o_block), None

    zero = jnp.zeros(q.shape[:3], jnp.float32)
    carry = (zero + _MASKED, zero, jnp.zeros(q.shape, jnp.float32))
    (m, total, o), _ = jax.lax.scan(step, carry, (k, v, kv_ids, jnp.arange(len(k))))
    out = (o / total[..., None]).astype(q.dtype)
    return out, (q, k, v, q_segments, kv_ids, out, m + jnp.log(total))


def _flash_backward(causal, saved, g):
    """Run algorithm 4 of FlashAttention.

    The weights of a block are recomputed from its scores and the saved logsumexp.
    """
    q, k, v, q_segments, kv_ids, out, logsumexp = saved
    B, K, size, H = k.shape[1:]
    heads_per_kv = q.shape[1] // K
    delta = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def step(dq, block):
        k, v, ids, index = block
        k, v = (jnp.repeat(x, heads_per_kv, axis=1) for x in (k, v))
        weights = jnp.exp(
            _block_scores(q, k, q_segments, ids, index, causal) - logsumexp[..., None]
        )
        d_weights = jnp.einsum("bnth,bnsh->bnts", g, v, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - delta) * H**-0.5).astype(q.dtype)
        dq += jnp.einsum("bnts,bnsh->bnth", d_scores, k)
        dk = jnp.einsum("bnts,bnth->bnsh", d_scores, q)
        dv = jnp.einsum("bnts,bnth->bnsh", weights.astype(g.dtype), g)
        return dq, tuple(x.reshape(B, K, heads_per_kv, size, H).sum(axis=2) for x in (dk, dv))

    zero = jnp.zeros(q.shape, jnp.float32)
    dq, (dk, dv) = jax.lax.scan(step, zero, (k, v, kv_ids, jnp.arange(len(k))))
    return dq.astype(q.dtype), dk, dv, None, None


_flash = jax.custom_vjp(_flash_output, nondiff_argnums=(5,))
_flash.defvjp(_flash_forward, _flash_backward)


def _cudnn(q, k, v, segment_ids, *, causal: bool):
    # Give an empty row a length of one token: the gradient of an empty softmax is undefined.
    lengths = jnp.maximum((segment_ids != 0).sum(axis=1), 1).astype(jnp.int32)
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


def _mosaic(q, k, v, segment_ids, prefix_ids=None, *, causal: bool, interpret: bool = False):
    from mmsr1_jax.models import gpu_packed_attention as packed  # Pallas takes long to import

    return packed.attention(q, k, v, segment_ids, prefix_ids, causal=causal, interpret=interpret)


def _splash(q, k, v, segment_ids, prefix_ids=None, *, causal: bool, interpret: bool = False):
    from mmsr1_jax.models import splash  # Pallas for TPUs takes long to import

    return splash.attention(q, k, v, segment_ids, prefix_ids, causal=causal, interpret=interpret)


def _per_device(kernel, q, k, v, *ids):
    """Run a single-device kernel on each device's own rows and heads."""
    if sharding.num_devices() == 1:
        return kernel(q, k, v, *ids)
    mesh = jax.sharding.get_abstract_mesh()
    names = ("batch", None, "heads", None)
    kv_spec = sharding.partition_spec(("batch", None, "kv_heads", None), k.shape, mesh)
    spec = sharding.partition_spec(names, q.shape, mesh)
    if kv_spec != spec:  # q and kv heads split differently: every device computes all heads
        spec = kv_spec = PartitionSpec(spec[0])
    ids_specs = (PartitionSpec(spec[0]),) * len(ids)
    run = sharding.per_device(kernel, (spec, kv_spec, kv_spec, *ids_specs), spec)
    return run(q, k, v, *ids)
