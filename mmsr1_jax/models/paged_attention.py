"""Attention over a paged KV cache (PagedAttention, arXiv 2309.06180).

The cache of a layer is one array of pages, each of which holds the keys and values of a fixed
number of consecutive tokens. A sequence is a list of pages in any order, its row of a page table,
so that sequences share pages and take only as many as they fill. Two layouts exist:

    token-major   [pages, page_size, 2K, H]      TPU, for `ragged_paged_attention` of jax
    head-major    [pages, K, 2, page_size, H]    CPU and GPU

In both, keys and values of a head are adjacent, so that both are split over the tensor axis by kv
head. Kernels read pages in place: nothing of the size of the cache is copied.

| platform | decode (T = 1)             | more tokens                              |
|----------|----------------------------|------------------------------------------|
| TPU      | `ragged_paged_attention`   | the same                                 |
| GPU      | `gpu_paged_attention`      | `gpu_paged_prefill`                      |
| CPU      | page by page in XLA        | the same                                 |

The last line also serves what the kernels do not support: float32 and other GPUs than Hopper, head
dimensions other than 128.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int32

from mmsr1_jax.models import sharding
from mmsr1_jax.utils.arrays import AnyArray

_MASKED = -1e30  # finite, so that a row with no visible key yields a mean, not NaN
PAGE_LOOP = "page_loop"  # name of the loop over pages in a compiled program
_CPU_ROWS = 4  # rows that the XLA form computes at a time on a CPU
# Block sizes of the TPU kernel, pinned: its own defaults depend on the numbers of rows and pages.
_TPU_BLOCK_TOKENS = 512  # keys of a block
_TPU_DECODE_ROWS = 8
_TPU_BLOCK_QUERIES = 128  # reads a row's keys once for this many of its new tokens
_TPU_VMEM = 64 * 2**20

# Logical axes of a layer's pages, by number of dimensions.
AXES = {
    4: (None, None, "kv_heads", None),
    5: (None, "kv_heads", None, None, None),
}


class PagedRows(flax.struct.PyTreeNode):
    """Rows of new tokens, and where their sequences are in the cache.

    Attributes:
      table: Pages of each row's sequence in order, int32[B, pages]. Entries beyond the page of the
        last new token may be any valid index.
      start: Number of tokens of the sequence before the new ones, int32[B].
      count: Number of new tokens, int32[B], at most T; the rest of the row is padding, and a row of
        none is skipped.
    """

    table: Int32[AnyArray, "B pages"]
    start: Int32[AnyArray, "B"]
    count: Int32[AnyArray, "B"]


def token_major(head_dim: int) -> bool:
    """Return whether the current platform stores pages token-major, for the TPU kernel."""
    return sharding.platform() == "tpu" and head_dim % 128 == 0


def pages_shape(
    num_pages: int, page_size: int, kv_heads: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    """Return the shape of one layer's pages on the current platform, and its logical axes."""
    shape = (num_pages, kv_heads, 2, page_size, head_dim)
    if token_major(head_dim):
        shape = (num_pages, page_size, 2 * kv_heads, head_dim)
    return shape, AXES[len(shape)]


def page_size(pages: Float[jax.Array, "..."]) -> int:
    """Return the number of tokens in a page."""
    return pages.shape[1] if pages.ndim == 4 else pages.shape[3]


