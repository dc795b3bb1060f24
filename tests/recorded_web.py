"""A web made of the real pages and pictures in `shared/`: searches, pages, pictures, and models.

The search engine speaks SearXNG's protocol. The models reply by rules that read the page that they
are shown, so that each reply can be verified.
"""

import asyncio
import collections
import hashlib
import html
import json
import pathlib
import re
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mmsr1_jax.data import QuestionSource
from tests.construction_server import ModelServer
from tests.programs import read_jsonl

# What the pictures of questions in fvqa_mini.parquet show, as far as pages are about it.
CONCEPTS = {
    "fvqa_train_3969": "Mount William",
    "fvqa_train_2791": "Quaid-e-Azam House",
    "fvqa_train_3956": "Monserrate",
    "fvqa_train_1013": "BSI",
    "fvqa_train_1078": "Musketeers",
    "fvqa_train_2330": "Botanic Garden",
    "fvqa_train_2594": "Kiyomizu-dera",
    "fvqa_train_3835": "Binondo Church",
    "fvqa_train_3825": "Pomeranian Philharmonic",
    "fvqa_train_3112": "Auditorio de Tenerife",
}
_NUMBER = re.compile(r"(?<![\w.,-])[0-9]{2,4}(?![\w.,-])")


class RecordedWeb:
    """Searches, pages, pictures and models on one server.

    Args:
      shared: Folder of the real data.
      delay: Seconds that each response takes.

    Attributes:
      requests: Number of times that each request was sent, by its digest.
      answered: Digests of the answered requests, in the order of the answers.
      by_service: Number of requests by service.
      on_request: Function called before each response.
    """

    def __init__(self, shared: pathlib.Path, delay: float = 0.0):
        self.pages = read_jsonl(shared / "data" / "web_pages.jsonl")
        rows = QuestionSource(str(shared / "data" / "fvqa_mini.parquet"))
        self.pictures = {row.id: row.images[0] for row in rows if row.id in CONCEPTS}
        self.delay, self.url = delay, ""
        self.requests: collections.Counter[str] = collections.Counter()
        self.by_service: collections.Counter[str] = collections.Counter()
        self.answered: list[str] = []
        self.on_request: Callable[[], None] = lambda: None
        self.models = ModelServer(None, fault_rate=0.1, reply=self._reply)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/search", self._counted("searxng", self._search)),
                Route("/page/{number}", self._counted("reader", self._page)),
                Route("/picture/{name}", self._counted("thumbnails", self._picture)),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    def _counted(self, service: str, respond: Callable) -> Callable:
        async def counted(request):
            body = await request.body() or str(request.url).encode()
            digest = hashlib.blake2b(body, digest_size=16).hexdigest()
            self.requests[digest] += 1
            self.by_service[service] += 1
            self.on_request()
            await asyncio.sleep(self.delay)
            response = await respond(request)
            self.answered.append(digest)
            return response

        return counted

    async def _chat(self, request) -> Response:
        service = json.loads(await request.body())["model"]
        return await self._counted(service, self.models.chat)(request)

    async def _search(self, request) -> Response:
        query = request.query_params["q"].casefold()
        if request.query_params.get("categories") == "images":
            names = [name for name, concept in CONCEPTS.items() if concept.casefold() == query]
            results = [
                {"url": f"https://commons.example/{name}", "license": "CC BY-SA 4.0",
                 "title": f"File:{request.query_params['q']}.jpg",
                 "img_src": f"{self.url}/picture/{name}"}
                for name in ("none", *names)
            ]  # fmt: skip
        else:
            results = [
                {"url": f"{self.url}/page/{number}", "title": page["title"],
                 "content": page["snippet"]}
                for number, page in enumerate(self.pages)
                if query in f"{page['title']} {page['snippet']} {page['summary']}".casefold()
            ]  # fmt: skip
        return JSONResponse({"results": results})

    async def _page(self, request) -> Response:
        page = self.pages[int(request.path_params["number"])]
        texts = [page["title"], page["snippet"] or "", *(page["summary"] or "").splitlines()]
        body = "".join(f"<p>{html.escape(text)}</p>" for text in texts)
        return HTMLResponse(f"<html><body><article>{body}</article></body></html>")

    async def _picture(self, request) -> Response:
        data = self.pictures.get(request.path_params["name"])
        if data is None:
            return Response("no such picture", status_code=404)
        return Response(data, media_type="image/jpeg")

    def _reply(self, prompt: str, texts: dict[str, str], image: bytes | None):
        """Return the right reply: the first number of the page is the answer of its question."""
        if prompt == "write":
            lines = [line for line in texts["Page"].splitlines() if _NUMBER.search(line)]
            if not lines:
                return {"questions": []}
            answer = _NUMBER.search(lines[0])[0]
            return {"questions": [{"question": "Which number is first reported about this?",
                                   "answer": answer, "evidence": lines[0]}]}  # fmt: skip
        if prompt == "answerable":
            return {"answer": _NUMBER.search(texts["Page"])[0]}
        fixed = {
            "title": {"answer": ""}, "blind": {"answer": ""}, "shown": {"shown": True},
            "sound": {"unambiguous": True, "changes": False}, "aliases": {"aliases": []},
            "same": {"same": []}, "category": {"category": "geography"},
        }  # fmt: skip
        return fixed[prompt]


def in_flight(web: RecordedWeb, count: int) -> set[str]:
    """Return the digests of the unanswered requests, and of those answered last.

    Args:
      web: The web.
      count: Number of answers that the client may not have written to disk yet.
    """
    return (web.requests.keys() - set(web.answered)) | set(web.answered[-count:])


def write_concepts(path: pathlib.Path) -> pathlib.Path:
    """Write a file of the concepts with counts; one more has no page and no picture."""
    names = [*CONCEPTS.values(), "Hershey of Nowhere"]
    path.write_text("".join(f"{name}\t{10**i}\n" for i, name in enumerate(names)))
    return path
