"""Build the configured search tools and check that their services respond."""

import asyncio
import functools
import re
import sys
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import PIL.Image

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.processing.image_files import public_jpeg
from mmsr1_jax.tools.addresses import parse_host
from mmsr1_jax.tools.cached_tool import (
    CachedCalls,
    CachedFinder,
    CachedImages,
    CachedReader,
    CachedSearch,
    CachedSummariser,
)
from mmsr1_jax.tools.image_search import ImageFetcher, ImageSearch, ImageUploader
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.local import Embed, LocalIndex
from mmsr1_jax.tools.redis_cache import RedisCache, open_cache
from mmsr1_jax.tools.service import Service, ServiceRefusedError, is_refusal
from mmsr1_jax.tools.services.fvqa import FvqaCache
from mmsr1_jax.tools.services.jina import Jina
from mmsr1_jax.tools.services.reader import Reader
from mmsr1_jax.tools.services.retrieval import Retrieval
from mmsr1_jax.tools.services.searxng import SearXNG
from mmsr1_jax.tools.services.serpapi import SerpApi
from mmsr1_jax.tools.services.serper import Serper
from mmsr1_jax.tools.services.summariser import Summariser
from mmsr1_jax.tools.text_search import PassageSearch, TextSearch
from mmsr1_jax.tools.tool import Tool
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import Web, WebError

SERVICES = (
    "serpapi", "serper", "searxng", "retrieval", "reader", "summariser", "judge", "thumbnails",
    "publisher",
)  # fmt: skip
# Fields of `config.services` and environment variables that configure each service.
_SETTINGS = {
    "serpapi": ("serpapi_url", "SERPAPI_API_KEY"),
    "serper": ("serper_url", "SERPER_API_KEY"),
    "searxng": ("searxng_url",),
    "retrieval": ("retrieval_url",),
    "reader": ("jina_url", "JINA_API_KEY"),
    "summariser": ("summariser_url", "summariser_model", "SUMMARISER_API_KEY"),
    "judge": ("judge_url", "judge_model", "JUDGE_API_KEY"),
    "publisher": ("upload_url", "PUBLISHER_AUTHORIZATION", "PUBLISHER_QUERY"),
}
_PUBLISHING = ("upload_url", "public_url")
_TEST_SECONDS = 60.0  # time limit of a service's test request, including retries
_JUDGE_PAUSE = 60.0  # seconds; longer than the pause of an open circuit breaker (`Service`)


class ToolsError(UserError):
    """Inconsistent tool settings; the message names the field."""


def make_tools(config: settings.Config, *, loops: int = 1) -> dict[str, Tool]:
    """Return the search tools by action, without those set to `none`.

    Args:
      config: Settings.
      loops: Number of asyncio loops that will use the tools, one per engine. Limits are enforced
        per loop, so each loop gets an equal share of them.

    Raises:
      ToolsError, LocalIndexError, KeyMissingError, CacheError, ToolCacheError: A tool cannot be
        built.
      ConfigError, CheckpointError, ImageError: The model in `tools.image_model` cannot be used.
    """
    tools, services = config.tools, config.services
    automatic = "none" if tools.index is None else "local"
    text = automatic if tools.text == "auto" else tools.text
    image = automatic if tools.image == "auto" else tools.image
    index = None
    if "local" in (text, image):
        path = _needed("tools.index", tools.index)
        embed = _embedder(config) if image == "local" else None
        index = LocalIndex(
            path, results=tools.max_results, chars=tools.max_result_chars, embed=embed
        )
    make = _Makers(tools, services, _store(services), loops)
    made: dict[str, Tool] = {}
    if text != "none":
        made["text_search"] = index.text_search if text == "local" else make.text(text)
    if image != "none":
        made["image_search"] = index.image_search if image == "local" else make.image(image)
    return made


def make_judge(config: settings.Config) -> Judge | None:
    """Return the answer judge, or None if answers are matched. Raises ToolCacheError."""
    services = config.services
    if services.judge_url is None:
        return None
    return _Makers(config.tools, services, _store(services), 1).judge()


def check_services(
    config: settings.Config, turns: Sequence[settings.Turns], *, judge: bool = True
) -> None:
    """Send one harmless test request to every service that a command will use.

    The requests are a search for `test`, the page example.com, a summary of one sentence, a verdict
    on one answer, and the upload of a small white image. Hosts of pages and images are not
    contacted, and in replay mode no service is. A transient failure is printed and does not stop
    the command.

    Args:
      config: Settings.
      turns: Turn limits of the episodes. Services of a search that all of them forbid are skipped.
      judge: Whether the command uses the judge.

    Raises:
      ServiceRefusedError: One or more services refuse requests (a 3xx or 4xx status other than 408,
        425 and 429) or are unreachable (connection refused, unknown host name, invalid
        certificate).
      ToolsError, KeyMissingError: See `make_tools`.
    """
    services = config.services
    if services.cache is not None and services.cache_mode == "replay":
        return
    searches = [
        any(min(one.max_searches, getattr(one, f"max_{kind}_searches")) > 0 for one in turns)
        for kind in ("text", "image")
    ]
    makers = _Makers(config.tools, services, ToolCache(None, "off"), 1, testing=True)
    refusals = asyncio.run(_refusals(makers.tests(*searches, judge)))
    if refusals:
        raise ServiceRefusedError("; ".join(refusals))


