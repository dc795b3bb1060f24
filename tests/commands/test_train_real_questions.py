"""`python -m mmsr1_jax.train` on real questions, images and pages from the folder `shared/`."""

import json
import sys

import numpy as np
import pytest

from mmsr1_jax.data import QuestionSource
from mmsr1_jax.tools.index_builder import build_index
from mmsr1_jax.training import metrics
from tests.programs import run
from tests.train_runs import read_episodes, train_command


@pytest.fixture(scope="module")
def real_index(shared, tmp_path_factory):
    """Index of the real pages, and of the real images with their recorded titles."""
    folder = tmp_path_factory.mktemp("real")
    known = json.loads((shared / "data" / "image_search_results.json").read_text("utf-8"))
    lines = []
    for row in QuestionSource((str(shared / "data" / "fvqa_mini.parquet"),)):
        (folder / f"{len(lines)}.img").write_bytes(row.images[0])
        titles = [entry["title"] for entry in known.get(row.id, [])][:5]
        lines.append({"image": f"{len(lines)}.img", "titles": titles or [row.question]})
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_index(folder / "index", [shared / "data" / "web_pages.jsonl"], [folder / "images.jsonl"])
    return folder / "index"


@pytest.mark.proof
@pytest.mark.parametrize(
    "dataset, tokenizer",
    [("fvqa_mini", "own"), ("fvqa_mini", "released"), ("infoseek_mini", "own")],
)
def test_training_on_real_questions_resumes_and_measures_everything(
    shared, real_index, dataset, tokenizer, tmp_path
):
    """The policy is the warm start, which searches, or a random one with Qwen's tokenizer."""
    data = f"('{shared / 'data' / dataset}.parquet',)"
    arguments = [
        "--config=configs/tiny.py", f"--config.data.train={data}",
        f"--config.data.validation={data}", "--config.data.validation_rows=3",
        f"--config.tools.index={real_index}", "--config.run.prompts_per_step=2",
        "--config.run.group_size=4", "--config.run.validate_every=1", "--config.run.save_every=1",
        "--config.run.saved_episodes=8", "--config.rollout.lanes=8",
        "--config.rollout.decode_batch_size=8",
        "--config.rollout.precompile=False",
        "--config.objective.entropy_coef=0.01",  # gives groups without reward variance a gradient
    ]  # fmt: skip
    if tokenizer == "released":
        write_policy = ["-m", "mmsr1_jax.scripts.random_policy", f"--out={tmp_path / 'policy'}",
                        f"--tokenizer={shared / 'tokenizer' / 'qwen'}"]  # fmt: skip
        assert run([sys.executable, *write_policy]).returncode == 0
        arguments.append(f"--model={tmp_path / 'policy'}")
    result = run(train_command(tmp_path / "run", *arguments, "--config.run.steps=1"))
    assert result.returncode == 0, result.stderr[-3000:]
    result = run(train_command(tmp_path / "run", "--config.run.steps=2"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resuming after step 1" in result.stderr, result.stderr[-3000:]

    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2 and lines[0].keys() == lines[1].keys()
    names = {"reward", "accuracy", "format", "searches", "search/any", "search/text",
             "search/image", "search/both", "search/none", "turns", "tokens", "tool/failed",
             "validation/accuracy", "update/clip_fraction", "update/entropy",
             "update/gradient_norm", "update/rollout_logprob_diff_abs", "time/rollout",
             "update/packing_efficiency",
             "time/update", "time/compiles"}  # fmt: skip
    assert names <= lines[1].keys() and all(np.isfinite(lines[1][name]) for name in names)
    assert lines[1]["update/rollout_logprob_diff_abs"] < 1e-4
    episodes = read_episodes(tmp_path / "run")
    assert len(episodes) == 16 and all(episode["images"] for episode in episodes)
    if tokenizer == "own":
        actions = {call["action"] for e in episodes for call in e["calls"] if call["num_shown"]}
        assert actions
        if dataset == "fvqa_mini":
            assert actions == {"image_search", "text_search"}
