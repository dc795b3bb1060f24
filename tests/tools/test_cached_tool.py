"""Recorded searches are replayed without connections, and failures are retried otherwise."""

import asyncio
import contextlib

import pytest

from mmsr1_jax.processing.image_files import public_jpeg
from mmsr1_jax.tools import Observation, Query
from mmsr1_jax.tools.cached_tool import CachedCalls, CachedSearch
from mmsr1_jax.tools.image_search import ImageUploader
from mmsr1_jax.tools.service import Service, ServiceDownError
from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from mmsr1_jax.tools.web import StatusError, WebClient, WebError
from tests.servers import serve
from tests.tools.cached_searches import REQUESTS, UPLOADS, app, ask_both, jpeg, tools


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "sk-very-secret")
    REQUESTS.clear()
    UPLOADS.clear()


def test_recorded_searches_are_replayed_without_connections(tmp_path):
    path = tmp_path / "cache.sqlite"
    with serve(app()) as address:
        recorded = asyncio.run(ask_both(*tools(address, ToolCache(path, "record"))[:2]))
        num_requests = len(REQUESTS)
        asyncio.run(ask_both(*tools(address, ToolCache(path, "record"))[:2]))
        assert len(REQUESTS) == 2 * num_requests  # mode `record` requests everything again
        cached = asyncio.run(ask_both(*tools(address, ToolCache(path, "use"))[:2]))
        # Only the failures are requested again.
        assert sorted(REQUESTS[2 * num_requests :]) == ["/page/1", "/page/3"]
    text, image = recorded
    assert [r[0].text for r in text.results] == [
        f"link: {address}/page/{i}\nsummary: It is page {i}." for i in (0, 2, 4)
    ]
    assert text.error == "page 2: HTTP status 403; page 4: HTTP status 403"
    assert [r[2].text for r in image.results] == [f"\ntitle: title {i}" for i in (1, 2, 3)]
    assert image.error.startswith("1: 10 bytes: not an image")
    public, _ = asyncio.run(public_jpeg(jpeg(9)))  # the pixels of the file only
    assert UPLOADS and set(UPLOADS.values()) == {public}
    *searches, backend = tools(address, ToolCache(path, "replay"))
    assert asyncio.run(ask_both(*searches)) == recorded == cached
    assert backend.connections == []
    query = Query(action="text_search", text="never asked", question="?")
    observation = asyncio.run(searches[0](query))
    assert observation.status == "failed" and "not in the cache" in observation.error
    assert b"sk-very-secret" not in path.read_bytes()


def test_image_is_uploaded_once_across_runs(tmp_path):
    with serve(app()) as address:
        for _ in range(3):
            service = Service("t", WebClient(allowed_hosts=[address.removeprefix("http://")]))
            cached_calls = CachedCalls(ToolCache(tmp_path / "cache.sqlite"))
            urls = {"upload_url": f"{address}/put/", "public_url": f"{address}/public/"}
            upload = ImageUploader(service, cached_calls, **urls)
            assert asyncio.run(upload(jpeg(1))) == asyncio.run(upload(jpeg(1)))
        assert len(REQUESTS) == 1 and list(UPLOADS.values()) == [jpeg(1)]


def test_complete_searches_are_cached_beside_their_parts(tmp_path):
    """If a complete search is not cached, the cached parts are used."""
    path = tmp_path / "cache.sqlite"
    query = Query(action="text_search", text="q", question="What is it?")
    with serve(app()) as address:

        def search(mode, name="complete"):
            cache = ToolCache(path, mode)
            text, _, backend = tools(address, cache)
            tool = CachedSearch(text, CachedCalls(cache), name)
            return asyncio.run(tool(query)), len(backend.connections)

        search("use")  # incomplete: two pages failed
        num_requests = len(REQUESTS)
        search("use")
        assert len(REQUESTS) > num_requests  # they are requested again
        REQUESTS.clear()
        recorded, _ = search("record")
        num_requests = len(REQUESTS)
        assert search("use") == (recorded, 0) and len(REQUESTS) == num_requests
        search("record")
        assert len(REQUESTS) == 2 * num_requests
    assert recorded.status == "ok" and recorded.error.startswith("page 2: HTTP status 403")
    assert search("replay") == (recorded, 0)
    assert search("replay", "other settings") == (recorded, 0)  # from the cached parts

    class FailingSearch:
        async def __call__(self, query):
            return Observation(status="failed", error="down")

    cache = ToolCache(path)
    tool = CachedSearch(FailingSearch(), CachedCalls(cache), "down")
    assert asyncio.run(tool(query)).error == "down"
    replayed = CachedSearch(FailingSearch(), CachedCalls(ToolCache(path, "replay")), "down")
    assert asyncio.run(replayed(query)) == Observation(status="failed", error="down")
    assert dict((k, n) for k, n, _ in cache.info())["search"] == 2


def test_searches_continue_when_the_cache_fails(tmp_path, capsys):
    class FullCache(ToolCache):
        def put(self, *arguments, **keywords):
            raise ToolCacheError("disk full")

    with serve(app()) as address:
        text, image, _ = tools(address, FullCache(tmp_path / "cache.sqlite"))
        observations = asyncio.run(ask_both(text, image))
    assert [observation.status for observation in observations] == ["ok", "ok"]
    assert capsys.readouterr().err.count("disk full; searches continue without it") == 1


class Flaky:
    """Calls that fail with the next of several errors, and then succeed."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    async def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "value"


@pytest.mark.parametrize(
    "kind, error, is_repeated",
    [
        ("chat", StatusError(400), False),
        ("chat", StatusError(503), True),
        ("chat", ServiceDownError("down"), True),
        ("page", StatusError(503), False),  # of some host, in place of which the next page is read
        ("page", ServiceDownError("down"), True),  # of a reader behind an API
    ],
)
def test_a_resumed_batch_repeats_only_what_may_succeed(tmp_path, kind, error, is_repeated):
    path, call = tmp_path / "cache.sqlite", Flaky(error)
    for _ in range(2):
        calls = CachedCalls(ToolCache(path, "resume", ttl_days=0))
        with contextlib.suppress(WebError):
            asyncio.run(calls.get(kind, "key", call))
    assert call.calls == 1 + is_repeated
    calls = CachedCalls(ToolCache(path, "resume", ttl_days=0))
    if is_repeated:
        assert asyncio.run(calls.get(kind, "key", call)) == "value"  # however old it is
        assert call.calls == 2
    else:
        with pytest.raises(WebError, match="HTTP status"):
            asyncio.run(calls.get(kind, "key", call))
    assert asyncio.run(CachedCalls(ToolCache(path, "use")).get(kind, "key", call)) == "value"


def test_a_search_that_failed_is_repeated_when_resumed(tmp_path):
    searches = []

    async def tool(query):
        searches.append(query.text)
        return Observation(status="failed", error="search: down")

    query = Query(action="text_search", text="a", question="?")
    for mode, expected in (("resume", 1), ("resume", 2), ("record", 3), ("replay", 3)):
        calls = CachedCalls(ToolCache(tmp_path / "cache.sqlite", mode))
        observation = asyncio.run(CachedSearch(tool, calls, "x")(query))
        assert observation.status == "failed" and len(searches) == expected
