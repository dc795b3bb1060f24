"""`python -m mmsr1_jax.train`, as a user runs it: real questions, and a run that is killed."""

import itertools
import json
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.data import QuestionSource, tiny_world, write_parquet
from mmsr1_jax.rl.train_batch import update_metrics
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.training import metrics
from tests.programs import environment

ROOT = pathlib.Path(__file__).resolve().parents[1]
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


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policies") / "tiny"
    random_policy.write(directory, seed=2)
    return directory


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Of the tiny world, which the warm start is right about at times, with its index beside."""
    folder = tmp_path_factory.mktemp("questions")
    world = tiny_world.World.make()
    tiny_world.write_index(world, folder / "index")
    write_parquet(folder / "q.parquet", tiny_world.questions(world, "train", 10))
    return folder / "q.parquet"


def command(workdir, *arguments):
    return [sys.executable, "-m", "mmsr1_jax.train", f"--workdir={workdir}", *map(str, arguments)]


def begin(workdir, questions, *arguments):
    given = f"('{questions}',)"
    data = [f"--config.data.train={given}", f"--config.data.validation={given}"]
    data.append(f"--config.tools.index={questions.parent / 'index'}")
    return command(workdir, *SMALL, *data, *arguments)


def run(command):
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )


def results(workdir):
    """All that a run leaves behind but its times, and the parameters."""
    lines = [
        {
            name: value
            for name, value in line.items()
            if not name.startswith("time/") and not name.endswith("tool/seconds")
        }
        for line in metrics.read(workdir / "metrics.jsonl")
    ]
    files = sorted((workdir / "policy").glob("*.safetensors"))
    paths = sorted((workdir / "episodes").iterdir())
    episodes = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    for call in itertools.chain(*(episode["calls"] for episode in episodes)):
        del call["seconds"]
    assert files and episodes
    return lines, [path.read_bytes() for path in files], episodes


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, questions):
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run(begin(workdir, questions))
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


def test_what_a_run_leaves_behind(unbroken):
    lines, _, episodes = results(unbroken)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["update/rollout_logprob_diff_abs"] < 1e-4
        assert line["update/ratio"] == 1.0 and line["update/clip_fraction"] == 0.0
        assert line["update/gradient_norm"] > 0 and line["update/nonfinite"] == 0
        assert line["errors"] == 0 and line["groups/sampled"] == 2
    # There is something to learn, and tools are part of it.
    assert any(
        line["groups/with_variance"] > 0 and line["update/policy_loss"] != 0 for line in lines
    )
    assert sum(line["tool/calls"] for line in lines) > 5
    assert all(line["tool/failed"] == 0 for line in lines)
    assert ["validation/accuracy" in line for line in lines] == [False, False, True] * 2
    assert lines[0]["update/kl"] == pytest.approx(0, abs=1e-9)
    assert lines[-1]["update/kl"] > 1e-6
    compiled = [line["time/compiles"] for line in metrics.read(unbroken / "metrics.jsonl")]
    assert compiled[3] == compiled[-1]  # the second validation compiles nothing
    episode = episodes[0]
    assert episode["answers"] and episode["segments"] and "reward" in episode["reward"]
    steps = sorted(int(path.name) for path in (unbroken / "checkpoints").iterdir())
    scores = [line.get("validation/accuracy", -1) for line in lines]
    best = 1 + max(range(6), key=lambda i: (scores[i], i))
    kept = {4, 6} | ({best} if best in (2, 4, 6) else set())  # the best of those that were saved
    assert set(steps) == kept, (steps, scores)
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
        arguments, cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.proof
def test_killed_in_a_save_and_gone_on_with(unbroken, tmp_path, questions):
    workdir = tmp_path / "run"
    saving = workdir / "checkpoints"
    process = start(begin(workdir, questions))
    kill_when(process, lambda: any(saving.glob("4.*")) or (saving / "4").exists())
    done = run(command(workdir))
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr[-3000:]
    assert results(workdir) == results(unbroken)


def test_asked_to_stop(unbroken, tmp_path, questions):
    workdir = tmp_path / "run"
    process = start(begin(workdir, questions))
    while not metrics.read(workdir / "metrics.jsonl"):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0 and "which is saved" in said, said[-3000:]
    assert len(metrics.read(workdir / "metrics.jsonl")) < 6
    assert run(command(workdir)).returncode == 0
    assert results(workdir) == results(unbroken)


@pytest.mark.proof
def test_killed_at_ten_random_moments(unbroken, tmp_path, questions):
    """Each at some moment of a step that was drawn; a third of them while something is saved."""
    rng = random.Random(0)
    for number in range(10):
        workdir = tmp_path / f"run{number}"
        step, wait = rng.randint(0, 5), rng.uniform(0, 2)
        process = start(begin(workdir, questions))
        if number % 3 == 0:
            kill_when(process, lambda saved=workdir / "checkpoints": any(saved.glob("*.*")))
        else:
            while len(metrics.read(workdir / "metrics.jsonl")) < step:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(wait)
            assert process.poll() is None, "it was over before it could be killed"
            process.send_signal(signal.SIGKILL)
            process.wait()
        arguments = command(workdir)
        if not (workdir / "config.json").is_file():  # it had not even begun
            arguments = begin(workdir, questions)
        done = run(arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert results(workdir) == results(unbroken), number


def test_a_run_is_gone_on_with_as_it_was_begun(unbroken, tmp_path, questions):
    """Another setting by a config file is refused, and what was refused changes nothing."""
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    before = (workdir / "config.json").read_bytes()
    stamp = (workdir / "policy" / "config.json").stat().st_mtime_ns
    other = run(begin(workdir, questions, "--config.rewards.search_penalty=0"))
    assert other.returncode == 1
    assert "with config.rewards.search_penalty=0.3; this command sets" in other.stderr
    seed = run(command(workdir, "--config.run.seed=1"))
    assert seed.returncode == 1 and "seed=0" in seed.stderr
    assert (workdir / "config.json").read_bytes() == before
    assert run(command(workdir)).returncode == 0  # over: nothing is written again
    assert (workdir / "policy" / "config.json").stat().st_mtime_ns == stamp
    assert results(workdir) == results(unbroken)


@pytest.fixture(scope="module")
def real_index(shared, tmp_path_factory):
    """The real pages, and the real photographs with their recorded titles."""
    from mmsr1_jax.tools.index_builder import build_index

    folder = tmp_path_factory.mktemp("real")
    known = json.loads((shared / "data" / "image_search_results.json").read_text("utf-8"))
    lines = []
    for row in QuestionSource((str(shared / "data" / "fvqa_mini.parquet"),)):
        (folder / f"{len(lines)}.img").write_bytes(row.images[0])
        titles = [entry["title"] for entry in known.get(row.id, [])][:5]
        lines.append({"image": f"{len(lines)}.img", "titles": titles or [row.question]})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_index(
        folder / "index", [shared / "data" / "web_pages.jsonl"], [folder / "pictures.jsonl"]
    )
    return folder / "index"


@pytest.mark.parametrize(
    "name, tokenizer",
    [
        pytest.param("fvqa_mini", "own", marks=pytest.mark.proof),
        pytest.param("fvqa_mini", "released", marks=pytest.mark.proof),
        pytest.param("infoseek_mini", "own", marks=pytest.mark.proof),
    ],
)
def test_real_questions(shared, real_index, name, tokenizer, tmp_path):
    """The warm start, which searches; or a random policy with the released tokenizer."""
    data = f"('{shared / 'data' / name}.parquet',)"
    arguments = [
        "--config=configs/tiny.py", f"--config.data.train={data}",
        f"--config.data.validation={data}", "--config.data.validation_rows=3",
        f"--config.tools.index={real_index}", "--config.run.prompts_per_step=2",
        "--config.run.group_size=4", "--config.run.validate_every=1", "--config.run.save_every=1",
        "--config.run.saved_episodes=8", "--config.rollout.lanes=8",
        "--config.rollout.decode_batch_size=8",
        "--config.rollout.precompile=False",
        "--config.objective.entropy_coef=0.01",  # else groups without spread teach nothing
    ]  # fmt: skip
    if tokenizer == "released":
        made = ["-m", "mmsr1_jax.scripts.random_policy", f"--out={tmp_path / 'policy'}",
                f"--tokenizer={shared / 'tokenizer' / 'qwen'}"]  # fmt: skip
        assert run([sys.executable, *made]).returncode == 0
        arguments.append(f"--model={tmp_path / 'policy'}")
    done = run(command(tmp_path / "run", *arguments, "--config.run.steps=1"))
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(command(tmp_path / "run", "--config.run.steps=2"))
    assert done.returncode == 0 and "resuming after step 1" in done.stderr, done.stderr[-3000:]
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2 and lines[0].keys() == lines[1].keys()
    parts = {"reward", "accuracy", "format", "searches", "search/any", "search/text",
             "search/image", "search/both", "search/none", "turns", "tokens", "tool/failed",
             "validation/accuracy", "update/clip_fraction", "update/entropy",
             "update/gradient_norm", "update/rollout_logprob_diff_abs", "time/rollout",
             "update/packing_efficiency",
             "time/update", "time/compiles"}  # fmt: skip
    assert parts <= lines[1].keys() and all(np.isfinite(lines[1][part]) for part in parts)
    assert lines[1]["update/rollout_logprob_diff_abs"] < 1e-4
    saved = [
        json.loads(line)
        for path in sorted((tmp_path / "run" / "episodes").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert len(saved) == 16 and all(episode["images"] for episode in saved)
    if tokenizer == "own":
        found = {call["action"] for e in saved for call in e["calls"] if call["num_shown"]}
        assert found == ({"image_search", "text_search"} if name == "fvqa_mini" else found)
        assert found


@pytest.mark.parametrize("name", ["tiny", "qwen3b", "qwen7b", "qwen7b_lora"])
def test_configs(name):
    get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    variants = ["paper", "script", "sft"]
    if name == "tiny":
        variants = ["warm_start", "warm_start_facts"]
    for arguments in [(), *((v,) for v in variants)]:
        config = settings.validate(get_config(*arguments))
        # What the engine can roll out has room in a row of the update.
        assert config.turns.max_episode_tokens <= config.update.pack_length


def test_mistakes_are_said_in_one_line(tmp_path, policy):
    def error(*arguments):
        done = run(command(tmp_path / "run", *arguments))
        assert done.returncode == 1
        return done.stderr.strip().splitlines()[-1]

    nothing = run([sys.executable, "-m", "mmsr1_jax.train"])
    assert nothing.returncode == 1 and "give --config=FILE to start a run" in nothing.stderr
    assert "a new run needs a policy" in error(*SMALL, "--config.run.model=")
    no_tools = ["--config.tools.text=none", "--config.tools.image=none"]
    data = "--config.data.train=('nowhere.parquet',)"
    nowhere = error(*SMALL, f"--model={policy}", data, *no_tools)
    assert nowhere.startswith("error: ") and "nowhere.parquet" in nowhere
    assert not (tmp_path / "run" / "config.json").exists()
    assert "temperature=0" in error(*SMALL, "--config.sampling.temperature=0")


def test_sums_become_means():
    sums = {"tokens": 4.0, "loss": 1.5, "policy_loss": 1.0, "clipped_low": 1.0, "clipped_high": 2.0,
            "kl": 8.0, "log_ratio_squared": 16.0, "gradient_norm": 3.0, "finite": 1.0}  # fmt: skip
    found = update_metrics(sums)
    assert found["kl"] == 2.0 and found["log_ratio_rms"] == 2.0 and found["loss"] == 1.5
    assert found["clip_fraction"] == 0.75
