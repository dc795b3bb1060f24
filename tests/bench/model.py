"""Tokens per second of the policy, forward and forward+backward, compared with torch.

    python -m tests.bench.model                 same weights, batch and machine; float32
    python -m tests.bench.model --shape=7b      on an accelerator: 4 layers of 7B width, bf16, MFU

Both sides do the same work: images through the tower, tokens through the decoder, log-probs of all
tokens, and for the second row of the table the gradient with respect to every parameter. Runs
alternate, and the best of each side counts, since other load on the machine only slows runs down.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmsr1_jax.models.checkpoint import abstract_model
from mmsr1_jax.models.families import PRESETS
from mmsr1_jax.models.image_rows import num_windows
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig, VisionConfig, text_config
from mmsr1_jax.processing.batching import Bucket, make_rows
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.scripts import random_policy

# bfloat16 matrix products without sparsity, operations per second, from the vendors' data sheets.
# The first key that occurs in a device's kind counts.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
        "TPU v5": 459e12, "TPU v6": 918e12}  # fmt: skip


def _four_layers(name: str) -> ModelConfig:
    """Return a released model with four layers in each tower."""
    preset = PRESETS[f"qwen2.5-vl-{name}"]
    vision = dataclasses.replace(preset.vision, num_layers=4, full_attention_layers=(3,))
    text = dataclasses.replace(preset.text, num_layers=4)
    return dataclasses.replace(preset, text=text, vision=vision)


SHAPES = {
    # About 24M parameters, the proportions of the 3B.
    "small": ModelConfig(
        text=text_config(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1536,
            num_layers=6,
            num_heads=6,
            num_kv_heads=2,
            mrope_section=(8, 12, 12),
        ),
        vision=VisionConfig(
            num_layers=4,
            hidden_size=256,
            intermediate_size=680,
            num_heads=4,
            out_hidden_size=384,
            full_attention_layers=(3,),
        ),
    ),
    "3b": _four_layers("3b"),
    "7b": _four_layers("7b"),
}


def quick_random_model(config: ModelConfig, **keywords) -> Policy:
    """Return a policy with random parameters, created by one program that compiles fast.

    Kernels are uniform with variance 1 / hidden size, norms about 1, biases about 0.

    Args:
      config: Architecture of the policy.
      keywords: Other arguments of `Policy`.
    """
    graph, shapes = nnx.split(abstract_model(config, **keywords))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    scale = (12 / config.text.hidden_size) ** 0.5

    def parameter(index, path, leaf):
        x = jax.lax.iota(jnp.uint32, leaf.size) + jnp.uint32(index * 0x9E3779B9 % 2**32)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # scramble the bits
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        x = (x.astype(jnp.float32) * 2.0**-32 - 0.5).reshape(leaf.shape)
        name = jax.tree_util.keystr(path)
        x = 1 + 0.1 * x if "scale" in name else 0.1 * x if "bias" in name else scale * x
        return x.astype(leaf.dtype)

    create = jax.jit(lambda: [parameter(i, *item) for i, item in enumerate(leaves)])
    return nnx.merge(graph, jax.tree.unflatten(tree, create()))


def conversation(rng, config, length: int, side: int) -> Prompt:
    """Return `length` random tokens that start with an image of side x side merged tokens."""
    config = dataclasses.replace(config, image_token_id=3)
    merged = side * side
    tokens = rng.integers(10, config.text.vocab_size, length)
    tokens[1 : 1 + merged] = config.image_token_id
    grid = (1, side * config.vision.merge_size, side * config.vision.merge_size)
    values = rng.normal(size=(grid[1] * grid[2], config.vision.patch_dim))
    return Prompt(tokens.astype(np.int32), (Patches(values.astype(np.float32), grid),))


def jax_runs(model, prompts, length):
    config = model.config
    windows = num_windows(prompts[0].grids[:1], config.vision)
    bucket = Bucket(length=length, windows=windows, rows=len(prompts))
    rows = jax.device_put(make_rows([[p] for p in prompts], bucket, config, 3))
    graph, params = nnx.split(model)

    def loss(params, rows):
        return nnx.merge(graph, params).token_logprobs(rows).sum()

    forward = jax.jit(loss).lower(params, rows).compile()
    both = jax.jit(jax.value_and_grad(loss)).lower(params, rows).compile()
    return {
        "forward": lambda: jax.block_until_ready(forward(params, rows)),
        "forward+backward": lambda: jax.block_until_ready(both(params, rows)),
    }, both


def torch_runs(model, prompts):
    from tests.reference import torch, torch_model

    reference = torch_model(model)
    reference.config.image_token_id = 3
    ids = torch.tensor(np.stack([p.tokens for p in prompts]), dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
        "mm_token_type_ids": (ids == 3).int(),
        "pixel_values": torch.tensor(np.concatenate([p.images[0].values for p in prompts])),
        "image_grid_thw": torch.tensor([p.grids[0] for p in prompts]),
    }

    def loss():
        logprobs = torch.log_softmax(reference(**inputs).logits[:, :-1].float(), -1)
        return logprobs.gather(-1, ids[:, 1:, None]).sum()

    def both():
        reference.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss().backward()

    return {"forward": lambda: loss().item(), "forward+backward": both}


def best_seconds(runs: dict, repeats: int) -> dict:
    """Return the shortest time of each of `runs`, in seconds. The runs alternate."""
    times = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: min(seconds) for name, seconds in times.items()}


def useful_flops(config, tokens: int, length: int, patches: int) -> float:
    """Return the number of operations of a forward and backward pass.

    6 for each parameter and token, and 12 N H for each pair of tokens that attend to each other
    (half of the pairs if attention is causal).
    """
    t, v = config.text, config.vision
    H, N, K = t.head_dim, t.num_heads, t.num_kv_heads
    layer = t.hidden_size * (2 * N + 2 * K) * H + 3 * t.hidden_size * t.intermediate_size
    text = 6 * tokens * (t.num_layers * layer + t.vocab_size * t.hidden_size)
    text += 12 * t.num_layers * N * H * tokens * length / 2
    layer = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    merged = v.hidden_size * v.merge_size**2
    vision = 6 * patches * (v.num_layers * layer + v.patch_dim * v.hidden_size)
    vision += 6 * patches / v.merge_size**2 * (merged * merged + merged * v.out_hidden_size)
    full = len(v.full_attention_layers) * patches**2  # one image per row, see below
    windows = (v.num_layers - len(v.full_attention_layers)) * patches * v.window_patches
    rows = tokens // length
    return text + vision + 12 * v.hidden_size * (full / rows + windows)


def peak_flops() -> float | None:
    """Return the FLOP/s of bfloat16 products that the device's data sheet states, if known."""
    kind = jax.devices()[0].device_kind
    return next((value for key, value in PEAK.items() if key in kind), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, help="tokens per row")
    parser.add_argument("--side", type=int, help="merged tokens on a side of each row's image")
    parser.add_argument("--remat", default="none", choices=["none", "dots", "full"])
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    accelerator = options.shape != "small"
    length = options.length or (4096 if accelerator else 512)
    side = options.side or (24 if accelerator else 12)
    config = dataclasses.replace(SHAPES[options.shape], image_token_id=3)
    dtype = jnp.bfloat16 if accelerator else jnp.float32
    rng = np.random.default_rng(0)
    prompts = [conversation(rng, config, length, side) for _ in range(options.rows)]
    model = random_policy.random_model(
        config, 0, param_dtype=dtype, dtype=dtype, remat=options.remat
    )
    tokens = options.rows * length
    patches = sum(len(p.images[0].values) for p in prompts)
    print(f"{options.rows} rows x {length} tokens, {patches} patches, {jnp.dtype(dtype).name}, "
          f"{jax.devices()[0].device_kind}")  # fmt: skip

    ours, compiled = jax_runs(model, prompts, length)
    runs = {("jax", name): run for name, run in ours.items()}
    if not accelerator:
        runs |= {("torch", name): run for name, run in torch_runs(model, prompts).items()}
    seconds = best_seconds(runs, options.repeats)
    print("| pass | jax tokens/s | torch tokens/s | ratio |\n|---|---|---|---|")
    for name in ours:
        jax_speed = tokens / seconds["jax", name]
        if ("torch", name) in seconds:
            torch_speed = tokens / seconds["torch", name]
            ratio = jax_speed / torch_speed
            print(f"| {name} | {jax_speed:,.0f} | {torch_speed:,.0f} | {ratio:.2f} |")
        else:
            print(f"| {name} | {jax_speed:,.0f} | - | - |")
    if peak := peak_flops():
        flops = useful_flops(config, tokens, length, patches)
        mfu = flops / seconds["jax", "forward+backward"] / peak
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**30
        print(f"MFU of forward+backward: {mfu:.1%}; {memory:.1f} GiB of temporaries")


if __name__ == "__main__":
    main()
