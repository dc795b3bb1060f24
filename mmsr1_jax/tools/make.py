"""The tools that the settings ask for."""

import functools
import re
import urllib.parse

from mmsr1_jax import config as settings
from mmsr1_jax.judge import Judge
from mmsr1_jax.tools.image_search import ImageSearch, Publisher, Thumbnails
from mmsr1_jax.tools.local import Embed, LocalIndex
from mmsr1_jax.tools.redis_store import RedisStore, open_store
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services.fvqa import FvqaCache
from mmsr1_jax.tools.services.jina import Jina
from mmsr1_jax.tools.services.reader import Reader
from mmsr1_jax.tools.services.retrieval import Retrieval
from mmsr1_jax.tools.services.searxng import SearXNG
from mmsr1_jax.tools.services.serpapi import SerpApi
from mmsr1_jax.tools.services.serper import Serper
from mmsr1_jax.tools.services.summariser import Summariser
from mmsr1_jax.tools.store import Store
from mmsr1_jax.tools.stored import (
    Stored,
    StoredFinder,
    StoredPictures,
    StoredReader,
    StoredSearch,
    StoredSummariser,
)
from mmsr1_jax.tools.text_search import PassageSearch, TextSearch
from mmsr1_jax.tools.tool import Tool
from mmsr1_jax.tools.web import Web

SERVICES = (
    "serpapi", "serper", "searxng", "retrieval", "reader", "summariser", "judge", "thumbnails",
    "publisher",
)  # fmt: skip
_JUDGE_PAUSE = 60.0  # seconds; longer than a `Service` that failed is left alone


class ToolsError(ValueError):
    """Settings of tools that do not fit together; the message names the field."""


def make_tools(config: settings.Config, *, loops: int = 1) -> dict[str, Tool]:
    """The search tools by action; one that is `none` is left out.

    Args:
      loops: asyncio loops that will use them, one for each engine. Limits count for each loop, so
        each has a share of them.

    Raises:
      ToolsError, LocalIndexError, KeyMissingError, CacheError, StoreError: one cannot be made.
      ConfigError, CheckpointError, ImageError: nor the model of `tools.image_model` be used.
    """
    tools, services = config.tools, config.services
    automatic = "none" if tools.index is None else "local"
    text = automatic if tools.text == "auto" else tools.text
    image = automatic if tools.image == "auto" else tools.image
    index = None
    if "local" in (text, image):
        path = _needed("tools.index", tools.index)
        embed = _embedder(config) if image == "local" else None
        index = LocalIndex(path, results=tools.results, chars=tools.result_chars, embed=embed)
    make = _Makers(tools, services, _store(services), loops)
    made: dict[str, Tool] = {}
    if text != "none":
        made["text_search"] = index.text_search if text == "local" else make.text(text)
    if image != "none":
        made["image_search"] = index.image_search if image == "local" else make.image(image)
    return made


def make_judge(config: settings.Config) -> Judge | None:
    """What judges answers; None where they are matched. Raises StoreError."""
    services = config.services
    if services.judge_url is None:
        return None
    return _Makers(config.tools, services, _store(services), 1).judge()


def _store(services: settings.Services) -> Store | RedisStore:
    mode = "off" if services.store is None else services.store_mode
    return open_store(
        services.store, mode, days=services.store_days, max_bytes=services.store_max_bytes
    )


def _embedder(config: settings.Config) -> Embed | None:
    directory = config.tools.image_model
    if directory is None:
        return None
    from mmsr1_jax.tools.embedding import Embedder  # only here: tools need no model otherwise

    embed = Embedder(directory)
    if config.rollout.compile_ahead:
        embed.warm_up()
    return embed


