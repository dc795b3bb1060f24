"""Workflows through the engine, and `python -m mmsr1_jax.evaluate` as a user runs it: killed and
gone on with, with judges that fail, and without a policy."""

import asyncio
import itertools
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib

import jax
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from mmsr1_jax.config import settings
from mmsr1_jax.data import QuestionSource
from mmsr1_jax.episodes import prompts, turns
from mmsr1_jax.evaluation.compare import compare_files
from mmsr1_jax.evaluation.run import evaluate, parameters
from mmsr1_jax.evaluation.scoring import rescore
from mmsr1_jax.evaluation.table import table
from mmsr1_jax.evaluation.workflows import WORKFLOWS, limits_of
from mmsr1_jax.models import sharding
from mmsr1_jax.rewards.reward_function import exact_match
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.train_batch import make_loss
from mmsr1_jax.rollout import forcing
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools.service import ServiceRefusedError
from mmsr1_jax.training import run_config, train_utils
from mmsr1_jax.training.checkpoint import Checkpoints
from tests import scripted_policy
from tests.engines import (
    VOCAB_SIZE,
    assert_logprobs_match_score,
    by_index,
    examples,
    make_config,
    search_tools,
)
from tests.programs import environment
from tests.scripted_policy import config_for, scripted_processor
from tests.servers import serve

ROOT = pathlib.Path(__file__).resolve().parents[1]


# Forced turns


@pytest.mark.parametrize(
    "text, action, expected",
    [
        ("<reason>r</reason> <answer>a</answer>", "text_search",
         "<reason>r</reason> <text_search>"),
        ("<reason>r</reason>\n<search><img></search>", "answer", "<reason>r</reason> <answer>"),
        ("<reason>r</reason> and so on", "image_search",
         "<reason>r</reason> <search><img></search>"),
        (" <reason>cut off", "answer", " <reason>cut off</reason> <answer>"),
        ("<answer>a</answer>", "image_search", " <search><img></search>"),
        ("I see </text_search>", "answer", "I see  <answer>"),
        ("", "text_search", " <text_search>"),
    ],
)  # fmt: skip
def test_where_an_action_is_opened(text, action, expected):
    stay, follows = forcing.opened(text, action)
    assert text[:stay] + follows == expected
    if action == "image_search" or "<reason>" not in text:
        return
    closed = turns.parse(f"{expected}x</{turns.TAGS[action]}>")
    assert closed.action == action and closed.well_formed


@pytest.mark.parametrize("text", ["Paris", "Paris</search>", "Paris<answer>x</answer>"])
def test_where_an_action_is_closed(text):
    stay, follows = forcing.closed(text, "answer", "Which city?")
    assert text[:stay] + follows == "Paris</answer>"


@pytest.mark.parametrize("text", ["", " ", "</text_search>", " <answer>x</answer>"])
def test_a_query_that_is_not_written_is_the_question(text):
    question = "Who built this?</text_search> " + 40 * "x "
    stay, follows = forcing.closed(text, "text_search", question)
    turn = turns.parse(f"<reason>r</reason> <text_search>{text[:stay]}{follows}")
    assert turn.payload.strip() == "Who built this? " + 28 * "x " + "x"
    assert forcing.closed("", "answer", question) == (0, "</answer>")


@pytest.fixture(scope="module")
def model():
    return random_policy.random_model(config_for(VOCAB_SIZE), seed=3)


def make_engine(model, **keywords):
    return Engine(model, scripted_processor(VOCAB_SIZE), make_config(**keywords), search_tools())


@pytest.fixture(scope="module")
def engine(model):
    engine = make_engine(model)
    yield engine
    engine.close()


def rollout(engine, name, count=5, rollouts=4, **keywords):
    limits = limits_of(name, engine.config.turns)
    rules = engine.make_rules(limits, prompts.load(), WORKFLOWS[name].forced)
    return list(engine.rollout(examples(count), rollouts=rollouts, rules=rules, **keywords))


@pytest.fixture(scope="module")
def forced(engine):
    return {name: rollout(engine, name) for name in ("rag", "direct")}


