"""Sampling of the next token of every row, with its log-prob.

All settings are per row and traced, so that rows with different settings share one program.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, Key

from mmsr1_jax.utils.arrays import AnyArray

THRESHOLD_SEARCH = "threshold_search"  # name of the loop of `least_likely` in a compiled program


class Sampling(flax.struct.PyTreeNode):
    """Sampling parameters of B rows.

    Attributes:
      temperature: Divisor of the logits, float32[B], above 0.
      top_k: Number of most likely tokens to sample from, int32[B]; 0 for all.
      top_p: Cumulative probability of nucleus sampling (arXiv 1904.09751), float32[B]: the smallest
        set of most likely tokens whose probabilities, renormalised after top-k, reach p; 1 for all.
      greedy: Whether to choose the most likely token and ignore the other parameters, bool[B].
    """

    temperature: Float32[AnyArray, "B"]
    top_k: Int32[AnyArray, "B"]
    top_p: Float32[AnyArray, "B"]
    greedy: Bool[AnyArray, "B"]

    @classmethod
    def uniform(
        cls,
        lanes: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
    ) -> "Sampling":
        """Return the same parameters for all rows, on the host. A temperature of 0 means greedy.

        Raises:
          ValueError: `temperature` or `top_k` is negative, or `top_p` is outside (0, 1].
        """
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"sampling: temperature={temperature} and top_k={top_k} must not be negative, "
                f"top_p={top_p} must be in (0, 1]"
            )
        greedy = greedy or temperature == 0
        return cls(
            temperature=np.full(lanes, temperature or 1.0, np.float32),
            top_k=np.full(lanes, top_k, np.int32),
            top_p=np.full(lanes, top_p, np.float32),
            greedy=np.full(lanes, greedy),
        )


def token_keys(
    seed: int | Int32[AnyArray, ""], episode: Int32[AnyArray, "B"], index: Int32[AnyArray, "B"]
) -> Key[jax.Array, "B"]:
    """Return one random key per row, derived from (seed, episode, token index) alone.

    The tokens of an episode thus depend neither on other episodes nor on the schedule.

    Args:
      seed: Seed of the rollout, int32[].
      episode: Index of the episode in each row, int32[B].
      index: Index of the next sampled token in the episode, int32[B].
    """

    def key(episode, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), episode), index)

    return jax.vmap(key)(episode, index)


def sample(
    logits: Float32[jax.Array, "B V"],
    keys: Key[jax.Array, "B"],
    sampling: Sampling,
    allowed: Bool[AnyArray, "V"],
) -> tuple[Int32[jax.Array, "B"], Float32[jax.Array, "B"], Float32[jax.Array, "B"]]:
    """Sample one token per row.

    Args:
      logits: Logits, float32[B, V].
      keys: Random keys from `token_keys`, [B].
      sampling: Sampling parameters.
      allowed: Tokens that may be sampled at all, bool[V]. Excludes the control tokens of prompts
        and ids beyond the tokenizer's.

    Returns:
      tokens: Sampled token ids, int32[B].
      sampling_logprobs: Log-probs under the distribution sampled from, float32[B]; 0 if greedy.
      logprobs: Log-probs under softmax(logits / temperature) over the whole vocabulary, float32[B],
        as computed by the trainer and `score`.
    """
    least = jax.lax.platform_dependent(
        logits,
        sampling,
        allowed,
        cpu=functools.partial(least_likely, bits=1),
        default=functools.partial(least_likely, bits=4),
    )
    scaled = logits / sampling.temperature[:, None]
    kept = allowed & ~(logits < least[:, None])
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    noise = jnp.where(sampling.greedy[:, None], 0.0, noise)
    perturbed = jnp.where(kept, scaled + noise, -jnp.inf)
    # NaN, from a policy that diverged, counts as the largest, so an allowed token is returned.
    perturbed = jnp.where(jnp.isnan(perturbed), jnp.inf, perturbed)
    tokens, kept_lse, other_lse = jax.lax.platform_dependent(
        perturbed, scaled, kept, cpu=reduce_in_passes, default=reduce_at_once
    )
    logit = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] / sampling.temperature
    sampling_logprobs = jnp.where(sampling.greedy, 0.0, logit - kept_lse)
    return tokens, sampling_logprobs, logit - jnp.logaddexp(kept_lse, other_lse)


def reduce_in_passes(
    perturbed: Float32[jax.Array, "B V"],
    scaled: Float32[jax.Array, "B V"],
    kept: Bool[jax.Array, "B V"],
) -> tuple[Int32[jax.Array, "B"], Float32[jax.Array, "B"], Float32[jax.Array, "B"]]:
    """Reduce the vocabulary by one plain reduction after the other, which a CPU vectorises.

    Args:
      perturbed: Scaled logits plus Gumbel noise, float32[B, V]; -inf for tokens not kept.
      scaled: Logits divided by the temperature, float32[B, V].
      kept: Tokens that may be sampled in each row, bool[B, V].

    Returns:
      tokens: First token of the largest perturbed logit, int32[B].
      kept_lse: Log-sum-exp of the scaled logits of tokens that are kept, float32[B].
      other_lse: Log-sum-exp of the other scaled logits, float32[B]; -inf without any.
    """
    V = perturbed.shape[-1]
    largest = perturbed.max(axis=-1, keepdims=True)
    tokens = jnp.where(perturbed == largest, jnp.arange(V, dtype=jnp.int32), V - 1).min(axis=-1)
    kept_lse = jax.nn.logsumexp(scaled, axis=-1, where=kept)
    return tokens, kept_lse, jax.nn.logsumexp(scaled, axis=-1, where=~kept)


def reduce_at_once(
    perturbed: Float32[jax.Array, "B V"],
    scaled: Float32[jax.Array, "B V"],
    kept: Bool[jax.Array, "B V"],
) -> tuple[Int32[jax.Array, "B"], Float32[jax.Array, "B"], Float32[jax.Array, "B"]]:
    """Compute the same as `reduce_in_passes` in one reduction, which an accelerator fuses.

    Random numbers and intermediate values are then never written to memory. A log-sum-exp is
    reduced as a pair of maximum and sum relative to it, so the maximum needs no pass of its own.
    On a CPU this is slower, and its running sums in float32 lose digits over a large vocabulary.

    Args:
      perturbed: As for `reduce_in_passes`, float32[B, V].
      scaled: As for `reduce_in_passes`, float32[B, V].
      kept: As for `reduce_in_passes`, bool[B, V].
    """
    # The maximum of no logits is finite, as the difference of two infinities is NaN.
    lowest, zero = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    scaled = jnp.maximum(scaled, lowest)
    index = jax.lax.broadcasted_iota(jnp.int32, perturbed.shape, 1)
    last = jnp.int32(perturbed.shape[-1] - 1)
    kept_max, other_max = jnp.where(kept, scaled, lowest), jnp.where(kept, lowest, scaled)
    kept_sum, other_sum = kept.astype(jnp.float32), (~kept).astype(jnp.float32)

    def add(max_a, sum_a, max_b, sum_b):
        largest = jnp.maximum(max_a, max_b)
        return largest, sum_a * jnp.exp(max_a - largest) + sum_b * jnp.exp(max_b - largest)

    def combine(a, b):
        b_wins = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
        value, token = jnp.where(b_wins, b[0], a[0]), jnp.where(b_wins, b[1], a[1])
        return value, token, *add(*a[2:4], *b[2:4]), *add(*a[4:], *b[4:])

    _, tokens, kept_max, kept_sum, other_max, other_sum = jax.lax.reduce(
        (perturbed, index, kept_max, kept_sum, other_max, other_sum),
        (jnp.float32(-jnp.inf), last, lowest, zero, lowest, zero),
        combine,
        dimensions=(1,),
    )
    return tokens, kept_max + jnp.log(kept_sum), other_max + jnp.log(other_sum)


def least_likely(
    logits: Float32[jax.Array, "B V"],
    sampling: Sampling,
    allowed: Bool[AnyArray, "V"],
    *,
    bits: int,
) -> Float32[jax.Array, "B"]:
    """Return the smallest logit that top-k and top-p keep in each row, float32[B]; -inf for all.

    Top-p applies to the probabilities of the k most likely tokens, renormalised. Tokens tied with
    the least likely one kept are kept too. Nothing is sorted. Both limits are the same search: for
    the smallest logit such that the tokens above it weigh less than a target. For top-k, a token
    weighs 1 and the target is k; for top-p, it weighs its probability and the target is p. Only
    searches that some row needs are run, with 2 + 32 / `bits` passes over the logits each.

    Args:
      logits: Logits, float32[B, V].
      sampling: Sampling parameters.
      allowed: Tokens that may be sampled, bool[V].
      bits: Number of bits of the result that a pass determines, by comparing each logit with
        2**bits - 1 others: 1, 2 or 4.
    """
    B, V = logits.shape
    use_k = ~sampling.greedy & (sampling.top_k > 0)
    use_p = ~sampling.greedy & (sampling.top_p < 1)
    k = jnp.where(use_k, sampling.top_k, V).astype(jnp.float32)

    def search(by_probability, least):
        # The comparison keeps the compiler from moving this pass out of the loop.
        kept = allowed & (logits >= least[:, None])
        largest = jnp.max(logits, axis=-1, where=kept, initial=-jnp.inf)
        temperature = jnp.where(by_probability == 1, sampling.temperature, jnp.inf)

        def weight(logits):  # relative to the most likely token; 1 at an infinite temperature
            return jnp.exp((logits - largest[:, None]) / temperature[:, None])

        def above(logit, weight):
            return jnp.where(allowed & (logits > logit[:, None]), weight, 0.0)

        # Of tokens tied with the least likely one, only as many count as make k.
        sum_above = above(least, weight(logits)).sum(axis=-1)
        num_tied = k - above(least, 1.0).sum(axis=-1)
        total = sum_above + num_tied * weight(least[:, None])[:, 0]
        target = jnp.where(by_probability == 1, sampling.top_p * total, k)

        def refine(step, rank):
            size = jnp.uint32(2 ** (32 - bits)) >> (bits * step).astype(jnp.uint32)
            digits = jnp.arange(1, 2**bits, dtype=jnp.uint32)
            ends = _float_of_rank(rank[:, None] + digits * size - 1)
            sums = [above(end, weight(logits)).sum(axis=-1) for end in ends.T]
            return rank + size * (jnp.stack(sums) >= target).sum(axis=0, dtype=jnp.uint32)

        rank = jax.lax.fori_loop(0, 32 // bits, refine, jnp.zeros(B, jnp.uint32))
        found = jnp.maximum(jnp.minimum(_float_of_rank(rank), largest), least)
        return jnp.where(jnp.where(by_probability == 1, use_p, use_k), found, least)

    # Round 0 is top-k, round 1 is top-p.
    first, end = jnp.where(use_k.any(), 0, 1), jnp.where(use_p.any(), 2, 1)
    with jax.named_scope(THRESHOLD_SEARCH):
        return jax.lax.fori_loop(first, end, search, jnp.full(B, -jnp.inf, jnp.float32))


def _float_of_rank(rank: jax.Array) -> jax.Array:
    """Return the float32 at a position, uint32, in the order of all floats; NaN excluded."""
    rank = jnp.clip(rank, jnp.uint32(0x007FFFFF), jnp.uint32(0xFF800000))  # -inf and inf
    bits = jnp.where(rank >> 31 == 1, rank ^ jnp.uint32(0x80000000), ~rank)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
