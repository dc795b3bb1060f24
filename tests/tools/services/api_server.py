"""Server that implements the APIs of all services, and can be made to fail, for tests."""

import asyncio
import contextlib
import gzip
import io
import json
import urllib.parse
from collections.abc import Iterator

import PIL.Image
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from mmsr1_jax.tools import Query
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import WebClient
from tests.servers import RecordingBackend

KEY = "sk-very-secret"
PAGE = """<html><head><title>T</title><script>var evil = 1;</script></head>
<body><nav>menu</nav>
<article><h1>The bridge of Porto</h1>
<p>The Dom Luis bridge crosses the Douro river and was opened in the year 1886, after five years of
work.</p><p>It carries a metro line on its upper deck.</p>
</article></body></html>"""
BACKENDS: list[tuple[str, RecordingBackend]] = []  # (host of the server, backend)
FAULTS: dict[str, str] = {}  # fault, or the JSON of a response, by service


def jpeg() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (60, 40), "green").save(file, "jpeg")
    return file.getvalue()


async def body_of(request: Request):
    return json.loads(await request.body())


async def serpapi(request):
    query = request.query_params
    assert query["api_key"] == KEY
    if query["engine"] == "google_lens":
        assert query["url"] == "http://image"
        return {"visual_matches": [
            {"title": "A bridge", "link": "http://l", "thumbnail": "http://t", "position": 1},
            {"link": "http://no-title"}, "rubbish",
        ]}  # fmt: skip
    assert query["engine"] == "google"
    return {"organic_results": [
        {"title": query["q"], "link": "http://a", "snippet": "s", "position": 1},
        {"title": "no link"}, {"title": 7, "link": "http://b"},
    ]}  # fmt: skip


async def serper(request):
    assert request.headers["x-api-key"] == KEY
    body = await body_of(request)
    assert body["gl"] == "us" and body["hl"] == "en"
    if request.url.path.endswith("/lens"):
        return {"organic": [{"title": "A bridge", "link": "http://l", "imageUrl": "http://i",
                             "thumbnailUrl": "http://t"}]}  # fmt: skip
    return {"organic": [{"title": body["q"], "link": "http://a", "snippet": "s"}]}


async def searxng(request):
    assert request.query_params["format"] == "json"
    results = [{"url": f"http://{i}", "title": "t", "content": "s"} for i in range(20)]
    return {"query": request.query_params["q"], "results": results}


async def retrieval(request):
    body = await body_of(request)
    assert body == {"queries": ["q"], "topk": 2, "return_scores": True}
    return {"result": [[
        {"document": {"id": "1", "contents": '"Porto"\nA city in Portugal.'}, "score": 0.9},
        {"document": {"contents": "one line"}, "score": 0.8}, {"document": 5},
    ]]}  # fmt: skip


async def jina(request):
    assert request.headers["authorization"] == f"Bearer {KEY}"
    target = urllib.parse.unquote(request.url.path.removeprefix("/jina/"))
    return PlainTextResponse(f"# Title\nmarkdown of {target}")


async def reader(request):
    return Response(PAGE, media_type="text/html; charset=utf-8")


async def put(request):
    assert request.method == "PUT"
    return Response(status_code=201)


async def thumbnail(request):
    return Response(jpeg(), media_type="image/jpeg")


async def chat(request):
    body = await body_of(request)
    assert request.headers["authorization"] == f"Bearer {KEY}" and body["model"] == "m"
    return {"choices": [{"message": {"role": "assistant", "content": " In short. "}}]}


BOMB = gzip.compress(b" " * 100_000_000, 1)  # compressed in advance, as it takes a while


def faulty_response(fault: str) -> Response:
    if fault[0] in '{"':  # JSON of the response
        data = json.loads(fault)
        return JSONResponse(data) if isinstance(data, dict) else PlainTextResponse(data)
    if fault == "truncated":
        return Response(b'{"organic": [{"link": "http', media_type="application/json")
    if fault == "not an object":
        return JSONResponse([1, 2])
    if fault == "wrong type":
        return Response(b"\x89PNG", media_type="image/png")
    if fault == "50 MB":
        return Response(b" " * 50_000_000, media_type="application/json")
    if fault == "gzip bomb":
        return Response(BOMB, media_type="application/json",
                        headers={"content-encoding": "gzip"})  # fmt: skip
    if fault == "metadata":
        return RedirectResponse("http://169.254.169.254/")
    if fault == "loopback":
        return RedirectResponse("http://127.0.0.1:9/")
    return Response(status_code=int(fault), headers={"retry-after": "0"} if fault == "429" else {})


def app():
    services = {"serpapi": serpapi, "serper": serper, "searxng": searxng, "retrieval": retrieval,
                "jina": jina, "reader": reader, "chat": chat, "put": put,
                "thumbnail": thumbnail, "other": thumbnail}  # fmt: skip

    def route(name, handle):
        async def respond(request):
            fault = FAULTS.get(name, "")
            if fault == "timeout":
                await asyncio.sleep(60)
            elif fault:
                return faulty_response(fault)
            result = await handle(request)
            return result if isinstance(result, Response) else JSONResponse(result)

        return Route(f"/{name}/{{rest:path}}", respond, methods=["GET", "POST", "PUT"])

    return Starlette(routes=[route(name, handle) for name, handle in services.items()])


@contextlib.contextmanager
def checked_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set API keys; at the end, check that connections were made to the server only."""
    FAULTS.clear()
    BACKENDS.clear()
    for name in ("SERPAPI_API_KEY", "SERPER_API_KEY", "JINA_API_KEY", "SUMMARISER_API_KEY"):
        monkeypatch.setenv(name, KEY)
    yield
    for backend_host, backend in BACKENDS:
        assert {f"{host}:{port}" for host, port in backend.connections} <= {backend_host}


def service(address):
    host = address.removeprefix("http://")
    backend = RecordingBackend()
    BACKENDS.append((host, backend))
    timeout = 0.5 if "timeout" in FAULTS.values() else 60.0
    web = WebClient(allowed_hosts=[host], timeout=timeout, max_bytes=1_000_000, backend=backend)
    return Service("test", web, max_attempts=2, max_wait=0.1)


def run(awaitable):
    return asyncio.run(awaitable)


def ask(tool):
    """Return the observation of a text search."""
    return run(tool(Query(action="text_search", text="q", question="When was it opened?")))