def append(
    pages: Float[jax.Array, "..."],
    k: Float[jax.Array, "B T K H"],
    v: Float[jax.Array, "B T K H"],
    rows: PagedRows,
) -> Float[jax.Array, "..."]:
    """Write the keys and values of new tokens into a layer's pages.

    Args:
      pages: Pages of one layer.
      k, v: float[B, T, K, H]. Keys and values of each row's new tokens, padded at the end.
      rows: The rows.
    """
    B, T, K, H = k.shape
    size = page_size(pages)
    index = rows.start[:, None] + jnp.arange(T)
    page = jnp.take_along_axis(rows.table, index // size, axis=1, mode="clip")
    # Padding gets an out-of-range page, so that its writes are dropped.
    page = jnp.where(jnp.arange(T) < rows.count[:, None], page, len(pages))
    new = jnp.stack([k, v], axis=3).astype(pages.dtype)  # [B, T, K, 2, H]
    if pages.ndim == 4:
        return pages.at[page, index % size].set(new.reshape(B, T, 2 * K, H), mode="drop")
    return pages.at[page, :, :, index % size].set(new, mode="drop")


def paged_attention(
    q: Float[jax.Array, "B T N H"], pages: Float[jax.Array, "..."], rows: PagedRows
) -> Float[jax.Array, "B T N H"]:
    """Compute causal attention of new tokens over their sequences, whose pages contain them.

    A row's result depends on that row alone: neither on other rows nor on which pages it has.

    Args:
      q: float[B, T, N, H]. Queries of the new tokens.
      pages: Pages of one layer.
      rows: The rows.

    Returns:
      float[B, T, N, H]; undefined at padding.
    """
    if pages.ndim == 4:
        return _per_device(_tpu, q, pages, rows)
    bfloat16 = q.dtype == pages.dtype == jnp.bfloat16
    if bfloat16 and q.shape[3] == 128 and sharding.is_hopper():
        return _per_device(_gpu_decode if q.shape[1] == 1 else _gpu_prefill, q, pages, rows)
    if sharding.platform() == "cpu" and len(q) > _CPU_ROWS and len(q) % _CPU_ROWS == 0:
        # Four rows at a time, so that short rows read fewer pages; best if sorted by length.
        parts = [
            x.reshape(-1, _CPU_ROWS, *x.shape[1:]) for x in (q, rows.table, rows.start, rows.count)
        ]
        out = jax.lax.map(lambda part: _xla(part[0], pages, PagedRows(*part[1:])), parts)
        return out.reshape(q.shape)
    return _xla(q, pages, rows)


def _per_device(kernel, q, pages, rows: PagedRows) -> jax.Array:
    """Run a kernel on each device's own heads."""
    if sharding.num_devices() == 1:
        return kernel(q, pages, rows)
    mesh = jax.sharding.get_abstract_mesh()
    kv_spec = sharding.partition_spec(AXES[pages.ndim], pages.shape, mesh)
    spec = sharding.partition_spec((None, None, "heads", None), q.shape, mesh)
    if not any(kv_spec):  # fewer kv heads than devices: every device computes all heads
        spec = PartitionSpec()
    return sharding.per_device(kernel, (spec, kv_spec, PartitionSpec()), spec)(q, pages, rows)


def tpu_fetched_tokens(T: int, keys: int, page_size: int, num_pages: int) -> int:
    """Return the number of tokens whose keys and values the TPU kernel fetches for a row.

    Args:
      T: Number of new tokens of the row.
      keys: Number of tokens of its sequence, the new ones included.
      page_size: Number of tokens in a page.
      num_pages: Maximum number of pages of a sequence.
    """
    block = _tpu_block_pages(page_size, num_pages) * page_size
    return -(-T // _TPU_BLOCK_QUERIES) * -(-keys // block) * block


def _tpu_block_pages(page_size: int, num_pages: int) -> int:
    return max(1, min(_TPU_BLOCK_TOKENS // page_size, num_pages))


def _tpu(q, pages, rows: PagedRows) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    B, T, N, H = q.shape
    block = _tpu_block_pages(pages.shape[1], rows.table.shape[1])
    # Each row counts all T tokens; the queries of its padding come last and are undefined. A row
    # of none reads one block.
    lengths = jnp.where(rows.count > 0, rows.start + T, T)
    out = ragged_paged_attention(
        q.reshape(B * T, N, H),
        pages,
        lengths,
        rows.table,
        jnp.arange(B + 1, dtype=jnp.int32) * T,
        jnp.array([B], jnp.int32),
        sm_scale=H**-0.5,
        num_kv_pages_per_block=block,
        num_queries_per_block=_TPU_DECODE_ROWS if T == 1 else min(T, _TPU_BLOCK_QUERIES),
        vmem_limit_bytes=_TPU_VMEM,
    )
    return out.reshape(B, T, N, H)


def _gpu_decode(q, pages, rows: PagedRows) -> jax.Array:
    from mmsr1_jax.models.gpu_paged_attention import paged_decode

    P, K, _, size, H = pages.shape
    length = jnp.where(rows.count > 0, rows.start + 1, 1)
    kv, table = pages.reshape(P, 2 * K, size, H), jnp.asarray(rows.table)
    out = paged_decode(q[:, 0], kv, table, length)
    return out[:, None]


def _gpu_prefill(q, pages, rows: PagedRows) -> jax.Array:
    from mmsr1_jax.models.gpu_paged_prefill import paged_prefill

    P, K, _, size, H = pages.shape
    kv, table = pages.reshape(P, 2 * K, size, H), jnp.asarray(rows.table)
    return paged_prefill(q, kv, table, jnp.asarray(rows.start), jnp.asarray(rows.count))


def _xla(q, pages, rows: PagedRows) -> jax.Array:
    """Attend page by page, up to the last page that the fullest row needs.

    The recurrence of FlashAttention (arXiv 2205.14135, algorithm 1). A page without visible keys
    multiplies a row's sums by 1 and adds 0, so a row's result is bit-identical however full the
    other rows are.
    """
    B, T, N, H = q.shape
    _, K, _, size, _ = pages.shape
    heads_per_kv = N // K
    q = q.reshape(B, T, K, heads_per_kv, H).transpose(0, 2, 3, 1, 4)
    q = q.reshape(B, K, heads_per_kv * T, H)
    query_index = jnp.tile(rows.start[:, None] + jnp.arange(T), (1, heads_per_kv))
    query_index = query_index[:, None, :, None]  # [B, 1, heads_per_kv T, 1]

    def read(page, which: int):  # keys (0) or values (1), [B, K, size, H]
        def one(page):
            return jax.lax.dynamic_slice(
                pages, (page, 0, which, 0, 0), (1, K, 1, size, H)
            )[0, :, 0]  # fmt: skip

        return jax.vmap(one)(page)

    def step(index, carry):
        m, total, o = carry
        page = rows.table[:, index]
        scores = jnp.einsum("bkth,bksh->bkts", q, read(page, 0), preferred_element_type=jnp.float32)
        visible = query_index >= index * size + jnp.arange(size)
        scores = jnp.where(visible, scores * H**-0.5, _MASKED)
        m_new = jnp.maximum(m, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - m_new)
        scale = jnp.exp(m - m_new)
        o_page = jnp.einsum(
            "bkts,bksh->bkth", weights.astype(q.dtype), read(page, 1),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return m_new, total * scale + weights.sum(axis=-1, keepdims=True), o * scale + o_page

    zero = jnp.zeros((*q.shape[:3], 1), jnp.float32)
    carry = (zero + _MASKED, zero, jnp.zeros(q.shape, jnp.float32))
    filled = jnp.max(jnp.where(rows.count > 0, rows.start + rows.count, 1))
    with jax.named_scope(PAGE_LOOP):
        _, total, o = jax.lax.fori_loop(0, (filled + size - 1) // size, step, carry)
    o = (o / total).astype(q.dtype).reshape(B, K, heads_per_kv, T, H)
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
