"""`python -m mmsr1_jax.serve`: several ask at once, hostile uploads, those who leave; and the page,
in a real browser."""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib

import httpx
import jax
import numpy as np
import PIL.Image
import pytest

from mmsr1_jax.apps.serve.app import Limits, check_picture, make_app, split
from mmsr1_jax.apps.serve.events import EventSerializer
from mmsr1_jax.apps.serve.request_queue import RequestQueue
from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Example
from mmsr1_jax.rollout.build import make_engine
from mmsr1_jax.tools.index_builder import build_index
from tests import browser, scripted_policy
from tests.programs import environment
from tests.servers import serve

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
# Every other token of this policy is a whole turn.
TURNS = {
    "<reason>because {}</reason> <text_search>bridge {}</text_search>\n": 180,
    "<reason>I look {}</reason> <search><img></search>": 120,
    "<reason>r{}</reason> <answer>" + HOSTILE + "{}</answer>": 60,
}
CONFIG = """
from mmsr1_jax.config import Buckets, Config, Rollout, Tools, Turns

def get_config():
    return Config(
        buckets=Buckets(image_windows=(4, 8, 16)),
        rollout=Rollout(lanes=2, decode_batch_size=2, decode_steps=8, prefill_buckets=(32, 128),
                        prefill_tokens=64, encode_windows=8, image_cache_tokens=2048,
                        precompile=False),
        turns=Turns(max_new_tokens=40, max_episode_tokens=2048, min_turn_tokens=16,
                    max_result_tokens=768),
        tools=Tools(max_pixels=16 * 28 * 28, max_result_chars=600, timeout=600.0,
                    episode_timeout=600.0),
    )
"""
QUESTIONS = ("When was it opened?", "Who built it?", f"What is {HOSTILE}?")
PATIENCE = 600.0  # seconds: on a busy machine everything takes its time
ACTIONS = ("image_search", "text_search")
LIMITS = Limits(picture_bytes=150_000, picture_pixels=10**6, question_chars=100, waiting=8,
                seconds=2.0)  # fmt: skip


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = PIL.Image.fromarray(pixels).resize((160, 120), PIL.Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


PICTURES = [picture(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The directory of a policy that acts, that of an index whose pages are hostile, and settings
    as a file."""
    policy, index = tmp_path_factory.mktemp("policy") / "acting", tmp_path_factory.mktemp("index")
    settings_file = tmp_path_factory.mktemp("config") / "config.py"
    settings_file.write_text(CONFIG)
    scripted_policy.write(policy, vocab_size=896, actions=TURNS)
    page = {"url": "http://bridges/1?a=b&c", "title": HOSTILE, "summary": f"{HOSTILE} bridge\n2. x"}
    other = {"url": "javascript:window.hacked=1", "title": "bridge", "summary": "A bridge " * 60}
    (index / "p.jsonl").write_text("\n".join(map(json.dumps, (page, other))))
    lines = []
    for number, file in enumerate(PICTURES):
        (index / f"{number}.png").write_bytes(file)
        lines.append(json.dumps({"image": f"{number}.png", "title": f"Picture {number} {HOSTILE}"}))
    (index / "i.jsonl").write_text("\n".join(lines))
    build_index(index, [index / "p.jsonl"], [index / "i.jsonl"])
    return policy, index, settings_file


@pytest.fixture(scope="module")
def engine(places):
    """Two engines of two lanes."""
    config = runpy.run_path(str(places[2]))["get_config"]()
    config.tools.index = str(places[1])
    config.sampling = settings.Sampling(temperature=1.0, seed=4)
    made = make_engine(config, str(places[0]), engines=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(engine):
    """What each question gives when nobody else asks."""
    told = []
    for question, file in zip(QUESTIONS, PICTURES, strict=True):
        (episode,) = engine.rollout([Example(question=question, images=[file])])
        told.append(episode)
    assert all(episode.calls for episode in told)  # so that they can be held
    assert {call.action for e in told for call in e.calls} == {"text_search", "image_search"}
    assert any(episode.answer for episode in told)
    return told


class Gate:
    """Holds all searches until it is opened.

    Attributes:
      held: questions that have come to it.
    """

    def __init__(self):
        self.held: set[str] = set()
        self._open = threading.Event()

    def open(self):
        self._open.set()

    def wait(self, count):
        wait_for(lambda: len(self.held) >= count)

    def around(self, tool):
        async def held(query):
            self.held.add(query.question)
            while not self._open.is_set():
                await asyncio.sleep(0.01)
            return await tool(query)

        return held


def wait_for(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def served(engine, limits=LIMITS, names=("127.0.0.1",)):
    """Yields the server's address, its desk, and a closed gate before the tools."""
    gate, before = Gate(), [one.tools for one in engine.engines]
    for one in engine.engines:
        one.tools = {name: gate.around(tool) for name, tool in one.tools.items()}
    desk = RequestQueue(engine, engine.config.sampling)
    app = make_app(desk, engine.processor, title="acting <b>", limits=limits, names=names)
    try:
        with serve(app) as url:
            yield url, desk, gate
            gate.open()
    finally:
        gate.open()
        desk.close()
        for one, tools in zip(engine.engines, before, strict=True):
            one.tools = tools


def body(question, file: bytes) -> bytes:
    return json.dumps({"question": question}).encode() + b"\n" + file


def ask(url, question, file) -> list[dict]:
    """The events of a question."""
    with httpx.stream(
        "POST", f"{url}/ask", content=body(question, file), timeout=PATIENCE
    ) as reply:
        assert reply.status_code == 200, reply.read()
        return [json.loads(line) for line in reply.iter_lines() if line]


def raw(url, rest: str) -> bytes:
    """The beginning of what is answered to a request that may never end."""
    host = url.removeprefix("http://")
    name, port = host.split(":")
    with socket.create_connection((name, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(f"POST /ask HTTP/1.1\r\nHost: {host}\r\n{rest}".encode())
        return connection.recv(4096)


def check(events, episode, processor):
    """That events tell of an episode, and of all of it."""
    events = [event for event in events if event["event"] != "waiting"]
    assert [event["event"] for event in (events[0], events[-1])] == ["begun", "end"]
    sampled = [processor.decode(s.tokens) for s in episode.segments if s.kind == "model"]
    sampled = [re.sub(r"<\|(?:im_end|endoftext)\|>$", "", text) for text in sampled]
    turns = [event for event in events if event["event"] == "turn"]
    assert [turn["text"] for turn in turns] == sampled
    drawn = "".join(event["text"] for event in events if event["event"] == "drawn")
    assert drawn == "".join(sampled).removesuffix("\N{REPLACEMENT CHARACTER}")
    for turn, read in zip(turns, episode.turns, strict=True):
        assert all(turn[name] == getattr(read, name)
                   for name in ("action", "payload", "reason", "problem"))  # fmt: skip
    replies = [event for event in events if event["event"] == "reply"]
    assert len(replies) == sum(segment.kind == "tool" for segment in episode.segments)
    calls = [reply["call"] for reply in replies if reply["call"]]
    for told, call in zip(calls, episode.calls, strict=True):
        assert (told["action"], told["query"], told["status"], told["num_shown"]) == (
            call.action, call.query, call.status, call.num_shown,
        )  # fmt: skip
        assert "notes" not in told
    for reply in replies:
        assert len(reply["results"]) == (reply["call"]["num_shown"] if reply["call"] else 0)
        assert bool(reply["said"]) == (not reply["results"])
    pictures = [r["picture"] for reply in replies for r in reply["results"] if r["picture"]]
    assert len(pictures) == len(episode.images) - 1
    end = events[-1]
    assert (end["end"], end["answer"], end["error"]) == (episode.end, episode.answer, None)


# The desk and the server


def test_each_gets_an_episode_of_their_own(engine, alone, places):
    """Three at once, all held in their searches at the same time; and one gives what the command
    `infer` gives."""
    with concurrent.futures.ThreadPoolExecutor() as threads, served(engine) as (url, _, gate):
        asked = [threads.submit(ask, url, *pair) for pair in zip(QUESTIONS, PICTURES, strict=True)]
        gate.wait(3)
        gate.open()
        for one, episode in zip(asked, alone, strict=True):
            check(one.result(), episode, engine.processor)
        # The same question again is the same episode.
        check(ask(url, QUESTIONS[1], PICTURES[1]), alone[1], engine.processor)
    image = places[1] / "1.png"
    done = subprocess.run(
        [sys.executable, "-m", "mmsr1_jax.infer", f"--model={places[0]}", f"--image={image}",
         f"--question={QUESTIONS[1]}", f"--tools.index={places[1]}", f"--config={places[2]}",
         "--config.sampling.temperature=1", "--config.sampling.seed=4", "--json"],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    told = json.loads(done.stdout)
    expected = json.loads(json.dumps(alone[1].to_json(engine.processor)))
    for data in (told, expected):
        for call in data["calls"]:
            del call["seconds"]
    assert [s["tokens"] for s in told["segments"]] == [s["tokens"] for s in expected["segments"]]
    assert all(told[name] == expected[name] for name in ("turns", "calls", "end", "answer"))


def test_thumbnails_are_what_the_policy_saw(engine, alone):
    number = next(n for n, e in enumerate(alone) if any(c.action == "image_search" and c.num_shown
                                                        for c in e.calls))  # fmt: skip
    with served(engine) as (url, _, gate):
        gate.open()
        events = ask(url, QUESTIONS[number], PICTURES[number])
    found = [r for e in events if e["event"] == "reply" for r in e["results"] if r["picture"]]
    titles = {f"Picture {n} {HOSTILE}" for n in range(3)}
    assert all(result["title"] in titles and not result["link"] for result in found)
    kind, _, data = found[0]["picture"].partition(",")
    assert kind == "data:image/webp;base64"
    image = PIL.Image.open(io.BytesIO(base64.b64decode(data)))
    saw = engine.processor.images.unpatchify(alone[number].images[1])
    difference = np.asarray(image, float) - np.asarray(saw, float)
    assert image.size == saw.size and np.abs(difference).mean() < 8


def test_characters_of_several_tokens(processor):
    """A turn that is drawn token by token is its text, and shows no half of a character."""
    text = "<reason>über 日本 ✓ 🙂</reason> <answer>é</answer>"
    tokens = processor.encode_text(text)
    teller = EventSerializer(processor, processor.token_bytes())
    drawn = [teller("drawn", np.array([token], np.int32))["text"] for token in tokens]
    assert "".join(drawn) == text and "" in drawn
    half = processor.encode_text("🙂")[:1]
    assert teller("drawn", np.array(half, np.int32))["text"] == ""


def test_who_waits_who_leaves_and_who_is_too_many(engine, alone):
    limits = dataclasses.replace(LIMITS, waiting=2)
    users = concurrent.futures.ThreadPoolExecutor()
    with users as threads, served(engine, limits) as (url, desk, gate):
        inside = []
        for number in range(4):  # each something of their own, so that they are told apart
            asked = f"{QUESTIONS[0]} {number}"
            inside.append(threads.submit(ask, url, asked, PICTURES[0]))
            wait_for(lambda: sum(map(len, desk._active)) == len(inside))
            loads = [len(questions) for questions in desk._active]
            assert max(loads) - min(loads) <= 1
        left = httpx.Client(timeout=PATIENCE)
        request = left.build_request("POST", f"{url}/ask", content=body("Gone?", PICTURES[1]))
        reply = left.send(request, stream=True)
        lines = reply.iter_lines()
        assert json.loads(next(lines)) == {"event": "waiting", "ahead": 0}
        last = threads.submit(ask, url, QUESTIONS[2], PICTURES[2])
        wait_for(lambda: len(desk) == 2)
        with pytest.raises(AssertionError, match="2 questions are waiting"):
            ask(url, "One more?", PICTURES[0])
        reply.close()  # whoever waited first leaves
        left.close()
        wait_for(lambda: len(desk) == 1)
        gate.open()
        events = last.result()
        assert events[0]["event"] == "waiting" and events[0]["ahead"] == 1
        check(events, alone[2], engine.processor)
        assert all(one.result()[-1]["event"] == "end" for one in inside)
        assert "Gone?" not in gate.held


def test_who_leaves_an_episode_under_way_leaves_no_lane_behind(engine, alone):
    with served(engine) as (url, desk, gate):
        for number in range(4):
            with httpx.stream("POST", f"{url}/ask", content=body(f"{number}", PICTURES[0]),
                              timeout=PATIENCE) as reply:  # fmt: skip
                next(reply.iter_lines())
        gate.open()
        check(ask(url, QUESTIONS[0], PICTURES[0]), alone[0], engine.processor)
        wait_for(lambda: not any(desk._active))


def _gone(device, *args, **keywords):
    """A program that fails after it was given lanes and store."""
    for buffer in jax.tree.leaves((device._lanes, device._image_tokens)):
        buffer.delete()
    raise ZeroDivisionError


@pytest.mark.parametrize("where", ["decode", "_encode_program"])
def test_an_engine_that_fails_goes_on(engine, alone, monkeypatch, caplog, where):
    with served(engine) as (url, _, gate):
        gate.open()
        with monkeypatch.context() as patch:
            for one in engine.engines:
                one.device.reset()  # no picture has been encoded yet
                patch.setattr(one.device, where, functools.partial(_gone, one.device))
            events = ask(url, QUESTIONS[0], PICTURES[0])
        assert events[-1]["event"] == "failed" and "ZeroDivision" not in events[-1]["error"]
        assert "ZeroDivisionError" in caplog.text
        check(ask(url, QUESTIONS[0], PICTURES[0]), alone[0], engine.processor)


def test_what_is_refused(engine):
    good = body("What?", PICTURES[0])
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"
    with served(engine) as (url, desk, _):

        def refused(content, **headers):
            reply = httpx.post(f"{url}/ask", content=content, headers=headers)
            assert reply.headers["x-content-type-options"] == "nosniff"
            return reply.status_code, reply.json()["error"]

        assert refused(body("What?", svg))[0] == 415
        for kind in ("eps", "tiff", "bmp"):  # pictures, but not to be opened for just anyone
            file = io.BytesIO()
            PIL.Image.new("RGB", (8, 8)).save(file, kind)
            assert refused(body("What?", file.getvalue()))[0] == 415
        assert refused(body("What?", b""))[0] == 422
        assert refused(body("What?", b"\x89PNG" + bytes(200_000))) == (
            413, "The picture is larger than 0.15 MB.")  # fmt: skip
        assert raw(url, "Content-Length: 999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")
        assert refused(body(" \n ", PICTURES[0])) == (422, "Write a question.")
        assert "longer than 100" in refused(body("x" * 101, PICTURES[0]))[1]
        for line in (b"", b"{", b"[]\n", b"{}\n", b'{"question": 5}\n', b"[" * 1500 + b"\n", b"\n"):
            assert refused(line)[0] == 400, line
        assert refused(good, origin="http://elsewhere")[0] == 403
        assert refused(good, origin="null")[0] == 403
        assert refused(good, host="elsewhere")[0] == 421
        assert refused(good, host="[")[0] == 421
        assert httpx.get(f"{url}/ask").status_code == 405
        assert httpx.get(f"{url}/../desk.py").status_code == 404
        assert len(desk) == 0 and not any(desk._active)
        # A file that is damaged behind its header: the policy's own reader says so.
        events = ask(url, "What?", PICTURES[0][:2000])
        assert events[-1]["end"] == "error" and "cannot be decoded" in events[-1]["error"]
        # As who uses the page's own address.
        own = httpx.post(f"{url}/ask", content=body("?", b""), headers={"origin": url})
        assert own.status_code == 422


def test_who_sends_slowly_is_not_waited_for(engine):
    with served(engine) as (url, _, _):
        sent = 'Content-Length: 1000\r\n\r\n{"quest'
        assert raw(url, sent).startswith(b"HTTP/1.1 408 ")


def test_bombs_are_told_by_their_header():
    def png(width, height):
        """A file that says it is so large."""
        file = bytearray(PICTURES[0])
        file[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        crc = zlib.crc32(file[12:29])
        file[29:33] = crc.to_bytes(4, "big")
        return bytes(file)

    check_picture(png(1000, 1000), LIMITS)
    for side in (1001, 20_000, 100_000):
        with pytest.raises(Exception, match="more than 1 million pixels"):
            check_picture(png(side, 1000), LIMITS)
    assert split(body("é" * 100, b"\n\nabc"), LIMITS) == ("é" * 100, b"\n\nabc")
    assert split(body("🙂" * 100, b"abc"), LIMITS) == ("🙂" * 100, b"abc")


def test_the_page_as_a_file(engine):
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


# The page in a browser


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as found:
        yield found


@pytest.fixture
def open_page(chromium):
    """Opens the page, as another user each time; errors in it fail the test."""
    contexts, errors = [], []

    def open_page(url, **options):
        contexts.append(chromium.new_context(**options))
        contexts[-1].set_default_timeout(1000 * PATIENCE)
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda sent: None if sent.url.startswith((url, "blob:", "data:"))
               else errors.append(sent.url))  # fmt: skip
        tab.goto(url)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def choose(tab, file):
    tab.set_input_files("#picture", {"name": "p.png", "mimeType": "image/png", "buffer": file})


def fill(tab, question, file):
    choose(tab, file)
    tab.fill("#question", question)
    tab.press("#question", "Enter")


def shown(tab, selector) -> list[str]:
    return tab.locator(selector).all_text_contents()


def test_three_users_at_once(engine, alone, open_page):
    looks = ({}, {"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 844}})
    with served(engine) as (url, _, gate):
        tabs = [open_page(url, **look) for look in looks]
        for tab, question, file in zip(tabs, QUESTIONS, PICTURES, strict=True):
            assert browser.violations(tab) == []
            fill(tab, question, file)
        gate.wait(3)
        for tab in tabs:
            tab.wait_for_selector(".turn .payload")
            assert tab.locator("#stop").is_visible() and tab.locator("#send").is_disabled()
        gate.open()
        for tab, question, episode in zip(tabs, QUESTIONS, alone, strict=True):
            tab.wait_for_selector(".final")
            assert shown(tab, ".episode h2") == [question]
            searches = [turn for turn in episode.turns if turn.action in ACTIONS]
            given = [turn.payload or "The whole picture" for turn in searches]
            assert shown(tab, ".payload") == given
            written = shown(tab, ".reason")
            assert len(written) == len(episode.turns)
            for text, turn in zip(written, episode.turns, strict=True):
                assert turn.problem or text == turn.reason
            assert tab.locator(".results > li").count() == sum(c.num_shown for c in episode.calls)
            assert tab.locator(".results img").count() == len(episode.images) - 1
            if episode.answer is not None:
                assert shown(tab, ".final p") == [episode.answer]
            assert tab.locator("#send").is_enabled() and tab.locator("#stop").is_hidden()
            # What comes from outside is text.
            assert HOSTILE in "".join(shown(tab, ".results"))
            assert tab.evaluate("window.hacked") is None
            assert tab.locator("main script, [onerror], a[href^=javascript]").count() == 0
            for details in tab.locator("details summary").all():
                details.click()
            assert browser.violations(tab) == []
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_mistakes_are_told_on_the_page(engine, open_page):
    with served(engine) as (url, desk, gate):
        tab = open_page(url)
        mistake = tab.locator("#mistake")
        tab.press("#question", "Enter")
        assert mistake.inner_text() == "Choose a picture."
        assert tab.evaluate("document.activeElement.id") == "picture"
        fill(tab, "", PICTURES[0])
        assert mistake.inner_text() == "Write a question."
        fill(tab, "What?", b"no picture")
        _expect(tab.locator("#mistake")).to_contain_text("JPEG")
        choose(tab, bytes(200_000))
        assert mistake.inner_text() == "The picture is larger than 0.15 MB."
        tab.press("#question", "Enter")  # not with the picture before it
        assert mistake.inner_text() == "Choose a picture."
        fill(tab, "What?", PICTURES[0][:2000])
        tab.wait_for_selector(".final.bad")
        assert "cannot be decoded" in tab.locator(".final.bad").inner_text()
        # One who stops leaves nothing that waits.
        fill(tab, QUESTIONS[0], PICTURES[0])
        gate.wait(1)
        tab.click("#stop")
        _expect(tab.locator(".status").first).to_have_text("Stopped.")
        assert tab.locator("#send").is_enabled()
        gate.open()
        wait_for(lambda: not any(desk._active))


# The command


def test_the_command(tiny_dir, places):
    command = [sys.executable, "-m", "mmsr1_jax.serve", f"--model={tiny_dir}",
               f"--config={places[2]}", "--config.turns.max_turns=1"]  # fmt: skip
    keywords = dict(cwd=ROOT, env=environment(), text=True)
    with subprocess.Popen([*command, "--port=0"], **keywords, stdout=subprocess.PIPE) as process:
        try:
            url = re.match(r"(http://127\.0\.0\.1:\d+)/ ", process.stdout.readline())[1]
            assert "Ask about a picture" in httpx.get(url).text
            events = ask(url, "What is it?", PICTURES[0])
            assert events[-1]["event"] == "end" and events[-1]["end"] in ("answer", "turns")
            assert sum(event["event"] == "drawn" for event in events) > 2  # as it is written
            taken = url.rpartition(":")[2]
            done = subprocess.run([*command, f"--port={taken}"], **keywords, capture_output=True,
                                  timeout=PATIENCE)  # fmt: skip
            assert done.returncode == 1 and f"--port={taken}: " in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0


def _expect(locator):
    """Wait by an assertion of Playwright: a function in a string needs the page to allow eval."""
    from playwright.sync_api import expect  # as in `browser.py`: only where it is installed

    return expect(locator)