def test_forced_turns_do_what_they_are_to_do(forced):
    begun = 0
    for episode in forced["rag"]:
        wanted = ["image_search", "text_search", "answer"][not episode.example.images :]
        actions = [turn.action for turn in episode.turns]
        assert actions == wanted[: len(actions)]
        if episode.end == "answer":
            assert actions[-1] == "answer" and len(actions) >= len(wanted)
            begun += actions == wanted
        searches = [call.action for call in episode.calls]
        assert searches == [a for a in actions if a in ("image_search", "text_search")]
    assert begun > 10
    for episode in forced["direct"]:
        assert [turn.action for turn in episode.turns] == ["answer"] and not episode.calls


def test_forced_tokens_are_told_from_sampled_ones(forced, engine):
    """Turns are what their tokens say; no token was sampled that is not there; and the policy had
    read all of them, whatever was cut off."""
    processor, cut = engine.processor, 0
    end = processor.control["<|im_end|>"]
    for episode in itertools.chain(*forced.values()):
        texts, tokens = [], []
        for segment in [*episode.segments[1:], None]:
            if segment is None or segment.kind == "tool":
                tokens = tokens[: tokens.index(end)] if end in tokens else tokens
                texts.append(processor.decode(tokens))
                tokens = []
            else:
                assert len(segment.tokens)
                tokens += segment.tokens.tolist()
        assert [turns.parse(text) for text in texts] == episode.turns
        kinds = [segment.kind for segment in episode.segments]
        cut += "forced" in "".join(kinds).replace("forcedtool", "")
    assert cut > 10


def test_logprobs_of_forced_episodes_are_those_of_score(forced, model):
    some = {name: sorted(episodes, key=lambda e: e.index) for name, episodes in forced.items()}
    assert_logprobs_match_score(model, [*some["rag"][3:13], *some["direct"][:3]], 1.0)


@pytest.mark.parametrize("lanes, chunk", [(4, 3)])
def test_schedules_do_not_change_forced_episodes(model, forced, lanes, chunk):
    engine = make_engine(model, lanes=lanes, decode_steps=chunk)
    for name, episodes in forced.items():
        assert by_index(rollout(engine, name)) == by_index(episodes)
    engine.close()


def test_a_pool_forces_too(model, forced):
    pool = EnginePool([model], scripted_processor(VOCAB_SIZE), make_config(), search_tools())
    assert by_index(rollout(pool, "rag")) == by_index(forced["rag"])
    part = rollout(pool, "direct", 1, indices=[0])
    pool.close()
    assert by_index(part) == {n: by_index(forced["direct"])[n] for n in range(4)}


def test_other_workflows_leave_the_trained_one_as_it_is(engine):
    plain = by_index(engine.rollout(examples(4), rollouts=2))
    assert by_index(rollout(engine, "on_demand", 4, 2)) == plain
    part = engine.rollout(examples(4)[2:], rollouts=2, indices=[2, 3])
    assert by_index(part) == {number: plain[number] for number in range(4, 8)}


# The parameters of a run


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.proof)])
def test_the_parameters_of_a_checkpoint(tmp_path, tiny_dir, rank):
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
    found = jax.tree.leaves(parameters(config, tiny_dir, tmp_path, 3))
    for leaf, expected in zip(found, jax.tree.leaves(trainer.params), strict=True):
        np.testing.assert_array_equal(leaf, expected)


# Judges


class JudgeServer:
    """A judge: right is what has an even checksum. With `fault`, three of four answers meet one:
    the server takes too long, refuses, or replies with something that is no verdict."""

    def __init__(self):
        self.fault, self.asked = False, 0

    async def chat(self, request):
        user = json.loads(await request.body())["messages"][-1]["content"]
        answer = "\n".join(user.rsplit("Answer to check:\n", 1)[1].split("\n")[1:-1])
        number, self.asked = zlib.crc32(answer.encode()), self.asked + 1
        kind = number % 4 if self.fault else 3
        if kind == 0:
            await asyncio.sleep(600)
        if kind == 1:
            return PlainTextResponse("no", status_code=503)
        reply = "Yes, it is." if kind == 2 else verdict_of(answer)
        return JSONResponse({"choices": [{"message": {"content": reply}}]})


def verdict_of(answer: str) -> str:
    right = zlib.crc32(answer.encode()) % 8 >= 4
    return json.dumps({"correct": right, "reason": f"so it is of {len(answer)}"})


