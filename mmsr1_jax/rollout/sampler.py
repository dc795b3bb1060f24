"""Sampling of the next token of every row, with its log-prob.

All settings are per row and traced, so that rows with different settings share one program.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, Key

from mmsr1_jax.utils.arrays import AnyArray

_IMPOSSIBLE = -jnp.inf


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
    scaled = logits / sampling.temperature[:, None]
    candidates = jnp.where(allowed, scaled, _IMPOSSIBLE)
    limited = ~sampling.greedy & ((sampling.top_k > 0) | (sampling.top_p < 1))
    candidates = jax.lax.cond(
        limited.any(), lambda x: _mask_unlikely(x, sampling), lambda x: x, candidates
    )
    sampled = jax.vmap(jax.random.categorical)(keys, candidates)
    greedy = jnp.argmax(candidates, axis=-1)
    tokens = jnp.where(sampling.greedy, greedy, sampled).astype(jnp.int32)

    def logprob(logits):
        logit = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        return logit - jax.nn.logsumexp(logits, axis=-1)

    return tokens, jnp.where(sampling.greedy, 0.0, logprob(candidates)), logprob(scaled)


def _mask_unlikely(candidates: jax.Array, sampling: Sampling) -> jax.Array:
    """Mask logits by top-k, then top-p. Tokens tied with the least likely one kept are kept too.

    Args:
      candidates: Logits divided by the temperature, float32[B, V].
      sampling: Sampling parameters.
    """
    V = candidates.shape[-1]
    ordered = -jnp.sort(-candidates, axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)[:, None]
    ordered = jnp.where(jnp.arange(V) < k, ordered, _IMPOSSIBLE)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < sampling.top_p[:, None]) & (ordered > _IMPOSSIBLE)
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(candidates >= threshold, candidates, _IMPOSSIBLE)
