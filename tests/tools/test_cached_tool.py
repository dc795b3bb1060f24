"""A recorded search is the same again with the servers gone, and asks nobody."""

import asyncio
import io

import PIL.Image
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmsr1_jax.processing.image_files import public_jpeg
from mmsr1_jax.tools import Observation, Query
from mmsr1_jax.tools.cached_tool import (
    CachedCalls,
    CachedFinder,
    CachedImages,
    CachedReader,
    CachedSearch,
    CachedSummariser,
)
from mmsr1_jax.tools.image_search import ImageFetcher, ImageSearch, ImageUploader
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services.reader import Reader
from mmsr1_jax.tools.services.serper import Serper
from mmsr1_jax.tools.services.summariser import Summariser
from mmsr1_jax.tools.text_search import TextSearch
from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from mmsr1_jax.tools.web import WebClient
from tests.servers import RecordingBackend, serve

ASKED: list[str] = []
PUBLISHED: dict[str, bytes] = {}
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
        assert body["url"].removeprefix(f"{base}public/") in PUBLISHED
        found = [{"link": f"http://l/{i}", "title": f"title {i}",
                  "thumbnailUrl": f"{base}picture/{i}"} for i in range(8)]  # fmt: skip
        return JSONResponse({"organic": found})

    async def put(request):
        assert request.method == "PUT"
        PUBLISHED[request.path_params["name"]] = await request.body()
        return Response()

    async def page(request):
        number = request.path_params["number"]
        if number in (1, 3):
            return Response(status_code=403)
        return Response(PAGE.format(f"The text of page {number}. " * 20), media_type="text/html")

    async def picture(request):
        number = request.path_params["number"]
        if number == 0:
            return Response(b"no picture", media_type="image/jpeg")
        return Response(jpeg(number), media_type="image/jpeg")

    async def chat(request):
        body = await request.json()
        text = body["messages"][1]["content"].split("The text of page ")[1][:1]
        return JSONResponse({"choices": [{"message": {"content": f"It is page {text}."}}]})

    routes = [
        Route("/serper/search", search, methods=["POST"]),
        Route("/serper/lens", lens, methods=["POST"]),
        Route("/page/{number:int}", page),
        Route("/picture/{number:int}", picture),
        Route("/put/{name}", put, methods=["PUT"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]

    async def counted(scope, receive, send):
        ASKED.append(scope["path"])
        await inner(scope, receive, send)

    inner = Starlette(routes=routes)
    return counted


def tools(address, store):
    """Both searches over one service, through a store; and where connections were made to."""
    backend = RecordingBackend()
    web = WebClient(allowed_hosts=[address.removeprefix("http://")], timeout=2.0, backend=backend)
    service, stored = Service("test", web, max_attempts=1), CachedCalls(store)
    serper = Serper(service, base_url=f"{address}/serper")
    reader = CachedReader(Reader(service), stored, "reader")
    summariser = CachedSummariser(Summariser(service, base_url=address, model="m"), stored, "m")
    text = TextSearch(CachedFinder(serper, stored, "serper"), reader, summariser, max_results=3)
    publisher = ImageUploader(
        service, stored, upload_url=f"{address}/put/", public_url=f"{address}/public/"
    )
    pictures = CachedImages(ImageFetcher(service), stored)
    return text, ImageSearch(serper, publisher, pictures, stored, "serper", max_results=3), backend


async def ask_both(text, image):
    question = "What is it?"
    return [
        await text(Query(action="text_search", text="q", question=question)),
        await image(Query(action="image_search", text=None, question=question, images=[jpeg(9)])),
    ]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "sk-very-secret")
    ASKED.clear()
    PUBLISHED.clear()


def test_recorded_searches_are_replayed_without_connections(tmp_path):
    path = tmp_path / "store.sqlite"
    with serve(app()) as address:
        recorded = asyncio.run(ask_both(*tools(address, ToolCache(path, "record"))[:2]))
        first = len(ASKED)
        asyncio.run(ask_both(*tools(address, ToolCache(path, "record"))[:2]))
        assert len(ASKED) == 2 * first  # a record asks for everything anew
        used = asyncio.run(ask_both(*tools(address, ToolCache(path, "use"))[:2]))
        # What failed is worth another try, the rest is not asked again.
        assert sorted(ASKED[2 * first :]) == ["/page/1", "/page/3"]
    text, image = recorded
    assert [r[0].text for r in text.results] == [
        f"link: {address}/page/{i}\nsummary: It is page {i}." for i in (0, 2, 4)
    ]
    assert text.error == "page 2: HTTP status 403; page 4: HTTP status 403"
    assert [r[2].text for r in image.results] == [f"\ntitle: title {i}" for i in (1, 2, 3)]
    assert image.error.startswith("1: 10 bytes: not an image")
    public, _ = asyncio.run(public_jpeg(jpeg(9)))  # its pixels, and nothing else of the file
    assert PUBLISHED and set(PUBLISHED.values()) == {public}
    *both, backend = tools(address, ToolCache(path, "replay"))
    assert asyncio.run(ask_both(*both)) == recorded == used
    assert backend.connections == []  # not one connection
    other = Query(action="text_search", text="never asked", question="?")
    missing = asyncio.run(both[0](other))
    assert missing.status == "failed" and "not in the cache" in missing.error
    assert b"sk-very-secret" not in path.read_bytes()


def test_image_is_uploaded_once_across_runs(tmp_path):
    with serve(app()) as address:
        for _ in range(3):
            service = Service("t", WebClient(allowed_hosts=[address.removeprefix("http://")]))
            stored = CachedCalls(ToolCache(tmp_path / "store.sqlite"))
            urls = {"upload_url": f"{address}/put/", "public_url": f"{address}/public/"}
            publish = ImageUploader(service, stored, **urls)
            assert asyncio.run(publish(jpeg(1))) == asyncio.run(publish(jpeg(1)))
        assert len(ASKED) == 1 and list(PUBLISHED.values()) == [jpeg(1)]


def test_complete_searches_are_cached_beside_their_parts(tmp_path):
    """One look into the store; where that has nothing, what it has of the parts."""
    path = tmp_path / "store.sqlite"
    query = Query(action="text_search", text="q", question="What is it?")
    with serve(app()) as address:

        def search(mode, name="as a whole"):
            store = ToolCache(path, mode)
            text, _, backend = tools(address, store)
            tool = CachedSearch(text, CachedCalls(store), name)
            return asyncio.run(tool(query)), len(backend.connections)

        search("use")  # not whole: two pages failed
        asked = len(ASKED)
        search("use")
        assert len(ASKED) > asked  # they are tried again
        ASKED.clear()
        recorded, _ = search("record")
        asked = len(ASKED)
        assert search("use") == (recorded, 0) and len(ASKED) == asked
        search("record")
        assert len(ASKED) == 2 * asked
    assert recorded.status == "ok" and recorded.error.startswith("page 2: HTTP status 403")
    assert search("replay") == (recorded, 0)
    assert search("replay", "other settings") == (recorded, 0)  # from the parts

    class Down:
        async def __call__(self, query):
            return Observation(status="failed", error="all is lost")

    store = ToolCache(path)
    tool = CachedSearch(Down(), CachedCalls(store), "down")
    assert asyncio.run(tool(query)).error == "all is lost"
    replayed = CachedSearch(Down(), CachedCalls(ToolCache(path, "replay")), "down")
    assert asyncio.run(replayed(query)) == Observation(status="failed", error="all is lost")
    assert dict((k, n) for k, n, _ in store.info())["search"] == 2


def test_searches_continue_when_the_cache_fails(tmp_path, capsys):
    class Full(ToolCache):
        def put(self, *arguments, **keywords):
            raise ToolCacheError("disk full")

    with serve(app()) as address:
        text, image, _ = tools(address, Full(tmp_path / "store.sqlite"))
        found = asyncio.run(ask_both(text, image))
    assert [observation.status for observation in found] == ["ok", "ok"]
    assert capsys.readouterr().err.count("disk full; searches continue without it") == 1
