"""Tokens per second of an update (loss, gradients, AdamW), compared with torch.

    python -m tests.bench.update                 a small model on a CPU, float32, and torch
    python -m tests.bench.update --shape=7b      on an accelerator: 4 layers of 7B width, bf16, MFU
    python -m tests.bench.update --tiny          a step of configs/tiny.py, with and without sharing

Episodes are an eighth as long as in the published run: an image and a question, up to two searches.
Ours are packed into rows. Torch's are padded as in the published trainer: prompts on the left to
the maximum prompt length, turns on the right to the maximum length of all turns (4,096 and 8,192;
here an eighth). Tokens are those of the episodes, without padding, on both sides. Runs alternate,
and the best run of each side counts.
"""

import argparse
import dataclasses
import pathlib
import runpy
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmsr1_jax.apps.plan import needs
from mmsr1_jax.config import settings
from mmsr1_jax.data import tiny_world
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.models import sharding
from mmsr1_jax.processing.batching import num_prompt_windows
from mmsr1_jax.rl import packing
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.train_batch import make_loss
from mmsr1_jax.rollout.build import make_engine
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.training import train_utils
from tests.bench.model import SHAPES, conversation, peak_flops, useful_flops

PROMPT, TURNS = 512, 1024  # an eighth of the published 4,096 and 8,192
IMAGE_TOKEN = 3
SIDE = 6  # of an image, in merged tokens


def episodes(rng, config, count: int) -> list[packing.Sample]:
    """Return episodes with prompts of 60 to 190 tokens and turns of up to 830 tokens in all."""
    samples = []
    for _ in range(count):
        prompt = int(rng.integers(60, 190))
        kind = rng.random()
        turns = rng.integers(30, 90) if kind < 0.35 else rng.integers(200, 450)
        if kind > 0.85:
            turns = rng.integers(450, 830)
        T = prompt + int(turns)
        mask = np.zeros(T, bool)
        mask[prompt : prompt + min(int(turns), 60)] = True  # the first turn
        mask[-min(int(turns), 40) :] = True  # the answer
        samples.append(
            packing.Sample(
                prompt=conversation(rng, config, T, SIDE),
                mask=mask,
                weights=np.full(T, 1e-3, np.float32),
                advantages=np.full(T, rng.normal(), np.float32),
                rollout_logprobs=np.full(T, -9.0, np.float32),
            )
        )
    return samples


