"""The KV cache: dense lanes behind four verbs. Nobody else knows how it is laid out.

    allocate   lanes of a fixed capacity, all empty
    extend     write tokens (and pictures in their places) into some lanes, and read the last hidden
               state of each: a prompt, a tool's result and a sampled token are the same operation
    fork       copy one lane onto others: a group's prompt is computed once
    read       how much of each lane is filled

A lane keeps what it holds until it is cleared, so a conversation that pauses for a tool goes on
where it was; nothing is computed twice.
"""

import flax.struct
import jax
import jax.numpy as jnp

from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL


@flax.struct.dataclass
class Lanes:
    """The state of all lanes.

    Attributes:
      k, v: [L, lanes, S, K, H]: rotated keys, and values.
      length: int32[lanes]: tokens that a lane holds.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens that a lane can hold, S."""
        return self.k.shape[2]


@flax.struct.dataclass
class Extension:
    """Tokens for some lanes, in a shape of the bucket table.

    Attributes:
      lane: int32[R]: the lane of each row; a row that is padding names the lane "number of lanes",
        which does not exist, and changes nothing. No two rows name the same lane.
      tokens: int32[R, T], padded at the end.
      count: int32[R]: how many of a row's tokens are real.
      positions: int32[R, 3, T], from `mrope_positions`, counted on from what the lane holds.
      image_index: int32[R, T]: which of the row's image tokens stands at a placeholder; -1: text.
      image_tokens: float[R, M, D] from `encode_images`, or None where no row has a picture.
    """

    lane: jax.Array
    tokens: jax.Array
    count: jax.Array
    positions: jax.Array
    image_index: jax.Array
    image_tokens: jax.Array | None = None


def allocate(model: Qwen2_5_VL, lanes: int, capacity: int) -> Lanes:
    """Empty lanes in the dtype of the model's computation."""
    text = model.config.text
    shape = (text.num_layers, lanes, capacity, text.num_kv_heads, text.head_dim)
    k, v = jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)
    return Lanes(k, v, jnp.zeros(lanes, jnp.int32))


def extend(model: Qwen2_5_VL, lanes: Lanes, new: Extension) -> tuple[jax.Array, Lanes]:
    """Writes tokens into lanes.

    The caller sees to it that they fit (`read` and `Lanes.capacity`): what does not is dropped.

    Returns:
      float[R, D]: the hidden state of each row's last token, after the final norm; and the lanes.
    """
    start = jnp.take(lanes.length, new.lane, mode="fill", fill_value=0)
    x = model.embed(new, new.image_tokens)
    hidden, k, v = model.text.cached(
        x, new.positions, lanes.k, lanes.v, lane=new.lane, start=start, count=new.count
    )
    last = jnp.maximum(new.count - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    length = lanes.length.at[new.lane].add(new.count, mode="drop")
    return hidden, Lanes(k, v, length)


def fork(lanes: Lanes, source: jax.Array, targets: jax.Array) -> Lanes:
    """Copies lane `source`, int32[], onto lanes `targets`, int32[n]; one that does not exist
    ("number of lanes") is left out."""

    def copy(x, axis):
        row = jax.lax.dynamic_index_in_dim(x, source, axis, keepdims=True)
        index = (slice(None),) * axis + (targets,)
        return x.at[index].set(row, mode="drop")

    return Lanes(copy(lanes.k, 1), copy(lanes.v, 1), copy(lanes.length, 0))


def clear(lanes: Lanes, freed: jax.Array) -> Lanes:
    """Empties lanes `freed`, int32[n]; what they held is never seen again."""
    return lanes.replace(length=lanes.length.at[freed].set(0, mode="drop"))


def read(lanes: Lanes) -> jax.Array:
    """int32[lanes]: tokens that each lane holds."""
    return lanes.length
