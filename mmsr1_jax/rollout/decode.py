"""Decoding: a chunk of steps over all lanes in one program.

A step, for every lane that is active:

    hidden ──► logits ──► token ──► state of the stop automaton ──► still running?
       ▲                    │
       └──── the cache ◄────┘

A lane stops at the token that completes a stop string, at an end token, or when its turn has no
tokens left; that token is in the cache too, so the lane can go on from it. Lanes that wait for a
tool, or are empty, are not active and cost nothing but their place in the batch.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.rollout.cache import Lanes
from mmsr1_jax.rollout.sampler import Sampling, sample, token_keys


@flax.struct.dataclass
class DecodeState:
    """What decoding carries; all but `lanes` is one entry a lane.

    Attributes:
      lanes: the KV cache.
      hidden: float[B, D]: of the last token in the lane; the next is drawn from it.
      active: bool[B]: draws tokens.
      stop_state: int32[B]: of the stop automaton; 0 at the beginning of a turn.
      position: int32[B]: M-RoPE position of the next token.
      episode: int32[B]: number of the episode, for its random numbers.
      drawn: int32[B]: tokens that the episode has drawn so far, over all its turns.
      left: int32[B]: tokens that the turn may still draw.
    """

    lanes: Lanes
    hidden: jax.Array
    active: jax.Array
    stop_state: jax.Array
    position: jax.Array
    episode: jax.Array
    drawn: jax.Array
    left: jax.Array


@flax.struct.dataclass
class Drawn:
    """What a chunk drew. A lane's tokens are the first `count` of its row.

    Attributes:
      tokens: int32[B, steps].
      sampling_logprobs: float32[B, steps], under the distribution that was drawn from.
      logprobs: float32[B, steps], under temperature alone.
      count: int32[B].
    """

    tokens: jax.Array
    sampling_logprobs: jax.Array
    logprobs: jax.Array
    count: jax.Array


def start(lanes: Lanes, width: int, dtype) -> DecodeState:
    """The state in which no lane is active. `width`: D, `dtype`: of the hidden states."""
    B = len(lanes.length)
    none = jnp.zeros(B, jnp.int32)
    return DecodeState(
        lanes=lanes,
        hidden=jnp.zeros((B, width), dtype),
        active=jnp.zeros(B, bool),
        stop_state=none,
        position=none,
        episode=none,
        drawn=none,
        left=none,
    )


def decode(
    model: Qwen2_5_VL,
    state: DecodeState,
    sampling: Sampling,
    next_state: jax.Array,
    allowed: jax.Array,
    seed: jax.Array,
    leave_at: jax.Array,
    *,
    steps: int,
    running: int,
) -> tuple[Drawn, DecodeState]:
    """Up to `steps` steps; fewer when only `leave_at` lanes are still active.

    Args:
      model: the policy.
      state: where the lanes stand (to be donated).
      sampling: how each lane draws.
      next_state: int16[states, V], of `stop.StopTable`.
      allowed: bool[V]: tokens that may be drawn.
      seed: int32[], of the run.
      leave_at: int32[]: return when no more than this many lanes are active; 0: when none is.
      steps: static.
      running: static, of `stop.StopTable`.
    """
    B = len(state.active)
    zeros = functools.partial(jnp.zeros, (B, steps))
    drawn = Drawn(zeros(jnp.int32), zeros(jnp.float32), zeros(jnp.float32), jnp.zeros(B, jnp.int32))

    def go_on(carry):
        number, _, state = carry
        return (number < steps) & (state.active.sum() > leave_at)

    def step(carry):
        number, out, state = carry
        on, lanes = state.active, state.lanes
        logits = model.logits(state.hidden[:, None])[:, 0]
        keys = token_keys(seed, state.episode, state.drawn)
        token, sampling_logprob, logprob = sample(logits, keys, sampling, allowed)
        hidden, k, v = model.text.cached(
            model.text.embed(token[:, None], model.dtype),
            jnp.tile(state.position[:, None, None], (1, 3, 1)),
            lanes.k,
            lanes.v,
            lane=None,
            start=lanes.length,
            count=on.astype(jnp.int32),
        )
        one = on.astype(jnp.int32)
        stop_state = jnp.where(on, next_state[state.stop_state, token], state.stop_state)
        left = state.left - one
        # A lane draws from its first step of the chunk until it stops, so its tokens are in front.
        out = Drawn(
            tokens=out.tokens.at[:, number].set(token),
            sampling_logprobs=out.sampling_logprobs.at[:, number].set(sampling_logprob),
            logprobs=out.logprobs.at[:, number].set(logprob),
            count=out.count + one,
        )
        state = state.replace(
            lanes=Lanes(k, v, lanes.length + one),
            hidden=jnp.where(on[:, None], hidden[:, 0], state.hidden),
            active=on & (stop_state < running) & (left > 0),
            stop_state=stop_state.astype(jnp.int32),
            position=state.position + one,
            drawn=state.drawn + one,
            left=left,
        )
        return number + 1, out, state

    _, drawn, state = jax.lax.while_loop(go_on, step, (0, drawn, state))
    return drawn, state
