"""Small engines, their examples and tools, and comparisons of episodes, for tests of rollouts."""

import asyncio
import dataclasses

import jax
import numpy as np
import PIL.Image
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Example
from mmsr1_jax.processing.batching import Bucket, make_rows
from mmsr1_jax.tools import Observation, image_result, text_result

VOCAB_SIZE = 640
LIMITS = settings.Turns(
    max_new_tokens=40, max_episode_tokens=1024, min_turn_tokens=16, max_result_tokens=300
)


def make_config(*, limits=LIMITS, **rollout) -> settings.Config:
    keywords = dict(lanes=6, decode_batch_size=8, decode_steps=8, prefill_buckets=(32, 128),
                    prefill_tokens=64, encode_windows=8, image_cache_tokens=2048,
                    precompile=False)  # fmt: skip
    return settings.Config(
        rollout=settings.Rollout(**(keywords | rollout)),
        buckets=settings.Buckets(image_windows=(4, 8, 16)),
        turns=limits,
        tools=settings.Tools(max_pixels=16 * 28 * 28, max_result_chars=300, timeout=20.0),
    )


def random_image(seed: int, width: int = 80, height: int = 60) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def examples(count: int) -> list[Example]:
    """Return questions of different lengths with 0 to 2 images."""
    return [
        Example(
            id=str(i),
            question="Who built it? " + "x" * i,
            images=[random_image(100 * i + j, 150, 100 + 30 * i) for j in range(i % 3)],
        )
        for i in range(count)
    ]


def search_tools(wait=lambda: 0.0):
    """Return tools whose results depend on the query alone and take `wait` seconds."""

    async def text(query):
        await asyncio.sleep(wait())
        return Observation(
            results=[text_result(f"http://x/{i}", query.text * (i + 1)) for i in range(3)]
        )

    async def image(query):
        await asyncio.sleep(wait())
        seed = len(query.question)
        images = [random_image(seed + i, 80 + 20 * i) for i in range(3)]
        results = [image_result(image, f"title {i}") for i, image in enumerate(images)]
        return Observation(results=results)

    return {"text_search": text, "image_search": image}


def episode_record(episode) -> dict:
    """Return the fields of an episode that must be the same in every run."""
    calls = [dataclasses.replace(call, seconds=0.0) for call in episode.calls]
    return {
        "kinds": [segment.kind for segment in episode.segments],
        "tokens": episode.tokens.tolist(),
        "logprobs": episode.logprobs.tolist(),
        "sampling": [s.sampling_logprobs.tolist() for s in episode.segments if s.kind == "model"],
        "images": [image.digest for image in episode.images],
        "calls": calls,
        "turns": episode.turns,
        "end": episode.end,
    }


def by_index(episodes) -> dict[int, dict]:
    return {episode.index: episode_record(episode) for episode in episodes}


def compare_logprobs_with_score(model, finished, temperature: float) -> int:
    """Compare recorded log-probs with those of `score` on the finished conversations.

    Returns:
      Number of tokens that were compared.
    """
    graph, params = nnx.split(nnx.clone(model))
    # logits / temperature, by the output head
    params["text"]["head"].set_value(params["text"]["head"].get_value() / temperature)
    score = jax.jit(lambda params, rows: nnx.merge(graph, params).token_logprobs(rows))
    bucket, compared = Bucket(length=1024, windows=64, rows=1), 0
    for episode in finished:
        rows = make_rows([[episode.conversation]], bucket, model.config, 5)
        expected = np.asarray(score(params, rows))[0, : len(episode)]
        mask = episode.loss_mask
        np.testing.assert_allclose(episode.logprobs[mask], expected[mask], atol=1e-4, rtol=0)
        assert (episode.logprobs[~mask] == 0).all()
        for segment in episode.segments:
            if segment.kind == "model":
                assert (segment.sampling_logprobs >= segment.logprobs - 1e-5).all()
        compared += int(mask.sum())
    return compared


def assert_logprobs_match_score(model, finished, temperature: float) -> None:
    """Compare the log-probs of many tokens, of episodes with several turns and images."""
    assert compare_logprobs_with_score(model, finished, temperature) > 100
    assert any(len(e.turns) == 3 and len(e.images) > 3 for e in finished)
