"""The parts of `tests.device`. Each runs in a process of its own:

    python -m tests.device_parts PART --out=FILE [--tiny] [--start=N]

A part is a list of measurements, independent of each other. FILE is rewritten before and after each
of them, so it is complete whenever the process ends:

    {"results": [{"name": .., "seconds": .., values ..}, {"name": .., "seconds": .., "error": ..}],
     "running": name of the measurement in progress, or null,
     "total": number of the part's measurements}
"""

import argparse
import dataclasses
import functools
import gc
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx

from mmsr1_jax.models.checkpoint import abstract_model
from mmsr1_jax.models.families import PRESETS
from mmsr1_jax.processing.batching import num_prompt_windows
from mmsr1_jax.rl import packing
from mmsr1_jax.scripts.random_policy import CONFIG
from mmsr1_jax.training import metrics
from tests import train_runs
from tests.bench import model as model_bench
from tests.bench import rollout as rollout_bench
from tests.bench import update as update_bench
from tests.device_gap import gap
from tests.device_parity import Measurement, parity
from tests.device_speed import speed
from tests.programs import ROOT

GIB = 2**30
UNUSABLE = 3  # exit code: the device fails after an error, so a new process has to go on


def measure(
    measurements: list[Measurement], file: pathlib.Path, *, start: int = 0
) -> list[dict[str, Any]]:
    """Run measurements, write their results to `file`, and return them.

    An exception is recorded, and the next measurement follows.

    Raises:
      SystemExit: The device no longer works after an exception.
    """
    results: list[dict[str, Any]] = []

    def write(running: str | None) -> None:
        text = json.dumps({"results": results, "running": running, "total": len(measurements)})
        partial = file.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, file)

    for measurement in measurements[start:]:
        write(measurement.name)
        begin, values = time.monotonic(), {}
        try:
            values = measurement.run()
        except Exception as error:
            traceback.print_exc()
            reason = str(error).strip() or "no message"
            values = {"error": f"{type(error).__name__}: {reason[:2000]}"}
        values = {name: _json_value(value) for name, value in values.items()}
        seconds = round(time.monotonic() - begin, 2)
        results.append({"name": measurement.name, "seconds": seconds, **values})
        write(None)
        if "error" in values and not device_works():
            sys.exit(UNUSABLE)
        gc.collect()  # frees the arrays
    return results


def _json_value(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinities as texts."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def device_works() -> bool:
    """Return whether a trivial program runs. After an illegal memory access on a GPU none does."""
    try:
        return float(jnp.ones(2).sum()) == 2
    except Exception:
        return False


# The device


def device(tiny: bool) -> list[Measurement]:
    """Return what the device and its software are, and its speed in the simplest programs."""
    return [
        Measurement("facts", facts),
        Measurement("copies", lambda: {"gigabytes_per_second": _bandwidth() / 1e9}),
        Measurement("products", functools.partial(product_speed, 256 if tiny else 8192)),
    ]


def facts() -> dict[str, Any]:
    """Return names and versions of the device, its driver and the packages."""
    first = jax.devices()[0]
    stats, peak = first.memory_stats() or {}, model_bench.peak_flops()
    values = {
        "kind": first.device_kind,
        "platform": first.platform,
        "devices": jax.device_count(),
        "memory_gib": round(stats.get("bytes_limit", 0) / GIB, 2),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "runtime": first.client.platform_version,
        "peak_tflops": peak / 1e12 if peak else None,
    }
    if first.platform == "gpu" and shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10)
        values["driver"] = (output.stdout + output.stderr).strip()
    return values


@functools.cache
def _bandwidth() -> float:
    """Return the bytes per second of copies, measured once per process."""
    return rollout_bench.copy_bandwidth()


def product_speed(size: int) -> dict[str, Any]:
    """Measure products of square bfloat16 matrices, one after the other in one program."""
    count = 40

    @jax.jit
    def run(w):
        def multiply(_, x):
            product = jax.lax.dot(x, w, preferred_element_type=jnp.bfloat16)
            return product * jnp.bfloat16(size**-0.5)

        return jax.lax.fori_loop(0, count, multiply, w)

    w = np.random.default_rng(0).standard_normal((size, size), np.float32)
    w = jnp.asarray(w, jnp.bfloat16)
    seconds = model_bench.best_seconds({"": lambda: jax.block_until_ready(run(w))}, 3)[""]
    speed = 2 * size**3 * count / seconds
    return {"tflops": speed / 1e12, "share_of_peak": _share(speed, model_bench.peak_flops())}


