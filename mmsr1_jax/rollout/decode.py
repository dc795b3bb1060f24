"""Decoding: a chunk of steps of some lanes in one program.

A step, for every row that is active:

    hidden ──► logits ──► token ──► state of the stop automaton ──► still running?
       ▲                    │
       └──── the cache ◄────┘

A row stops at the token that completes a stop string, at an end token, or when its turn has no
tokens left; that token is in the cache too, so the lane can go on from it. A program has a fixed
number of rows, whatever the number of lanes: each row is a lane that can run, the others wait.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.rollout import cache
from mmsr1_jax.rollout.cache import Lanes
from mmsr1_jax.rollout.sampler import Sampling, sample, token_keys


@flax.struct.dataclass
class Rows:
    """The turns that are drawn, and where each stands; one entry a row.

    Attributes:
      lane: int32[R]; for a row that is padding, "number of lanes".
      active: bool[R]: draws tokens.
      stop_state: int32[R]: of the stop automaton; 0 at the beginning of a turn.
      position: int32[R]: M-RoPE position of the next token.
      episode: int32[R]: number of the episode, for its random numbers.
      drawn: int32[R]: tokens that the episode has drawn so far, over all its turns.
      left: int32[R]: tokens that the turn may still draw.
      sampling: how each row draws.
    """

    lane: jax.Array
    active: jax.Array
    stop_state: jax.Array
    position: jax.Array
    episode: jax.Array
    drawn: jax.Array
    left: jax.Array
    sampling: Sampling


@flax.struct.dataclass
class Drawn:
    """What a chunk drew. A row's tokens are the first `count` of its row.

    Attributes:
      tokens: int32[R, steps].
      sampling_logprobs: float32[R, steps], under the distribution that was drawn from.
      logprobs: float32[R, steps], under temperature alone.
      count: int32[R].
      stop_state: int32[R]: of the automaton, after them.
      steps: int32[]: steps that were run.
    """

    tokens: jax.Array
    sampling_logprobs: jax.Array
    logprobs: jax.Array
    count: jax.Array
    stop_state: jax.Array
    steps: jax.Array


def decode(
    model: Qwen2_5_VL,
    lanes: Lanes,
    rows: Rows,
    next_state: jax.Array,
    allowed: jax.Array,
    seed: jax.Array,
    leave_at: jax.Array,
    *,
    steps: int,
    running: int,
) -> tuple[Drawn, Lanes]:
    """Up to `steps` steps; fewer when only `leave_at` rows are still active.

    Args:
      model: the policy.
      lanes: the cache (to be donated).
      rows: which lanes draw.
      next_state: int16[states, V], of `stop.StopTable`.
      allowed: bool[V]: tokens that may be drawn.
      seed: int32[], of the run.
      leave_at: int32[]: return when no more than this many rows are active; 0: when none is.
      steps: static.
      running: static, of `stop.StopTable`.
    """
    R = len(rows.lane)
    zeros = functools.partial(jnp.zeros, (R, steps))
    out = (zeros(jnp.int32), zeros(jnp.float32), zeros(jnp.float32), jnp.zeros(R, jnp.int32))

    def go_on(carry):
        number, _, rows, _, _ = carry
        return (number < steps) & (rows.active.sum() > leave_at)

    def step(carry):
        number, out, rows, hidden, lanes = carry
        on, one = rows.active, rows.active.astype(jnp.int32)
        logits = model.logits(hidden[:, None])[:, 0]
        keys = token_keys(seed, rows.episode, rows.drawn)
        token, sampling_logprob, logprob = sample(logits, keys, rows.sampling, allowed)
        x = model.text.embed(token[:, None], model.dtype)
        positions = jnp.tile(rows.position[:, None, None], (1, 3, 1))
        new_hidden, lanes = cache.write(model, lanes, rows.lane, x, positions, one)
        stop_state = jnp.where(on, next_state[rows.stop_state, token], rows.stop_state)
        left = rows.left - one
        # A row draws from its first step of the chunk until it stops, so its tokens are in front.
        tokens, sampling_logprobs, logprobs, count = out
        out = (
            tokens.at[:, number].set(token),
            sampling_logprobs.at[:, number].set(sampling_logprob),
            logprobs.at[:, number].set(logprob),
            count + one,
        )
        rows = rows.replace(
            active=on & (stop_state < running) & (left > 0),
            stop_state=stop_state.astype(jnp.int32),
            position=rows.position + one,
            drawn=rows.drawn + one,
            left=left,
        )
        return number + 1, out, rows, jnp.where(on[:, None], new_hidden, hidden), lanes

    hidden = jnp.take(lanes.hidden, rows.lane, axis=0, mode="clip")
    carry = (jnp.int32(0), out, rows, hidden, lanes)
    number, out, rows, hidden, lanes = jax.lax.while_loop(go_on, step, carry)
    lanes = lanes.replace(hidden=lanes.hidden.at[rows.lane].set(hidden, mode="drop"))
    return Drawn(*out, rows.stop_state, number), lanes
