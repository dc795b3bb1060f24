"""`python -m mmsr1_jax.serve`: concurrent questions, hostile uploads, clients that disconnect."""

import base64
import concurrent.futures
import dataclasses
import functools
import io
import json
import re
import signal
import subprocess
import sys
import zlib

import httpx
import jax
import numpy as np
import PIL.Image
import pytest

from mmsr1_jax.apps.serve.app import check_image, split
from mmsr1_jax.apps.serve.events import EventSerializer
from tests.programs import ROOT, environment, run_module
from tests.serving import (
    HOSTILE,
    IMAGES,
    LIMITS,
    PATIENCE,
    QUESTIONS,
    ask,
    body,
    raw,
    served,
    wait_for,
)


def check(events, episode, processor):
    """Check that events describe a whole episode."""
    events = [event for event in events if event["event"] != "waiting"]
    assert [event["event"] for event in (events[0], events[-1])] == ["started", "end"]
    sampled = [processor.decode(s.tokens) for s in episode.segments if s.kind == "model"]
    sampled = [re.sub(r"<\|(?:im_end|endoftext)\|>$", "", text) for text in sampled]
    turns = [event for event in events if event["event"] == "turn"]
    assert [turn["text"] for turn in turns] == sampled
    drawn = "".join(event["text"] for event in events if event["event"] == "tokens")
    assert drawn == "".join(sampled).removesuffix("\N{REPLACEMENT CHARACTER}")
    for turn, parsed in zip(turns, episode.turns, strict=True):
        assert all(turn[name] == getattr(parsed, name)
                   for name in ("action", "payload", "reason", "problem"))  # fmt: skip
    replies = [event for event in events if event["event"] == "reply"]
    assert len(replies) == sum(segment.kind == "tool" for segment in episode.segments)
    calls = [reply["call"] for reply in replies if reply["call"]]
    for summary, call in zip(calls, episode.calls, strict=True):
        assert (summary["action"], summary["query"], summary["status"], summary["num_shown"]) == (
            call.action, call.query, call.status, call.num_shown,
        )  # fmt: skip
        assert "notes" not in summary
    for reply in replies:
        assert len(reply["results"]) == (reply["call"]["num_shown"] if reply["call"] else 0)
        assert bool(reply["text"]) == (not reply["results"])
    thumbnails = [r["image"] for reply in replies for r in reply["results"] if r["image"]]
    assert len(thumbnails) == len(episode.images) - 1
    end = events[-1]
    assert (end["end"], end["answer"], end["error"]) == (episode.end, episode.answer, None)


# The queue and the server


def test_concurrent_questions_get_the_episodes_of_infer(engine, alone, setup):
    """Three questions are answered concurrently, and one equals the episode of `infer`."""
    with concurrent.futures.ThreadPoolExecutor() as threads, served(engine) as (url, _, gate):
        requests = [threads.submit(ask, url, *pair) for pair in zip(QUESTIONS, IMAGES, strict=True)]
        gate.wait(3)
        gate.open()
        for request, episode in zip(requests, alone, strict=True):
            check(request.result(), episode, engine.processor)
        # The same question gets the same episode again.
        check(ask(url, QUESTIONS[1], IMAGES[1]), alone[1], engine.processor)
    image = setup[1] / "1.png"
    done = run_module(
        f"--model={setup[0]}", f"--image={image}", f"--question={QUESTIONS[1]}",
        f"--tools.index={setup[1]}", f"--config={setup[2]}", "--config.sampling.temperature=1",
        "--config.sampling.seed=1", "--json", module="mmsr1_jax.infer", devices=8,
    )  # fmt: skip
    inferred = json.loads(done.stdout)
    expected = json.loads(json.dumps(alone[1].to_json(engine.processor)))
    for data in (inferred, expected):
        for call in data["calls"]:
            del call["seconds"]
    assert [s["tokens"] for s in inferred["segments"]] == [
        s["tokens"] for s in expected["segments"]
    ]
    assert all(inferred[name] == expected[name] for name in ("turns", "calls", "end", "answer"))


