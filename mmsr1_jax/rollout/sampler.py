"""Sampling of the next token of every lane, with its log-prob.

All settings are per lane and traced, so that lanes with different settings share one program.
"""

import flax.struct
import jax
import jax.numpy as jnp

_NEVER = -jnp.inf


@flax.struct.dataclass
class Sampling:
    """Sampling parameters of B lanes.

    Attributes:
      temperature: Divisor of the logits, float32[B], above 0.
      top_k: Number of most likely tokens to sample from, int32[B]; 0 for all.
      top_p: Cumulative probability of nucleus sampling (arXiv 1904.09751), float32[B]: the smallest
        set of most likely tokens whose probabilities, renormalised after top-k, reach p; 1 for all.
      greedy: Whether to choose the most likely token and ignore the other parameters, bool[B].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    greedy: jax.Array

    @classmethod
    def uniform(
        cls, lanes: int, *, temperature=1.0, top_k=0, top_p=1.0, greedy=False
    ) -> "Sampling":
        """Return the same parameters for all lanes. A temperature of 0 means greedy.

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
            temperature=jnp.full(lanes, temperature or 1.0, jnp.float32),
            top_k=jnp.full(lanes, top_k, jnp.int32),
            top_p=jnp.full(lanes, top_p, jnp.float32),
            greedy=jnp.full(lanes, greedy),
        )


def token_keys(seed: jax.Array, episode: jax.Array, index: jax.Array) -> jax.Array:
    """Return one random key per lane, derived from (seed, episode, token index) alone.

    The tokens of a lane thus depend neither on other lanes nor on when it runs.

    Args:
      seed: Seed of the rollout, int32[].
      episode: Index of the episode in each lane, int32[B].
      index: Index of the next sampled token in the episode, int32[B].
    """

    def key(episode, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), episode), index)

    return jax.vmap(key)(episode, index)


def sample(
    logits: jax.Array, keys: jax.Array, sampling: Sampling, allowed: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sample one token per lane.

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
    candidates = jnp.where(allowed, scaled, _NEVER)
    limited = ~sampling.greedy & ((sampling.top_k > 0) | (sampling.top_p < 1))
    candidates = jax.lax.cond(
        limited.any(), lambda c: _keep_likeliest(c, sampling), lambda c: c, candidates
    )
    drawn = jax.vmap(jax.random.categorical)(keys, candidates)
    tokens = jnp.where(sampling.greedy, jnp.argmax(candidates, axis=-1), drawn).astype(jnp.int32)

    def logprob(values):
        chosen = jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(values, axis=-1)

    return tokens, jnp.where(sampling.greedy, 0.0, logprob(candidates)), logprob(scaled)


def _keep_likeliest(candidates: jax.Array, sampling: Sampling) -> jax.Array:
    """Mask tokens by top-k, then top-p. Tokens tied with the least likely one kept are kept too."""
    V = candidates.shape[-1]
    likeliest = -jnp.sort(-candidates, axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)[:, None]
    likeliest = jnp.where(jnp.arange(V) < k, likeliest, _NEVER)
    probabilities = jax.nn.softmax(likeliest, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < sampling.top_p[:, None]) & (likeliest > _NEVER)
    least = jnp.min(jnp.where(kept, likeliest, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(candidates >= least, candidates, _NEVER)
