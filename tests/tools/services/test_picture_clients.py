"""Picture searches by words of the services, against a server that implements their APIs."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from mmsr1_jax.tools.services import FREE_LICENCE, PictureHit
from mmsr1_jax.tools.services.searxng import SearXNG
from mmsr1_jax.tools.services.serpapi import SerpApi
from mmsr1_jax.tools.services.serper import Serper
from mmsr1_jax.tools.web import WebError
from tests.servers import serve
from tests.tools.services.api_server import service

REQUESTS = []


async def respond(request):
    body = await request.body()
    REQUESTS.append({**request.query_params, **(json.loads(body) if body else {})})
    query = REQUESTS[-1]["q"]
    if query == "broken":
        return JSONResponse({"images": "none", "images_results": 3, "results": 3})
    if query == "nothing":
        return JSONResponse({"images": [], "images_results": [], "results": []})
    google = {"title": "A bridge", "link": "http://page", "imageUrl": "http://big",
              "thumbnailUrl": "http://small", "original": "http://big",
              "thumbnail": "http://small"}  # fmt: skip
    own = {"title": "A bridge", "url": "http://page", "img_src": "http://big",
           "thumbnail_src": "http://small", "license": "CC0"}  # fmt: skip
    unusable = [{"title": "no picture"}, {"imageUrl": "http://x", "img_src": 7}, "text"]
    return JSONResponse({
        "images": [google, *unusable], "images_results": [google, *unusable],
        "results": [own, *unusable],
    })  # fmt: skip


@pytest.fixture
def clients(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "key")
    monkeypatch.setenv("SERPAPI_API_KEY", "key")
    REQUESTS.clear()
    methods = ["GET", "POST"]
    app = Starlette(routes=[Route("/{path:path}", respond, methods=methods)])
    with serve(app) as address:
        client = service(address)
        yield {
            "serper": Serper(client, base_url=address),
            "serpapi": SerpApi(client, base_url=address),
            "searxng": SearXNG(client, base_url=address),
        }


@pytest.mark.parametrize(
    "name, free, licence, sent",
    [
        ("serper", False, "", {}),
        ("serper", True, FREE_LICENCE, {"tbs": "il:cl"}),
        ("serpapi", False, "", {"engine": "google_images"}),
        ("serpapi", True, FREE_LICENCE, {"engine": "google_images", "licenses": "cl"}),
        ("searxng", True, "CC0", {"categories": "images", "format": "json"}),
    ],
)
def test_usable_pictures_are_returned_with_their_licence(clients, name, free, licence, sent):
    hits = asyncio.run(clients[name].pictures("bridge", 5, free=free))
    assert hits == [PictureHit("http://page", "A bridge", "http://big", "http://small", licence)]
    assert sent.items() <= REQUESTS[0].items() and REQUESTS[0]["q"] == "bridge"
    assert free or not {"tbs", "licenses"} & REQUESTS[0].keys()
    assert asyncio.run(clients[name].pictures("bridge", 0, free=free)) == []


@pytest.mark.parametrize("name", ["serper", "serpapi", "searxng"])
def test_nothing_found_differs_from_a_broken_response(clients, name):
    assert asyncio.run(clients[name].pictures("nothing", 5, free=False)) == []
    with pytest.raises(WebError):
        asyncio.run(clients[name].pictures("broken", 5, free=False))