def _share(value: float, of: float | None) -> float | None:
    return value / of if of else None


# Decoding


def decoding(tiny: bool) -> list[Measurement]:
    """Decode at 7B shape with 64 and 256 lanes, or as many as fit."""
    config = CONFIG if tiny else PRESETS["qwen2.5-vl-7b"]
    context, dtype = (128, "float32") if tiny else (2048, "bfloat16")
    return [
        Measurement(
            f"{lanes} lanes of {context} tokens",
            functools.partial(decoding_speed, config, lanes, context, dtype),
        )
        for lanes in ((4,) if tiny else (64, 256))
    ]


def decoding_speed(config, lanes: int, context: int, dtype: str) -> dict[str, Any]:
    """Measure a decoding step, and its share of the bandwidth of copies."""
    bandwidth = _bandwidth()
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
    config, lanes = largest_that_fits(config, lanes, context, dtype, limit)
    step, read = rollout_bench.decoding_step(config, lanes, context, jnp.dtype(dtype))
    return {
        "lanes": lanes,
        "layers": config.text.num_layers,
        "tokens_per_second": lanes / step,
        "milliseconds": step * 1e3,
        "gigabytes_read": read / 1e9,
        "share_of_copy_bandwidth": read / step / bandwidth,
        "copy_gigabytes_per_second": bandwidth / 1e9,
    }