class _Makers:
    def __init__(
        self, tools: settings.Tools, services: settings.Services, store: Store | RedisStore,
        loops: int,
    ):  # fmt: skip
        self._tools, self._services, self._loops = tools, services, loops
        self._store, self._stored = store, Stored(store)
        # One's own services may be anywhere; what they find may not.
        urls = (
            services.serpapi_url, services.serper_url, services.searxng_url, services.jina_url,
            services.retrieval_url, services.summariser_url, services.judge_url, services.put_url,
        )  # fmt: skip
        own = {urllib.parse.urlsplit(url).netloc for url in urls if url}
        self._own = Web(allowed_hosts=own, seconds=services.seconds)
        self._web = Web(allowed_hosts=services.allowed_hosts, seconds=services.seconds)
        self._limits = dict(map(_limit, services.limits))
        # What is there by then is made do with, so that the search itself is not too late.
        self._seconds = 0.75 * tools.seconds

    def _service(self, name: str) -> Service:
        """One's own, or one that is paid for."""
        return self._limited(name, self._own, attempts=self._services.attempts)

    def _hosts(self, name: str) -> Service:
        """Any host: one that fails says nothing of the others, and the next hit is the retry."""
        return self._limited(name, self._web, attempts=1, failures=None)

    def _limited(self, name: str, web: Web, **keywords) -> Service:
        per_second, at_once, turn = self._services.per_second, self._services.at_once, None
        per_second, at_once = self._limits.get(name, (per_second, at_once))
        if isinstance(self._store, RedisStore):
            turn = functools.partial(self._store.turn, name, per_second)
        at_once, per_second = -(-at_once // self._loops), per_second / self._loops
        return Service(name, web, at_once=at_once, per_second=per_second, turn=turn, **keywords)

    def _google(self, name: str) -> SerpApi | Serper:
        service = self._service(name)
        if name == "serpapi":
            return SerpApi(service, base_url=self._services.serpapi_url)
        return Serper(service, base_url=self._services.serper_url)

    def text(self, name: str) -> Tool:
        services, stored = self._services, self._stored
        if name == "retrieval":
            url = services.retrieval_url
            retrieval = Retrieval(self._service(name), base_url=url)
            return PassageSearch(retrieval, stored, url, results=self._tools.results)
        where = name  # by which what was found is known again
        if name == "searxng":
            where = f"{name} {services.searxng_url}"
            finder = SearXNG(self._service(name), base_url=services.searxng_url)
        else:
            finder = self._google(name)
        summariser = services.summariser_url and services.summariser_model
        results, chars = self._tools.results, self._tools.result_chars
        search = TextSearch(
            StoredFinder(finder, stored, where),
            self._reader(),
            self._summariser(),
            results=results,
            chars=chars,
            seconds=self._seconds,
        )
        return StoredSearch(
            search, stored, f"{where} {services.reader} {summariser} {results} {chars}"
        )

    def _reader(self) -> StoredReader | None:
        name = self._services.reader
        if name == "none":
            return None
        if name == "local":
            reader = Reader(self._hosts("reader"))
        else:
            reader = Jina(self._service("reader"), base_url=self._services.jina_url)
        return StoredReader(reader, self._stored, name)

    def _summariser(self) -> StoredSummariser | None:
        url, model = self._services.summariser_url, self._services.summariser_model
        if url is None:
            return None
        summariser = Summariser(self._service("summariser"), base_url=url, model=model)
        return StoredSummariser(summariser, self._stored, model)

    def judge(self) -> Judge:
        url, model = self._services.judge_url, self._services.judge_model
        pauses = [_JUDGE_PAUSE] * (self._services.attempts - 1)
        service = self._service("judge")
        return Judge(service, self._stored, base_url=url, model=model, pauses=pauses)

    def image(self, name: str) -> Tool:
        services, results = self._services, self._tools.results
        pictures = StoredPictures(Thumbnails(self._hosts("thumbnails")), self._stored)
        if name == "fvqa":
            path = _needed("services.fvqa_cache", services.fvqa_cache)
            return FvqaCache(path, pictures, results=results)
        publisher = Publisher(
            self._service("publisher"),
            self._stored,
            put_url=_needed("services.put_url", services.put_url),
            public_url=_needed("services.public_url", services.public_url),
        )
        return ImageSearch(
            self._google(name), publisher, pictures, self._stored, name, results=results,
            seconds=self._seconds,
        )  # fmt: skip


def _limit(text: str) -> tuple[str, tuple[float, int]]:
    """`NAME=PER_SECOND/AT_ONCE` as (name, (calls a second, calls at a time))."""
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
