"""Searches while a service fails in any way: reported without secrets, replaced where possible."""

import pytest

from mmsr1_jax.tools import Query
from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.image_search import ImageFetcher, ImageSearch, ImageUploader
from mmsr1_jax.tools.services import Hit, Match
from mmsr1_jax.tools.services.jina import Jina
from mmsr1_jax.tools.services.reader import Reader
from mmsr1_jax.tools.services.retrieval import Retrieval
from mmsr1_jax.tools.services.searxng import SearXNG
from mmsr1_jax.tools.services.serpapi import SerpApi
from mmsr1_jax.tools.services.serper import Serper
from mmsr1_jax.tools.services.summariser import Summariser
from mmsr1_jax.tools.text_search import TextSearch
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import WebError
from tests.servers import serve
from tests.tools.services import api_server
from tests.tools.services.api_server import FAULTS, KEY, ask, jpeg, run, service


@pytest.fixture(scope="module")
def address():
    with serve(api_server.app()) as address:
        yield address


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    with api_server.checked_environment(monkeypatch):
        yield


KINDS = ["401", "403", "429", "500", "timeout", "truncated", "not an object", "wrong type",
          "50 MB", "gzip bomb", "metadata", "loopback"]  # fmt: skip
FINDERS = {
    "serpapi": lambda client, address: SerpApi(client, base_url=f"{address}/serpapi"),
    "serper": lambda client, address: Serper(client, base_url=f"{address}/serper"),
    "searxng": lambda client, address: SearXNG(client, base_url=f"{address}/searxng"),
}


@pytest.mark.parametrize("fault", KINDS)
@pytest.mark.parametrize("name", FINDERS)
def test_failed_search_is_reported_without_key_and_address(address, name, fault):
    FAULTS[name] = fault
    observation = ask(TextSearch(FINDERS[name](service(address), address)))
    assert observation.status == "failed" and observation.error.startswith("search: ")
    assert KEY not in observation.error and "127.0.0.1" not in observation.error


class Fixed:
    """Finder of given links, and reader that records the links that it reads."""

    def __init__(self, links, reader=None):
        self.links, self.reader, self.read_links = links, reader, []

    async def search(self, query, count):
        return [Hit(link, "t", "s") for link in self.links[:count]]

    async def read(self, url):
        self.read_links.append(url)
        return await self.reader.read(url)


@pytest.mark.parametrize("fault", [f for f in KINDS if f not in ("truncated", "not an object")])
@pytest.mark.parametrize("name", ["jina", "reader"])
def test_failed_page_reader_is_reported_without_key(address, name, fault):
    FAULTS[name] = fault
    client = service(address)
    reader = Reader(client) if name == "reader" else Jina(client, base_url=f"{address}/jina")
    finder = Fixed([f"{address}/reader/{i}" for i in range(3)])
    observation = ask(TextSearch(finder, reader))
    assert observation.status == "failed" and observation.error.startswith(
        "no page could be read: page 1: "
    )
    assert KEY not in observation.error


@pytest.mark.parametrize("fault", KINDS)
def test_failed_summariser_is_reported_without_key(address, fault):
    FAULTS["chat"] = fault
    client = service(address)
    short = Summariser(client, base_url=f"{address}/chat", model="m")
    finder = Fixed([f"{address}/reader/{i}" for i in range(3)])
    observation = ask(TextSearch(finder, Reader(client), short))
    assert observation.status == "failed" and KEY not in observation.error


class FixedLens:
    def __init__(self, thumbnails):
        self.matches = [Match("http://l", f"t{i}", url) for i, url in enumerate(thumbnails)]

    async def lens(self, url):
        return self.matches


def look_up(address, lens=None, thumbnails=("/thumbnail/0",)):
    client, nothing = service(address), CachedCalls(ToolCache(None, "off"))
    # The responses of `serper` and `serpapi` have a thumbnail at http://t, which cannot be fetched.
    search = ImageSearch(
        lens or FixedLens([address + path for path in thumbnails]),
        ImageUploader(client, nothing, upload_url=f"{address}/put/", public_url="http://image"),
        ImageFetcher(client, max_bytes=1_000_000),
        nothing,
        "test",
    )
    query = Query(action="image_search", text=None, question="What is it?", images=[jpeg()])
    return run(search(query))


class FixedUrlLens:
    """Image search of a service, with the image URL that the test server expects."""

    def __init__(self, inner):
        self.inner = inner

    async def lens(self, url):
        assert url.startswith("http://image")
        return await self.inner.lens("http://image")


@pytest.mark.parametrize("fault", KINDS)
@pytest.mark.parametrize("name", ["serpapi", "serper"])
def test_failed_image_search_is_reported_without_key_and_address(address, name, fault):
    working = look_up(address, FixedUrlLens(FINDERS[name](service(address), address)))
    assert working.error.startswith("no image could be fetched: 1: ")  # the matches were found
    FAULTS[name] = fault
    observation = look_up(address, FixedUrlLens(FINDERS[name](service(address), address)))
    assert observation.status == "failed" and observation.error.startswith("search: ")
    assert KEY not in observation.error and "127.0.0.1" not in observation.error


@pytest.mark.parametrize("fault", [f for f in KINDS if f not in ("truncated", "not an object")])
def test_failed_thumbnail_is_replaced_by_the_next_match(address, fault):
    paths = ["/thumbnail/0", "/other/1"]
    FAULTS["thumbnail"] = fault
    observation = look_up(address, thumbnails=paths)
    assert [result[2].text for result in observation.results] == ["\ntitle: t1"]
    assert observation.error.startswith("1: ")
    observation = look_up(address, thumbnails=paths[:1])
    assert observation.status == "failed" and observation.error.startswith(
        "no image could be fetched: 1: "
    )


@pytest.mark.parametrize("fault", ["401", "403", "429", "500", "timeout"])
def test_failed_upload_fails_the_search(address, fault):
    FAULTS["put"] = fault
    observation = look_up(address)
    assert observation.status == "failed" and observation.error.startswith("search: ")


@pytest.mark.parametrize("fault", KINDS)
def test_failed_retrieval_is_reported_without_address(address, fault):
    FAULTS["retrieval"] = fault
    with pytest.raises(WebError) as raised:
        run(Retrieval(service(address), base_url=f"{address}/retrieval").passages("q", 2))
    assert "127.0.0.1" not in str(raised.value)


def test_failed_page_is_replaced_by_the_next_hit(address):
    """Results have the order of the hits, and no more pages are read than needed."""
    good, private = f"{address}/reader/", "http://10.0.0.1/"
    links = [private, good + "1", f"{address}/nowhere", good + "3", good + "4", good + "5"]
    finder = Fixed(links, Reader(service(address)))
    observation = ask(TextSearch(finder, finder, max_results=3, num_spare=3))
    assert observation.status == "ok"
    assert [r[0].text.split("\n")[0] for r in observation.results] == [
        f"link: {links[i]}" for i in (1, 3, 4)
    ]
    assert sorted(finder.read_links) == sorted(links[:5])
    assert observation.error == "page 1: the address is not public; page 3: HTTP status 404"