def row_shape(samples, config, pack_length: int, rows: int) -> packing.RowShape:
    """Return a shape whose rows hold the images of many short episodes."""
    windows = max(num_prompt_windows(s.prompt, config) for s in samples)
    return packing.RowShape(rows, pack_length, windows * (pack_length // 200))


def jax_update(model, samples, shape: packing.RowShape):
    """Return a function that takes one optimiser step, and the packing efficiency."""
    update = settings.Update(freeze_vision=False)
    objective = settings.Objective(kl_coef=0.0)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    graph, params = nnx.split(model)
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    learner = Learner(nnx.merge(graph, params), make_loss(objective), update, mesh)
    batches = packing.pack(samples, model.config, shape)
    return (lambda: learner.update(batches, 1e-6)), packing.efficiency(batches)


def torch_update(model, samples, micro_batch: int = 4):
    from tests.reference import torch, torch_model

    reference = torch_model(model)
    reference.config.image_token_id = IMAGE_TOKEN
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-6)
    width = PROMPT + TURNS

    def pad(sample):
        prompt_length = int(np.argmax(sample.mask))
        row = np.zeros((3, width), np.int64)
        start = PROMPT - prompt_length
        columns = slice(start, start + len(sample.mask))
        row[0, columns], row[1, columns], row[2, columns] = sample.prompt.tokens, 1, sample.mask
        return row

    chunks = []
    for start in range(0, len(samples), micro_batch):
        part = samples[start : start + micro_batch]
        rows = torch.tensor(np.stack([pad(s) for s in part]))
        images = [s.prompt.images[0] for s in part]
        chunks.append((
            {
                "input_ids": rows[:, 0],
                "attention_mask": rows[:, 1],
                "use_cache": False,
                "mm_token_type_ids": (rows[:, 0] == IMAGE_TOKEN).int(),
                "pixel_values": torch.tensor(np.concatenate([i.values for i in images])),
                "image_grid_thw": torch.tensor([i.grid for i in images]),
            },
            rows[:, 2, PROMPT:].bool(),
            torch.tensor([s.advantages[0] for s in part]),
        ))  # fmt: skip

    def run():
        optimizer.zero_grad()
        with torch.enable_grad():
            for inputs, mask, advantages in chunks:
                # Logits of the turns only, as in the published trainer.
                logits = reference(**inputs).logits[:, PROMPT - 1 : -1].float()
                p = torch.log_softmax(logits, -1)
                new = p.gather(-1, inputs["input_ids"][:, PROMPT:, None])[..., 0]
                ratio = (new - new.detach()).exp()
                objective = torch.minimum(
                    ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
                )
                (-(objective * mask).sum() * 1e-3).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()

    return run


def tiny_world_episodes(config: settings.Config) -> list[Episode]:
    """Return the episodes of a step of `configs/tiny.py` with its initial policy."""
    world = tiny_world.World.generate()
    with tempfile.TemporaryDirectory() as directory:
        config.tools.index = f"{directory}/index"
        tiny_world.write_index(world, pathlib.Path(config.tools.index))
        engine = make_engine(config, config.run.model, engines=1)
        questions = tiny_world.questions(world, "train", config.run.prompts_per_step)
        examples = [question.example() for question in questions]
        episodes = list(
            engine.rollout(
                examples, group_size=config.run.group_size, sampling=settings.Sampling(seed=1)
            )
        )
        engine.close()
    return sorted(episodes, key=lambda episode: episode.index)


def samples_of(episodes: list[Episode]) -> list[packing.Sample]:
    """Return a sample for each episode, with a random advantage."""
    rng = np.random.default_rng(0)
    return [
        packing.Sample(
            prompt=episode.conversation,
            mask=episode.loss_mask,
            weights=np.full(len(episode), 1e-4, np.float32),
            advantages=np.full(len(episode), rng.normal(), np.float32),
            rollout_logprobs=episode.logprobs,
            prefix=len(episode.segments[0].tokens),
        )
        for episode in episodes
    ]


def needed_flops(batches, model_config, update: settings.Update) -> float:
    """Return the FLOPs of the tokens, pictures and loss columns of micro-batches, by formula.

    Attention is that of tokens to those that they see.
    """
    tokens = sum(int((b.rows.segment_ids > 0).sum()) for b in batches)
    patches = sum(int((b.rows.images.segment_ids > 0).sum()) for b in batches)
    columns = sum(int(b.mask.sum()) for b in batches)
    work = needs.Work(rows=1, length=tokens, patches=patches, image_patches=36, columns=columns)
    pairs = 0
    for batch in batches:
        for ids, prefixes in zip(batch.rows.segment_ids, batch.rows.prefix_ids, strict=True):
            lengths = np.bincount(ids, minlength=len(ids))
            own = lengths[1:].astype(np.int64)
            pairs += int((own * (own + 1) // 2).sum() + lengths[prefixes[prefixes > 0]].sum())
    t = model_config.text
    flops = needs.gradient_flops(model_config, work, update)
    flops -= 3 * needs.forward_flops(model_config, work)["text attention"]
    return flops + 3 * 4.0 * t.num_layers * t.num_heads * t.head_dim * pairs


def product_flops(size: int = 2048) -> float:
    """Return the FLOP/s of a product of float32 matrices."""
    x = jnp.ones((size, size), jnp.float32)
    multiply, best = jax.jit(jnp.matmul), np.inf
    for _ in range(6):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def tiny_world_update(repeats: int) -> None:
    """Print how long an update of `configs/tiny.py` takes, and what its arithmetic takes."""
    config = runpy.run_path("configs/tiny.py")["get_config"]()
    config.sampling.temperature = 1.0
    samples = samples_of(tiny_world_episodes(config))
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    learner = Learner(
        train_utils.load_policy(config, config.run.model, mesh), make_loss(config.objective),
        config.update, mesh,
    )  # fmt: skip
    model_config, shape = learner.model().config, train_utils.row_shape(config, mesh)
    batches = {
        name: packing.pack(samples, model_config, dataclasses.replace(shape, shares_prompts=shares))
        for name, shares in (("shared", True), ("not shared", False))
    }
    tokens = sum(len(sample.mask) for sample in samples)
    best = dict.fromkeys(batches, np.inf)
    for repeat in range(repeats + 1):
        for name, micro_batches in batches.items():
            start = time.perf_counter()
            learner.update(micro_batches, 1e-6)
            if repeat:  # the first compiles
                best[name] = min(best[name], time.perf_counter() - start)
    rate = product_flops()
    for name, micro_batches in batches.items():
        used = sum(int((b.rows.segment_ids > 0).sum()) for b in micro_batches)
        print(f"{name}: {len(micro_batches)} micro-batches of {micro_batches[0].rows.tokens.shape}")
        filled = packing.efficiency(micro_batches)
        print(f"  {used} of {tokens} tokens computed, rows filled {filled:.2f}")
        print(f"  {best[name]:.2f} s")
    flops = needed_flops(batches["shared"], model_config, config.update)
    print(f"product: {rate / 1e9:.0f} GFLOP/s; {flops / 1e9:.0f} GFLOP without repetition")
    print(f"seconds / (FLOPs / rate): {best['shared'] * rate / flops:.2f} (goal 3)")
    print(f"not shared / shared: {best['not shared'] / best['shared']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a step of configs/tiny.py")
    arguments = parser.parse_args()
    if arguments.tiny:
        return tiny_world_update(arguments.repeats)
    config = SHAPES[arguments.shape]
    large = arguments.shape != "small"
    rng = np.random.default_rng(0)
    dtype = "bfloat16" if large else "float32"
    model = random_policy.random_model(
        config, seed=0, dtype=dtype, attention="auto", remat="full" if large else "none",
        logprob_chunk=256,
    )  # fmt: skip
    model.config = config = dataclasses.replace(config, image_token_id=IMAGE_TOKEN)
    samples = episodes(rng, config, arguments.episodes)
    tokens = sum(len(s.mask) for s in samples)
    shape = row_shape(samples, config, 8192 if large else 1024, 1)
    run, efficiency = jax_update(model, samples, shape)
    runs = {"ours": run}
    if not large and not arguments.skip_torch:
        runs["torch"] = torch_update(
            random_policy.random_model(SHAPES[arguments.shape], seed=0), samples
        )
    best = dict.fromkeys(runs, np.inf)
    for repeat in range(arguments.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first compiles
                best[name] = min(best[name], time.perf_counter() - start)
    print(f"{len(samples)} episodes, {tokens} tokens, packed {efficiency:.2f}")
    for name, seconds in best.items():
        print(f"{name}: {tokens / seconds:.0f} tokens/s")
    if "torch" in best:
        print(f"ratio {best['torch'] / best['ours']:.2f}")
    if peak := peak_flops():
        patches = sum(len(s.prompt.images[0].values) for s in samples)
        length = float(np.average([len(s.mask) for s in samples],
                                  weights=[len(s.mask) for s in samples]))  # fmt: skip
        flops = useful_flops(config, tokens, int(length), patches)
        print(f"MFU {flops / best['ours'] / peak:.3f} of {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