@pytest.fixture
def judge():
    server = JudgeServer()
    with serve(
        Starlette(routes=[Route("/v1/chat/completions", server.chat, methods=["POST"])])
    ) as url:
        server.url = url
        yield server


def judge_config(server, **fields):
    config = settings.Config()
    config.services = settings.Services(
        judge_url=server and server.url, timeout=5.0, max_attempts=1, **fields
    )
    return config


def read_lines(path):
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_recorded_answers_are_scored_without_a_policy(shared, tmp_path, capsys):
    path = shared / "data" / "transcripts.jsonl"
    found = rescore(judge_config(None), path, tmp_path)
    assert found["recorded"] == {"episodes": 26, "same_actions": 26}
    assert "actions read as recorded: 26 of 26" in capsys.readouterr().out
    recorded = read_lines(path)
    right = searches = 0
    for line, written in zip(recorded, read_lines(tmp_path / "episodes.jsonl"), strict=True):
        golds = line["candidate_answers"]
        golds = json.loads(golds) if isinstance(golds, str) else golds
        final = line["turns"][-1]
        answer = final["payload"] if final["action"] == "answer" else None
        assert (written["answer"] or "") == (answer or "") and written["id"] == line["data_id"]
        right += exact_match(answer, [line["ground_truth"], *golds])
        searches += sum(turn["action"] in ("image_search", "text_search") for turn in line["turns"])
    of = found["workflows"]["recorded"]
    assert of["accuracy"]["em"]["mean"] == pytest.approx(right / 26)
    assert of["searches"]["made"] == searches and of["questions"] == 26
    # What was written is read again, with the same results.
    assert rescore(judge_config(None), tmp_path / "episodes.jsonl", None) == {
        **found, "made_with": {"rescored": str(tmp_path / "episodes.jsonl")},
    }  # fmt: skip
    with pytest.raises(ValueError, match="--out: needed"):
        rescore(judge_config(None), path, None)


def test_a_judge_that_fails_gives_no_verdict_and_is_asked_again(shared, tmp_path, judge):
    path = shared / "data" / "transcripts.jsonl"
    judge.fault = True
    found = rescore(judge_config(judge), path, tmp_path)
    lines = read_lines(tmp_path / "episodes.jsonl")
    of_kind = {kind: 0 for kind in range(4)}
    for line in lines:
        verdict = line["judge"]
        if verdict["by"] == "match":  # no answer, or a gold one word for word
            continue
        kind = zlib.crc32(line["answer"].encode()) % 4
        of_kind[kind] += 1
        if kind == 3:
            assert verdict["correct"] == json.loads(verdict_of(line["answer"]))["correct"]
            assert verdict["reason"] == f"so it is of {len(line['answer'])}"
        elif kind == 2:
            assert verdict["correct"] is False
            assert verdict["reason"].startswith("no verdict in the reply: ")
        else:
            assert verdict["correct"] is None and verdict["reason"].startswith("no verdict: ")
    assert all(of_kind.values())
    failed, again = of_kind[0] + of_kind[1], of_kind[0] + of_kind[1] + of_kind[2]
    assert found["unreadable"] == of_kind[2]
    assert f"of {failed} answers the judge said nothing" in table(found)
    accuracy = found["workflows"]["recorded"]["accuracy"]["judge"]
    assert found["no_verdict"] == accuracy["no_verdict"] == failed

    judge.fault, judge.asked = False, 0
    found = rescore(judge_config(judge), tmp_path / "episodes.jsonl", None)
    assert judge.asked == again and found["no_verdict"] == 0
    for line in (known := read_lines(tmp_path / "episodes.jsonl")):
        if line["judge"]["by"] == "judge":
            right = json.loads(verdict_of(line["answer"]))["correct"]
            assert line["judge"]["correct"] is right
    right = sum(line["judge"]["correct"] for line in known)
    assert found["workflows"]["recorded"]["accuracy"]["judge"]["mean"] == pytest.approx(right / 26)
    # All is known; another judge is asked anew; without one, verdicts stay.
    rescore(judge_config(judge), tmp_path / "episodes.jsonl", None)
    assert judge.asked == again
    assert rescore(judge_config(None), tmp_path / "episodes.jsonl", None)["no_verdict"] == 0
    rescore(judge_config(judge, judge_model="other"), tmp_path / "episodes.jsonl", None)
    assert judge.asked == again + sum(of_kind.values())


