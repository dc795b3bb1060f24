"""Episodes of a group share their prompt and their pictures in a row; the update stays the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mmsr1_jax.models import sharding
from mmsr1_jax.models.families import PRESETS
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.rl import packing
from tests.reference import random_conversation
from tests.rl.learners import (
    CONFIG,
    assert_same_update,
    make_learner,
    metrics_and_moments,
    off_policy_batches,
)

SHAPE = packing.RowShape(rows=2, length=256, windows=24, shares_prompts=True)


def join(*prompts: Prompt) -> Prompt:
    images = tuple(image for prompt in prompts for image in prompt.images)
    return Prompt(np.concatenate([prompt.tokens for prompt in prompts]), images)


def make_groups(rng, groups=3, size=4):
    """Return samples of groups with one prompt each; a picture is shown in several replies."""
    samples, shown = [], random_conversation(rng, CONFIG, [1, (4, 4), 3])
    for _ in range(groups):
        prompt = random_conversation(rng, CONFIG, [5, (4, 6), 14])
        for index in range(size):
            parts = [random_conversation(rng, CONFIG, [int(rng.integers(8, 30))])]
            if index % 2:
                parts += [shown, random_conversation(rng, CONFIG, [6])]
            whole = join(prompt, *parts)
            T = len(whole.tokens)
            mask = (rng.random(T) < 0.5) & (whole.tokens != CONFIG.image_token_id)
            mask[: len(prompt.tokens)] = False
            mask[len(prompt.tokens)] = mask[-1] = True  # the prompt's last token predicts the first
            samples.append(
                packing.Sample(
                    prompt=whole,
                    mask=mask,
                    weights=np.full(T, rng.uniform(0.01, 0.03), np.float32),
                    advantages=np.full(T, rng.normal(), np.float32),
                    rollout_logprobs=rng.normal(-6, 0.5, T).astype(np.float32),
                    prefix=len(prompt.tokens),
                )
            )
    return samples


@pytest.mark.parametrize("attention", ["xla", pytest.param("blockwise", marks=pytest.mark.proof)])
def test_an_update_equals_that_of_episodes_one_by_one(attention):
    learner = make_learner(CONFIG, attention=attention)
    samples = make_groups(np.random.default_rng(0))
    shared = off_policy_batches(learner, samples, SHAPE)
    longest = max(len(sample.prompt.tokens) for sample in samples)
    one = packing.RowShape(rows=1, length=longest, windows=SHAPE.windows)
    separate = off_policy_batches(learner, samples, one)
    assert len(separate) == len(samples) > 3 * len(shared)
    assert any((batch.rows.prefix_ids > 0).any() for batch in shared)
    assert_same_update(metrics_and_moments(learner, shared), metrics_and_moments(learner, separate))


@pytest.mark.proof
def test_eight_devices_equal_one():
    samples = make_groups(np.random.default_rng(3))
    results = []
    for mesh in (sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh(1, 4, 2)):
        learner = make_learner(CONFIG, mesh)
        shape = dataclasses.replace(SHAPE, rows=4 * len(results) or 2)
        batches = off_policy_batches(learner, samples, shape)
        results.append(metrics_and_moments(learner, batches))
    assert_same_update(*results)


def test_prompts_and_pictures_are_in_a_row_once():
    samples = make_groups(np.random.default_rng(1), groups=2, size=6)
    (batch,) = packing.pack(samples, CONFIG, dataclasses.replace(SHAPE, length=512))
    prompts = {sample.prompt.tokens[: sample.prefix].tobytes() for sample in samples}
    distinct = sum(len(s.prompt.tokens) - s.prefix for s in samples)
    distinct += sum(len(np.frombuffer(prompt, np.int32)) for prompt in prompts)
    assert (batch.rows.segment_ids > 0).sum() == distinct
    # The first-turn pictures of both groups, and the one that the replies show.
    assert batch.rows.images.segment_ids.max(axis=1).tolist() in ([3, 0], [2, 2])


def test_different_pictures_with_equal_texts_are_different_prompts():
    rng = np.random.default_rng(2)
    first, second = make_groups(rng, groups=1, size=2)
    image = second.prompt.images[0]
    other = Patches(image.values + 1, image.grid)
    prompt = dataclasses.replace(second.prompt, images=(other, *second.prompt.images[1:]))
    (batch,) = packing.pack([first, dataclasses.replace(second, prompt=prompt)], CONFIG, SHAPE)
    assert not (batch.rows.prefix_ids > 0).any()


def test_groups_with_real_lengths_are_computed_about_once(shared):
    """Groups of eight with the lengths of real transcripts, in rows of 8,192 tokens."""
    config = PRESETS["qwen2.5-vl-7b"]
    text = (shared / "data" / "transcripts.jsonl").read_text("utf-8")
    turns = [json.loads(line)["turns"] for line in text.splitlines()]
    prompts = [first["input_tokens"] for first, *_ in turns]
    rests = [
        last["input_tokens"] + last["output_tokens"] - prompt
        for (*_, last), prompt in zip(turns, prompts, strict=True)
    ]
    rng, samples = np.random.default_rng(0), []
    for group, prompt_length in enumerate(prompts):
        for rest in rng.choice(rests, 8):
            tokens = np.concatenate([
                np.full(prompt_length, 10 + group), rng.integers(200, 50_000, rest)
            ]).astype(np.int32)  # fmt: skip
            ones = np.ones(len(tokens), np.float32)
            samples.append(
                packing.Sample(
                    prompt=Prompt(tokens, ()), mask=np.arange(len(tokens)) >= prompt_length,
                    weights=ones, advantages=ones, rollout_logprobs=ones, prefix=prompt_length,
                )
            )  # fmt: skip
    shape = packing.RowShape(rows=1, length=8192, windows=0, shares_prompts=True)
    batches = packing.pack(samples, config, shape)
    distinct = sum(prompts) + sum(len(s.prompt.tokens) - s.prefix for s in samples)
    computed = sum(int((batch.rows.segment_ids > 0).sum()) for batch in batches)
    before = sum(len(s.prompt.tokens) for s in samples)
    assert computed <= 1.1 * distinct and before > 1.4 * distinct
    assert packing.efficiency(batches) > 0.85
