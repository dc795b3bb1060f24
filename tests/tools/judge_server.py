"""Scripted judge behind a real server, for tests."""

import contextlib
import json

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import WebClient
from tests.servers import serve

RIGHT = '{"correct": true, "reason": "same city"}'
WRONG = '{"correct": false, "reason": "another city"}'
SECRET = "sk-secret"


def message(content, finish="stop", **fields):
    choice = {"message": {"role": "assistant", "content": content, **fields}}
    return {"choices": [choice | {"finish_reason": finish}]}


class JudgeServer:
    """Judge with scripted replies.

    Attributes:
      reply: Function from an answer to the reply, an object for JSON or a response.
      answers: Answers that were judged.
    """

    def __init__(self):
        self.reply, self.answers = lambda answer: message(RIGHT), []
        self.url = None

    async def chat(self, request):
        user = json.loads(await request.body())["messages"][-1]["content"]
        answer = "\n".join(user.rsplit("Answer to check:\n", 1)[1].split("\n")[1:-1])
        self.answers.append(answer)
        reply = self.reply(answer)
        if isinstance(reply, Response):
            return reply
        return Response(json.dumps(reply), media_type="application/json")

    def judge(self, max_attempts=1, **options):
        host = self.url.removeprefix("http://")
        service = Service(
            "judge",
            WebClient(allowed_hosts=[host], timeout=5),
            max_attempts=max_attempts,
            max_wait=0.01,
            max_qps=1e4,
            address=self.url,
            **options,
        )
        return Judge(service, CachedCalls(ToolCache(None, "off")), base_url=self.url, model="m")


@contextlib.contextmanager
def run_server():
    """Run a judge and yield it."""
    server = JudgeServer()
    route = Route("/v1/chat/completions", server.chat, methods=["POST"])
    with serve(Starlette(routes=[route])) as server.url:
        yield server


def reset(server, monkeypatch):
    """Let a judge accept all answers, with an API key and without waits between attempts."""
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    monkeypatch.setattr("mmsr1_jax.tools.judge._CONFIRMATION_WAIT", 0.0)
    server.reply, server.answers = lambda answer: message(RIGHT), []
