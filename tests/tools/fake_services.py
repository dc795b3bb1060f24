"""All services on one server, each of which can be made to fail, for tests."""

import collections
import contextlib
import io

import PIL.Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mmsr1_jax.config import settings
from mmsr1_jax.data import Question, write_parquet
from mmsr1_jax.utils import fallbacks
from tests.servers import serve

SECRET = "s3cret"


class FakeServices:
    """All services on one server, each under its name.

    Attributes:
      faults: By name of a service, a status, a response, or a function from the body to one of them
        or to None.
      requests: Number of requests by name of a service.
    """

    def __init__(self):
        self.faults, self.requests, self.url = {}, collections.Counter(), None

    async def respond(self, request):
        name = request.path_params["name"]
        body = await request.body()
        self.requests[name] += 1
        fault = self.faults.get(name)
        if callable(fault) and not isinstance(fault, Response):
            fault = fault(body)
        if isinstance(fault, Response):
            return fault
        if fault is not None:
            return Response(f"no: {SECRET}", status_code=fault)
        if name in ("summariser", "judge"):
            reply = '{"correct": true, "reason": "ok"}'
            return JSONResponse({"choices": [{"message": {"content": reply}}]})
        if name == "retrieval":
            return JSONResponse({"result": [[{"document": {"contents": "Title\nText."}}]]})
        if name == "reader":
            return PlainTextResponse("text of a page")
        result = {"url": "http://h/", "link": "http://h/", "title": "t", "content": "c"}
        return JSONResponse({k: [result] for k in ("results", "organic", "organic_results")})


@contextlib.contextmanager
def run_server():
    """Run all services and yield them."""
    services = FakeServices()
    methods = ["GET", "POST", "PUT"]
    route = Route("/{name}/{rest:path}", services.respond, methods=methods)
    with serve(Starlette(routes=[route])) as services.url:
        yield services


def reset(services, monkeypatch):
    """Repair all services, with API keys and without waits between a judge's attempts."""
    for name in ("SERPAPI_API_KEY", "SERPER_API_KEY", "JUDGE_API_KEY", "UPLOAD_QUERY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr("mmsr1_jax.tools.judge._CONFIRMATION_WAIT", 0.0)
    services.faults, services.requests = {}, collections.Counter()
    fallbacks.take_counts()


def configured(url, text="none", image="none", judge=True, **options):
    """Return settings of searches and services on a server."""
    config = settings.Config()
    config.tools.text, config.tools.image = text, image
    names = {"serpapi_url": "serpapi", "serper_url": "serper", "searxng_url": "searxng",
              "retrieval_url": "retrieval", "jina_url": "reader", "summariser_url": "summariser",
              "upload_url": "uploader/", "public_url": "public"}  # fmt: skip
    names |= {"judge_url": "judge"} if judge else {}
    urls = {field: f"{url}/{name}" for field, name in names.items()}
    options = {"max_attempts": 1, "reader": "jina"} | options
    config.services = settings.Services(**urls | options)
    return config


def questions(tmp_path, count=4):
    """Write questions with an image, and return the file."""
    path, file = tmp_path / "q.parquet", io.BytesIO()
    PIL.Image.new("RGB", (56, 56)).save(file, "png")
    write_parquet(path, [Question(id=f"q{i}", question="Which?", images=(file.getvalue(),),
                                  answers=("x",))
                         for i in range(count)])  # fmt: skip
    return path
