"""Tools built from settings: every valid combination works, and missing settings are named."""

import io
import json
import os
import pickle

import PIL.Image
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmsr1_jax.config import settings
from mmsr1_jax.tools.build import ToolsError, make_tools
from mmsr1_jax.tools.services import KeyMissingError, fvqa
from tests.servers import serve
from tests.tools.configured_tools import ask, configured


@pytest.fixture
def keys(monkeypatch):
    for name in ("SERPAPI_API_KEY", "SERPER_API_KEY"):
        monkeypatch.setenv(name, "k")


def test_every_combination_of_settings_can_be_built(keys, tmp_path):
    (tmp_path / "pages.jsonl").write_text('{"title": "q"}')
    (tmp_path / "cache.json").write_text("{}")
    services = {"upload_url": "http://p/", "public_url": "http://q/", "summariser_url": "http://s",
                "fvqa_cache": str(tmp_path / "cache.json"),
                "cache": str(tmp_path / "cache.sqlite")}  # fmt: skip
    for text in settings.TEXT_SEARCHES:
        for image in settings.IMAGE_SEARCHES:
            for reader in settings.READERS:
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
def test_missing_setting_is_reported(keys, tools, message):
    with pytest.raises(ToolsError, match=message):
        make_tools(configured(**tools))


def test_missing_api_key_is_reported(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(KeyMissingError, match="SERPER_API_KEY"):
        make_tools(configured(text="serper"))


def test_invalid_settings_are_rejected():
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
        observation = [{"url": "http://10.0.0.1/private", "title": "t", "content": "c"},
                 {"url": f"{request.base_url}page", "title": "t", "content": "c"}]  # fmt: skip
        return JSONResponse({"results": observation})

    async def page(request):
        return Response("The text of the page.", media_type="text/plain")

    async def image(request):
        return Response(jpeg("red"), media_type="image/jpeg")

    async def retrieve(request):
        return JSONResponse({"result": [[{"document": {"contents": "Title\nText."}}]]})

    routes = [Route("/search", search), Route("/page", page), Route("/picture", image),
              Route("/retrieve", retrieve, methods=["POST"])]  # fmt: skip
    with serve(Starlette(routes=routes)) as address:
        yield address


def test_text_search_follows_the_settings(address):
    services = {"searxng_url": address, "retrieval_url": address, "max_attempts": 1,
           "allowed_hosts": (address.removeprefix("http://"),)}  # fmt: skip
    observation = ask(make_tools(configured(text="searxng", services=services)))
    assert [r[0].text for r in observation.results] == [
        f"link: {address}/page\nsummary: The text of the page."
    ]
    assert observation.error == "page 1: the address is not public"
    observation = ask(
        make_tools(configured(text="searxng", services=services | {"reader": "none"}))
    )
    assert [r[0].text.split("\n")[1] for r in observation.results] == ["summary: c"] * 2
    observation = ask(make_tools(configured(text="retrieval", services=services)))
    assert observation.results == [(observation.results[0][0],)]
    assert observation.results[0][0].text == "link: Title\nsummary: Text."
    without_allowed_hosts = {k: v for k, v in services.items() if k != "allowed_hosts"}
    observation = ask(make_tools(configured(text="searxng", services=without_allowed_hosts)))
    assert observation.status == "failed" and "not public" in observation.error


def cached(path, address, example):
    services = {"fvqa_cache": str(path), "allowed_hosts": (address.removeprefix("http://"),)}
    return ask(make_tools(configured(image="fvqa", services=services)), "image_search",
               example=example)  # fmt: skip


def titles(observation):
    return [result[2].text for result in observation.results]


def test_released_fvqa_cache_is_read(address, tmp_path):
    """The released pickle contains URLs or images."""
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
        observation = cached(path, address, "a")
        assert titles(observation) == ["\ntitle: one", "\ntitle: three"]
        assert observation.results[0][1].image == jpeg("red")
        assert observation.results[1][1].image.getpixel((0, 0)) == (255, 0, 0)
        assert observation.error == "2: HTTP status 404"
        blue = cached(path, address, "c").results[0][1].image
        assert blue.size == (8, 8) and blue.getpixel((3, 3)) == (0, 0, 255)
        assert cached(path, address, "b").status == cached(path, address, "d").status == "empty"
        missing = cached(path, address, "e")
        assert missing.status == "failed" and missing.error == "no entry for example 'e'"


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_pickled_cache_is_not_run(tmp_path):
    path, marker = tmp_path / "cache.pkl", tmp_path / "it_ran"
    path.write_bytes(pickle.dumps({"a": Evil(marker), "b": {"tool_returned_web_title_list": ["t"],
                     "tool_returned_images_urls": [Evil(marker)]}}))  # fmt: skip
    assert fvqa.load_results(path) == {"a": [], "b": []} and not marker.exists()
    for content in (b"rubbish", b"", pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(fvqa.FvqaCacheError, match="cache.pkl: "):
            fvqa.load_results(path)


def test_recorded_image_results_are_read(shared):
    results = fvqa.load_results(shared / "data" / "image_search_results.json")
    raw = json.loads((shared / "data" / "image_search_results.json").read_text("utf-8"))
    assert {k: [t for t, _ in v] for k, v in results.items()} == {
        k: [e["title"] for e in v] for k, v in raw.items()
    }


def test_limits_of_single_services_are_divided_by_loops():
    config = configured(text="searxng", services={"limits": ("searxng=8/4", "reader=100/50")})
    for loops, expected in ((1, (8.0, 4)), (3, (8 / 3, 2))):
        search = make_tools(config, num_loops=loops)["text_search"]
        service = search._tool._finder._finder._service
        assert (service._max_qps, service._max_concurrency) == expected
        reader = search._tool._reader._reader._service
        assert reader._max_concurrency == -(-50 // loops) and reader._max_attempts == 1
    for invalid in ("searxng", "google=1/1", "reader=0/5", "reader=x/5"):
        with pytest.raises(ToolsError, match="services.limits: "):
            make_tools(configured(text="searxng", services={"limits": (invalid,)}))


def test_pages_cannot_be_fetched_from_configured_services():
    """Only `allowed_hosts` are open to pages, not the hosts of configured services."""
    with serve(Starlette(routes=[Route("/{rest:path}", lambda r: JSONResponse({
        "results": [{"url": f"{r.base_url}page", "title": "t", "content": "s"}]
    }))])) as address:  # fmt: skip
        config = configured(text="searxng", services={"searxng_url": address})
        observation = ask(make_tools(config))
        assert observation.status == "failed" and "the address is not public" in observation.error