async def _refusals(tests: "Sequence[_Test]") -> list[str]:
    """Return one line per service that refuses its test, and print one per other failure."""

    async def one(service: Service, ask: Callable[[], Awaitable]) -> str | None:
        try:
            async with asyncio.timeout(_TEST_SECONDS):
                await ask()
        except TimeoutError:
            words = f"no answer within {_TEST_SECONDS:g} s"
        except WebError as error:
            if is_refusal(error, at_start=True):
                return service.refusal(error)
            words = str(error)
        else:
            return None
        print(f"warning: {service.name} failed its test: {words}; it is asked again when needed",
              file=sys.stderr)  # fmt: skip
        return None

    return [line for line in await asyncio.gather(*(one(*test) for test in tests)) if line]


_Test = tuple[Service, Callable[[], Awaitable]]


def _store(services: settings.Services) -> ToolCache | RedisCache:
    mode = "off" if services.cache is None else services.cache_mode
    return open_cache(
        services.cache, mode, days=services.cache_ttl_days, max_bytes=services.cache_max_bytes
    )


def _embedder(config: settings.Config) -> Embed | None:
    directory = config.tools.image_model
    if directory is None:
        return None
    from mmsr1_jax.tools.embedding import Embedder  # imported lazily: other tools need no model

    embed = Embedder(directory)
    if config.rollout.precompile:
        embed.warm_up()
    return embed


