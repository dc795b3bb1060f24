"""The update: against torch, however episodes are packed, on one device and on eight."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.qwen2_5_vl import checkpoint
from mmsr1_jax.processing.batching import TooLongError
from mmsr1_jax.rl import loss, packing
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.scripts import random_policy
from tests.reference import random_conversation, torch, torch_inputs, torch_model
from tests.test_model import variant

OPTIONS = loss.LossOptions(
    clip_low=0.1, clip_high=0.3, kl_coef=0.05, entropy_coef=0.01, tis_cap=1.5
)
SHAPE = packing.RowShape(rows=2, length=128, windows=16)


def make_samples(config, count=5, seed=0):
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        parts = [[9, (4, 6), 25], [30], [8, (4, 4), 6, (6, 4), 12], [50, 20], [70]][number % 5]
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


def policy(logprobs, entropies, batch):
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


def learner(config, mesh=None, attention="xla", **update):
    mesh = mesh or sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = random_policy.random_model(config, seed=3, attention=attention, logprob_chunk=16)
    graph, params = nnx.split(model)
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    defaults = dict(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    return Learner(nnx.merge(graph, params), policy, settings.Update(**defaults | update), mesh)


def with_old(batches, old, reference):
    return [
        batch.replace(old_logprobs=o, ref_logprobs=r)
        for batch, o, r in zip(batches, old, reference, strict=True)
    ]


def prepared(one, samples, shape=SHAPE):
    """Micro-batches whose ratios and KL are not those of a first update."""
    config = one.model().config
    batches = packing.pack(samples, config, shape)
    scores = one.score(batches)

    def shifted(scale):
        # By the token, not by where it lies.
        return [s + scale * np.sin(b.targets * 1.7 + 0.3).astype(np.float32)
                for s, b in zip(scores, batches, strict=True)]  # fmt: skip

    return with_old(batches, shifted(0.2), shifted(0.1))


def flat(state):
    return {jax.tree_util.keystr(p): np.asarray(x)
            for p, x in jax.tree_util.tree_leaves_with_path(state)}  # fmt: skip


def after(one, batches):
    """What an update found, and its gradients: Adam's first moment is a tenth of them, clipped.
    Nothing is changed."""
    one.optimizer = jax.tree.map(jnp.zeros_like, one.optimizer)
    return one.update(batches, 0.0), flat(one.optimizer[1].mu)


CONFIG = variant(num_heads=8, num_kv_heads=2)


@pytest.fixture(scope="module")
def one():
    return learner(CONFIG)


@pytest.fixture(scope="module")
def expected(one):
    return after(one, prepared(one, make_samples(CONFIG)))


def assert_same(found, expected):
    (figures, moments), (wanted, wanted_moments) = found, expected
    for name in wanted:
        assert figures[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), name
    for name, moment in wanted_moments.items():
        np.testing.assert_allclose(10 * moments[name], 10 * moment, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 128, 16), pytest.param((1, 512, 64), marks=pytest.mark.proof)]
)
def test_packing_and_micro_batches_change_nothing(one, expected, shape):
    figures, moments = expected
    assert figures["finite"] == 1 and max(np.abs(m).max() for m in moments.values()) > 1e-3
    batches = prepared(one, make_samples(CONFIG)[::-1], packing.RowShape(*shape))
    assert_same(after(one, batches), expected)


@pytest.mark.parametrize("shape", [pytest.param((1, 8, 1), marks=pytest.mark.proof), (1, 4, 2)])
def test_eight_devices(expected, shape):
    other = learner(CONFIG, sharding.make_mesh(*shape))
    batches = prepared(other, make_samples(CONFIG), packing.RowShape(8, 128, 16))
    assert_same(after(other, batches), expected)
    moments = [x for x in jax.tree.leaves(other.optimizer) if x.ndim > 2]
    parts = [x.sharding.shard_shape(x.shape) for x in moments]
    assert any(part != x.shape for part, x in zip(parts, moments, strict=True)), "spread"


def torch_loss(model, samples, old, reference):
    """The same loss, from the equations, an episode at a time."""
    total, own = 0.0, []
    for number, sample in enumerate(samples):
        logits = model(**torch_inputs(sample.prompt, CONFIG)).logits[0].double()
        columns = np.flatnonzero(sample.mask)
        p = torch.log_softmax(logits[columns - 1], -1)
        target = torch.tensor(sample.prompt.tokens[columns], dtype=torch.long)
        new = p.gather(-1, target[:, None])[:, 0]
        entropy = -(p.exp() * p).sum(-1)
        own.append(new.detach())
        if old is None:
            continue
        weight, advantage, rollout_logprobs = (
            torch.tensor(x[columns], dtype=torch.float64)
            for x in (sample.weights, sample.advantages, sample.rollout_logprobs)
        )
        shift = torch.sin(target * 1.7 + 0.3)
        old_, reference_ = old[number] + 0.2 * shift, reference[number] + 0.1 * shift
        ratio = (new - old_).exp()
        clipped = ratio.clamp(1 - OPTIONS.clip_low, 1 + OPTIONS.clip_high)
        objective = torch.minimum(ratio * advantage, clipped * advantage)
        objective = objective * (old_ - rollout_logprobs).exp().clamp(max=OPTIONS.tis_cap)
        d = reference_ - new
        kl = d.exp() - 1 - d
        total = (
            total
            + (weight * (-objective + OPTIONS.kl_coef * kl - OPTIONS.entropy_coef * entropy)).sum()
        )
    return total, own


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_three_updates_equal_torch(freeze_vision):
    samples = make_samples(CONFIG, seed=2)
    one = learner(CONFIG, freeze_vision=freeze_vision)
    batches = prepared(one, samples)
    theirs = torch_model(one.model())
    names = dict(theirs.named_parameters())
    chosen = [x for n, x in names.items() if not (freeze_vision and "visual" in n)]
    start = {name: x.detach().clone() for name, x in names.items()}
    optimizer = torch.optim.AdamW(chosen, lr=1e-4, weight_decay=0.1)
    _, own = torch_loss(theirs, samples, None, None)
    with torch.enable_grad():
        for step in range(3):
            optimizer.zero_grad()
            wanted, _ = torch_loss(theirs, samples, own, own)
            wanted.backward()
            norm = torch.nn.utils.clip_grad_norm_(chosen, 0.5)
            assert norm > 0.5  # it is clipped
            optimizer.step()
            found = one.update(batches, 1e-4)
            assert found["loss"] == pytest.approx(wanted.item(), rel=1e-4), step
            assert found["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    ours = dict(checkpoint.hf_tensors(one.model(), checkpoint.LAYOUTS[1]))
    moved = {name: np.abs((x.detach() - start[name]).numpy()).max() for name, x in names.items()}
    assert all((x > 2e-4) != (freeze_vision and "visual" in name) for name, x in moved.items())
    worst = {name: np.abs(ours[name] - x.detach().numpy()).max() for name, x in names.items()}
    assert max(worst.values()) <= 1e-5, max(worst, key=worst.get)


def test_what_is_not_finite_changes_nothing(one):
    batches = prepared(one, make_samples(CONFIG))
    before, moments = flat(one.params), flat(one.optimizer)
    broken = [b.replace(advantages=np.where(b.mask, np.nan, 0).astype(np.float32)) for b in batches]
    assert one.update(broken, 1e-3)["finite"] == 0
    for state, was in ((one.params, before), (one.optimizer, moments)):
        for name, value in flat(state).items():
            np.testing.assert_array_equal(value, was[name])
    assert one.update(batches, 1e-3)["finite"] == 1


def test_a_reference_in_host_memory(one):
    batches = packing.pack(make_samples(CONFIG), CONFIG, SHAPE)
    reference = one.snapshot("pinned_host")
    assert {x.sharding.memory_kind for x in jax.tree.leaves(reference)} == {"pinned_host"}
    for found, wanted in zip(one.score(batches, reference), one.score(batches), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_no_array_of_tokens_by_vocabulary():
    """The released vocabulary and a row of 8k tokens, as compiled."""
    config = variant(vocab_size=151_936)
    T, V = 8192, 151_936
    prompt = packing.Prompt(np.full(T, 9, np.int32), ())
    ones = np.ones(T, np.float32)
    sample = packing.Sample(
        prompt=prompt, mask=ones > 0, weights=ones, advantages=ones, rollout_logprobs=ones
    )
    (batch,) = packing.pack([sample], config, packing.RowShape(1, T, 0))
    one = learner(config, attention="blockwise")
    text = one.lower(batch).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", text)}
    by_vocabulary = [math.prod(shape) // V for shape in shapes if V in shape]
    assert max(by_vocabulary) < T / 8, max(by_vocabulary)
    assert config.text.hidden_size in by_vocabulary  # such arrays are found


def test_first_fit_of_real_lengths():
    """A mixture as of the published run: prompts with a picture, up to two searches."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([
        rng.integers(500, 1500, 160), rng.integers(1200, 3500, 60), rng.integers(2500, 8192, 36)
    ])  # fmt: skip
    windows = rng.integers(24, 96, len(lengths))
    rows = packing.first_fit(list(zip(lengths, windows, strict=True)), 8192, 768)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= 8192 and windows[row].sum() <= 768 for row in rows)
    assert lengths.sum() / (len(rows) * 8192) >= 0.9


def test_what_fits_no_row_is_said():
    prompt = make_samples(CONFIG, 1)[0].prompt
    with pytest.raises(TooLongError, match="60 tokens, more than update.pack_length=50"):
        packing.check_fits(prompt, CONFIG, packing.RowShape(1, 50, 16))
    with pytest.raises(TooLongError, match="image windows, more than update.pack_windows=1"):
        packing.check_fits(prompt, CONFIG, packing.RowShape(1, 500, 1))
