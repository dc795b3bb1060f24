"""The KV cache: dense lanes and the operations on them. Its layout is private to this module.

    allocate       create empty lanes of a fixed capacity
    write          append embedded tokens to some lanes; used by `extend` and by `decode`
    extend         append tokens (and images at their placeholders) to some lanes: prompts and tool
                   results
    fork           copy the prefix of one lane to others, so that a group's prompt is computed once
    truncate       keep the prefix of a lane
    clear, reset   empty some lanes; zero all lanes
    read           return the number of tokens in each lane

A lane keeps its contents until it is overwritten by a fork, truncated, cleared or reset, so a
conversation that pauses for a tool call resumes without recomputation.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from mmsr1_jax.models.attention import CACHE_BLOCK
from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.utils.arrays import AnyArray


class Lanes(flax.struct.PyTreeNode):
    """State of all lanes.

    Attributes:
      k, v: Keys (after rotary embedding) and values, float[L, lanes, K, S, H].
      length: Number of tokens in each lane, int32[lanes].
      hidden: Hidden state of each lane's last token after the final norm, float[lanes, D]; the next
        token is sampled from it.
    """

    k: Float[jax.Array, "L lanes K S H"]
    v: Float[jax.Array, "L lanes K S H"]
    length: Int32[jax.Array, "lanes"]
    hidden: Float[jax.Array, "lanes D"]

    @property
    def capacity(self) -> int:
        """Maximum number of tokens in a lane, S."""
        return self.k.shape[3]


class PrefillBatch(flax.struct.PyTreeNode):
    """A batch of tokens to write into some lanes, padded to a shape of the bucket table.

    Attributes:
      lane: Lane of each row, int32[B]. Padding rows have the out-of-range index "number of lanes",
        and are dropped. No two rows have the same lane.
      tokens: Token ids, int32[B, T], padded at the end.
      count: Number of real tokens in each row, int32[B].
      positions: M-RoPE positions from `mrope_positions`, int32[B, 3, T], continuing those of the
        tokens already in the lane.
      image_index: Row of `image_tokens` to insert at each image placeholder, int32[B, T]; -1 for
        text.
    """

    lane: Int32[AnyArray, "B"]
    tokens: Int32[AnyArray, "B T"]
    count: Int32[AnyArray, "B"]
    positions: Int32[AnyArray, "B 3 T"]
    image_index: Int32[AnyArray, "B T"]


def allocate(model: Qwen2_5_VL, lanes: int, capacity: int) -> Lanes:
    """Return empty lanes of at least `capacity` tokens, in the model's compute dtype."""
    text = model.config.text
    capacity = -(-capacity // CACHE_BLOCK) * CACHE_BLOCK
    shape = (text.num_layers, lanes, text.num_kv_heads, capacity, text.head_dim)
    return Lanes(
        k=jnp.zeros(shape, model.dtype),
        v=jnp.zeros(shape, model.dtype),
        length=jnp.zeros(lanes, jnp.int32),
        hidden=jnp.zeros((lanes, text.hidden_size), model.dtype),
    )


def write(
    model: Qwen2_5_VL,
    lanes: Lanes,
    lane: Int32[AnyArray, "B"],
    x: Float[jax.Array, "B T D"],
    positions: Int32[AnyArray, "B 3 T"],
    count: Int32[AnyArray, "B"],
) -> tuple[Float[jax.Array, "B D"], Lanes]:
    """Write embedded tokens into lanes.

    Args:
      model: The policy.
      lanes: The cache.
      lane, positions, count: As in `PrefillBatch`.
      x: Embedded tokens, float[B, T, D].

    Returns:
      The hidden state of each row's last token, float[B, D], and the lanes, with `hidden`
      unchanged.
    """
    start = jnp.take(lanes.length, lane, mode="fill", fill_value=0)
    hidden, k, v = model.text.cached(
        x, positions, lanes.k, lanes.v, lane=lane, start=start, count=count
    )
    last = jnp.maximum(count - 1, 0)[:, None, None]
    length = lanes.length.at[lane].add(count, mode="drop")
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], lanes.replace(k=k, v=v, length=length)


def extend(
    model: Qwen2_5_VL,
    lanes: Lanes,
    new: PrefillBatch,
    image_tokens: Float[jax.Array, "M D"] | None = None,
) -> tuple[Float[jax.Array, "B D"], Lanes]:
    """Write tokens into lanes.

    The caller ensures that they fit (`read` and `Lanes.capacity`); tokens beyond the capacity are
    dropped.

    Args:
      model: The policy.
      lanes: The cache.
      new: Tokens to write.
      image_tokens: Image embeddings from `encode_images`, float[M, D]; None if no row has an image.

    Returns:
      The hidden state of each row's last token, float[B, D], and the lanes.
    """
    x = model.text.embed(new.tokens, model.dtype)
    if image_tokens is not None:
        images = jnp.take(image_tokens, jnp.maximum(new.image_index, 0), axis=0)
        x = jnp.where(new.image_index[..., None] >= 0, images, x)
    hidden, lanes = write(model, lanes, new.lane, x, new.positions, new.count)
    return hidden, lanes.replace(hidden=lanes.hidden.at[new.lane].set(hidden, mode="drop"))


def fork(
    lanes: Lanes,
    source: Int32[AnyArray, ""],
    targets: Int32[AnyArray, "targets"],
    length: Int32[AnyArray, ""],
    hidden: Float[jax.Array, "D"],
) -> Lanes:
    """Copy the first `length` tokens of lane `source` to the lanes `targets`.

    Args:
      lanes: The cache.
      source: Lane to copy from, int32[]. It may itself be a target, and is then truncated.
      targets: Lanes to overwrite, int32[targets]; the index "number of lanes" is skipped.
      length: Number of tokens to copy, int32[].
      hidden: Hidden state of the last of these tokens, as returned by `extend`, float[D].
    """

    def copy(x):
        row = jax.lax.dynamic_index_in_dim(x, source, 1, keepdims=True)
        return x.at[:, targets].set(row, mode="drop")

    return Lanes(
        k=copy(lanes.k),
        v=copy(lanes.v),
        length=lanes.length.at[targets].set(length, mode="drop"),
        hidden=lanes.hidden.at[targets].set(hidden, mode="drop"),
    )


def truncate(
    lanes: Lanes,
    lane: Int32[AnyArray, "1"],
    length: Int32[AnyArray, ""],
    hidden: Float[jax.Array, "D"],
) -> Lanes:
    """Truncate a lane, int32[1], to its first `length` tokens: `fork` without the copy."""
    return lanes.replace(
        length=lanes.length.at[lane].set(length, mode="drop"),
        hidden=lanes.hidden.at[lane].set(hidden, mode="drop"),
    )


def reset(lanes: Lanes) -> Lanes:
    """Zero all lanes. Stale values of empty lanes matter too, as 0 times NaN is NaN."""
    return jax.tree.map(jnp.zeros_like, lanes)


def clear(lanes: Lanes, freed: Int32[AnyArray, "freed"]) -> Lanes:
    """Empty the lanes `freed`, int32[freed]; their contents are never attended to again."""
    return lanes.replace(length=lanes.length.at[freed].set(0, mode="drop"))


def read(lanes: Lanes) -> Int32[jax.Array, "lanes"]:
    """Return the number of tokens in each lane, int32[lanes]."""
    return lanes.length
