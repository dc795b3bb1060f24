"""The device side of the KV cache: pages of all layers, and the operations on them.

    allocate          create empty pages
    write             append embedded tokens to some lanes; used by `extend` and by `decode`
    extend            append tokens (and images at their placeholders) to some lanes: prompts and
                      tool results
    fork              copy the last, partly filled page of a prefix, and its hidden state
    read_pages        copy some pages out of the cache, to move them to the host
    write_pages       write them back

A lane is one conversation. Which pages it has is decided on the host (`rollout/pages.py`) and given
to each call as a page table, so a conversation that pauses for a tool call resumes without
recomputation, and lanes that begin with the same prompt share its pages.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from mmsr1_jax.models import paged_attention
from mmsr1_jax.models.config import TextConfig
from mmsr1_jax.models.paged_attention import PagedRows
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.utils.arrays import AnyArray


class Cache(flax.struct.PyTreeNode):
    """Contents of the cache.

    Attributes:
      pages: Keys (after rotary embedding) and values of each layer, in the layout of
        `models/paged_attention.py`.
      hidden: Hidden state of each lane's last token after the final norm, float[lanes, D]; the next
        token is sampled from it.
    """

    pages: tuple[Float[jax.Array, "..."], ...]
    hidden: Float[jax.Array, "lanes D"]


class PrefillBatch(flax.struct.PyTreeNode):
    """A batch of tokens to write into some lanes, padded to a shape of the bucket table.

    Attributes:
      lane: Lane of each row, int32[B]. Padding rows have the out-of-range `Programs.num_lanes`,
        and are dropped. No two rows have the same lane.
      rows: Pages, filled tokens and number of new tokens of each row's lane.
      tokens: Token ids, int32[B, T], padded at the end.
      positions: M-RoPE positions from `mrope_positions`, int32[B, 3, T], continuing those of the
        tokens already in the lane.
      image_index: Row of `image_tokens` to insert at each image placeholder, int32[B, T]; -1 for
        text.
    """

    lane: Int32[AnyArray, "B"]
    rows: PagedRows
    tokens: Int32[AnyArray, "B T"]
    positions: Int32[AnyArray, "B 3 T"]
    image_index: Int32[AnyArray, "B T"]


def allocate(
    text: TextConfig, dtype: DTypeLike, lanes: int, num_pages: int, page_size: int
) -> Cache:
    """Return an empty cache for a text decoder."""
    shape, _ = paged_attention.pages_shape(num_pages, page_size, text.num_kv_heads, text.head_dim)
    return Cache(
        pages=tuple(jnp.zeros(shape, dtype) for _ in range(text.num_layers)),
        hidden=jnp.zeros((lanes, text.hidden_size), dtype),
    )


def write(
    model: Policy,
    cache: Cache,
    x: Float[jax.Array, "B T D"],
    positions: Int32[AnyArray, "B 3 T"],
    rows: PagedRows,
    deepstack: Float[jax.Array, "deep B T D"] | None = None,
) -> tuple[Float[jax.Array, "B D"], Cache]:
    """Write embedded tokens into lanes.

    Args:
      model: The policy.
      cache: The cache.
      x: Embedded tokens, float[B, T, D].
      positions: As in `PrefillBatch`.
      rows: Pages, filled tokens and number of new tokens of each row's lane.
      deepstack: Features of image tokens, as in `TextDecoder.cached`.

    Returns:
      The hidden state of each row's last token, float[B, D], and the cache, with `hidden`
      unchanged.
    """
    hidden, pages = model.text.cached(x, positions, cache.pages, rows, deepstack)
    last = jnp.maximum(rows.count - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache.replace(pages=pages)


def extend(
    model: Policy,
    cache: Cache,
    new: PrefillBatch,
    image_tokens: Float[jax.Array, "M image_D"] | None = None,
) -> tuple[Float[jax.Array, "B D"], Cache]:
    """Write tokens into lanes, whose page tables have room for them.

    Args:
      model: The policy.
      cache: The cache.
      new: Tokens to write.
      image_tokens: Image tokens from `encode_images`, float[M, image_D]; None if no row has an
        image.

    Returns:
      The hidden state of each row's last token, float[B, D], and the cache.
    """
    x, deepstack = model.embed(new.tokens, new.image_index, image_tokens)
    hidden, cache = write(model, cache, x, new.positions, new.rows, deepstack)
    return hidden, cache.replace(hidden=cache.hidden.at[new.lane].set(hidden, mode="drop"))


def fork(
    cache: Cache,
    source: Int32[AnyArray, ""],
    target: Int32[AnyArray, ""],
    from_lane: Int32[AnyArray, ""],
    to_lane: Int32[AnyArray, ""],
) -> Cache:
    """Copy one page, and the hidden state of a lane.

    XLA does not know that source and target differ, so it copies a page by way of a temporary in
    every form (slices, `at[].set`, gather and scatter): on GPUs twice the bytes are moved between
    arrays. The temporary is one layer's page, 256 KiB at 7B shape, which a cache of 50 MB holds, so
    that memory sees one read and one write.

    Args:
      cache: The cache.
      source: Page to copy, int32[].
      target: Page to overwrite, int32[].
      from_lane, to_lane: Lane whose hidden state is copied, and the one that continues from it,
        int32[]; nothing is copied to an out-of-range one.
    """

    def copy(pages):
        page = jax.lax.dynamic_slice_in_dim(pages, source, 1)
        return jax.lax.dynamic_update_slice_in_dim(pages, page, target, 0)

    hidden = jax.lax.dynamic_index_in_dim(cache.hidden, from_lane, keepdims=False)
    return Cache(
        pages=tuple(copy(pages) for pages in cache.pages),
        hidden=cache.hidden.at[to_lane].set(hidden, mode="drop"),
    )


def read_pages(cache: Cache, index: Int32[AnyArray, "n"]) -> tuple[Float[jax.Array, "n ..."], ...]:
    """Return the contents of the pages `index`, int32[n], of each layer."""
    return tuple(jnp.take(pages, index, axis=0, mode="clip") for pages in cache.pages)


def write_pages(
    cache: Cache, index: Int32[AnyArray, "n"], contents: tuple[Float[AnyArray, "n ..."], ...]
) -> Cache:
    """Write the pages `index`, int32[n]; out-of-range ones are skipped."""
    pages = (
        layer.at[index].set(new, mode="drop")
        for layer, new in zip(cache.pages, contents, strict=True)
    )
    return cache.replace(pages=tuple(pages))
