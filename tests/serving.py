"""The page of `serve` over real engines, for several tests."""

import asyncio
import contextlib
import io
import json
import socket
import threading
import time

import httpx
import numpy as np
import PIL.Image

from mmsr1_jax.apps.serve.app import Limits, make_app
from mmsr1_jax.apps.serve.request_queue import RequestQueue
from tests.servers import serve

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
# A policy of which every other token is a whole turn.
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
PATIENCE = 600.0  # seconds; a busy machine is slow
LIMITS = Limits(
    max_image_bytes=150_000, max_image_pixels=10**6, max_question_chars=100, max_waiting=8
)


def make_image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = PIL.Image.fromarray(pixels).resize((160, 120), PIL.Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


IMAGES = [make_image(seed) for seed in range(3)]


class Gate:
    """Gate that blocks all searches until it is opened.

    Attributes:
      held: Questions with a blocked search.
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


def wait_for(condition):
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@contextlib.contextmanager
def served(engine, limits=LIMITS, names=("127.0.0.1",)):
    """Yield the server's address, its queue, and a closed gate before the tools."""
    gate, original = Gate(), [single.tools for single in engine.engines]
    for single in engine.engines:
        single.tools = {name: gate.around(tool) for name, tool in single.tools.items()}
    queue = RequestQueue(engine, engine.config.sampling)
    app = make_app(queue, engine.processor, title="acting <b>", limits=limits, names=names)
    try:
        with serve(app) as url:
            yield url, queue, gate
            gate.open()
    finally:
        gate.open()
        queue.close()
        for single, tools in zip(engine.engines, original, strict=True):
            single.tools = tools


def body(question, file: bytes) -> bytes:
    return json.dumps({"question": question}).encode() + b"\n" + file


def ask(url, question, file) -> list[dict]:
    """Return the events of a question."""
    with httpx.stream(
        "POST", f"{url}/ask", content=body(question, file), timeout=PATIENCE
    ) as reply:
        assert reply.status_code == 200, reply.read()
        return [json.loads(line) for line in reply.iter_lines() if line]


def raw(url, rest: str) -> bytes:
    """Return the beginning of the response to an incomplete request."""
    host = url.removeprefix("http://")
    name, port = host.split(":")
    with socket.create_connection((name, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(f"POST /ask HTTP/1.1\r\nHost: {host}\r\n{rest}".encode())
        return connection.recv(4096)