def largest_that_fits(config, lanes: int, context: int, dtype: str, memory: float):
    """Return the policy and the number of lanes that fit into `memory` bytes.

    Lanes are halved down to 16, then layers.
    """
    itemsize = jnp.dtype(dtype).itemsize
    while True:
        text = config.text
        params = nnx.split(abstract_model(config))[1]
        elements = sum(x.size for x in jax.tree.leaves(params))
        elements += (
            lanes * (context + 256) * text.num_layers * 2 * text.num_kv_heads * text.head_dim
        )
        # Beside them: several arrays of logits in float32, and a fixed reserve.
        needed = elements * itemsize + lanes * text.vocab_size * 4 * 6 + GIB
        if needed <= memory:
            return config, lanes
        if lanes > 16:
            lanes //= 2
        elif text.num_layers > 1:
            text = dataclasses.replace(text, num_layers=text.num_layers // 2)
            config = dataclasses.replace(config, text=text)
        else:
            raise MemoryError(f"{needed / GIB:.1f} GiB are needed, {memory / GIB:.1f} are there")


# MFU of an update


def update(tiny: bool) -> list[Measurement]:
    """Measure forward+backward and whole updates of four layers of 7B and 3B width."""
    shapes = {"tiny": CONFIG}
    if not tiny:
        shapes = {name: model_bench.SHAPES[name] for name in ("7b", "3b")}
    first = next(iter(shapes))
    forward_backward = functools.partial(forward_backward_speed, shapes[first], tiny)
    return [
        Measurement(f"forward+backward, {first}", forward_backward),
        *(
            Measurement(f"update, {name}", functools.partial(update_speed, config, tiny))
            for name, config in shapes.items()
        ),
    ]


def _work(config, tiny: bool) -> tuple[Any, list, int]:
    """Return the policy's configuration, conversations of a batch, and their length."""
    length, side = (64, 4) if tiny else (4096, 24)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    count = 2 if tiny else 4 if limit > 40 * GIB else 1
    config = dataclasses.replace(config, image_token_id=update_bench.IMAGE_TOKEN)
    rng = np.random.default_rng(0)
    prompts = [model_bench.conversation(rng, config, length, side) for _ in range(count)]
    return config, prompts, length


def _speed(config, prompts, length: int, seconds: float, **values: Any) -> dict[str, Any]:
    tokens, patches = length * len(prompts), sum(len(p.images[0].values) for p in prompts)
    flops = model_bench.useful_flops(config, tokens, length, patches)
    return {
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": _share(flops / seconds, model_bench.peak_flops()),
        "milliseconds": seconds * 1e3,
        "rows": len(prompts),
        "length": length,
        **values,
    }


def forward_backward_speed(config, tiny: bool) -> dict[str, Any]:
    """Measure log-probs of all tokens and their gradient, without rematerialisation if it fits."""
    config, prompts, length = _work(config, tiny)
    dtype = "float32" if tiny else "bfloat16"
    remat = "none" if len(prompts) > 1 else "full"
    model = model_bench.quick_random_model(config, param_dtype=dtype, dtype=dtype, remat=remat)
    runs, compiled = model_bench.jax_runs(model, prompts, length)
    seconds = model_bench.best_seconds(runs, 1 if tiny else 5)
    memory = compiled.memory_analysis().temp_size_in_bytes / GIB
    return _speed(
        config, prompts, length, seconds["forward+backward"], remat=remat, temporaries_gib=memory,
        forward_tokens_per_second=length * len(prompts) / seconds["forward"],
    )  # fmt: skip


def update_speed(config, tiny: bool) -> dict[str, Any]:
    """Measure an optimiser step of the learner: a micro-batch for each conversation, then AdamW."""
    config, prompts, length = _work(config, tiny)
    samples = [
        packing.Sample(
            prompt=prompt, mask=np.arange(length) > 0,  # `useful_flops` counts the head for all
            weights=np.full(length, 1e-4, np.float32), advantages=np.ones(length, np.float32),
            rollout_logprobs=np.full(length, -9.0, np.float32),
        )
        for prompt in prompts
    ]  # fmt: skip
    windows = max(num_prompt_windows(s.prompt, config) for s in samples)
    dtype, remat = ("float32", "none") if tiny else ("bfloat16", "full")
    model = model_bench.quick_random_model(config, dtype=dtype, remat=remat, logprob_chunk=256)
    shape = packing.RowShape(1, length, windows)
    run, _ = update_bench.jax_update(model, samples, shape)
    seconds = model_bench.best_seconds({"": run}, 1 if tiny else 3)[""]
    return _speed(config, prompts, length, seconds, remat=remat)


# Demo


def demo(tiny: bool) -> list[Measurement]:
    """Run ten steps of the embedded task. The command has the device, this process has not."""
    return [Measurement("training", functools.partial(train_demo, tiny))]


def train_demo(tiny: bool) -> dict[str, Any]:
    """Train for a few steps, and return seconds and rewards."""
    steps = 1 if tiny else 10
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        questions = train_runs.write_questions(folder, 4 if tiny else 32 * steps)
        options = ["--config=configs/tiny.py"]
        if tiny:
            options = [*train_runs.SMALL, "--config.run.group_size=2"]
        begin = time.monotonic()
        run = subprocess.run(
            train_runs.train_command(
                folder / "run", *options, f"--config.data.train=('{questions}',)",
                f"--config.tools.index={folder / 'index'}", f"--config.run.steps={steps}",
                f"--config.run.save_every={steps}", "--config.run.validate_every=0",
                "--config.run.log_to=",
            ),
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.monotonic() - begin
        lines = metrics.read(folder / "run" / "metrics.jsonl")
    if run.returncode or len(lines) != steps:
        print(run.stdout, run.stderr, sep="\n", file=sys.stderr)
        raise RuntimeError(
            f"exit code {run.returncode} after {len(lines)} steps: {run.stderr[-1500:]}"
        )
    gaps = [line["update/rollout_logprob_diff_abs"] for line in lines]
    return {
        "steps": steps,
        "total_seconds": seconds,
        "seconds_per_step": float(np.median([line["time/step"] for line in lines])),
        "first_reward": lines[0]["reward"],
        "last_reward": lines[-1]["reward"],
        "logprob_difference": float(np.mean(gaps)),
        "finite": all(line["update/nonfinite"] == 0 for line in lines),
    }


PARTS = {f.__name__: f for f in (device, parity, gap, decoding, speed, update, demo)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--start", type=int, default=0, help="first measurement to run")
    options = parser.parse_args()
    measure(PARTS[options.part](options.tiny), options.out, start=options.start)


if __name__ == "__main__":
    main()
