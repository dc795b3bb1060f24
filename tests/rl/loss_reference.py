"""Reference implementation of the loss: one episode at a time, as in the papers, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmsr1_jax.rl.loss import (
    LossOptions,
    policy_loss,
    token_weights,
)

FIXED = 40
FIELDS = ("new", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "entropies")
LAYOUTS = {  # rows of episodes in each micro-batch, and the tokens of a row
    "one episode per row": ([[[0], [1], [2], [3], [4], [5], [6]]], 16),
    "one row": ([[[6, 0, 5, 1, 4, 2, 3]]], 98),
    "micro-batches": ([[[3, 1], [4]], [[0, 2], []], [[5], [6]]], 28),
}


def random_episodes(seed, count=7):
    """Return episodes with gaps in their masks; the fourth carries no loss at all."""
    rng = np.random.default_rng(seed)
    episodes = []
    for index in range(count):
        size = int(rng.integers(2, 15))
        new = rng.normal(-1.5, 0.7, size)
        episode = {
            "new": new,
            "old_logprobs": new + rng.normal(0, 0.15, size),
            "ref_logprobs": new + rng.normal(0, 0.5, size),
            "advantages": np.full(size, rng.normal()),
            "entropies": rng.uniform(0, 3, size),
            "mask": (rng.random(size) < 0.7) & (index != 3),
        }
        episode["rollout_logprobs"] = episode["old_logprobs"] + rng.normal(0, 0.2, size)
        episodes.append(episode)
    episodes[0]["mask"][:2] = True
    return episodes


def aggregate(values, aggregation):
    """Return the average of a list of arrays, each with the loss tokens of an episode."""
    nonempty = [v for v in values if len(v)]
    if aggregation == "token":
        return sum(v.sum() for v in nonempty) / sum(len(v) for v in nonempty)
    if aggregation == "sequence":
        return sum(v.mean() for v in nonempty) / len(nonempty)
    return sum(v.sum() for v in nonempty) / (len(values) * FIXED)


def reference_loss(episodes, options, aggregation, xp=np):
    """Return the loss as the papers define it; xp: numpy or torch."""
    objectives, kls, entropies = [], [], []
    for e in episodes:
        new, old, rollout_logprobs, reference, advantages, entropy = (
            e[f][e["mask"]] for f in FIELDS
        )
        if options.ratio_level == "token":
            ratio = xp.exp(new) / xp.exp(old)
        elif options.ratio_level == "sequence":
            ratio = xp.exp((new - old).sum() / max(1, len(new))) + 0 * new
        else:
            ratio = xp.prod(xp.exp(new) / xp.exp(old)) + 0 * new
        clipped = xp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
        objective = xp.minimum(ratio * advantages, clipped * advantages)
        if options.tis_cap is not None:
            objective = objective * xp.clip(xp.exp(old - rollout_logprobs), 0, options.tis_cap)
        r = xp.exp(reference) / xp.exp(new)
        kl = {"k1": -xp.log(r), "k2": xp.log(r) ** 2 / 2, "k3": r - 1 - xp.log(r)}
        objectives.append(objective)
        kls.append(kl[options.kl_estimator])
        entropies.append(entropy)
    return (
        -aggregate(objectives, aggregation)
        + options.kl_coef * aggregate(kls, aggregation)
        - options.entropy_coef * aggregate(entropies, aggregation)
    )


def pack(episodes, rows, length, weights, dtype):
    """Return the arrays of one micro-batch, with NaN or infinity at masked positions."""
    arrays = {f: np.full((len(rows), length), np.nan, dtype) for f in (*FIELDS, "weights")}
    arrays["mask"] = np.zeros((len(rows), length), bool)
    arrays["segment_ids"] = np.zeros((len(rows), length), np.int32)
    slots = {}
    for row, indices in enumerate(rows):
        start = 0
        for segment, index in enumerate(indices, start=1):
            e = episodes[index]
            slot = (row, slice(start, start + len(e["mask"])))
            for field in FIELDS:
                arrays[field][slot] = np.where(e["mask"], e[field], np.inf)
            arrays["weights"][slot] = weights[index]
            arrays["mask"][slot] = e["mask"]
            arrays["segment_ids"][slot] = segment
            slots[index] = slot
            start += len(e["mask"])
    return {name: jnp.asarray(a) for name, a in arrays.items()}, slots


@functools.partial(jax.jit, static_argnums=3)
def loss_and_gradient(new, entropies, arrays, options):
    def loss(new, entropies):
        return policy_loss(new, entropies=entropies, options=options, **arrays)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(new, entropies)


def run(episodes, options, aggregation, layout="micro-batches", dtype=np.float64):
    """Return loss, sums, and each episode's gradients of `new` and `entropies`."""
    weights = token_weights([e["mask"].sum() for e in episodes], aggregation, FIXED)
    loss, sums, gradients = 0.0, {}, {}
    micro_batches, length = LAYOUTS[layout]

    for rows in micro_batches:
        arrays, slots = pack(episodes, rows, length, weights, dtype)
        new, entropies = arrays.pop("new"), arrays.pop("entropies")
        (value, actual), (d_new, d_entropies) = loss_and_gradient(new, entropies, arrays, options)
        assert value.dtype == dtype and {v.dtype for v in actual.values()} == {np.dtype(dtype)}
        loss += float(value)
        sums = {name: sums.get(name, 0.0) + float(v) for name, v in actual.items()}
        hidden = ~np.asarray(arrays["mask"])
        assert (np.asarray(d_new)[hidden] == 0).all()
        assert (np.asarray(d_entropies)[hidden] == 0).all()
        for index, slot in slots.items():
            gradients[index] = (np.asarray(d_new)[slot], np.asarray(d_entropies)[slot])
    return loss, sums, gradients


def make_options(ratio="token", kl_estimator="k3", tis_cap=1.1):
    return LossOptions(
        ratio_level=ratio,
        clip_low=0.03,
        clip_high=0.05,
        kl_coef=0.3,
        kl_estimator=kl_estimator,
        entropy_coef=0.2,
        tis_cap=tis_cap,
    )
