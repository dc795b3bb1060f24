"""`python -m mmsr1_jax.curate` writes the same files, whether or not it was killed and resumed."""

import collections
import dataclasses
import itertools
import json
import runpy
import shutil
import sys

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from mmsr1_jax.data import Question, QuestionSource, curation, write_parquet
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools.index_builder import build_index
from mmsr1_jax.training import sft_dataset
from tests import scripted_policy
from tests.programs import ROOT, kill_when, run, start
from tests.question_files import png
from tests.servers import serve
from tests.train_runs import SMALL

ROLLOUTS = 4
ANSWERS = 60
# A fifth of the policy's tokens are whole turns; the answers are "a 0" to "a 59".
ACTIONS = {
    "<reason>r{}</reason> <text_search>bridge {}</text_search>": 60,
    "<reason>r{}</reason> <search><img></search>": 40,
    "<reason>r{}</reason> <answer>a {}</answer>": ANSWERS,
}
VOCABULARY = 832


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Policy, questions and index in a directory."""
    directory = tmp_path_factory.mktemp("world")
    scripted_policy.write(directory / "policy", vocab_size=VOCABULARY, actions=ACTIONS)
    write_parquet(
        directory / "questions.parquet",
        [
            Question(
                id=f"q{i}", question=f"Which number is {i}?", images=(png(i, (112, 112)),),
                # 1/7, 2/7, .. of all answers are correct, and none for some questions.
                answers=tuple(f"a {k}" for k in range(ANSWERS) if k % 7 < i % 7) or ("none",),
                source="made", category="old",
            )
            for i in range(12)
        ],
    )  # fmt: skip
    pages = directory / "pages.jsonl"
    pages.write_text(json.dumps({"url": "http://b", "title": "Bridge", "summary": "Of 1937."}))
    for number in range(0, 12, 2):  # searches for the others find nothing
        (directory / f"{number}.png").write_bytes(png(number, (112, 112)))
    images = directory / "images.jsonl"
    titles = [{"image": f"{number}.png", "title": f"Bridge {number}"} for number in range(0, 12, 2)]
    images.write_text("\n".join(map(json.dumps, titles)))
    build_index(directory / "index", [pages], [images])
    return directory


def command(world, out, *arguments, model=True):
    policy = [f"--model={world / 'policy'}"] * model
    return [
        sys.executable, "-m", "mmsr1_jax.curate", f"--out={out}", *policy, *SMALL,
        f"--config.data.train=('{world / 'questions.parquet'}',)",
        f"--config.run.group_size={ROLLOUTS}", f"--config.tools.index={world / 'index'}",
        "--config.tools.text=local", "--config.tools.image=local",
        *arguments,
    ]  # fmt: skip


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def results(out):
    """Return the contents of all written files, without times."""
    contents = {}
    for name in ("episodes.jsonl", "sft.jsonl"):
        contents[name] = read(out / name)
        for call in itertools.chain(*(episode["calls"] for episode in contents[name])):
            del call["seconds"]
    for path in [out / "curated.parquet", *(out / "images").iterdir()]:
        contents[path.name] = path.read_bytes()
    return contents | {"summary": json.loads((out / "curation.json").read_text())}


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("curated") / "out"
    done = run(command(world, out, "--mix=", "--keep=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def expected(episodes):
    """Return the class and the correct episodes of each question, computed from the lines alone."""
    result = {}
    for number, group in itertools.groupby(episodes, key=lambda episode: episode["group"]):
        correct = []
        for episode in group:
            calls = episode["calls"]
            searches = [call["action"] for call in calls if call["status"] != "refused"]
            if episode["answer"] in episode["answers"]:
                correct.append((len(searches), episode["index"], set(searches)))
        kinds = set().union(*(searches for *_, searches in correct)) if correct else set()
        if not correct:
            name = "never_correct"
        elif min(correct)[0] == 0:
            name = "search_free"
        elif len(kinds) == 2:
            name = "mix_required"
        else:
            name = f"{kinds.pop().removesuffix('_search')}_required"
        order = sorted(correct, key=lambda item: item[:2])
        result[number] = name, [(searches, index) for searches, index, _ in order]
    return result


@pytest.mark.proof
def test_written_files_agree_with_the_episodes(world, uninterrupted):
    out, stdout = uninterrupted
    episodes = read(out / "episodes.jsonl")
    assert sorted(e["index"] for e in episodes) == list(range(12 * ROLLOUTS))
    calls = list(itertools.chain(*(episode["calls"] for episode in episodes)))
    assert {call["action"] for call in calls if call["num_shown"]} == {
        "image_search",
        "text_search",
    }
    by_question = expected(episodes)
    names = [by_question[number][0] for number in range(12)]
    assert {"never_correct", "search_free"} < set(names)

    summary = json.loads((out / "curation.json").read_text())
    for name in curation.CLASSES:
        assert summary["classes"][name]["questions"] == names.count(name)
        assert [name, str(names.count(name))] in [row.split()[:2] for row in stdout.splitlines()]
    questions = list(QuestionSource(world / "questions.parquet"))
    back = list(QuestionSource(out / "curated.parquet", max_bad_rows=0))
    kept = [number for number in range(12) if names[number] != "never_correct"]
    assert [question.category for question in back] == [names[number] for number in kept]
    for question, number in zip(back, kept, strict=True):
        fields = {name: getattr(question, name) for name in ("category", "file", "row")}
        assert question == dataclasses.replace(questions[number], **fields)

    selected = read(out / "sft.jsonl")
    assert summary["sft"] == {"episodes": len(selected), "questions": len(kept)}
    for number in kept:
        own = [episode for episode in selected if episode["group"] == number]
        correct = by_question[number][1]
        fewest = [searches for searches, _ in correct[:2]]
        assert [episode["reward"]["searches"] for episode in own] == fewest
        assert {episode["index"] for episode in own} <= {index for _, index in correct}
        assert all(episode["category"] == names[number] for episode in own)


@pytest.mark.proof
def test_sft_reads_the_selected_episodes(world, uninterrupted, tmp_path):
    out, _ = uninterrupted
    config = runpy.run_path(str(ROOT / "tests" / "small_config.py"))["get_config"]()
    config.data.train, config.data.max_bad_rows = (str(out / "sft.jsonl"),), 0
    processor = Processor.from_directory(world / "policy")
    path = tmp_path / "examples.jsonl"
    sft_dataset.prepare(path, config, processor, scripted_policy.config_for(VOCABULARY))
    examples, lines = sft_dataset.load(path, config), read(out / "sft.jsonl")
    assert len(examples) == len(lines) > 5
    for example, line in zip(examples, lines, strict=True):
        tokens = [token for segment in line["segments"] for token in segment["tokens"]]
        sampled = [s["kind"] == "model" for s in line["segments"] for _ in s["tokens"]]
        assert example.tokens.tolist() == tokens and example.mask.tolist() == sampled
        prompt = example.prompt(processor.images)
        assert [list(image.grid) for image in prompt.images] == line["image_grids"]


@pytest.mark.proof
def test_a_killed_command_is_resumed_with_the_same_results(world, uninterrupted, tmp_path):
    out = tmp_path / "out"
    path = out / "episodes.jsonl"
    arguments = command(world, out, "--mix=", "--keep=2")
    kill_when(start(arguments), lambda: path.is_file() and path.read_bytes().count(b"\n") > 5)
    complete = [json.loads(text) for text in path.read_bytes().split(b"\n")[:-1]]
    assert 5 < len(complete) < 12 * ROLLOUTS and not (out / "curation.json").exists()
    with open(path, "ab") as file:  # a truncated line
        file.write(b'{"id": "q')
    early = run(command(world, out, model=False))
    assert early.returncode == 2 and "--model" in early.stderr.splitlines()[-1], early.stderr
    done = run(arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(out) == results(uninterrupted[0])


@pytest.mark.proof
def test_another_mix_or_judge_needs_no_policy(world, uninterrupted, tmp_path):
    out = shutil.copytree(uninterrupted[0], tmp_path / "out")
    names = {number: name for number, (name, _) in expected(read(out / "episodes.jsonl")).items()}

    done = run(command(world, out, "--mix=search_free=2,mix_required=900", model=False))
    assert done.returncode == 0, done.stderr[-3000:]
    available = list(names.values()).count("mix_required")
    assert f"mix_required: requested 900 questions, available {available}" in done.stdout
    back = [question.category for question in QuestionSource(out / "curated.parquet")]
    assert collections.Counter(back) == collections.Counter(
        {"search_free": 2, "mix_required": available}
    )

    async def chat(request):
        verdict = '{"correct": true, "reason": "ok"}'
        return JSONResponse({"choices": [{"message": {"content": verdict}}]})

    route = Route("/v1/chat/completions", chat, methods=["POST"])
    with serve(Starlette(routes=[route])) as address:
        done = run(
            command(world, out, "--mix=", f"--config.services.judge_url={address}", model=False)
        )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "curation.json").read_text())
    answered = {e["group"] for e in read(out / "episodes.jsonl") if e["answer"]}
    assert summary["chosen"] == len(answered) > len(back) and summary["no_verdict"] == 0

    done = run(command(world, out, "--mix=search_free=0", model=False))
    assert done.returncode == 2 and "another --mix" in done.stderr.splitlines()[-1]
    assert not (out / "curated.parquet").exists() and (out / "sft.jsonl").exists()
