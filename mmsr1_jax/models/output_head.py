"""The output head: logits, and log-probs of given tokens without all logits at once.

The logits of T tokens over a vocabulary of V take T x V floats, gigabytes for a row of training. So
log-probs and entropies are computed one block of the vocabulary at a time, in both passes:

    forward    for each block: logits = hidden table[block]^T; update max, sums and chosen logits
    backward   for each block: logits again, their gradient d, table gradient[block] = d^T hidden,
               hidden gradient += d table[block]

The table is gathered from other devices once, for both passes, and each block of its gradient is
summed over devices and written once. In blocks of tokens each of them would add to a gradient of
the whole table.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from mmsr1_jax.models import sharding
from mmsr1_jax.models.sharding import constrain
from mmsr1_jax.utils.arrays import AnyArray


def head_logits(
    hidden: Float[jax.Array, "B T D"], table: Float[jax.Array, "V D"]
) -> Float32[jax.Array, "B T V"]:
    """Return logits, float32[B, T, V], which are not rounded to bfloat16 for bfloat16 inputs.

    Args:
      hidden: float[B, T, D]. Hidden states.
      table: float[V, D]. Output head.
    """
    table = table.astype(hidden.dtype)
    return jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)


def token_statistics(
    hidden: Float[jax.Array, "B T D"],
    table: Float[jax.Array, "V D"],
    targets: Int32[AnyArray, "B T"],
    *,
    chunk: int,
    temperature: float = 1.0,
) -> tuple[Float32[jax.Array, "B T"], Float32[jax.Array, "B T"]]:
    """Return log-probs of targets and entropies under softmax(hidden table^T / temperature).

    Args:
      hidden: float[B, T, D]. Hidden states.
      table: float[V, D]. Output head.
      targets: int32[B, T]. Target tokens.
      chunk: Number of tokens whose logits over the whole vocabulary would take as much memory as
        the logits that are held at a time.
      temperature: Sampling temperature, greater than 0.

    Returns:
      Log-probabilities of the targets, float32[B, T], and entropies of the distributions in nats,
      float32[B, T].
    """
    with jax.named_scope("log_probs"):
        return _blocked_statistics(hidden, table, targets, chunk, temperature)


def _blocked_statistics(hidden, table, targets, chunk: int, temperature: float) -> Any:
    blocks = _num_blocks(table.shape[0] // _num_shards(table), -(-hidden.shape[1] // chunk))
    table = table.astype(hidden.dtype)
    return _statistics(hidden, table, jnp.asarray(targets), temperature, blocks)


def _num_shards(table) -> int:
    """Return the number of devices that split the vocabulary."""
    shards = sharding.mesh_axis_size("vocab")
    return shards if table.shape[0] % shards == 0 else 1


def _gather_blocks(table, blocks: int) -> jax.Array:
    """Return the table by blocks, [blocks, shards, v, D], gathered but for the vocabulary.

    Each device computes a part of every block.
    """
    V, D = table.shape
    shards = _num_shards(table)
    table = sharding.gather(table, "vocab", "embed")
    return table.reshape(shards, blocks, V // shards // blocks, D).swapaxes(0, 1)


def _num_blocks(vocabulary: int, at_least: int) -> int:
    """Return the smallest divisor of the vocabulary's size that is at least this number."""
    return next(n for n in range(min(at_least, vocabulary), vocabulary + 1) if vocabulary % n == 0)


def _block_logits(hidden, block, temperature: float):
    """Return the logits of a block of the vocabulary, float32[B, T, shards, v]."""
    block = constrain(block, "vocab", None, None)
    logits = jnp.einsum("btd,svd->btsv", hidden, block, preferred_element_type=jnp.float32)
    logits = constrain(logits, "batch", None, "vocab", None)
    return logits if temperature == 1.0 else logits / temperature


def _is_target(targets, index, table):
    """Return which tokens of a block are the targets, bool[B, T, shards, v]."""
    blocks, shards, v, _ = table.shape
    ids = (jnp.arange(shards)[:, None] * blocks + index) * v + jnp.arange(v)
    return targets[..., None, None] == ids


def _logsumexp_of_blocks(hidden, table, targets, temperature: float):
    """Return log-sum-exp, mean logit under the distribution and logit of the target.

    All are float32[B, T]. The sums over a block are relative to the largest logit so far.
    """

    def step(carry, xs):
        largest, total, weighted, chosen = carry
        index, block = xs
        logits = _block_logits(hidden, block, temperature)
        new = jnp.maximum(largest, logits.max(axis=(2, 3)))
        exp, scale = jnp.exp(logits - new[..., None, None]), jnp.exp(largest - new)
        total = total * scale + exp.sum(axis=(2, 3))
        weighted = weighted * scale + (exp * logits).sum(axis=(2, 3))
        found = _is_target(targets, index, table)
        chosen += jnp.where(found, logits, 0).sum(axis=(2, 3))
        return (new, total, weighted, chosen), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    carry = (zeros - jnp.inf, zeros, zeros, zeros)
    carry, _ = jax.lax.scan(step, carry, (jnp.arange(len(table)), table))
    largest, total, weighted, chosen = carry
    return largest + jnp.log(total), weighted / total, chosen


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _statistics(hidden, table, targets, temperature: float, blocks: int):
    return _statistics_forward(hidden, table, targets, temperature, blocks)[0]


def _statistics_forward(hidden, table, targets, temperature: float, blocks: int):
    table = _gather_blocks(table, blocks)
    logsumexp, mean, chosen = _logsumexp_of_blocks(hidden, table, targets, temperature)
    saved = hidden, table, targets, logsumexp, mean
    return (chosen - logsumexp, logsumexp - mean), saved


def _statistics_backward(temperature: float, _blocks: int, saved, gradients):
    """Return the gradients of hidden states and table.

    With probabilities p and logits z of a token, the gradient of its log-prob by z is
    [v = target] - p, and that of its entropy is -p (z - mean of z under p).
    """
    hidden, table, targets, logsumexp, mean = saved
    g_logprob, g_entropy = (g[..., None, None] for g in gradients)

    def step(d_hidden, xs):
        index, block = xs
        logits = _block_logits(hidden, block, temperature)
        probs = jnp.exp(logits - logsumexp[..., None, None])
        found = _is_target(targets, index, table)
        d_logits = g_logprob * (found - probs) - g_entropy * probs * (
            logits - mean[..., None, None]
        )
        d_logits = (d_logits / temperature).astype(hidden.dtype)
        d_hidden += jnp.einsum("btsv,svd->btd", d_logits, block, preferred_element_type=jnp.float32)
        d_block = jnp.einsum(
            "btsv,btd->svd", d_logits, hidden, preferred_element_type=jnp.float32
        ).astype(table.dtype)
        return d_hidden, constrain(d_block, "vocab", None, "embed")

    zeros = jnp.zeros(hidden.shape, jnp.float32)
    d_hidden, d_table = jax.lax.scan(step, zeros, (jnp.arange(len(table)), table))
    d_table = d_table.swapaxes(0, 1).reshape(-1, hidden.shape[-1])
    return d_hidden.astype(hidden.dtype), constrain(d_table, "vocab", "embed"), None


_statistics.defvjp(_statistics_forward, _statistics_backward)
