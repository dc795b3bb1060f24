"""Choosing the next token of every lane, and what its log-prob was.

All settings are per lane and traced, so that lanes of different kinds share one program.
"""

import flax.struct
import jax
import jax.numpy as jnp

_NEVER = -jnp.inf


@flax.struct.dataclass
class Sampling:
    """How each of B lanes samples.

    Attributes:
      temperature: float32[B], above 0; logits are divided by it.
      top_k: int32[B]: only the k likeliest tokens; 0 for all.
      top_p: float32[B]: of those, the smallest set of likeliest tokens whose probabilities, made to
        sum to 1, reach p (nucleus sampling, arXiv 1904.09751); 1 for all.
      greedy: bool[B]: the likeliest token; the rest is then ignored.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    greedy: jax.Array

    @classmethod
    def uniform(
        cls, lanes: int, *, temperature=1.0, top_k=0, top_p=1.0, greedy=False
    ) -> "Sampling":
        """The same for all lanes. A temperature of 0 means greedy.

        Raises:
          ValueError: a temperature or top_k below 0, or a top_p outside (0, 1].
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
    """A random key a lane, from (seed, episode, token index) alone: what a lane draws depends
    neither on its neighbours nor on when it runs. Arguments: int32[], int32[B], int32[B]."""

    def key(episode, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), episode), index)

    return jax.vmap(key)(episode, index)


def sample(
    logits: jax.Array, keys: jax.Array, sampling: Sampling, allowed: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token a lane.

    Args:
      logits: float32[B, V].
      keys: random keys [B], see `token_keys`.
      sampling: how.
      allowed: bool[V]: tokens that may be sampled at all (no control tokens of prompts, no ids
        beyond the tokenizer's).

    Returns:
      tokens: int32[B].
      sampling_logprobs: float32[B], under the distribution that was drawn from; 0 where greedy.
      logprobs: float32[B], under softmax(logits / temperature) over the whole vocabulary: what the
        trainer and `score` compute.
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
    """Top-k, then top-p of what is left. Tokens as likely as the last one kept are kept too."""
    V = candidates.shape[-1]
    likeliest = -jnp.sort(-candidates, axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)[:, None]
    likeliest = jnp.where(jnp.arange(V) < k, likeliest, _NEVER)
    probabilities = jax.nn.softmax(likeliest, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < sampling.top_p[:, None]) & (likeliest > _NEVER)
    least = jnp.min(jnp.where(kept, likeliest, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(candidates >= least, candidates, _NEVER)
