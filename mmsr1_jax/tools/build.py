"""Build the configured search tools and the judge."""

from collections.abc import Callable

from mmsr1_jax.config import settings
from mmsr1_jax.tools.cached_tool import (
    CachedFinder,
    CachedImages,
    CachedReader,
    CachedSearch,
    CachedSummariser,
)
from mmsr1_jax.tools.image_search import ImageFetcher, ImageSearch
from mmsr1_jax.tools.index_builder import ImageEmbedder
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.local_index import LocalIndex
from mmsr1_jax.tools.redis_cache import RedisCache, open_cache
from mmsr1_jax.tools.service_clients import ServiceClients, ToolsError, required
from mmsr1_jax.tools.services.fvqa import FvqaCache
from mmsr1_jax.tools.services.reader import Reader
from mmsr1_jax.tools.text_search import PassageSearch, TextSearch
from mmsr1_jax.tools.tool import Tool
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.utils import processes

# A search returns the results that are ready by this fraction of the time limit of a tool call, so
# that it does not exceed the limit itself.
_SEARCH_TIME_FRACTION = 0.75


def make_tools(
    config: settings.Config, *, num_loops: int = 1, clients: ServiceClients | None = None
) -> dict[str, Tool]:
    """Return the search tools by action, without those set to `none`.

    Args:
      config: Settings.
      num_loops: Number of asyncio loops that will use the tools, one for each engine of all
        processes. Limits are enforced per loop, so each loop gets an equal fraction of them.
      clients: Clients of the services; None: those of `make_clients`.

    Raises:
      ToolsError, LocalIndexError, KeyMissingError, FvqaCacheError, ToolCacheError: A tool cannot be
        built.
      ConfigError, CheckpointError, ImageError: The model in `tools.image_model` cannot be used.
    """
    tools = config.tools
    default = "none" if tools.index is None else "local"
    text = default if tools.text == "auto" else tools.text
    image = default if tools.image == "auto" else tools.image
    index = None
    if "local" in (text, image):
        index = _open_index(config, with_images=image == "local")
    clients = clients or make_clients(config, num_loops=num_loops)
    by_action: dict[str, Tool] = {}
    if index is not None and text == "local":
        by_action["text_search"] = index.text_search
    elif text != "none":
        by_action["text_search"] = _text_search(config, clients, text)
    if index is not None and image == "local":
        by_action["image_search"] = index.image_search
    elif image != "none":
        by_action["image_search"] = _image_search(config, clients, image)
    return by_action


def make_clients(
    config: settings.Config,
    *,
    num_loops: int = 1,
    before_request: Callable[[str], None] | None = None,
) -> ServiceClients:
    """Return the clients of the configured services, see `ServiceClients`.

    Raises:
      ToolsError: `limits` or `allowed_hosts` is invalid.
      ToolCacheError: The cache cannot be opened.
    """
    return ServiceClients(
        config.services,
        _open_cache(config.services),
        num_loops=num_loops,
        before_request=before_request,
    )


def make_judge(config: settings.Config, *, num_loops: int | None = None) -> Judge | None:
    """Return the answer judge, or None if answers are matched. Raises ToolCacheError.

    Args:
      config: Settings.
      num_loops: Number of processes that ask the judge, as in `make_tools`; None: all.
    """
    if config.services.judge_url is None:
        return None
    loops = processes.count() if num_loops is None else num_loops
    return make_clients(config, num_loops=loops).client("judge")


def _open_cache(services: settings.Services) -> ToolCache | RedisCache:
    return open_cache(
        services.cache,
        "off" if services.cache is None else services.cache_mode,
        ttl_days=services.cache_ttl_days,
        max_bytes=services.cache_max_bytes,
    )


def _open_index(config: settings.Config, *, with_images: bool) -> LocalIndex:
    tools = config.tools
    if tools.index is None:
        raise ToolsError("config.tools.index is not set")
    return LocalIndex(
        tools.index,
        max_results=tools.max_results,
        max_chars=tools.max_result_chars,
        embed=_load_embedder(config) if with_images else None,
    )


def _load_embedder(config: settings.Config) -> ImageEmbedder | None:
    directory = config.tools.image_model
    if directory is None:
        return None
    from mmsr1_jax.tools.embedding import Embedder  # imported lazily: other tools need no model

    embed = Embedder(directory)
    if config.rollout.precompile:
        embed.warm_up()
    return embed


def _text_search(config: settings.Config, clients: ServiceClients, name: str) -> Tool:
    tools, services, cached_calls = config.tools, config.services, clients.cached_calls
    finder = clients.client(name)
    if name == "retrieval":
        url = services.retrieval_url
        return PassageSearch(finder, cached_calls, url, max_results=tools.max_results)
    # Identifies the search service in the keys of the cache.
    source = f"{name} {services.searxng_url}" if name == "searxng" else name
    summariser = services.summariser_url and services.summariser_model
    max_results, max_chars = tools.max_results, tools.max_result_chars
    search = TextSearch(
        CachedFinder(finder, cached_calls, source),
        _page_reader(services, clients),
        _page_summariser(services, clients),
        max_results=max_results,
        max_chars=max_chars,
        timeout=_SEARCH_TIME_FRACTION * tools.timeout,
    )
    key = f"{source} {services.reader} {summariser} {max_results} {max_chars}"
    return CachedSearch(search, cached_calls, key)


def _page_reader(services: settings.Services, clients: ServiceClients) -> CachedReader | None:
    name = services.reader
    if name == "none":
        return None
    reader = Reader(clients.any_host("reader")) if name == "local" else clients.client("reader")
    return CachedReader(reader, clients.cached_calls, name)


def _page_summariser(
    services: settings.Services, clients: ServiceClients
) -> CachedSummariser | None:
    if services.summariser_url is None:
        return None
    summariser = clients.client("summariser")
    return CachedSummariser(summariser, clients.cached_calls, services.summariser_model)


def _image_search(config: settings.Config, clients: ServiceClients, name: str) -> Tool:
    tools, services, cached_calls = config.tools, config.services, clients.cached_calls
    fetch = CachedImages(ImageFetcher(clients.any_host("thumbnails")), cached_calls)
    if name == "fvqa":
        path = required("fvqa_cache", services.fvqa_cache)
        return FvqaCache(path, fetch, max_results=tools.max_results)
    upload = clients.client("uploader")
    return ImageSearch(
        clients.client(name),
        upload,
        fetch,
        cached_calls,
        name,
        max_results=tools.max_results,
        timeout=_SEARCH_TIME_FRACTION * tools.timeout,
    )