def test_thumbnails_show_what_the_policy_saw(engine, alone):
    number = next(n for n, e in enumerate(alone) if any(c.action == "image_search" and c.num_shown
                                                        for c in e.calls))  # fmt: skip
    with served(engine) as (url, _, gate):
        gate.open()
        events = ask(url, QUESTIONS[number], IMAGES[number])
    results = [r for e in events if e["event"] == "reply" for r in e["results"] if r["image"]]
    titles = {f"Picture {n} {HOSTILE}" for n in range(3)}
    assert all(result["title"] in titles and not result["link"] for result in results)
    kind, _, data = results[0]["image"].partition(",")
    assert kind == "data:image/webp;base64"
    image = PIL.Image.open(io.BytesIO(base64.b64decode(data)))
    seen = engine.processor.images.unpatchify(alone[number].images[1])
    difference = np.asarray(image, float) - np.asarray(seen, float)
    assert image.size == seen.size and np.abs(difference).mean() < 8


def test_characters_of_several_tokens_are_sent_whole(processor):
    """A turn that is sent token by token never contains part of a character."""
    text = "<reason>über 日本 ✓ 🙂</reason> <answer>é</answer>"
    tokens = processor.encode_text(text)
    serialize = EventSerializer(processor, processor.token_bytes())
    drawn = [serialize("tokens", np.array([token], np.int32))["text"] for token in tokens]
    assert "".join(drawn) == text and "" in drawn
    half = processor.encode_text("🙂")[:1]
    assert serialize("tokens", np.array(half, np.int32))["text"] == ""


def test_questions_wait_leave_and_are_rejected(engine, alone):
    limits = dataclasses.replace(LIMITS, max_waiting=2)
    users = concurrent.futures.ThreadPoolExecutor()
    with users as threads, served(engine, limits) as (url, queue, gate):
        active = []
        for number in range(4):  # different questions, to tell them apart
            question = f"{QUESTIONS[0]} {number}"
            active.append(threads.submit(ask, url, question, IMAGES[0]))
            wait_for(lambda: sum(map(len, queue._active)) == len(active))
            loads = [len(questions) for questions in queue._active]
            assert max(loads) - min(loads) <= 1
        left = httpx.Client(timeout=PATIENCE)
        request = left.build_request("POST", f"{url}/ask", content=body("Gone?", IMAGES[1]))
        reply = left.send(request, stream=True)
        lines = reply.iter_lines()
        assert json.loads(next(lines)) == {"event": "waiting", "ahead": 0}
        last = threads.submit(ask, url, QUESTIONS[2], IMAGES[2])
        wait_for(lambda: len(queue) == 2)
        with pytest.raises(AssertionError, match="2 questions are waiting"):
            ask(url, "One more?", IMAGES[0])
        reply.close()  # the first waiting client disconnects
        left.close()
        wait_for(lambda: len(queue) == 1)
        gate.open()
        events = last.result()
        assert events[0]["event"] == "waiting" and events[0]["ahead"] == 1
        check(events, alone[2], engine.processor)
        assert all(request_.result()[-1]["event"] == "end" for request_ in active)
        assert "Gone?" not in gate.held


def test_a_client_that_disconnects_frees_its_lane(engine, alone):
    with served(engine) as (url, queue, gate):
        for number in range(4):
            with httpx.stream("POST", f"{url}/ask", content=body(f"{number}", IMAGES[0]),
                              timeout=PATIENCE) as reply:  # fmt: skip
                next(reply.iter_lines())
        gate.open()
        check(ask(url, QUESTIONS[0], IMAGES[0]), alone[0], engine.processor)
        wait_for(lambda: not any(queue._active))


def _fail(runner, *args, **keywords):
    """A program that fails after it has received the lanes and the image store."""
    for buffer in jax.tree.leaves((runner._cache, runner._image_tokens)):
        buffer.delete()
    raise ZeroDivisionError


@pytest.mark.parametrize("where", ["decode", "encode"])
def test_an_engine_recovers_from_a_failure(engine, alone, monkeypatch, caplog, where):
    with served(engine) as (url, _, gate):
        gate.open()
        with monkeypatch.context() as patch:
            for single in engine.engines:
                single.device.release_caches()  # no image is encoded yet
                runner = single.device.runner
                patch.setattr(runner.programs, where, functools.partial(_fail, runner))
            events = ask(url, QUESTIONS[0], IMAGES[0])
        assert events[-1]["event"] == "failed" and "ZeroDivision" not in events[-1]["error"]
        assert "ZeroDivisionError" in caplog.text
        check(ask(url, QUESTIONS[0], IMAGES[0]), alone[0], engine.processor)


