"""ASGI app for load tests: a search engine, its pages, a reader service and a summariser.

Each reply takes WAIT seconds, and one request in FAULTY fails, in a different way each time. Run
`python -m uvicorn tests.load_app:app` as a separate process, with its port in the environment
variable PORT."""

import asyncio
import itertools
import os

from starlette.responses import JSONResponse, PlainTextResponse, Response

WAIT = float(os.environ.get("WAIT", "0.05"))
FAULTY = int(os.environ.get("FAULTY", "20"))  # 0: none
FAULTS = ("500", "429", "404", "wrong type", "truncated", "silent", "cut")
PARAGRAPH = (
    "The bridge number {} over the river was opened in the year {}, after some years of work, and "
    "has carried trams, carriages and people on foot between both banks of the city ever since. "
)
PORT = os.environ.get("PORT", "")
_requests = itertools.count(1)


def _page(name: str) -> list[str]:
    """Return paragraphs that depend on the name."""
    return [PARAGRAPH.format(f"{name}-{i}", 1700 + 13 * i) * (1 + i % 3) for i in range(24)]


def _html(name: str) -> str:
    menu = "".join(f'<li><a href="/page/{i}">Entry {i}</a></li>' for i in range(40))
    text = "".join(f"<p>{paragraph}</p>" for paragraph in _page(name))
    return (
        f"<html><head><title>{name}</title><script>var a = 1;</script></head><body>"
        f"<nav><ul>{menu}</ul></nav><article><h1>{name}</h1>{text}</article></body></html>"
    )


def _answer(path: str, query: str) -> Response:
    kind, _, name = path.lstrip("/").partition("/")
    if kind == "search":
        name = query.partition("q=")[2].partition("&")[0]
        results = [
            {"url": f"http://127.0.0.1:{PORT}/page/{name}-{i}", "title": f"{name} {i}",
             "content": "A bridge."} for i in range(20)
        ]  # fmt: skip
        return JSONResponse({"query": name, "results": results})
    if kind == "reader":
        return PlainTextResponse("\n\n".join(_page(name.rpartition("/")[2])))
    if kind == "page":
        return Response(_html(name), media_type="text/html; charset=utf-8")
    if kind == "v1":
        message = {"role": "assistant", "content": "It was opened in 1700. It carries trams."}
        return JSONResponse({"choices": [{"message": message}]})
    return Response(status_code=404)


async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    index = next(_requests)
    fault = FAULTS[index // FAULTY % len(FAULTS)] if FAULTY and index % FAULTY == 0 else None
    await asyncio.sleep(WAIT)
    response = _answer(scope["path"], scope["query_string"].decode())
    if fault in ("500", "429", "404"):
        response = Response(status_code=int(fault), headers={"retry-after": "0"})
    elif fault == "wrong type":
        response = Response(b"\x89PNG", media_type="image/png")
    elif fault == "truncated" and response.media_type == "application/json":
        response = Response(response.body[: len(response.body) // 2], media_type="application/json")
    elif fault == "silent":
        await asyncio.sleep(3600)
    elif fault == "cut":
        start = {"type": "http.response.start", "status": 200}
        await send(start | {"headers": [(b"content-length", b"1000")]})
        raise ConnectionResetError("on purpose")
    await response(scope, receive, send)
