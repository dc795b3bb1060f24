"""Verdicts of a judge: resuming after a kill, a server that is down; and imperfect files."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from mmsr1_jax.config import settings
from mmsr1_jax.evaluation import scoring
from mmsr1_jax.evaluation.scoring import judge_answers, rescore, score_episodes
from mmsr1_jax.evaluation.table import format_results
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import WebClient
from tests.programs import ROOT
from tests.servers import serve


class JudgeServer:
    """A judge that accepts answers with an even checksum.

    It rejects the first `num_rejected` requests, and after `max_replies` answers it replies to
    nobody until `free` is set.
    """

    def __init__(self):
        self.num_rejected, self.max_replies, self.answers = 0, 10**9, []
        self.free = threading.Event()

    async def chat(self, request):
        user = json.loads(await request.body())["messages"][-1]["content"]
        if self.num_rejected:
            self.num_rejected -= 1
            return PlainTextResponse("not now", status_code=503)
        if len(self.answers) >= self.max_replies:
            while not self.free.is_set():
                await asyncio.sleep(0.02)
            return PlainTextResponse("too late", status_code=503)
        answer = "\n".join(user.rsplit("Answer to check:\n", 1)[1].split("\n")[1:-1])
        self.answers.append(answer)
        verdict = {"correct": is_correct(answer), "reason": f"of {answer}"}
        return JSONResponse({"choices": [{"message": {"content": json.dumps(verdict)}}]})


def is_correct(answer):
    return zlib.crc32(answer.encode()) % 2 == 0


@pytest.fixture
def server():
    judge_server = JudgeServer()
    with serve(
        Starlette(routes=[Route("/v1/chat/completions", judge_server.chat, methods=["POST"])])
    ) as judge_server.url:
        yield judge_server


def judge_of(url, pauses):
    """Return a judge that gets no requests for 0.1 s after 20 consecutive failures."""
    web = WebClient(allowed_hosts=[url.removeprefix("http://")], timeout=2)
    service = Service("judge", web, max_qps=2000, max_wait=0.02, cooldown=0.1)
    return Judge(
        service, CachedCalls(ToolCache(None, "off")), base_url=url, model="m", retry_waits=pauses
    )


def write(path, name, count, **fields):
    """Write recorded answers: `name` and an index each."""
    lines = [
        {"question": f"What is {index}?", "ground_truth": "it", "data_id": f"q{index}",
         "turns": [{"response": f"<reason>r</reason> <answer>{name} {index}</answer>",
                    "action": "answer"}]} | fields
        for index in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(folder):
    text = (folder / "episodes.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def config_of(url):
    config = settings.Config()
    config.services = settings.Services(judge_url=url, max_attempts=1)
    return config


# Killed during requests to the judge


def test_verdicts_survive_a_kill(tmp_path, server):
    """Judged answers are not sent again, and other answers do not get their verdicts."""
    a, b = (write(tmp_path / f"{name}.jsonl", name, 8) for name in "ab")
    out, server.max_replies = tmp_path / "out", 3
    process = subprocess.Popen(
        [sys.executable, "-m", "mmsr1_jax.evaluate", f"--rescore={a}", f"--out={out}",
         f"--config.services.judge_url={server.url}", "--config.services.timeout=300",
         "--config.services.limits=('judge=1000/1',)"],
        cwd=ROOT, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    kept = out / "verdicts.jsonl"
    while not kept.is_file() or kept.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(kept, "a") as file:
        file.write('["direct", 7, {"corr')  # as after a kill during a write
    other = tmp_path / "other"
    other.mkdir()
    (other / "verdicts.jsonl").write_bytes(kept.read_bytes())
    assert len(server.answers) == 3
    answers, server.answers, server.max_replies = server.answers, [], 10**9
    server.free.set()

    results = rescore(config_of(server.url), a, out)
    assert sorted([*answers, *server.answers]) == [f"a {index}" for index in range(8)]
    assert not kept.exists()
    assert results == rescore(config_of(server.url), a, tmp_path / "uninterrupted")
    assert read(out) == read(tmp_path / "uninterrupted")

    server.answers.clear()
    rescore(config_of(server.url), b, other)
    assert sorted(server.answers) == [f"b {index}" for index in range(8)]
    for line in read(other):
        verdict = line["judge"]
        assert verdict["correct"] is is_correct(line["answer"])
        assert verdict["reason"] == f"of {line['answer']}"


def test_stored_verdicts_without_a_digest_are_ignored(tmp_path, server):
    verdict = {"correct": True, "reason": "", "by": "judge", "model": "Qwen/Qwen3-32B"}
    (tmp_path / "verdicts.jsonl").write_text(json.dumps(["recorded", 0, verdict]) + "\n")
    rescore(config_of(server.url), write(tmp_path / "a.jsonl", "a", 1), tmp_path)
    assert server.answers == ["a 0"]


# A judge that is down


@pytest.mark.parametrize("count", [5, 60])
def test_requests_to_a_judge_that_is_down_are_retried(tmp_path, server, capsys, count):
    server.num_rejected = 3 * count + 10  # more than one round of three attempts each
    answers = {("direct", n): (f"What is {n}?", ["it"], f"a {n}") for n in range(count)}
    judge = judge_of(server.url, pauses=[0.15] * 15)
    verdicts = judge_answers(answers, judge, "m", tmp_path / "verdicts.jsonl")
    assert list(verdicts) == list(answers)
    for key, verdict in verdicts.items():
        answer = answers[key][2]
        assert verdict == {"correct": is_correct(answer), "reason": f"of {answer}", "by": "judge",
                           "model": "m"}  # fmt: skip
    assert len(server.answers) == count and "retrying in 0.15 s" in capsys.readouterr().err


def test_retries_of_a_judge_that_stays_down_are_bounded(tmp_path, server):
    """All verdicts are missing, and counted."""
    server.num_rejected = 10**9
    start = time.monotonic()
    path = write(tmp_path / "a.jsonl", "a", 300)
    results = score_episodes(path, tmp_path, judge_of(server.url, pauses=[0.15, 0.15]), "m", {})
    assert time.monotonic() - start < 30
    # At most three rounds, each with three attempts per answer.
    assert 10**9 - server.num_rejected < 3 * 300
    verdicts = [line["judge"] for line in read(tmp_path)]
    assert len(verdicts) == results["no_verdict"] == 300 and not server.answers
    for verdict in verdicts:
        assert verdict["correct"] is None and verdict["reason"].startswith("no verdict: ")
    assert "300 answers have no verdict" in format_results(results)


def test_the_number_of_attempts_is_a_setting():
    config = config_of("http://127.0.0.1:1")
    assert make_judge(config).retry_waits == ()
    config.services.max_attempts = 3
    assert make_judge(config).retry_waits == (60.0, 60.0)


# Imperfect files


@pytest.mark.parametrize("partial", ['{"question": "Wh', '{"question": "\udcc3'])
def test_a_truncated_last_line_is_skipped(tmp_path, capsys, partial):
    path = write(tmp_path / "a.jsonl", "a", 2)
    path.write_bytes(path.read_bytes() + partial.encode("utf-8", "surrogateescape"))
    before = path.read_bytes()
    results = rescore(settings.Config(), path, tmp_path / "out")
    assert results["recorded"]["episodes"] == len(read(tmp_path / "out")) == 2
    assert f"{path}, line 3: truncated; skipped" in capsys.readouterr().err
    assert path.read_bytes() == before
    path.write_bytes(before + b"\n")  # now it is a complete, invalid line
    with pytest.raises(ValueError, match="a.jsonl, line 3: not "):
        rescore(settings.Config(), path, tmp_path / "out")


def test_results_always_match_the_episodes(tmp_path, monkeypatch):
    """A kill between writing the two files leaves no results; the same command writes them."""
    out = tmp_path / "out"
    rescore(settings.Config(), write(tmp_path / "a.jsonl", "a", 2), out)
    path = write(tmp_path / "b.jsonl", "b", 3)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "write_results", killed)
        rescore(settings.Config(), path, out)
    assert len(read(out)) == 3 and not (out / "results.json").exists()
    rescore(settings.Config(), path, out)
    assert (out / "results.json").is_file()


def test_lone_surrogates_are_kept(tmp_path, server):
    broken = "\ud83d half"
    path = write(
        tmp_path / "a.jsonl", broken, 2, question=broken, category=broken, data_source=broken
    )
    results = rescore(config_of(server.url), path, tmp_path / "out")
    for index, line in enumerate(read(tmp_path / "out")):
        assert line["question"] == line["category"] == broken
        assert line["answer"] == f"{broken} {index}"
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8")) == results
    assert "? half" in format_results(results) and format_results(results).encode()
    assert rescore(config_of(server.url), tmp_path / "out" / "episodes.jsonl", None)
