"""Settings to tools: every combination that can be made is, and what is missing is named."""

import asyncio
import io
import json
import os
import pickle

import PIL.Image
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmsr1_jax.config import choices, settings
from mmsr1_jax.tools import Query
from mmsr1_jax.tools.build import ToolsError, make_tools
from mmsr1_jax.tools.services import KeyMissingError, fvqa
from tests.servers import serve


def configured(*, services=None, **tools):
    return settings.validate(
        settings.Config(
            tools=settings.Tools(**tools), services=settings.Services(**(services or {}))
        )
    )


def ask(tools, action="text_search", **query):
    given = {"text": "q" if action == "text_search" else None, "question": "What?"} | query
    return asyncio.run(tools[action](Query(action=action, **given)))


@pytest.fixture
def keys(monkeypatch):
    for name in ("SERPAPI_API_KEY", "SERPER_API_KEY"):
        monkeypatch.setenv(name, "k")


def test_every_choice_can_be_made(keys, tmp_path):
    (tmp_path / "pages.jsonl").write_text('{"title": "q"}')
    (tmp_path / "cache.json").write_text("{}")
    services = {"upload_url": "http://p/", "public_url": "http://q/", "summariser_url": "http://s",
                "fvqa_cache": str(tmp_path / "cache.json"),
                "cache": str(tmp_path / "store.sqlite")}  # fmt: skip
    for text in choices.TEXT_SEARCHES:
        for image in choices.IMAGE_SEARCHES:
            for reader in choices.READERS:
                config = configured(text=text, image=image, index=str(tmp_path),
                                    services=services | {"reader": reader})  # fmt: skip
                expected = {f"{name}_search" for name, choice in (("text", text), ("image", image))
                            if choice != "none"}  # fmt: skip
                assert set(make_tools(config)) == expected
    assert make_tools(configured()) == {}


@pytest.mark.parametrize(
    "tools, message",
    [
        ({"text": "local"}, "config.tools.index is not set"),
        ({"image": "fvqa"}, "config.services.fvqa_cache is not set"),
        ({"image": "serper"}, "config.services.upload_url is not set"),
    ],
)
def test_what_is_missing_is_named(keys, tools, message):
    with pytest.raises(ToolsError, match=message):
        make_tools(configured(**tools))


def test_a_key_is_needed(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(KeyMissingError, match="SERPER_API_KEY"):
        make_tools(configured(text="serper"))


def test_settings_that_cannot_be():
    with pytest.raises(settings.ConfigError, match="config.tools.text='bing' is not one of"):
        configured(text="bing")
    with pytest.raises(settings.ConfigError, match="config.services.max_qps=0.0 must be over 0"):
        configured(services={"max_qps": 0.0})


def jpeg(colour) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (40, 40), colour).save(file, "jpeg")
    return file.getvalue()


@pytest.fixture(scope="module")
def address():
    async def search(request):
        found = [{"url": "http://10.0.0.1/private", "title": "t", "content": "c"},
                 {"url": f"{request.base_url}page", "title": "t", "content": "c"}]  # fmt: skip
        return JSONResponse({"results": found})

    async def page(request):
        return Response("The text of the page.", media_type="text/plain")

    async def picture(request):
        return Response(jpeg("red"), media_type="image/jpeg")

    async def retrieve(request):
        return JSONResponse({"result": [[{"document": {"contents": "Title\nText."}}]]})

    routes = [Route("/search", search), Route("/page", page), Route("/picture", picture),
              Route("/retrieve", retrieve, methods=["POST"])]  # fmt: skip
    with serve(Starlette(routes=routes)) as address:
        yield address


def test_text_searches_as_they_are_set(address):
    own = {"searxng_url": address, "retrieval_url": address, "max_attempts": 1,
           "allowed_hosts": (address.removeprefix("http://"),)}  # fmt: skip
    found = ask(make_tools(configured(text="searxng", services=own)))
    assert [r[0].text for r in found.results] == [
        f"link: {address}/page\nsummary: The text of the page."
    ]
    assert found.error == "page 1: an address that is not public"
    found = ask(make_tools(configured(text="searxng", services=own | {"reader": "none"})))
    assert [r[0].text.split("\n")[1] for r in found.results] == ["summary: c"] * 2
    found = ask(make_tools(configured(text="retrieval", services=own)))
    assert found.results == [(found.results[0][0],)]
    assert found.results[0][0].text == "link: Title\nsummary: Text."
    private = {k: v for k, v in own.items() if k != "allowed_hosts"}
    found = ask(make_tools(configured(text="searxng", services=private)))
    assert found.status == "failed" and "not public" in found.error


