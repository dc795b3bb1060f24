"""Helpers: learners with a small random policy, random samples, and the same loss in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.rl import loss, packing
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.scripts import random_policy
from tests.reference import random_conversation, torch, torch_inputs, variant

OPTIONS = loss.LossOptions(
    clip_low=0.1, clip_high=0.3, kl_coef=0.05, entropy_coef=0.01, tis_cap=1.5
)
SHAPE = packing.RowShape(rows=2, length=128, windows=16)


def make_samples(config, count=5, seed=0):
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        parts = [[9, (4, 6), 25], [30], [8, (4, 4), 6, (6, 4), 12], [50, 20], [70]][index % 5]
        prompt = random_conversation(rng, config, parts)
        T = len(prompt.tokens)
        mask = (rng.random(T) < 0.4) & (prompt.tokens != config.image_token_id)
        mask[-1], mask[0] = True, False
        samples.append(
            packing.Sample(
                prompt=prompt,
                mask=mask,
                weights=np.full(T, rng.uniform(0.01, 0.03), np.float32),
                advantages=np.full(T, rng.normal(), np.float32),
                rollout_logprobs=rng.normal(-6, 0.5, T).astype(np.float32),
            )
        )
    return samples


def loss_function(logprobs, entropies, batch):
    return loss.policy_loss(
        logprobs,
        old_logprobs=batch.old_logprobs,
        advantages=batch.advantages,
        weights=batch.weights,
        mask=batch.mask,
        segment_ids=batch.segment_ids,
        options=OPTIONS,
        rollout_logprobs=batch.rollout_logprobs,
        ref_logprobs=batch.ref_logprobs,
        entropies=entropies,
    )


def make_learner(config, mesh=None, attention="xla", **update):
    mesh = mesh or sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = random_policy.random_model(config, seed=3, attention=attention, logprob_chunk=16)
    graph, params = nnx.split(model)
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    defaults = dict(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    return Learner(
        nnx.merge(graph, params), loss_function, settings.Update(**defaults | update), mesh
    )


def with_logprobs(batches, old_logprobs, ref_logprobs):
    return [
        batch.replace(old_logprobs=o, ref_logprobs=r)
        for batch, o, r in zip(batches, old_logprobs, ref_logprobs, strict=True)
    ]


def off_policy_batches(learner, samples, shape=SHAPE):
    """Return micro-batches whose ratios are not 1 and whose KL is not 0."""
    config = learner.model().config
    batches = packing.pack(samples, config, shape)
    logprobs = learner.logprobs(batches)

    def shifted(scale):
        # Depends on the token id, not on its position in the batch.
        return [s + scale * np.sin(b.targets * 1.7 + 0.3).astype(np.float32)
                for s, b in zip(logprobs, batches, strict=True)]  # fmt: skip

    return with_logprobs(batches, shifted(0.2), shifted(0.1))


def flat(state):
    return {jax.tree_util.keystr(p): np.asarray(x)
            for p, x in jax.tree_util.tree_leaves_with_path(state)}  # fmt: skip


def metrics_and_moments(learner, batches):
    """Return the metrics of an update and Adam's first moments, without changing the parameters.

    The moments are a tenth of the clipped gradients.
    """
    learner.optimizer = jax.tree.map(jnp.zeros_like, learner.optimizer)
    return learner.update(batches, 0.0), flat(learner.optimizer[1].mu)


CONFIG = variant(num_heads=8, num_kv_heads=2)


def learned_config(request) -> ModelConfig:
    """Return the config of the family that a test names (`over_families`), or of the first."""
    return variant(getattr(request, "param", "qwen2_5_vl"), num_heads=8, num_kv_heads=2)


def assert_same_update(actual, expected):
    """Assert that two results of `metrics_and_moments` are equal up to rounding."""
    (metrics, moments), (expected_metrics, expected_moments) = actual, expected
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    for name, moment in expected_moments.items():
        np.testing.assert_allclose(10 * moments[name], 10 * moment, rtol=0, atol=1e-5)


def torch_loss(model, samples, old_logprobs, ref_logprobs):
    """Return the loss, from the equations and one episode at a time, and the new log-probs."""
    total, logprobs = 0.0, []
    for index, sample in enumerate(samples):
        logits = model(**torch_inputs(sample.prompt, CONFIG)).logits[0].double()
        columns = np.flatnonzero(sample.mask)
        p = torch.log_softmax(logits[columns - 1], -1)
        target = torch.tensor(sample.prompt.tokens[columns], dtype=torch.long)
        new = p.gather(-1, target[:, None])[:, 0]
        entropy = -(p.exp() * p).sum(-1)
        logprobs.append(new.detach())
        if old_logprobs is None:
            continue
        weight, advantage, rollout_logprobs = (
            torch.tensor(x[columns], dtype=torch.float64)
            for x in (sample.weights, sample.advantages, sample.rollout_logprobs)
        )
        shift = torch.sin(target * 1.7 + 0.3)
        old, reference = old_logprobs[index] + 0.2 * shift, ref_logprobs[index] + 0.1 * shift
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - OPTIONS.clip_low, 1 + OPTIONS.clip_high)
        objective = torch.minimum(ratio * advantage, clipped * advantage)
        objective = objective * (old - rollout_logprobs).exp().clamp(max=OPTIONS.tis_cap)
        d = reference - new
        kl = d.exp() - 1 - d
        total = (
            total
            + (weight * (-objective + OPTIONS.kl_coef * kl - OPTIONS.entropy_coef * entropy)).sum()
        )
    return total, logprobs
