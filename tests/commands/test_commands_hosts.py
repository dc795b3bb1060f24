"""`sft`, `evaluate`, `curate` and `score` on two processes: the same files as on one."""

import json
import sys

import pytest

from mmsr1_jax.data import tiny_world, write_parquet
from mmsr1_jax.data.tiny_world import POLICY
from mmsr1_jax.training import metrics
from tests.hosts import hosts
from tests.train_runs import SMALL

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions of the embedded task, their index, and conversations."""
    directory = tmp_path_factory.mktemp("data")
    world = tiny_world.World.generate()
    tiny_world.write_index(world, directory / "index")
    questions = tiny_world.questions(world, "train", 7)
    write_parquet(directory / "q.parquet", questions)
    with open(directory / "conversations.jsonl", "w", encoding="utf-8") as file:
        for number, text in enumerate(["Who?", "What is this?", "When " * 30, "Yes"] * 3):
            messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            file.write(json.dumps({"id": number, "messages": messages}) + "\n")
        file.write("no line\n")
    return directory


def run(name, count, *arguments, expected=0):
    """Run a command on `count` processes with four devices in all, and return their outputs."""
    command = [sys.executable, "-m", f"mmsr1_jax.{name}", *map(str, arguments)]
    with hosts([command] * count, devices=4 // count) as group:
        outputs = [group.wait(600), *map(group.output, range(count))]
    assert outputs[0] == [expected] * count, [text[-3000:] for text in outputs[1:]]
    return outputs[1:]


def episodes(out):
    """Return the lines of the episodes of `out` without times, by workflow and index."""
    lines = [json.loads(line) for line in (out / "episodes.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        for call in line["calls"]:
            del call["seconds"]
    assert not list(out.glob("episodes.*.jsonl"))
    return {(line["workflow"], line["index"]): line for line in lines}


def results(out):
    """Return the results of an evaluation without times and paths."""

    def clean(value):
        if isinstance(value, dict):
            return {
                k: clean(v) for k, v in value.items() if "seconds" not in k and k != "provenance"
            }
        return [clean(v) for v in value] if isinstance(value, list) else value

    return clean(json.loads((out / "results.json").read_text("utf-8")))


def flags(folder):
    files = f"('{folder / 'q.parquet'}',)"
    return [*SMALL[:5], f"--config.tools.index={folder / 'index'}", f"--model={POLICY}",
            f"--config.data.train={files}", f"--config.eval.data={files}"]  # fmt: skip


def test_evaluate(folder, tmp_path):
    outs = [tmp_path / str(count) for count in (1, 2)]
    for count, out in zip((1, 2), outs, strict=True):
        texts = run("evaluate", count, *flags(folder), f"--out={out}",
                    "--config.eval.workflows=('rag', 'on_demand')")  # fmt: skip
        assert "on_demand" in texts[0]
    assert episodes(outs[0]) == episodes(outs[1]) and results(outs[0]) == results(outs[1])
    # A killed evaluation leaves parts, which another number of processes takes over.
    lines = (outs[1] / "episodes.jsonl").read_text("utf-8").splitlines(keepends=True)
    (outs[1] / "episodes.jsonl").write_text("".join(lines[:5]), "utf-8")
    (outs[1] / "episodes.3.jsonl").write_text("".join(lines[4:8]) + lines[8][:20], "utf-8")
    run("evaluate", 1, *flags(folder), f"--out={outs[1]}",
        "--config.eval.workflows=('rag', 'on_demand')")  # fmt: skip
    assert episodes(outs[0]) == episodes(outs[1]) and results(outs[0]) == results(outs[1])


def test_curate(folder, tmp_path):
    outs = [tmp_path / str(count) for count in (1, 2)]
    for count, out in zip((1, 2), outs, strict=True):
        run("curate", count, *flags(folder), f"--out={out}", "--mix=", "--config.run.group_size=2")
    assert episodes(outs[0]) == episodes(outs[1])
    summaries = [json.loads((out / "curation.json").read_text()) for out in outs]
    assert summaries[0] == summaries[1]
    assert len({(out / "sft.jsonl").read_text().count("\n") for out in outs}) == 1


def test_sft_on_what_curate_selects(folder, tmp_path):
    run("curate", 2, *flags(folder), f"--out={tmp_path / 'c'}", "--mix=")
    workdirs = [tmp_path / str(count) for count in (1, 2)]
    for count, workdir in zip((1, 2), workdirs, strict=True):
        run("sft", count, *SMALL[:3], f"--model={POLICY}", f"--workdir={workdir}",
            f"--config.data.train=('{tmp_path / 'c' / 'sft.jsonl'}',)", "--config.run.steps=3",
            "--config.run.prompts_per_step=3", "--config.run.log_to=")  # fmt: skip
    alone, together = [metrics.read(workdir / "metrics.jsonl") for workdir in workdirs]
    assert len(alone) == len(together) == 3
    for one, other in zip(alone, together, strict=True):
        for name in ("loss", "gradient_norm", "tokens", "epoch"):
            assert other[name] == pytest.approx(one[name], rel=1e-5), name


def test_score(folder, tmp_path):
    files = [tmp_path / f"{count}.jsonl" for count in (1, 2)]
    for count, file in zip((1, 2), files, strict=True):
        run("score", count, f"--model={POLICY}", f"--out={file}",
            f"--conversations={folder / 'conversations.jsonl'}", expected=1)  # fmt: skip
    alone, together = [
        [json.loads(line) for line in file.read_text().splitlines()] for file in files
    ]
    assert len(alone) == len(together) == 13
    for one, other in zip(alone[:-1], together[:-1], strict=True):
        assert one["id"] == other["id"] and one["tokens"] == other["tokens"]
        assert other["logprobs"][1:] == pytest.approx(one["logprobs"][1:], abs=1e-4)
    assert alone[-1] == together[-1] and "line 13" in alone[-1]["error"]
