"""A judge's server for the tests."""

import json

from starlette.responses import JSONResponse, Response

from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import WebClient


class JudgeServer:
    """Chat server that replies `reply` and records the requests."""

    def __init__(self):
        self.reply, self.status, self.requests = "", 200, []
        self.address = None

    async def chat(self, request):
        self.requests.append((dict(request.headers), json.loads(await request.body())))
        if self.status != 200:
            return Response(status_code=self.status)
        return JSONResponse({"choices": [{"message": {"content": self.reply}}]})

    def judge(self, calls=None):
        web = WebClient(allowed_hosts=[self.address.removeprefix("http://")], timeout=2)
        service = Service("judge", web, max_attempts=2, max_wait=0.05)
        return Judge(
            service, calls or CachedCalls(ToolCache(None, "off")), base_url=self.address, model="m"
        )
