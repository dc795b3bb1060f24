"""Small runs of `mmsr1_jax.train`: their commands, their questions, and comparable results."""

import io
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image

from mmsr1_jax.data import Question, tiny_world, write_parquet
from mmsr1_jax.training import metrics
from tests import programs

SMALL = [
    "--config=configs/tiny.py",
    "--config.buckets.image_windows=(1, 4)",
    "--config.rollout.prefill_buckets=(32, 128)",
    "--config.rollout.lanes=4",
    "--config.rollout.decode_batch_size=4",
    "--config.objective.kl_coef=0.001",
    "--config.objective.entropy_coef=0.01",
    "--config.run.prompts_per_step=2",
    "--config.run.group_size=4",
    "--config.run.steps=6",
    "--config.run.save_every=2",
    "--config.run.validate_every=3",
]


def write_questions(folder: pathlib.Path, count: int = 10) -> pathlib.Path:
    """Write `count` questions of the embedded task, and their index to `index` beside them.

    The warm start answers some of them correctly, so rewards differ within groups.
    """
    world = tiny_world.World.generate()
    tiny_world.write_index(world, folder / "index")
    write_parquet(folder / "q.parquet", tiny_world.questions(world, "train", count))
    return folder / "q.parquet"


def train_command(workdir: pathlib.Path, *arguments) -> list[str]:
    """Return the command that trains in `workdir`; without `arguments` it resumes a run."""
    return [sys.executable, "-m", "mmsr1_jax.train", f"--workdir={workdir}", *map(str, arguments)]


def new_run_command(workdir: pathlib.Path, questions: pathlib.Path, *arguments) -> list[str]:
    """Return the command that starts a small run on the file of `write_questions`."""
    files = f"('{questions}',)"
    data = [f"--config.data.train={files}", f"--config.data.validation={files}"]
    data.append(f"--config.tools.index={questions.parent / 'index'}")
    return train_command(workdir, *SMALL, *data, *arguments)


def run_without_tools(
    workdir: pathlib.Path, policy: pathlib.Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Train with two questions per step, two short episodes each, and no tools."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(file, "png")
    data = workdir.parent / "q.parquet"
    write_parquet(
        data,
        [Question(id=f"q{i}", question="Which?", images=(file.getvalue(),), answers=("x",))
         for i in range(3)],
    )  # fmt: skip
    command = train_command(
        workdir, "--config=configs/tiny.py", f"--model={policy}",
        f"--config.data.train=('{data}',)", "--config.tools.text=none", "--config.tools.image=none",
        "--config.turns.max_new_tokens=16", "--config.turns.min_turn_tokens=16",
        "--config.rollout.lanes=4", "--config.rollout.decode_batch_size=4",
        "--config.rollout.precompile=False", "--config.update.pack_windows=16",
        "--config.update.micro_batch_rows=1", "--config.objective.entropy_coef=0.01",
        "--config.objective.num_minibatches=2", "--config.run.prompts_per_step=2",
        "--config.run.group_size=2", "--config.run.save_every=0", "--config.run.log_to=",
        *arguments,
    )  # fmt: skip
    return programs.run(command, env=env, timeout=900)


def run_results(workdir: pathlib.Path) -> tuple[list[dict], list[bytes], list[dict]]:
    """Return the metrics, policy files and episodes of a complete run, without times."""
    lines = [
        {
            name: value
            for name, value in line.items()
            if not name.startswith("time/") and not name.endswith("tool/seconds")
        }
        for line in metrics.read(workdir / "metrics.jsonl")
    ]
    files = sorted((workdir / "policy").glob("*.safetensors"))
    episodes = read_episodes(workdir)
    for call in itertools.chain(*(episode["calls"] for episode in episodes)):
        del call["seconds"]
    assert files and episodes
    return lines, [path.read_bytes() for path in files], episodes


def read_episodes(workdir: pathlib.Path) -> list[dict]:
    """Return the saved episodes of a run, in the order of its steps."""
    return [*itertools.chain(*map(read_file, sorted((workdir / "episodes").iterdir())))]


def read_file(path: pathlib.Path) -> list[dict]:
    """Return the saved episodes of a step."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
