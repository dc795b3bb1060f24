"""`python -m mmsr1_jax.train`, as a user runs it: real questions, and a run that is killed."""

import io
import json
import os
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from mmsr1_jax import config as settings
from mmsr1_jax import metrics, tiny
from mmsr1_jax.data import Question, write_parquet
from mmsr1_jax.rl.samples import figures_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = [
    "--config=configs/tiny.py",
    "--config.turns.prompts=mmsr1_jax/data/tiny_world/prompts",
    "--config.turns.turn_tokens=24",
    "--config.turns.tokens=512",
    "--config.turns.least_tokens=16",
    "--config.turns.result_tokens=128",
    "--config.rollout.lanes=4",
    "--config.rollout.rows=4",
    "--config.rollout.compile_ahead=False",
    "--config.update.row_tokens=512",
    "--config.update.row_windows=16",
    "--config.update.learning_rate=1e-3",
    "--config.objective.entropy_weight=0.01",  # a random policy is never right: else all is 0
    "--config.run.questions=2",
    "--config.run.rollouts=2",
    "--config.run.steps=6",
    "--config.run.save_every=2",
    "--config.run.validate_every=3",
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policies") / "tiny"
    tiny.write(directory, seed=2)
    return directory


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "q.parquet"

    def picture(seed):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (112, 112, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    write_parquet(
        path,
        [
            Question(id=f"q{i}", question=f"Which number is {i}?", images=(picture(i),),
                     answers=(str(i),), category="odd" if i % 2 else "even")
            for i in range(5)
        ],
    )  # fmt: skip
    return path


def one_device():
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return {**os.environ, "XLA_FLAGS": flags}


def command(workdir, *arguments):
    return [sys.executable, "-m", "mmsr1_jax.train", f"--workdir={workdir}", *map(str, arguments)]


def begin(workdir, policy, questions):
    given = f"('{questions}',)"
    data = [f"--config.data.train={given}", f"--config.data.validation={given}"]
    return command(workdir, f"--model={policy}", *SMALL, *data)


def run(command):
    return subprocess.run(
        command, cwd=ROOT, env=one_device(), capture_output=True, text=True, timeout=600
    )


def results(workdir):
    """All that a run leaves behind but its times, and the parameters."""
    lines = [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in metrics.read(workdir / "metrics.jsonl")
    ]
    files = sorted((workdir / "policy").glob("*.safetensors"))
    episodes = [path.read_text() for path in sorted((workdir / "episodes").iterdir())]
    assert files and episodes
    return lines, [path.read_bytes() for path in files], episodes


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, policy, questions):
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run(begin(workdir, policy, questions))
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


def test_what_a_run_leaves_behind(unbroken):
    lines, _, episodes = results(unbroken)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["update/engine_gap_abs"] < 1e-4
        assert line["update/ratio"] == 1.0 and line["update/clip_fraction"] == 0.0
        assert line["update/gradient_norm"] > 0 and line["update/lost"] == 0
    assert ["validation/accuracy" in line for line in lines] == [False, False, True] * 2
    assert lines[0]["update/kl"] == pytest.approx(0, abs=1e-9)
    assert lines[-1]["update/kl"] > 1e-6
    compiled = [line["time/compiled"] for line in metrics.read(unbroken / "metrics.jsonl")]
    assert compiled[3] == compiled[-1]  # the second validation compiles nothing
    episode = json.loads(episodes[0].splitlines()[0])
    assert episode["answers"] and episode["segments"] and "reward" in episode["reward"]
    steps = sorted(int(path.name) for path in (unbroken / "checkpoints").iterdir())
    assert steps[-2:] == [4, 6]
    assert any((unbroken / "tensorboard").iterdir())


def kill_when(process, condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def start(arguments):
    return subprocess.Popen(
        arguments, cwd=ROOT, env=one_device(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_in_a_save_and_gone_on_with(unbroken, tmp_path, policy, questions):
    workdir = tmp_path / "run"
    saving = workdir / "checkpoints"
    process = start(begin(workdir, policy, questions))
    kill_when(process, lambda: any(saving.glob("4.*")) or (saving / "4").exists())
    done = run(command(workdir))
    assert done.returncode == 0 and "goes on after step" in done.stderr, done.stderr[-3000:]
    assert results(workdir) == results(unbroken)


def test_asked_to_stop(unbroken, tmp_path, policy, questions):
    workdir = tmp_path / "run"
    process = start(begin(workdir, policy, questions))
    while not metrics.read(workdir / "metrics.jsonl"):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0 and "which is saved" in said, said[-3000:]
    assert len(metrics.read(workdir / "metrics.jsonl")) < 6
    assert run(command(workdir)).returncode == 0
    lines, parameters, _ = results(workdir)
    expected, expected_parameters, _ = results(unbroken)
    assert parameters == expected_parameters
    without = [{k: v for k, v in line.items() if not k.startswith("validation/")} for line in lines]
    assert without == [
        {k: v for k, v in line.items() if not k.startswith("validation/")} for line in expected
    ]


@pytest.mark.proof
def test_killed_at_ten_random_moments(unbroken, tmp_path, policy, questions):
    rng = random.Random(0)
    for number in range(10):
        workdir = tmp_path / f"run{number}"
        process = start(begin(workdir, policy, questions))
        began = time.monotonic()
        moment = rng.uniform(1, 25)
        while process.poll() is None and time.monotonic() - began < moment:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        arguments = command(workdir)
        if not (workdir / "config.json").is_file():  # it had not even begun
            arguments = begin(workdir, policy, questions)
        done = run(arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert results(workdir) == results(unbroken), number


@pytest.mark.parametrize(
    "name", ["fvqa_mini", pytest.param("infoseek_mini", marks=pytest.mark.proof)]
)
def test_real_questions(shared, name, tmp_path, policy):
    from mmsr1_jax.tools.local import build

    build(tmp_path / "index", [shared / "data" / "web_pages.jsonl"])
    small = [flag for flag in SMALL if not flag.startswith("--config.turns.prompts")]
    done = run(
        command(
            tmp_path / "run", f"--model={policy}", *small,
            f"--config.data.train=('{shared / 'data' / name}.parquet',)",
            f"--config.data.validation=('{shared / 'data' / name}.parquet',)",
            "--config.data.validation_rows=3", f"--config.tools.index={tmp_path / 'index'}",
            "--config.turns.tokens=1536", "--config.update.row_tokens=1536",
            "--config.update.row_windows=64", "--config.run.steps=2",
            "--config.run.validate_every=1",
        ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2 and "validation/reward" in lines[-1]


@pytest.mark.parametrize("name", ["tiny", "qwen3b", "qwen7b"])
def test_configs(name):
    get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    variants = [] if name == "tiny" else ["paper", "script"]
    for arguments in [(), *((v,) for v in variants)]:
        config = settings.validate(get_config(*arguments))
        # What the engine can roll out has room in a row of the update.
        assert config.turns.tokens <= config.update.row_tokens


def test_mistakes_are_said_in_one_line(tmp_path, policy, questions):
    def error(*arguments):
        done = run(command(tmp_path / "run", *arguments))
        assert done.returncode == 1
        return done.stderr.strip().splitlines()[-1]

    assert "--model: the HF directory" in error(*SMALL)
    nowhere = error(*SMALL, f"--model={policy}", "--config.data.train=('nowhere.parquet',)")
    assert nowhere.startswith("error: ") and "nowhere.parquet" in nowhere
    assert "objective.ratio='x'" in error(*SMALL, "--config.objective.ratio=x")


def test_sums_become_means():
    sums = {"tokens": 4.0, "loss": 1.5, "policy_loss": 1.0, "clipped_low": 1.0, "clipped_high": 2.0,
            "kl": 8.0, "log_ratio_squared": 16.0, "gradient_norm": 3.0, "finite": 1.0}  # fmt: skip
    found = figures_of(sums)
    assert found["kl"] == 2.0 and found["log_ratio_rms"] == 2.0 and found["loss"] == 1.5
    assert found["clip_fraction"] == 0.75
