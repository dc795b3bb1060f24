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
from jaxtyping import Bool, Float32, Int16, Int32

from mmsr1_jax.models.paged_attention import PagedRows
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.rollout import cache as kv_cache
from mmsr1_jax.rollout.cache import Cache
from mmsr1_jax.rollout.sampler import Sampling, sample, token_keys
from mmsr1_jax.utils.arrays import AnyArray


class Rows(flax.struct.PyTreeNode):
    """State of the turns being decoded, one per row.

    Attributes:
      lane: Lane of each row, int32[B]; `Programs.num_lanes` for padding rows.
      table: Pages of each row's lane, int32[B, pages], with room for the tokens to sample.
      length: Number of tokens in each row's lane, int32[B].
      active: Whether the row samples tokens, bool[B].
      stop_state: State of the stop automaton, int32[B]; 0 at the start of a turn.
      position: M-RoPE position of the next token, int32[B].
      episode: Index of the episode, int32[B], which seeds its random numbers.
      num_sampled: Number of tokens sampled so far in all turns of the episode, int32[B].
      budget: Remaining token budget of the turn, int32[B].
      sampling: Sampling parameters of each row.
    """

    lane: Int32[AnyArray, "B"]
    table: Int32[AnyArray, "B pages"]
    length: Int32[AnyArray, "B"]
    active: Bool[AnyArray, "B"]
    stop_state: Int32[AnyArray, "B"]
    position: Int32[AnyArray, "B"]
    episode: Int32[AnyArray, "B"]
    num_sampled: Int32[AnyArray, "B"]
    budget: Int32[AnyArray, "B"]
    sampling: Sampling


class SampledTokens(flax.struct.PyTreeNode):
    """Tokens sampled by one call of `decode`. Only the first `count` entries of a row are valid.

    Attributes:
      tokens: Sampled token ids, int32[B, steps].
      sampling_logprobs: Log-probs under the distribution sampled from, float32[B, steps].
      logprobs: Log-probs with temperature scaling alone, float32[B, steps].
      count: Number of tokens sampled in each row, int32[B].
      stop_state: State of the stop automaton after these tokens, int32[B].
      steps: Number of steps run, int32[].
    """

    tokens: Int32[AnyArray, "B steps"]
    sampling_logprobs: Float32[AnyArray, "B steps"]
    logprobs: Float32[AnyArray, "B steps"]
    count: Int32[AnyArray, "B"]
    stop_state: Int32[AnyArray, "B"]
    steps: Int32[AnyArray, ""]


def decode(
    model: Policy,
    cache: Cache,
    rows: Rows,
    next_state: Int16[AnyArray, "states V"],
    allowed: Bool[AnyArray, "V"],
    seed: int | Int32[AnyArray, ""],
    leave_at: Int32[AnyArray, ""],
    *,
    steps: int,
    running: int,
) -> tuple[SampledTokens, Cache]:
    """Run up to `steps` decoding steps; return early once at most `leave_at` rows are active.

    Args:
      model: The policy.
      cache: The cache (to be donated).
      rows: The turns to decode.
      next_state: Transition table of `stop.StopTable`, int16[states, V].
      allowed: Tokens that may be sampled, bool[V].
      seed: Random seed of the rollout, int32[].
      leave_at: Number of active rows at which to return, int32[]; 0: when no row is active.
      steps: Maximum number of steps; static.
      running: `stop.StopTable.running`; static.
    """
    B = len(rows.lane)
    zeros = functools.partial(jnp.zeros, (B, steps))
    out = (zeros(jnp.int32), zeros(jnp.float32), zeros(jnp.float32), jnp.zeros(B, jnp.int32))
    hidden = jnp.take(cache.hidden, rows.lane, axis=0, mode="clip")

    def should_continue(carry):
        index, _, rows, _, _ = carry
        return (index < steps) & (rows.active.sum() > leave_at)

    def step(carry):
        return _step(model, next_state, allowed, seed, running, *carry)

    carry = (jnp.int32(0), out, rows, hidden, cache)
    num_steps, out, rows, hidden, cache = jax.lax.while_loop(should_continue, step, carry)
    cache = cache.replace(hidden=cache.hidden.at[rows.lane].set(hidden, mode="drop"))
    return SampledTokens(*out, rows.stop_state, num_steps), cache


def _step(model, next_state, allowed, seed, running, index, out, rows, hidden, cache):
    """Run decoding step `index`: sample a token for each active row, and write it to its lane."""
    active, count = rows.active, rows.active.astype(jnp.int32)
    logits = model.logits(hidden[:, None])[:, 0]
    keys = token_keys(seed, rows.episode, rows.num_sampled)
    token, sampling_logprob, logprob = sample(logits, keys, rows.sampling, allowed)
    x = model.text.embed(token[:, None], model.dtype)
    positions = jnp.tile(rows.position[:, None, None], (1, 3, 1))
    paged = PagedRows(table=rows.table, start=rows.length, count=count)
    new_hidden, cache = kv_cache.write(model, cache, x, positions, paged)
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
        length=rows.length + count,
        position=rows.position + count,
        num_sampled=rows.num_sampled + count,
        budget=budget,
    )
    return index + 1, out, rows, jnp.where(active[:, None], new_hidden, hidden), cache
