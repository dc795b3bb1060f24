"""Verdicts of a judge: killed and gone on with, of the answers they were given to, and of a server
that is down for a while; and files of answers as users have them."""

import asyncio
import json
import os
import pathlib
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
from mmsr1_jax.evaluation.scoring import finish, judged, rescore
from mmsr1_jax.evaluation.table import table
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import WebClient
from tests.servers import serve

ROOT = pathlib.Path(__file__).resolve().parents[1]


class JudgeServer:
    """A judge: right is what has an even checksum. It refuses the first `refused` requests, and
    after `replies` answers it replies to nobody, until it is freed."""

    def __init__(self):
        self.refused, self.replies, self.asked = 0, 10**9, []
        self.free = threading.Event()

    async def chat(self, request):
        user = json.loads(await request.body())["messages"][-1]["content"]
        if self.refused:
            self.refused -= 1
            return PlainTextResponse("not now", status_code=503)
        if len(self.asked) >= self.replies:
            while not self.free.is_set():
                await asyncio.sleep(0.02)
            return PlainTextResponse("too late", status_code=503)
        answer = "\n".join(user.rsplit("Answer to check:\n", 1)[1].split("\n")[1:-1])
        self.asked.append(answer)
        said = {"correct": right(answer), "reason": f"of {answer}"}
        return JSONResponse({"choices": [{"message": {"content": json.dumps(said)}}]})


def right(answer):
    return zlib.crc32(answer.encode()) % 2 == 0


@pytest.fixture
def server():
    made = JudgeServer()
    with serve(
        Starlette(routes=[Route("/v1/chat/completions", made.chat, methods=["POST"])])
    ) as made.url:
        yield made


def judge_of(url, pauses):
    """A judge that is left alone for a tenth of a second after 20 failures in a row."""
    web = WebClient(allowed_hosts=[url.removeprefix("http://")], timeout=2)
    service = Service("judge", web, max_qps=2000, max_wait=0.02, cooldown=0.1)
    return Judge(
        service, CachedCalls(ToolCache(None, "off")), base_url=url, model="m", retry_waits=pauses
    )


def write(path, name, count, **fields):
    """Recorded answers, `name` and a number each."""
    lines = [
        {"question": f"What is {number}?", "ground_truth": "it", "data_id": f"q{number}",
         "turns": [{"response": f"<reason>r</reason> <answer>{name} {number}</answer>",
                    "action": "answer"}]} | fields
        for number in range(count)
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


# Killed while the judge is asked


def test_killed_while_the_judge_is_asked(tmp_path, server):
    """What has its verdict is not asked about again; other answers do not get it."""
    a, b = (write(tmp_path / f"{name}.jsonl", name, 8) for name in "ab")
    out, server.replies = tmp_path / "out", 3
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
        file.write('["direct", 7, {"corr')  # as a kill within a write leaves it
    other = tmp_path / "other"
    other.mkdir()
    (other / "verdicts.jsonl").write_bytes(kept.read_bytes())
    assert len(server.asked) == 3
    first, server.asked, server.replies = server.asked, [], 10**9
    server.free.set()

    found = rescore(config_of(server.url), a, out)
    assert sorted([*first, *server.asked]) == [f"a {number}" for number in range(8)]
    assert not kept.exists()
    assert found == rescore(config_of(server.url), a, tmp_path / "unbroken")
    assert read(out) == read(tmp_path / "unbroken")

    server.asked.clear()
    rescore(config_of(server.url), b, other)
    assert sorted(server.asked) == [f"b {number}" for number in range(8)]
    for line in read(other):
        verdict = line["judge"]
        assert verdict["correct"] is right(line["answer"])
        assert verdict["reason"] == f"of {line['answer']}"


def test_verdicts_of_before_there_were_digests_are_not_looked_at(tmp_path, server):
    verdict = {"correct": True, "reason": "", "by": "judge", "model": "Qwen/Qwen3-32B"}
    (tmp_path / "verdicts.jsonl").write_text(json.dumps(["recorded", 0, verdict]) + "\n")
    rescore(config_of(server.url), write(tmp_path / "a.jsonl", "a", 1), tmp_path)
    assert server.asked == ["a 0"]


# A judge that is down


@pytest.mark.parametrize("count", [5, 60])
def test_a_judge_that_is_down_for_a_while_is_asked_again(tmp_path, server, capsys, count):
    server.refused = 3 * count + 10  # more than one round of three attempts each
    asked = {("direct", n): (f"What is {n}?", ["it"], f"a {n}") for n in range(count)}
    judge = judge_of(server.url, pauses=[0.15] * 15)
    verdicts = judged(asked, judge, "m", tmp_path / "verdicts.jsonl")
    assert list(verdicts) == list(asked)
    for key, verdict in verdicts.items():
        answer = asked[key][2]
        assert verdict == {"correct": right(answer), "reason": f"of {answer}", "by": "judge",
                           "model": "m"}  # fmt: skip
    assert len(server.asked) == count and "tried again in 0.15 s" in capsys.readouterr().err


def test_a_judge_that_stays_down_ends(tmp_path, server):
    """It is asked a bounded number of times, and all verdicts are open and counted."""
    server.refused = 10**9
    begin = time.monotonic()
    path = write(tmp_path / "a.jsonl", "a", 300)
    found = finish(path, tmp_path, judge_of(server.url, pauses=[0.15, 0.15]), "m", {})
    assert time.monotonic() - begin < 30
    assert 10**9 - server.refused < 3 * 300  # in three rounds, each of three attempts an answer
    verdicts = [line["judge"] for line in read(tmp_path)]
    assert len(verdicts) == found["no_verdict"] == 300 and not server.asked
    for verdict in verdicts:
        assert verdict["correct"] is None and verdict["reason"].startswith("no verdict: ")
    assert "of 300 answers the judge said nothing" in table(found)


def test_how_often_a_judge_is_asked_is_a_setting():
    config = config_of("http://127.0.0.1:1")
    assert make_judge(config).retry_waits == ()
    config.services.max_attempts = 3
    assert make_judge(config).retry_waits == (60.0, 60.0)


# Files as users have them


@pytest.mark.parametrize("cut", ['{"question": "Wh', '{"question": "\udcc3'])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, capsys, cut):
    path = write(tmp_path / "a.jsonl", "a", 2)
    path.write_bytes(path.read_bytes() + cut.encode("utf-8", "surrogateescape"))
    before = path.read_bytes()
    found = rescore(settings.Config(), path, tmp_path / "out")
    assert found["recorded"]["episodes"] == len(read(tmp_path / "out")) == 2
    assert f"{path}, line 3: not written to its end; left out" in capsys.readouterr().err
    assert path.read_bytes() == before
    path.write_bytes(before + b"\n")  # is a line then, and a wrong one
    with pytest.raises(ValueError, match="a.jsonl, line 3: not "):
        rescore(settings.Config(), path, tmp_path / "out")


def test_results_never_lie_beside_other_episodes(tmp_path, monkeypatch):
    """Killed between the two files, there are no results, and the same command writes them."""
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


def test_half_a_surrogate_pair_is_kept(tmp_path, server):
    half = "\ud83d half"
    path = write(tmp_path / "a.jsonl", half, 2, question=half, category=half, data_source=half)
    found = rescore(config_of(server.url), path, tmp_path / "out")
    for number, line in enumerate(read(tmp_path / "out")):
        assert line["question"] == line["category"] == half
        assert line["answer"] == f"{half} {number}"
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8")) == found
    assert "? half" in table(found) and table(found).encode()
    assert rescore(config_of(server.url), tmp_path / "out" / "episodes.jsonl", None)
