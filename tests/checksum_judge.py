"""Judge server for tests, whose verdict depends on a checksum of the answer."""

import asyncio
import json
import zlib

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route


class JudgeServer:
    """Judge server, optionally with faults.

    Attributes:
      fault: Whether three of four answers meet a fault: the server does not reply, returns an error
        status, or replies without a verdict.
      num_requests: Number of requests so far.
      url: Address of the server, set by the fixture `judge`.
    """

    def __init__(self):
        self.fault, self.num_requests, self.url = False, 0, ""
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request: Request) -> Response:
        prompt = json.loads(await request.body())["messages"][-1]["content"]
        answer = "\n".join(prompt.rsplit("Answer to check:\n", 1)[1].split("\n")[1:-1])
        self.num_requests += 1
        kind = zlib.crc32(answer.encode()) % 4 if self.fault else 3
        if kind == 0:
            await asyncio.sleep(600)
        if kind == 1:
            return PlainTextResponse("no", status_code=503)
        reply = "Yes, it is." if kind == 2 else verdict_text(answer)
        return JSONResponse({"choices": [{"message": {"content": reply}}]})


def verdict_text(answer: str) -> str:
    """Return the judge's reply about an answer."""
    correct = zlib.crc32(answer.encode()) % 8 >= 4
    return json.dumps({"correct": correct, "reason": f"length {len(answer)}"})
