"""Rollouts compared with `generate` of transformers and with a synchronous engine, and decoding
compared with the memory bandwidth.

    python -m tests.bench.rollout                        a table; CPU, about 15 minutes
    python -m tests.bench.rollout --decode --shape=7b    bf16, 64 lanes of 2k tokens; on a GPU
    python -m tests.bench.rollout --host                 how long the device waits for the host

The policy is random, about 24M parameters, float32. Its tokenizer has tokens whose bytes are whole
searches, one in 64, so that turns end at random lengths; an episode has three of them. A question
has an image of 144 tokens and eight rollouts.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import pathlib
import random
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import PRESETS
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.rollout import decode
from mmsr1_jax.rollout import engine as engine_module
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.programs import Programs
from mmsr1_jax.rollout.sampler import Sampling
from mmsr1_jax.rollout.timeline import Timeline
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools import Observation, Part
from tests.bench.model import SHAPES
from tests.scripted_policy import scripted_processor

GROUP = 8
SEARCHES = {"<reason>r{}</reason> <text_search>q{}</text_search>\n": 8192 // 64}
# Short, so that recomputed tokens are mostly those of the conversation itself.
PROMPTS = {
    "question": "{images}\nQuestion: {question}",
    "after_text_search": "<information>\n{results}\n</information>\n{question}",
}
MEDIAN, P95 = 0.5, 4.0  # latency of a tool in seconds, log-normal


def engine_config(prompts: str, lanes: int, rows: int) -> settings.Config:
    return settings.Config(
        rollout=settings.Rollout(
            lanes=lanes, decode_batch_size=rows, decode_steps=16,
            prefill_buckets=(32, 64, 128, 256, 512),
            prefill_tokens=32, encode_windows=9, image_cache_tokens=8192, precompile=True,
        ),
        buckets=settings.Buckets(image_windows=(9,)),
        turns=settings.Turns(
            max_new_tokens=256, max_episode_tokens=2048, min_turn_tokens=256,
            max_result_tokens=1024, prompt_dir=prompts
        ),
        tools=settings.Tools(max_result_chars=2000, timeout=120.0, episode_timeout=1000.0),
    )  # fmt: skip


def examples(count: int) -> list[Example]:
    def random_image(seed: int) -> PIL.Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 255, (336, 336, 3), np.uint8)
        return PIL.Image.fromarray(pixels)

    return [
        Example(id=str(i), question=f"What is it? {i}", images=[random_image(i)])
        for i in range(count)
    ]


def search(latency: bool):
    """Return a tool whose results have 64 to 512 tokens, with or without latency."""
    sigma = np.log(P95 / MEDIAN) / 1.645
    rng = np.random.default_rng(0)

    async def call(query) -> Observation:
        if latency:
            await asyncio.sleep(MEDIAN * np.exp(sigma * rng.normal()))
        letters = random.Random(query.question + query.text)
        length = letters.randint(64, 512)
        text = "".join(letters.choices("0123456789QWXYZ", k=length))  # a token each
        return Observation(results=[(Part(text=text),)])

    return {"text_search": call}


class SynchronousScheduler(engine_module.Scheduler):
    """Scheduler that works in rounds: all lanes start together, and each turn waits for the slowest
    tool of the previous round."""

    def _collect_replies(self, wait: bool) -> None:
        if not self._ready_lanes and not self._unwritten() and not self._running:
            while len(self._engine.tool_executor):
                super()._collect_replies(True)

    def _admit(self):
        return [] if self._active else super()._admit()


@contextlib.contextmanager
def synchronous():
    """Make new rollouts of all engines synchronous."""
    asynchronous, engine_module.Scheduler = engine_module.Scheduler, SynchronousScheduler
    try:
        yield
    finally:
        engine_module.Scheduler = asynchronous


def timed_rollout(engine: Engine, count: int, seed: int = 0) -> tuple[float, list[Episode]]:
    """Return the seconds taken and the episodes of `count` questions."""
    engine.device._images.clear()
    begin = time.perf_counter()
    sampling = settings.Sampling(seed=seed)
    episodes = list(engine.rollout(examples(count), group_size=GROUP, sampling=sampling))
    seconds = time.perf_counter() - begin
    assert all(len(episode.turns) == 3 for episode in episodes), {e.error for e in episodes}
    return seconds, sorted(episodes, key=lambda episode: episode.index)


def sampled(episodes) -> int:
    return sum(int(episode.loss_mask.sum()) for episode in episodes)


def transformers_seconds(reference, config, episodes: list[Episode], batch: int) -> float:
    """Return the seconds that `generate` takes for the same turns.

    Each turn recomputes its whole conversation, in batches that run until their longest turn ends.
    """
    from tests.reference import torch

    def inputs_of(conversations):
        width = max(len(tokens) for tokens, _ in conversations)
        ids = torch.zeros(len(conversations), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(conversations):
            ids[row, width - len(tokens) :] = torch.tensor(tokens, dtype=torch.long)
            mask[row, width - len(tokens) :] = 1
        images = [image for _, images in conversations for image in images]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == config.image_token_id).int() * mask.int(),
            "pixel_values": torch.tensor(np.concatenate([image.values for image in images])),
            "image_grid_thw": torch.tensor([image.grid for image in images]),
        }

    begin = time.perf_counter()
    for turn in range(3):
        for first in range(0, len(episodes), batch):
            conversations, longest = [], 0
            for episode in episodes[first : first + batch]:
                before = episode.segments[: 1 + 3 * turn]
                tokens = np.concatenate([segment.tokens for segment in before])
                conversations.append((tokens, episode.images))
                longest = max(longest, len(episode.segments[1 + 3 * turn].tokens))
            reference.generate(
                **inputs_of(conversations), max_new_tokens=longest, min_new_tokens=longest,
                do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
    return time.perf_counter() - begin


def beside_transformers(model, processor, prompts: str) -> list[tuple]:
    from tests.reference import torch_model

    engine = Engine(model, processor, engine_config(prompts, lanes=32, rows=16), search(False))
    timed_rollout(engine, 1)
    ours, episodes = timed_rollout(engine, 16)
    counts = engine.device.stats
    engine.close()
    reference, theirs = torch_model(model), {}
    transformers_seconds(reference, model.config, episodes[:4], 4)
    for batch in (16, 32, 64):
        theirs[batch] = transformers_seconds(reference, model.config, episodes, batch)
    batch, best = min(theirs.items(), key=lambda item: item[1])
    tokens = sampled(episodes)
    filled = counts.decoded_tokens / counts.decode_slots
    padding = 1 - counts.prefill_tokens / counts.prefill_slots
    print(f"{len(episodes)} episodes, {tokens} tokens sampled, "
          f"{sum(map(len, episodes))} in all; decoding rows filled {filled:.0%}, "
          f"{padding:.0%} of the tokens written into lanes padding")  # fmt: skip
    print(f"transformers, tokens/s by batch: { {b: round(tokens / s) for b, s in theirs.items()} }")
    return [
        ("tokens/s, engine", f"{tokens / ours:,.0f}", ""),
        (f"tokens/s, `generate`, batch {batch}", f"{tokens / best:,.0f}", ""),
        ("engine / `generate`", f"{best / ours:.1f}", ">= 4"),
    ]


def with_latency(model, processor, prompts: str, lanes: int) -> list[tuple]:
    questions, seconds = 4 * lanes // GROUP, {}
    config = engine_config(prompts, lanes=lanes, rows=16)
    engine = Engine(model, processor, config, search(False))
    timed_rollout(engine, 1)
    seconds["none"], plain = timed_rollout(engine, questions)
    engine.tools = search(True)
    seconds["free"], free = timed_rollout(engine, questions)
    engine.tools = search(True)
    with synchronous():
        seconds["rounds"], rounds = timed_rollout(engine, questions)
    engine.close()
    same = [[e.tokens.tolist() for e in run] for run in (plain, free, rounds)]
    assert same[0] == same[1] == same[2]  # the same work is compared
    return [
        (f"s, no latency, {lanes} lanes, {4 * lanes} episodes", f"{seconds['none']:.1f}", ">= 30"),
        ("s, long-tailed latency", f"{seconds['free']:.1f}", ""),
        ("s, the same, synchronous", f"{seconds['rounds']:.1f}", ""),
        ("synchronous / engine", f"{seconds['rounds'] / seconds['free']:.2f}", ">= 2"),
        ("engine / no latency", f"{seconds['free'] / seconds['none']:.2f}", "<= 1.2"),
    ]


def host_waits(model, processor, prompts: str) -> list[tuple]:
    """Measure by the timeline how long the device waits for the host while 64 rows decode."""
    engine = Engine(model, processor, engine_config(prompts, lanes=64, rows=64), search(False))
    timed_rollout(engine, 1)
    timeline = Timeline()
    recorder = timeline.engine(0, engine.config)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # the precision of the timeline while the host computes
    list(engine.rollout(examples(16), group_size=GROUP, timeline=timeline))
    sys.setswitchinterval(interval)
    engine.close()
    events = recorder.tracks()["decode"]
    decoding_seconds = sum(end - start for _, start, end, _ in events)
    waits = sum(end - start for start, end in recorder.host_waits())
    return [
        ("s, decoding, 64 rows", f"{decoding_seconds:.1f}", ""),
        ("s, device waits for the host", f"{waits:.2f}", ""),
        ("share of decoding", f"{waits / decoding_seconds:.1%}", "<= 5 %"),
    ]


def decoding(shape: str, lanes: int, context: int, dtype) -> list[tuple]:
    """Compare decoding with the time needed to copy the bytes that a step reads."""
    config = SHAPES[shape] if shape == "small" else PRESETS[f"qwen2.5-vl-{shape}"]
    step, read = decoding_step(config, lanes, context, dtype)
    bound = read / copy_bandwidth()
    return [
        (f"tokens/s, decoding, {lanes} lanes, {context} tokens each", f"{lanes / step:,.0f}", ""),
        ("fraction of the memory bandwidth", f"{bound / step:.0%}", ">= 60 %"),
    ]


def decoding_step(config: ModelConfig, lanes: int, context: int, dtype) -> tuple[float, float]:
    """Return the seconds of a decoding step, and the bytes that it has to read.

    Args:
      config: Architecture of the policy, whose parameters are constants.
      lanes: Number of lanes, all of which decode.
      context: Number of tokens in each lane.
      dtype: Dtype of parameters and cache.
    """
    steps, config_of_engine = 16, settings.Config()
    rollout, turns = config_of_engine.rollout, config_of_engine.turns
    rollout.lanes, rollout.decode_batch_size, rollout.decode_steps = lanes, lanes, steps
    turns.max_episode_tokens = context + 8 * steps
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = checkpoint.abstract_model(config, remat="none", param_dtype=dtype, dtype=dtype)
    graph, params = nnx.split(model)
    params = sharding.abstract_params(params, mesh)
    programs = Programs(nnx.merge(graph, params), config_of_engine, states=1, running=1)
    shapes, layout = programs.abstract_params(), programs.layout
    full = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.full(x.shape, 1e-3, x.dtype), shapes),
        out_shardings=layout,
    )
    params, times = full(), []
    state, _ = programs.empty()
    nothing = np.zeros(lanes, np.int32)
    table = np.arange(lanes * programs.pages_per_lane, dtype=np.int32).reshape(lanes, -1)
    rows = decode.Rows(
        lane=np.arange(lanes, dtype=np.int32), table=table, length=nothing + context,
        active=np.ones(lanes, bool), stop_state=nothing, position=nothing + context,
        episode=nothing, num_sampled=nothing, budget=nothing + 10_000,
        sampling=Sampling.uniform(lanes),
    )  # fmt: skip
    vocabulary = config.text.vocab_size
    rest = (rows, np.zeros((1, vocabulary), np.int16), np.ones(vocabulary, bool), 0, 0)
    rest = jax.block_until_ready(jax.device_put(rest, programs.replicated))
    for _ in range(5):  # the first compiles
        begin = time.perf_counter()
        with programs.context():
            sampled, state = programs.decode(params, state, *rest, steps=steps, running=1)
        jax.block_until_ready((sampled, state))
        times.append((time.perf_counter() - begin) / steps)
    text = sum(x.nbytes for x in jax.tree.leaves(params["text"]))
    embedding = params["text"]["embedding"].get_value().nbytes  # a few rows of it are read
    kv = sum(pages.nbytes for pages in state.pages) / programs.num_pages
    kv *= lanes * context / rollout.page_size
    return min(times), text - (0 if config.text.tie_embeddings else embedding) + kv


def copy_bandwidth() -> float:
    """Return the bytes per second that copies read and write.

    One program makes all copies, so that launching it takes no noticeable part of the time.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, copies = (2**26, 4) if on_cpu else (2**30, 50)

    def copy(_, x):
        return jax.lax.optimization_barrier(x + 1)  # or several copies might become one

    run = jax.jit(lambda x: jax.lax.fori_loop(0, copies, copy, x), donate_argnums=0)
    x = jax.block_until_ready(run(jnp.zeros(size // 4, jnp.float32)))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        x = jax.block_until_ready(run(x))
        times.append(time.perf_counter() - begin)
    return 2 * size * copies / min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--decode", action="store_true", help="decoding alone")
    parser.add_argument("--host", action="store_true", help="waits of the device for the host")
    parser.add_argument("--shape", default="small", help="of the policy that decodes")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--skip", nargs="*", default=[], choices=["transformers", "latency"])
    options = parser.parse_args()
    rows = []
    if options.decode:
        dtype = jnp.float32 if options.shape == "small" else jnp.bfloat16
        rows += decoding(options.shape, options.lanes, options.context, dtype)
    else:
        images = ImageProcessor(min_pixels=336 * 336, max_pixels=336 * 336)
        processor = scripted_processor(8192, actions=SEARCHES, images=images)
        config = dataclasses.replace(
            SHAPES["small"],
            image_token_id=processor.control["<|image_pad|>"],
            vision_start_token_id=processor.control["<|vision_start|>"],
            vision_end_token_id=processor.control["<|vision_end|>"],
            video_token_id=8191,
        )
        model = random_policy.random_model(config, 0)
        with tempfile.TemporaryDirectory() as directory:
            for name, text in PROMPTS.items():
                (pathlib.Path(directory) / f"{name}.txt").write_text(text)
            if options.host:
                rows += host_waits(model, processor, directory)
                options.skip = ["transformers", "latency"]
            if "transformers" not in options.skip:
                rows += beside_transformers(model, processor, directory)
            if "latency" not in options.skip:
                rows += with_latency(model, processor, directory, options.lanes)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("| | measured | goal |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
