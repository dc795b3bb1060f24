"""`python -m mmsr1_jax.evaluate`: resuming after a kill, checks of settings, checkpoints."""

import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.data import QuestionSource
from mmsr1_jax.evaluation.compare import compare_files
from mmsr1_jax.evaluation.run import evaluate, restore_params
from mmsr1_jax.evaluation.workflows import WORKFLOWS
from mmsr1_jax.models import sharding
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.train_batch import make_loss
from mmsr1_jax.tools.index_builder import build_index
from mmsr1_jax.training import run_config, train_utils
from mmsr1_jax.training.checkpoint import Checkpoints
from tests import programs, scripted_policy
from tests.evaluations import CONFIG, command, run
from tests.programs import ROOT, environment, read_jsonl

# The parameters of a run


@pytest.mark.proof
@pytest.mark.parametrize("rank", [0, 2])
def test_parameters_are_restored_from_a_checkpoint(tmp_path, tiny_dir, rank):
    config = settings.Config(update=settings.Update(lora_rank=rank))
    mesh = sharding.make_mesh(1, -1, 1)
    trainer = Learner(
        train_utils.load_policy(config, tiny_dir, mesh),
        make_loss(config.objective),
        config.update,
        mesh,
    )
    trainer.trained = jax.tree.map(lambda x: x + 0.5, trainer.trained)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    state = {"trained": trainer.trained, "optimizer": trainer.optimizer}
    checkpoints.save(3, state, {}, score=None)
    checkpoints.close()
    restored = jax.tree.leaves(restore_params(config, tiny_dir, tmp_path, 3))
    for leaf, expected in zip(restored, jax.tree.leaves(trainer.params), strict=True):
        np.testing.assert_array_equal(leaf, expected)


# The settings of an evaluation that already exists