def test_invalid_requests_are_refused(engine):
    good = body("What?", IMAGES[0])
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"
    with served(engine) as (url, queue, _):

        def refused(content, **headers):
            reply = httpx.post(f"{url}/ask", content=content, headers=headers)
            assert reply.headers["x-content-type-options"] == "nosniff"
            return reply.status_code, reply.json()["error"]

        assert refused(body("What?", svg))[0] == 415
        for kind in ("eps", "tiff", "bmp"):  # formats that need risky decoders
            file = io.BytesIO()
            PIL.Image.new("RGB", (8, 8)).save(file, kind)
            assert refused(body("What?", file.getvalue()))[0] == 415
        assert refused(body("What?", b""))[0] == 422
        assert refused(body("What?", b"\x89PNG" + bytes(200_000))) == (
            413, "The image is larger than 0.15 MB.")  # fmt: skip
        assert raw(url, "Content-Length: 999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")
        assert refused(body(" \n ", IMAGES[0])) == (422, "Write a question.")
        assert "longer than 100" in refused(body("x" * 101, IMAGES[0]))[1]
        for line in (b"", b"{", b"[]\n", b"{}\n", b'{"question": 5}\n', b"[" * 1500 + b"\n", b"\n"):
            assert refused(line)[0] == 400, line
        assert refused(good, origin="http://elsewhere")[0] == 403
        assert refused(good, origin="null")[0] == 403
        assert refused(good, host="elsewhere")[0] == 421
        assert refused(good, host="[")[0] == 421
        assert httpx.get(f"{url}/ask").status_code == 405
        assert httpx.get(f"{url}/../queue.py").status_code == 404
        assert len(queue) == 0 and not any(queue._active)
        # A file that is damaged after its header is rejected by the policy's reader.
        events = ask(url, "What?", IMAGES[0][:2000])
        assert events[-1]["end"] == "error" and "cannot be decoded" in events[-1]["error"]
        # Requests from the page itself are allowed.
        own = httpx.post(f"{url}/ask", content=body("?", b""), headers={"origin": url})
        assert own.status_code == 422


def test_slow_uploads_time_out(engine):
    limits = dataclasses.replace(LIMITS, upload_timeout=2.0)
    with served(engine, limits) as (url, _, _):
        sent = 'Content-Length: 1000\r\n\r\n{"quest'
        assert raw(url, sent).startswith(b"HTTP/1.1 408 ")


def test_decompression_bombs_are_rejected_by_their_header():
    def png(width, height):
        """Return a file whose header has these dimensions."""
        file = bytearray(IMAGES[0])
        file[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        crc = zlib.crc32(file[12:29])
        file[29:33] = crc.to_bytes(4, "big")
        return bytes(file)

    check_image(png(1000, 1000), LIMITS)
    for side in (1001, 20_000, 100_000):
        with pytest.raises(Exception, match="more than 1 million pixels"):
            check_image(png(side, 1000), LIMITS)
    assert split(body("é" * 100, b"\n\nabc"), LIMITS) == ("é" * 100, b"\n\nabc")
    assert split(body("🙂" * 100, b"abc"), LIMITS) == ("🙂" * 100, b"abc")


def test_the_page_has_no_inline_scripts(engine):
    with served(engine) as (url, _, _):
        page = httpx.get(url)
        assert "acting &lt;b&gt;" in page.text and "<b>acting <b>" not in page.text
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        sources = re.findall(r'(?:src|href)="([^"#][^"]*)"', page.text)
        assert sorted(sources) == ["data:,", "dom.js", "page.js", "style.css"]
        for name in ("dom.js", "page.js", "style.css"):
            text = httpx.get(f"{url}/{name}").text
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(",
                                 text)  # fmt: skip


# The command


@pytest.mark.proof
def test_the_command(tiny_dir, setup):
    command = [sys.executable, "-m", "mmsr1_jax.serve", f"--model={tiny_dir}",
               f"--config={setup[2]}", "--config.turns.max_turns=1"]  # fmt: skip
    keywords = dict(cwd=ROOT, env=environment(), text=True)
    with subprocess.Popen([*command, "--port=0"], **keywords, stdout=subprocess.PIPE) as process:
        try:
            url = re.match(r"(http://127\.0\.0\.1:\d+)/ ", process.stdout.readline())[1]
            assert "Ask about an image" in httpx.get(url).text
            events = ask(url, "What is it?", IMAGES[0])
            assert events[-1]["event"] == "end" and events[-1]["end"] in ("answer", "turns")
            assert sum(event["event"] == "tokens" for event in events) > 2  # as it is written
            taken = url.rpartition(":")[2]
            done = subprocess.run([*command, f"--port={taken}"], **keywords, capture_output=True,
                                  timeout=PATIENCE)  # fmt: skip
            assert done.returncode == 2 and f"--port={taken}: " in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0
