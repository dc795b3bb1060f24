"""Both searches with all their services on one server, through a cache, for tests."""

import io

import PIL.Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmsr1_jax.tools import Query
from mmsr1_jax.tools.cached_tool import (
    CachedCalls,
    CachedFinder,
    CachedImages,
    CachedReader,
    CachedSummariser,
)
from mmsr1_jax.tools.image_search import ImageFetcher, ImageSearch, ImageUploader
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services.reader import Reader
from mmsr1_jax.tools.services.serper import Serper
from mmsr1_jax.tools.services.summariser import Summariser
from mmsr1_jax.tools.text_search import TextSearch
from mmsr1_jax.tools.web import WebClient
from tests.servers import RecordingBackend

REQUESTS: list[str] = []  # paths
UPLOADS: dict[str, bytes] = {}  # files by name
PAGE = "<html><body><article><p>{}</p></article></body></html>"


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (40 + seed, 40), (seed * 20 % 256, 100, 50)).save(file, "jpeg")
    return file.getvalue()


def app():
    async def search(request):
        base = str(request.base_url)
        links = [{"link": f"{base}page/{i}", "title": f"t{i}"} for i in range(8)]
        return JSONResponse({"organic": links})

    async def lens(request):
        base, body = str(request.base_url), await request.json()
        assert body["url"].removeprefix(f"{base}public/") in UPLOADS
        matches = [{"link": f"http://l/{i}", "title": f"title {i}",
                  "thumbnailUrl": f"{base}picture/{i}"} for i in range(8)]  # fmt: skip
        return JSONResponse({"organic": matches})

    async def put(request):
        assert request.method == "PUT"
        UPLOADS[request.path_params["name"]] = await request.body()
        return Response()

    async def page(request):
        index = request.path_params["number"]
        if index in (1, 3):
            return Response(status_code=403)
        return Response(PAGE.format(f"The text of page {index}. " * 20), media_type="text/html")

    async def image(request):
        index = request.path_params["number"]
        if index == 0:
            return Response(b"no picture", media_type="image/jpeg")
        return Response(jpeg(index), media_type="image/jpeg")

    async def chat(request):
        body = await request.json()
        text = body["messages"][1]["content"].split("The text of page ")[1][:1]
        return JSONResponse({"choices": [{"message": {"content": f"It is page {text}."}}]})

    routes = [
        Route("/serper/search", search, methods=["POST"]),
        Route("/serper/lens", lens, methods=["POST"]),
        Route("/page/{number:int}", page),
        Route("/picture/{number:int}", image),
        Route("/put/{name}", put, methods=["PUT"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]

    async def counting_app(scope, receive, send):
        REQUESTS.append(scope["path"])
        await inner(scope, receive, send)

    inner = Starlette(routes=routes)
    return counting_app


def tools(address, cache):
    """Return text search, image search, and the backend that records their connections."""
    backend = RecordingBackend()
    web = WebClient(allowed_hosts=[address.removeprefix("http://")], timeout=2.0, backend=backend)
    service, cached_calls = Service("test", web, max_attempts=1), CachedCalls(cache)
    serper = Serper(service, base_url=f"{address}/serper")
    reader = CachedReader(Reader(service), cached_calls, "reader")
    summariser = CachedSummariser(
        Summariser(service, base_url=address, model="m"), cached_calls, "m"
    )
    text = TextSearch(
        CachedFinder(serper, cached_calls, "serper"), reader, summariser, max_results=3
    )
    uploader = ImageUploader(
        service, cached_calls, upload_url=f"{address}/put/", public_url=f"{address}/public/"
    )
    images = CachedImages(ImageFetcher(service), cached_calls)
    image = ImageSearch(serper, uploader, images, cached_calls, "serper", max_results=3)
    return text, image, backend


async def ask_both(text, image):
    question = "What is it?"
    return [
        await text(Query(action="text_search", text="q", question=question)),
        await image(Query(action="image_search", text=None, question=question, images=[jpeg(9)])),
    ]