def test_a_judge_that_is_not_there_ends_the_evaluation(shared, tmp_path):
    config = settings.Config()
    config.services = settings.Services(judge_url="http://127.0.0.1:1", max_attempts=1)
    with pytest.raises(ServiceRefusedError, match="judge at http://127.0.0.1:1 .*refused"):
        rescore(config, shared / "data" / "transcripts.jsonl", tmp_path)


# The settings of an evaluation that already exists


@pytest.fixture
def begun(shared, tiny_dir, tmp_path):
    """Settings, a policy without parameters, so that nothing is answered, and a directory for an
    evaluation."""
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
    for _ in range(2):  # begun, and gone on with
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
def test_an_evaluation_depends_on_its_services(begun, field, value):
    config, policy, out = begun
    setattr(config.services, field, value)
    message = f"an evaluation with services.{field}=.*services.{field}={value}"
    with pytest.raises(ValueError, match=message):
        evaluate(config, policy, out)


def test_so_are_prompts_and_what_is_searched(begun, tmp_path):
    config, policy, out = begun
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
    for workflows in (("direct",), ("rag", "on_demand")):  # other workflows may follow
        config.eval.workflows = workflows
        with pytest.raises(ValueError, match=f"{policy}.*config.json"):
            evaluate(config, policy, out)
    (tmp_path / "prompts" / "direct").mkdir()
    (tmp_path / "prompts" / "direct" / "question.txt").write_text("{images} {question}?")
    config.eval.workflows = ("direct",)
    with pytest.raises(ValueError, match="already contains an evaluation with prompts.direct="):
        evaluate(config, policy, out)


# The command


def command(*arguments):
    return [sys.executable, "-m", "mmsr1_jax.evaluate", *map(str, arguments)]


def run(arguments):
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def kill_after(lines, path, arguments):
    """Kills the command when its file has so many lines."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


CONFIG = """
from mmsr1_jax.config import Buckets, Config, Rollout, Tools, Turns

def get_config():
    return Config(
        buckets=Buckets(image_windows=(4, 16, 64)),
        rollout=Rollout(lanes=4, decode_batch_size=4, prefill_buckets=(64, 256), prefill_tokens=256,
                        image_cache_tokens=8192, precompile=False),
        turns=Turns(max_new_tokens=48, max_episode_tokens=4096, min_turn_tokens=32,
                    max_result_tokens=768),
        tools=Tools(max_result_chars=300, max_pixels=112 * 112),
    )
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory, shared):
    """A random policy that acts, and an index of real pages and pictures."""
    from mmsr1_jax.tools.index_builder import build_index

    directory = tmp_path_factory.mktemp("evaluation")
    scripted_policy.write(directory / "policy")
    (directory / "config.py").write_text(CONFIG)
    known = json.loads((shared / "data" / "image_search_results.json").read_text("utf-8"))
    photographs = []
    for row in itertools.islice(QuestionSource(shared / "data" / "fvqa_mini.parquet"), 4):
        (directory / f"{row.id}.img").write_bytes(row.images[0])
        titles = [entry["title"] for entry in known.get(row.id, [])[:2]] or [row.question]
        photographs.append(json.dumps({"image": f"{row.id}.img", "titles": titles}) + "\n")
    (directory / "pictures.jsonl").write_text("".join(photographs))
    pages = shared / "data" / "web_pages.jsonl"
    build_index(directory / "index", [pages], [directory / "pictures.jsonl"])
    return directory