@pytest.fixture
def unfinished(shared, tiny_dir, tmp_path):
    """Settings, a policy without parameters, and the directory of an unfinished evaluation."""
    policy, out = tmp_path / "policy", tmp_path / "out"
    policy.mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(tiny_dir / name, policy / name)
    shutil.copy(shared / "data" / "web_pages.jsonl", tmp_path / "pages.jsonl")
    (tmp_path / "prompts").mkdir()
    for name in ("question.txt", "agent/question.txt"):
        (tmp_path / "prompts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "prompts" / name).write_text("{images} {question}")
    config = settings.Config()
    config.eval.data = (str(shared / "data" / "fvqa_mini.parquet"),)
    config.eval.workflows = ("on_demand", "agent")
    config.turns.prompt_dir = str(tmp_path / "prompts")
    config.tools.index = str(tmp_path)
    config.services.cache = str(tmp_path / "store.sqlite")
    for _ in range(2):  # start, and resume
        with pytest.raises(ValueError, match=f"{policy}.*config.json"):
            evaluate(config, policy, out)
    return config, policy, out


@pytest.mark.parametrize(
    "field, value",
    [
        ("reader", "none"), ("summariser_url", "http://127.0.0.1:1"), ("summariser_model", "other"),
        ("cache_mode", "record"), ("fvqa_cache", "cache.json"), ("searxng_url", "http://127.0.0.1:2"),
    ],
)  # fmt: skip
def test_an_evaluation_is_bound_to_its_services(unfinished, field, value):
    config, policy, out = unfinished
    setattr(config.services, field, value)
    message = f"an evaluation with services.{field}=.*services.{field}={value}"
    with pytest.raises(ValueError, match=message):
        evaluate(config, policy, out)


def test_an_evaluation_is_bound_to_its_prompts_and_index(unfinished, tmp_path):
    config, policy, out = unfinished
    for path, name in (
        (tmp_path / "pages.jsonl", "tools.files"),
        (tmp_path / "prompts" / "agent" / "question.txt", "prompts.agent"),
        (tmp_path / "prompts" / "question.txt", "prompts.on_demand"),
    ):
        data, times = path.read_bytes(), path.stat()
        path.write_bytes(data + b"\n{} ")
        with pytest.raises(ValueError, match=f"already contains an evaluation with {name}="):
            evaluate(config, policy, out)
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for workflows in (("direct",), ("rag", "on_demand")):  # other workflows may be added
        config.eval.workflows = workflows
        with pytest.raises(ValueError, match=f"{policy}.*config.json"):
            evaluate(config, policy, out)
    (tmp_path / "prompts" / "direct").mkdir()
    (tmp_path / "prompts" / "direct" / "question.txt").write_text("{images} {question}?")
    config.eval.workflows = ("direct",)
    with pytest.raises(ValueError, match="already contains an evaluation with prompts.direct="):
        evaluate(config, policy, out)


# The command


def kill_after(lines, path, arguments):
    """Kill the command when its file has this number of lines."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def material(tmp_path_factory, shared):
    """A random policy that acts, and an index of real pages and images."""

    directory = tmp_path_factory.mktemp("evaluation")
    scripted_policy.write(directory / "policy")
    (directory / "config.py").write_text(CONFIG)
    search_results = json.loads((shared / "data" / "image_search_results.json").read_text("utf-8"))
    images = []
    for row in itertools.islice(QuestionSource(shared / "data" / "fvqa_mini.parquet"), 4):
        (directory / f"{row.id}.img").write_bytes(row.images[0])
        titles = [entry["title"] for entry in search_results.get(row.id, [])[:2]] or [row.question]
        images.append(json.dumps({"image": f"{row.id}.img", "titles": titles}) + "\n")
    (directory / "images.jsonl").write_text("".join(images))
    pages = shared / "data" / "web_pages.jsonl"
    build_index(directory / "index", [pages], [directory / "images.jsonl"])
    return directory


@pytest.mark.proof
@pytest.mark.parametrize("rows", [2, 26])
def test_a_killed_evaluation_resumes_with_the_same_results(shared, material, tmp_path, judge, rows):
    arguments = [
        f"--config={material / 'config.py'}", f"--model={material / 'policy'}",
        f"--config.eval.data=('{shared / 'data' / 'fvqa_mini.parquet'}',)",
        f"--config.eval.max_questions={rows}", f"--config.tools.index={material / 'index'}",
        f"--config.services.judge_url={judge.url}",
    ]  # fmt: skip
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    printed = run(command(*arguments, f"--out={uninterrupted}"))
    results = json.loads((uninterrupted / "results.json").read_text())
    lines = read_jsonl(uninterrupted / "episodes.jsonl")
    assert len(lines) == 4 * rows and list(results["workflows"]) == list(WORKFLOWS)
    for name, metrics in results["workflows"].items():
        assert metrics["questions"] == metrics["episodes"] == rows and metrics["errors"] == 0
        assert set(metrics["accuracy"]) == {"em", "subem", "judge"} and metrics["by_category"]
        for accuracy in metrics["accuracy"].values():
            low, high = accuracy["interval"]
            assert 0 <= low <= accuracy["mean"] <= high <= 1
        searches = metrics["searches"]
        assert (searches["fraction_of_allowed"] is None) == (name == "direct")
        assert (
            metrics["turns"] >= 1
            and metrics["tokens"] > metrics["tokens_sampled"] > 0
            and metrics["by_source"]
        )
        assert f"\n{name} " in printed
    assert results["workflows"]["direct"]["searches"]["made"] == 0
    assert results["workflows"]["rag"]["searches"]["image_search"]["episode_fraction"] == 1.0
    assert results["no_verdict"] == 0
    for line in lines:
        assert all((uninterrupted / path).is_file() for path in line["images"])
    for line in lines[rows : rows + 2]:  # of rag: the question's image is in the index
        (call,) = [call for call in line["calls"] if call["action"] == "image_search"]
        assert line["workflow"] == "rag" and call["status"] == "ok" and call["num_shown"] >= 1
        (reply, *_) = [s["text"] for s in line["segments"] if s["kind"] == "tool"]
        assert "<|image_pad|>" in reply and len(line["images"]) == 1 + reply.count("<|vision_end|>")

    again = command(*arguments, f"--out={interrupted}")
    for count in (3 * rows,) if rows < 26 else (1, rows, 3 * rows):
        kill_after(count, interrupted / "episodes.jsonl", again)
        with open(interrupted / "episodes.jsonl", "a") as file:
            file.write('{"workflow": "direct", "id": ')  # as after a kill during a write
    run(again)
    assert json.loads((interrupted / "results.json").read_text()) == results
    for line, other in zip(lines, read_jsonl(interrupted / "episodes.jsonl"), strict=True):
        for call in (*line["calls"], *other["calls"]):
            call["seconds"] = 0.0
        assert other == line
    comparison = compare_files([f"{uninterrupted}:rag", f"{interrupted}:rag"])
    assert re.search(r"\+0\.0 \[-\d+\.\d, \+\d+\.\d\] by EM", comparison), comparison

    done = programs.run([*again, "--config.eval.temperature=0.5"])
    assert done.returncode == 2 and "with eval.temperature=0.0; this command" in done.stderr


@pytest.mark.proof
def test_a_run_is_evaluated_with_its_own_settings(shared, material, tmp_path):
    config = runpy.run_path(str(material / "config.py"))["get_config"]()
    config.data.validation = (str(shared / "data" / "fvqa_mini.parquet"),)
    config.eval.workflows = ("direct",)
    run_config.write(tmp_path / "config.json", config, "nowhere")
    shutil.copytree(material / "policy", tmp_path / "policy")
    run(command(f"--workdir={tmp_path}", "--config.eval.max_questions=1"))
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["workflows"]["direct"]["questions"] == 1 and len(results["workflows"]) == 1
    assert results["provenance"]["model"] == str(tmp_path / "policy")


@pytest.mark.proof
def test_a_checkpoint_of_a_run_is_evaluated(shared, material, tmp_path):
    """All its parameters are 0, so all tokens are equally likely and greedy decoding takes one."""
    config = runpy.run_path(str(material / "config.py"))["get_config"]()
    run_config.write(tmp_path / "config.json", config, str(material / "policy"))
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    policy = train_utils.load_policy(config, material / "policy", mesh)
    trainer = Learner(policy, make_loss(config.objective), config.update, mesh)
    state = {"trained": jax.tree.map(lambda x: 0 * x, trainer.trained)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(2, state | {"optimizer": trainer.optimizer}, {}, score=None)
    checkpoints.close()
    run(
        command(
            f"--workdir={tmp_path}", "--step=2", "--config.eval.workflows=('on_demand',)",
            "--config.eval.max_questions=1",
            f"--config.eval.data=('{shared}/data/fvqa_mini.parquet',)",
        )
    )  # fmt: skip
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["provenance"]["checkpoint"] == [str(tmp_path), 2]
    (line,) = read_jsonl(tmp_path / "evaluation" / "episodes.jsonl")
    sampled = [segment for segment in line["segments"] if segment["kind"] == "model"]
    assert len(sampled) == 3  # turns, all without an action
    for values in ("tokens", "logprobs"):
        assert len(set(itertools.chain(*(segment[values] for segment in sampled)))) == 1


def test_rescoring_needs_no_policy(shared, tmp_path):
    printed = run(
        command(f"--rescore={shared / 'data' / 'transcripts.jsonl'}", f"--out={tmp_path}")
    )
    assert printed.startswith("actions parsed as recorded: 26 of 26\n") and "\nrecorded " in printed
    done = programs.run(command(f"--out={tmp_path}"))
    assert done.returncode == 2 and done.stderr.startswith(
        "error: --model or --workdir: one of them is required"
    )
