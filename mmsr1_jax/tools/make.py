"""The tools that the settings ask for."""

import functools

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


class ToolsError(ValueError):
    """Settings of tools that do not fit together; the message names the field."""


def make_tools(config: settings.Config) -> dict[str, Tool]:
    """The search tools by action; one that is `none` is left out.

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
    make = _Makers(tools, services, _store(services))
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
    return _Makers(config.tools, services, _store(services)).judge()


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
        self, tools: settings.Tools, services: settings.Services, store: Store | RedisStore
    ):
        self._tools, self._services = tools, services
        self._store, self._stored = store, Stored(store)
        self._web = Web(allowed_hosts=services.allowed_hosts, seconds=services.seconds)

    def _service(self, name: str) -> Service:
        settings_, turn = self._services, None
        if isinstance(self._store, RedisStore):
            turn = functools.partial(self._store.turn, name, settings_.per_second)
        return Service(
            name,
            self._web,
            at_once=settings_.at_once,
            per_second=settings_.per_second,
            attempts=settings_.attempts,
            turn=turn,
        )

    def _google(self, name: str) -> SerpApi | Serper:
        service = self._service(name)
        if name == "serpapi":
            return SerpApi(service, base_url=self._services.serpapi_url)
        return Serper(service, base_url=self._services.serper_url)

    def text(self, name: str) -> Tool:
        services, stored = self._services, self._stored
        if name == "retrieval":
            retrieval = Retrieval(self._service(name), base_url=services.retrieval_url)
            return PassageSearch(retrieval, stored, results=self._tools.results)
        if name == "searxng":
            finder = SearXNG(self._service(name), base_url=services.searxng_url)
        else:
            finder = self._google(name)
        summariser = services.summariser_url and services.summariser_model
        results, chars = self._tools.results, self._tools.result_chars
        search = TextSearch(
            StoredFinder(finder, stored, name),
            self._reader(),
            self._summariser(),
            results=results,
            chars=chars,
        )
        return StoredSearch(
            search, stored, f"{name} {services.reader} {summariser} {results} {chars}"
        )

    def _reader(self) -> StoredReader | None:
        name = self._services.reader
        if name == "none":
            return None
        service = self._service(f"reader {name}")
        reader = Reader(service) if name == "local" else Jina(
            service, base_url=self._services.jina_url
        )  # fmt: skip
        return StoredReader(reader, self._stored, name)

    def _summariser(self) -> StoredSummariser | None:
        url, model = self._services.summariser_url, self._services.summariser_model
        if url is None:
            return None
        summariser = Summariser(self._service("summariser"), base_url=url, model=model)
        return StoredSummariser(summariser, self._stored, model)

    def judge(self) -> Judge:
        url, model = self._services.judge_url, self._services.judge_model
        return Judge(self._service("judge"), self._stored, base_url=url, model=model)

    def image(self, name: str) -> Tool:
        services, results = self._services, self._tools.results
        pictures = StoredPictures(Thumbnails(self._service("thumbnails")), self._stored)
        if name == "fvqa":
            path = _needed("services.fvqa_cache", services.fvqa_cache)
            return FvqaCache(path, pictures, results=results)
        publisher = Publisher(
            self._service("publisher"),
            self._stored,
            put_url=_needed("services.put_url", services.put_url),
            public_url=_needed("services.public_url", services.public_url),
        )
        return ImageSearch(self._google(name), publisher, pictures, self._stored, results=results)


def _needed(field: str, value: str | None) -> str:
    if value is None:
        raise ToolsError(f"config.{field} is not set")
    return value