@pytest.mark.proof
@pytest.mark.parametrize("rows", [2, 26])
def test_killed_and_gone_on_with(shared, material, tmp_path, judge, rows):
    arguments = [
        f"--config={material / 'config.py'}", f"--model={material / 'policy'}",
        f"--config.eval.data=('{shared / 'data' / 'fvqa_mini.parquet'}',)",
        f"--config.eval.max_questions={rows}", f"--config.tools.index={material / 'index'}",
        f"--config.services.judge_url={judge.url}",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    printed = run(command(*arguments, f"--out={whole}"))
    results = json.loads((whole / "results.json").read_text())
    lines = read_lines(whole / "episodes.jsonl")
    assert len(lines) == 4 * rows and list(results["workflows"]) == list(WORKFLOWS)
    for name, of in results["workflows"].items():
        assert of["questions"] == of["episodes"] == rows and of["errors"] == 0
        assert set(of["accuracy"]) == {"em", "subem", "judge"} and of["by_category"]
        for right in of["accuracy"].values():
            assert 0 <= right["interval"][0] <= right["mean"] <= right["interval"][1] <= 1
        made = of["searches"]
        assert (made["made_of_allowed"] is None) == (name == "direct")
        assert of["turns"] >= 1 and of["tokens"] > of["tokens_sampled"] > 0 and of["by_source"]
        assert f"\n{name} " in printed
    assert results["workflows"]["direct"]["searches"]["made"] == 0
    assert results["workflows"]["rag"]["searches"]["image_search"]["share"] == 1.0
    assert results["no_verdict"] == 0
    for line in lines:
        assert all((whole / path).is_file() for path in line["images"])
    for line in lines[rows : rows + 2]:  # of rag: the question's photograph is in the index
        (found,) = [call for call in line["calls"] if call["action"] == "image_search"]
        assert line["workflow"] == "rag" and found["status"] == "ok" and found["num_shown"] >= 1
        (reply, *_) = [s["text"] for s in line["segments"] if s["kind"] == "tool"]
        assert "<|image_pad|>" in reply and len(line["images"]) == 1 + reply.count("<|vision_end|>")

    again = command(*arguments, f"--out={parts}")
    for count in (3 * rows,) if rows < 26 else (1, rows, 3 * rows):
        kill_after(count, parts / "episodes.jsonl", again)
        with open(parts / "episodes.jsonl", "a") as file:
            file.write('{"workflow": "direct", "id": ')  # as a kill within a write leaves it
    run(again)
    assert json.loads((parts / "results.json").read_text()) == results
    for line, other in zip(lines, read_lines(parts / "episodes.jsonl"), strict=True):
        for call in (*line["calls"], *other["calls"]):
            call["seconds"] = 0.0
        assert other == line
    said = compare_files([f"{whole}:rag", f"{parts}:rag"])
    assert re.search(r"\+0\.0 \[-\d+\.\d, \+\d+\.\d\] by EM", said), said

    done = subprocess.run(
        [*again, "--config.eval.temperature=0.5"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "with eval.temperature=0.0; this command" in done.stderr


def test_a_run_is_measured_by_its_own_settings(shared, material, tmp_path):
    config = runpy.run_path(str(material / "config.py"))["get_config"]()
    config.data.validation = (str(shared / "data" / "fvqa_mini.parquet"),)
    config.eval.workflows = ("direct",)
    run_config.write(tmp_path / "config.json", config, "nowhere")
    shutil.copytree(material / "policy", tmp_path / "policy")
    run(command(f"--workdir={tmp_path}", "--config.eval.max_questions=1"))
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["workflows"]["direct"]["questions"] == 1 and len(results["workflows"]) == 1
    assert results["made_with"]["model"] == str(tmp_path / "policy")


@pytest.mark.proof
def test_a_checkpoint_of_a_run_is_measured(shared, material, tmp_path):
    """All its parameters are 0, so that all tokens are equally likely, and one is always taken."""
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
    assert results["made_with"]["checkpoint"] == [str(tmp_path), 2]
    (line,) = read_lines(tmp_path / "evaluation" / "episodes.jsonl")
    sampled = [segment for segment in line["segments"] if segment["kind"] == "model"]
    assert len(sampled) == 3  # turns, all without an action
    for values in ("tokens", "logprobs"):
        assert len(set(itertools.chain(*(segment[values] for segment in sampled)))) == 1


def test_the_command_scores_without_a_policy(shared, tmp_path):
    printed = run(
        command(f"--rescore={shared / 'data' / 'transcripts.jsonl'}", f"--out={tmp_path}")
    )
    assert printed.startswith("actions read as recorded: 26 of 26\n") and "\nrecorded " in printed
    done = subprocess.run(command(f"--out={tmp_path}"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("error: --model or --workdir: a policy is "
                                                         "needed\n")  # fmt: skip