def cached(path, address, example):
    services = {"fvqa_cache": str(path), "allowed_hosts": (address.removeprefix("http://"),)}
    return ask(make_tools(configured(image="fvqa", services=services)), "image_search",
               example=example)  # fmt: skip


def titles(observation):
    return [result[2].text for result in observation.results]


def test_the_published_cache(address, tmp_path):
    """The released pickle: addresses, or pictures inside it."""
    red, palette = PIL.Image.new("RGB", (30, 20), "red"), PIL.Image.new("P", (8, 8))
    palette.putpalette([0, 0, 255] * 256)
    data = {
        "a": {"tool_returned_web_title_list": ["one", "two", "three"],
              "tool_returned_images_urls": [f"{address}/picture", f"{address}/none", red]},
        "b": {"tool_returned_web_title_list": [], "tool_returned_images_urls": []},
        "c": {"tool_returned_web_title_list": ["blue"], "tool_returned_images_urls": [palette]},
        "d": "rubbish",
    }  # fmt: skip
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(data, protocol))
        found = cached(path, address, "a")
        assert titles(found) == ["\ntitle: one", "\ntitle: three"]
        assert found.results[0][1].image == jpeg("red")
        assert found.results[1][1].image.getpixel((0, 0)) == (255, 0, 0)
        assert found.error == "2: HTTP status 404"
        blue = cached(path, address, "c").results[0][1].image
        assert blue.size == (8, 8) and blue.getpixel((3, 3)) == (0, 0, 255)
        assert cached(path, address, "b").status == cached(path, address, "d").status == "empty"
        missing = cached(path, address, "e")
        assert missing.status == "failed" and missing.error == "'e' is not in the cache"


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_the_cache_is_not_run(tmp_path):
    path, marker = tmp_path / "cache.pkl", tmp_path / "it_ran"
    path.write_bytes(pickle.dumps({"a": Evil(marker), "b": {"tool_returned_web_title_list": ["t"],
                     "tool_returned_images_urls": [Evil(marker)]}}))  # fmt: skip
    assert fvqa.read(path) == {"a": [], "b": []} and not marker.exists()
    for content in (b"rubbish", b"", pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(fvqa.CacheError, match="cache.pkl: "):
            fvqa.read(path)


def test_the_recorded_results(shared):
    known = fvqa.read(shared / "data" / "image_search_results.json")
    raw = json.loads((shared / "data" / "image_search_results.json").read_text("utf-8"))
    assert {k: [t for t, _ in v] for k, v in known.items()} == {
        k: [e["title"] for e in v] for k, v in raw.items()
    }


def test_limits_of_single_services_and_of_several_loops():
    config = configured(text="searxng", services={"limits": ("searxng=8/4", "reader=100/50")})
    for loops, expected in ((1, (8.0, 4)), (3, (8 / 3, 2))):
        search = make_tools(config, loops=loops)["text_search"]
        service = search._tool._finder._finder._service
        assert (service._per_second, service._at_once) == expected
        reader = search._tool._reader._reader._service
        assert reader._at_once == -(-50 // loops) and reader._attempts == 1
    for wrong in ("searxng", "google=1/1", "reader=0/5", "reader=x/5"):
        with pytest.raises(ToolsError, match="services.limits: "):
            make_tools(configured(text="searxng", services={"limits": (wrong,)}))


def test_pages_may_not_reach_ones_own_services():
    """Only what `allowed_hosts` names is open to pages; services are where the settings say."""
    with serve(Starlette(routes=[Route("/{rest:path}", lambda r: JSONResponse({
        "results": [{"url": f"{r.base_url}page", "title": "t", "content": "s"}]
    }))])) as address:  # fmt: skip
        config = configured(text="searxng", services={"searxng_url": address})
        found = ask(make_tools(config))
        assert found.status == "failed" and "an address that is not public" in found.error
