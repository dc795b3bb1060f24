"""The KV cache: dense lanes behind four verbs. Nobody else knows how it is laid out.

    allocate   lanes of a fixed capacity, all empty
    extend     write tokens (and pictures in their places) into some lanes: a prompt, a tool's
               result and a sampled token are the same operation
    fork       copy the beginning of one lane onto others: a group's prompt is computed once
    read       how much of each lane is filled

A lane keeps what it holds until it is forked onto or cleared, so a conversation that pauses for a
tool goes on where it was; nothing is computed twice.
"""

import flax.struct
import jax
import jax.numpy as jnp

from mmsr1_jax.models.attention import CACHE_BLOCK
from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL


@flax.struct.dataclass
class Lanes:
    """The state of all lanes.

    Attributes:
      k, v: float[L, lanes, K, S, H]: rotated keys, and values.
      length: int32[lanes]: tokens that a lane holds.
      hidden: float[lanes, D]: of the last of them, after the final norm; the next is drawn from it.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    hidden: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens that a lane can hold, S."""
        return self.k.shape[3]


@flax.struct.dataclass
class Extension:
    """Tokens for some lanes, in a shape of the bucket table.

    Attributes:
      lane: int32[R]: the lane of each row; a row that is padding names the lane "number of lanes",
        which does not exist, and changes nothing. No two rows name the same lane.
      tokens: int32[R, T], padded at the end.
      count: int32[R]: how many of a row's tokens are real.
      positions: int32[R, 3, T], from `mrope_positions`, counted on from what the lane holds.
      image_index: int32[R, T]: which row of `image_tokens` stands at a placeholder; -1: text.
    """

    lane: jax.Array
    tokens: jax.Array
    count: jax.Array
    positions: jax.Array
    image_index: jax.Array


def allocate(model: Qwen2_5_VL, lanes: int, capacity: int) -> Lanes:
    """Empty lanes, in the dtype of the model's computation, of at least `capacity` tokens."""
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
    lane: jax.Array,
    x: jax.Array,
    positions: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, Lanes]:
    """Writes embedded tokens x, float[R, T, D], into lanes; the rest as in `Extension`.

    Returns:
      float[R, D]: the hidden state of each row's last token; and the lanes, `hidden` unchanged.
    """
    start = jnp.take(lanes.length, lane, mode="fill", fill_value=0)
    hidden, k, v = model.text.cached(
        x, positions, lanes.k, lanes.v, lane=lane, start=start, count=count
    )
    last = jnp.maximum(count - 1, 0)[:, None, None]
    length = lanes.length.at[lane].add(count, mode="drop")
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], lanes.replace(k=k, v=v, length=length)


def extend(
    model: Qwen2_5_VL, lanes: Lanes, new: Extension, image_tokens: jax.Array | None = None
) -> tuple[jax.Array, Lanes]:
    """Writes tokens into lanes.

    The caller sees to it that they fit (`read` and `Lanes.capacity`): what does not is dropped.

    Args:
      image_tokens: float[M, D], from `encode_images`; None where no row has a picture.

    Returns:
      float[R, D]: the hidden state of each row's last token; and the lanes.
    """
    x = model.text.embed(new.tokens, model.dtype)
    if image_tokens is not None:
        pictures = jnp.take(image_tokens, jnp.maximum(new.image_index, 0), axis=0)
        x = jnp.where(new.image_index[..., None] >= 0, pictures, x)
    hidden, lanes = write(model, lanes, new.lane, x, new.positions, new.count)
    return hidden, lanes.replace(hidden=lanes.hidden.at[new.lane].set(hidden, mode="drop"))


def fork(
    lanes: Lanes, source: jax.Array, targets: jax.Array, length: jax.Array, hidden: jax.Array
) -> Lanes:
    """Makes lanes `targets` hold the first `length` tokens of lane `source`.

    Args:
      source: int32[]; it may be a target itself, and is then cut.
      targets: int32[n]; one that does not exist ("number of lanes") is left out.
      length: int32[].
      hidden: float[D]: the hidden state of the last of these tokens, as `extend` returned it.
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


def cut(lanes: Lanes, lane: jax.Array, length: jax.Array, hidden: jax.Array) -> Lanes:
    """What `fork` does for a lane, int32[1], that begins with these tokens itself."""
    return lanes.replace(
        length=lanes.length.at[lane].set(length, mode="drop"),
        hidden=lanes.hidden.at[lane].set(hidden, mode="drop"),
    )


def wipe(lanes: Lanes) -> Lanes:
    """All lanes as new. (A NaN that an empty lane still held would count: 0 times it is NaN.)"""
    return jax.tree.map(jnp.zeros_like, lanes)


def clear(lanes: Lanes, freed: jax.Array) -> Lanes:
    """Empties lanes `freed`, int32[n]; what they held is never seen again."""
    return lanes.replace(length=lanes.length.at[freed].set(0, mode="drop"))


def read(lanes: Lanes) -> jax.Array:
    """int32[lanes]: tokens that each lane holds."""
    return lanes.length