class _Makers:
    def __init__(
        self, tools: settings.Tools, services: settings.Services, store: ToolCache | RedisCache,
        loops: int, *, testing: bool = False,
    ):  # fmt: skip
        self._tools, self._services, self._loops = tools, services, loops
        self._testing = testing
        self._store, self._stored = store, CachedCalls(store)
        # Configured services may have private addresses; the URLs that they return may not.
        urls = (
            services.serpapi_url, services.serper_url, services.searxng_url, services.jina_url,
            services.retrieval_url, services.summariser_url, services.judge_url,
            services.upload_url,
        )  # fmt: skip
        own = [url for url in urls if url and _names_host(url)]
        self._own = Web(allowed_hosts=own, seconds=services.timeout)
        self._web = Web(allowed_hosts=services.allowed_hosts, seconds=services.timeout)
        self._limits = dict(map(_limit, services.limits))
        # A search returns the results that are ready by then, so that it does not time out itself.
        self._seconds = 0.75 * tools.timeout

    def _service(self, name: str) -> Service:
        """Return the client of a configured service, self-hosted or commercial."""
        # The judge has its own metrics, and test requests do not belong to a step.
        counted = not self._testing and name != "judge"
        return self._limited(name, self._own, attempts=self._services.max_attempts, counted=counted)

    def _hosts(self, name: str) -> Service:
        """Return a client for arbitrary hosts.

        It has no circuit breaker, since the failure of one host says nothing about the others, and
        no retries, since the next hit is tried instead.
        """
        return self._limited(name, self._web, attempts=1, failures=None, counted=False)

    def _limited(self, name: str, web: Web, **keywords) -> Service:
        per_second, at_once, turn = self._services.max_qps, self._services.max_concurrency, None
        per_second, at_once = self._limits.get(name, (per_second, at_once))
        if isinstance(self._store, RedisCache):
            turn = functools.partial(self._store.turn, name, per_second)
        at_once, per_second = -(-at_once // self._loops), per_second / self._loops
        names = _SETTINGS.get(name, ())
        address = _origin(getattr(self._services, names[0]) or "") if names else ""
        fields = [n if n.isupper() else f"config.services.{n}" for n in names]
        return Service(
            name, web, at_once=at_once, per_second=per_second, turn=turn,
            address=address, settings=", ".join(fields), **keywords,
        )  # fmt: skip

    def _client(self, name: str, service: Service | None = None) -> Any:
        """Return the client of a web service in `_SETTINGS`, which sends requests by `service`."""
        of, service = self._services, service or self._service(name)
        match name:
            case "serpapi":
                return SerpApi(service, base_url=of.serpapi_url)
            case "serper":
                return Serper(service, base_url=of.serper_url)
            case "searxng":
                return SearXNG(service, base_url=of.searxng_url)
            case "retrieval":
                return Retrieval(service, base_url=of.retrieval_url)
            case "reader":
                return Jina(service, base_url=of.jina_url)
            case "summariser":
                return Summariser(service, base_url=of.summariser_url, model=of.summariser_model)
            case "judge":
                return Judge(
                    service, self._stored, base_url=of.judge_url, model=of.judge_model,
                    pauses=[_JUDGE_PAUSE] * (of.max_attempts - 1),
                )  # fmt: skip
            case "publisher":
                put, public = (_needed(f"services.{f}", getattr(of, f)) for f in _PUBLISHING)
                return ImageUploader(service, self._stored, put_url=put, public_url=public)
        raise ToolsError(f"there is no service {name!r}")

    def tests(self, text: bool, image: bool, judge: bool) -> "list[_Test]":
        """Return the web services in use, each with its test request.

        Args:
          text: Whether text search is used.
          image: Whether image search is used.
          judge: Whether answers are judged.
        """
        tools, of = self._tools, self._services
        names: list[str] = []
        if text and tools.text == "retrieval":
            names.append("retrieval")
        elif text and tools.text in _SETTINGS:
            names.append(tools.text)
            names += ["reader"] * (of.reader == "jina")
            names += ["summariser"] * (of.summariser_url is not None and of.reader != "none")
        if image and tools.image in _SETTINGS:  # both kinds of search share account and address
            names += [tools.image, "publisher"]
        names += ["judge"] * (judge and of.judge_url is not None)
        found = []
        for name in dict.fromkeys(names):
            service = self._service(name)
            found.append((service, functools.partial(_TESTS[name], self._client(name, service))))
        return found

    def text(self, name: str) -> Tool:
        services, stored = self._services, self._stored
        finder = self._client(name)
        if name == "retrieval":
            url = services.retrieval_url
            return PassageSearch(finder, stored, url, results=self._tools.max_results)
        # Identifies this search service in the keys of the store.
        where = f"{name} {services.searxng_url}" if name == "searxng" else name
        summariser = services.summariser_url and services.summariser_model
        results, chars = self._tools.max_results, self._tools.max_result_chars
        search = TextSearch(
            CachedFinder(finder, stored, where),
            self._reader(),
            self._summariser(),
            results=results,
            chars=chars,
            seconds=self._seconds,
        )
        return CachedSearch(
            search, stored, f"{where} {services.reader} {summariser} {results} {chars}"
        )

    def _reader(self) -> CachedReader | None:
        name = self._services.reader
        if name == "none":
            return None
        reader = Reader(self._hosts("reader")) if name == "local" else self._client("reader")
        return CachedReader(reader, self._stored, name)

    def _summariser(self) -> CachedSummariser | None:
        if self._services.summariser_url is None:
            return None
        model = self._services.summariser_model
        return CachedSummariser(self._client("summariser"), self._stored, model)

    def judge(self) -> Judge:
        return self._client("judge")

    def image(self, name: str) -> Tool:
        services, results = self._services, self._tools.max_results
        pictures = CachedImages(ImageFetcher(self._hosts("thumbnails")), self._stored)
        if name == "fvqa":
            path = _needed("services.fvqa_cache", services.fvqa_cache)
            return FvqaCache(path, pictures, results=results)
        publisher = self._client("publisher")
        return ImageSearch(
            self._client(name), publisher, pictures, self._stored, name, results=results,
            seconds=self._seconds,
        )  # fmt: skip


async def _publish_test_image(publish: ImageUploader) -> None:
    jpeg, _ = await public_jpeg(PIL.Image.new("RGB", (8, 8), "white"))
    await publish(jpeg)


# Harmless test request of each service, given its client.
_TESTS: dict[str, Callable[[Any], Awaitable]] = {
    **dict.fromkeys(("serpapi", "serper", "searxng"), lambda client: client.search("test", 1)),
    "retrieval": lambda client: client.passages("test", 1),
    "reader": lambda client: client.read("https://example.com/"),
    "summariser": lambda client: client.summarise("Paris is in France.", "Where is Paris?"),
    "judge": lambda client: client.test(),
    "publisher": _publish_test_image,
}


def _names_host(url: str) -> bool:
    """Return whether a URL names a host. Requests to one that does not are refused later."""
    try:
        parse_host(url)
    except ValueError:
        return False
    return True


def _origin(url: str) -> str:
    """Return the scheme, host and port of a URL. The rest may contain secrets."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{port}" if host else ""


def _limit(text: str) -> tuple[str, tuple[float, int]]:
    """Parse `NAME=PER_SECOND/AT_ONCE` into (name, (calls per second, concurrent calls))."""
    found = re.fullmatch(r"(\w+)=([0-9.]+)/([0-9]+)", text)
    try:
        name, limits = found[1], (float(found[2]), int(found[3]))
    except (TypeError, ValueError):
        name, limits = "", (0.0, 0)
    if name not in SERVICES or not all(limits):
        raise ToolsError(
            f"config.services.limits: {text!r} is not NAME=PER_SECOND/AT_ONCE, with a name of "
            f"{', '.join(SERVICES)}"
        )
    return name, limits


def _needed(field: str, value: str | None) -> str:
    if value is None:
        raise ToolsError(f"config.{field} is not set")
    return value
