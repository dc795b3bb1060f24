"""Decoding: several steps for a batch of lanes in one program.

Each step, for every active row:

    hidden ──► logits ──► token ──► state of the stop automaton ──► still running?
       ▲                    │
       └──── the cache ◄────┘

A row stops at the token that completes a stop string, at an end token, or when the token budget of
its turn is used up. That last token is written to the cache too, so the lane can resume from it.
A program has a fixed number of rows, whatever the number of lanes. Each row decodes one lane that
is ready to run, and the other lanes wait.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.rollout import cache
from mmsr1_jax.rollout.cache import Lanes
from mmsr1_jax.rollout.sampler import Sampling, sample, token_keys


class Rows(flax.struct.PyTreeNode):
    """State of the turns being decoded, one per row.

    Attributes:
      lane: Lane of each row, int32[R]; "number of lanes" for padding rows.
      active: Whether the row samples tokens, bool[R].
      stop_state: State of the stop automaton, int32[R]; 0 at the start of a turn.
      position: M-RoPE position of the next token, int32[R].
      episode: Index of the episode, int32[R], which seeds its random numbers.
      num_sampled: Number of tokens sampled so far in all turns of the episode, int32[R].
      budget: Remaining token budget of the turn, int32[R].
      sampling: Sampling parameters of each row.
    """

    lane: jax.Array
    active: jax.Array
    stop_state: jax.Array
    position: jax.Array
    episode: jax.Array
    num_sampled: jax.Array
    budget: jax.Array
    sampling: Sampling


class SampledTokens(flax.struct.PyTreeNode):
    """Tokens sampled by one call of `decode`. Only the first `count` entries of a row are valid.

    Attributes:
      tokens: Sampled token ids, int32[R, steps].
      sampling_logprobs: Log-probs under the distribution sampled from, float32[R, steps].
      logprobs: Log-probs with temperature scaling alone, float32[R, steps].
      count: Number of tokens sampled in each row, int32[R].
      stop_state: State of the stop automaton after these tokens, int32[R].
      steps: Number of steps run, int32[].
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
) -> tuple[SampledTokens, Lanes]:
    """Run up to `steps` decoding steps; return early once at most `leave_at` rows are active.

    Args:
      model: The policy.
      lanes: The cache (to be donated).
      rows: The turns to decode.
      next_state: Transition table of `stop.StopTable`, int16[states, V].
      allowed: Tokens that may be sampled, bool[V].
      seed: Random seed of the rollout, int32[].
      leave_at: Number of active rows at which to return, int32[]; 0: when no row is active.
      steps: Maximum number of steps; static.
      running: `stop.StopTable.running`; static.
    """
    R = len(rows.lane)
    zeros = functools.partial(jnp.zeros, (R, steps))
    out = (zeros(jnp.int32), zeros(jnp.float32), zeros(jnp.float32), jnp.zeros(R, jnp.int32))
    hidden = jnp.take(lanes.hidden, rows.lane, axis=0, mode="clip")

    def should_continue(carry):
        index, _, rows, _, _ = carry
        return (index < steps) & (rows.active.sum() > leave_at)

    def step(carry):
        return _step(model, next_state, allowed, seed, running, *carry)

    carry = (jnp.int32(0), out, rows, hidden, lanes)
    num_steps, out, rows, hidden, lanes = jax.lax.while_loop(should_continue, step, carry)
    lanes = lanes.replace(hidden=lanes.hidden.at[rows.lane].set(hidden, mode="drop"))
    return SampledTokens(*out, rows.stop_state, num_steps), lanes


def _step(model, next_state, allowed, seed, running, index, out, rows, hidden, lanes):
    """Run decoding step `index`: sample a token for each active row, and write it to its lane."""
    active, count = rows.active, rows.active.astype(jnp.int32)
    logits = model.logits(hidden[:, None])[:, 0]
    keys = token_keys(seed, rows.episode, rows.num_sampled)
    token, sampling_logprob, logprob = sample(logits, keys, rows.sampling, allowed)
    x = model.text.embed(token[:, None], model.dtype)
    positions = jnp.tile(rows.position[:, None, None], (1, 3, 1))
    new_hidden, lanes = cache.write(model, lanes, rows.lane, x, positions, count)
    stop_state = jnp.where(active, next_state[rows.stop_state, token], rows.stop_state)
    budget = rows.budget - count
    # An active row samples from the first step until it stops, so its tokens are contiguous.
    tokens, sampling_logprobs, logprobs, num_tokens = out
    out = (
        tokens.at[:, index].set(token),
        sampling_logprobs.at[:, index].set(sampling_logprob),
        logprobs.at[:, index].set(logprob),
        num_tokens + count,
    )
    rows = rows.replace(
        active=active & (stop_state < running) & (budget > 0),
        stop_state=stop_state.astype(jnp.int32),
        position=rows.position + count,
        num_sampled=rows.num_sampled + count,
        budget=budget,
    )
    return index + 1, out, rows, jnp.where(active[:, None], new_hidden, hidden), lanes
