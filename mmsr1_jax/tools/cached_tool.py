"""Cached wrappers of services, each with the interface of the service that it wraps.

The kinds of cached values are:

    links        query -> hits
    page         URL -> text
    summary      page and question -> text
    matches      image -> pages with similar images
    image        URL -> image file
    upload       public URL of an uploaded image
    search       query and question -> complete result of a text search
    passages     query -> passages of an index
    verdict      question, gold answers and answer -> whether the answer is correct, and the reason
    short form   question and answer -> the part of the answer that is scored
    pictures     words -> pages with pictures
    chat         messages and sample number -> reply of a model

Failures are cached too, so that a replay fails where the recorded run did. A cache file may come
from an untrusted source: a value that does not match `VALUE_TYPES` is treated as missing.
"""

import asyncio
import base64
import dataclasses
import functools
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from mmsr1_jax.tools.redis_cache import RedisCache
from mmsr1_jax.tools.service import ServiceDownError, is_temporary
from mmsr1_jax.tools.services import Finder, Hit, PageReader, PageSummariser
from mmsr1_jax.tools.tool import Observation, Query, Tool, parse_text_result
from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json, fallbacks
from mmsr1_jax.utils.checked_json import utf8
from mmsr1_jax.utils.logs import log

_Hits = list[tuple[str, str, str]]
# JSON type of each kind's values. A failure is always a string.
VALUE_TYPES: dict[str, Any] = {
    "links": _Hits,  # link, title, snippet
    "page": str,
    "summary": str,
    "matches": _Hits,  # link, title, thumbnail
    "image": str,  # base64
    "upload": Literal[True],
    # Fields of an `Observation`: status, error, and the texts of each result.
    "search": tuple[Literal["ok", "empty"], str | None, list[list[str]]],
    "passages": list[tuple[str, str]],  # title, text
    "verdict": tuple[bool, str],
    "short form": str,
    # link, title, picture, thumbnail, licence
    "pictures": list[tuple[str, str, str, str, str]],
    "chat": str,
}


class NotCachedError(WebError):
    """Value that was not recorded and that replay mode may not request."""


class CachedCalls:
    """Read-through cache of async calls with JSON results."""

    def __init__(self, cache: ToolCache | RedisCache):
        self._cache = cache
        self._has_warned = False

    @property
    def mode(self) -> str:
        """Mode of the cache."""
        return self._cache.mode

    @property
    def is_recording(self) -> bool:
        """Whether all values are recorded for a replay, including failures."""
        return self._cache.mode == "record"

    async def get(self, kind: str, key: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """Return the cached JSON value, or the result of `call`, which is cached, on a miss.

        Raises:
          WebError: Raised by `call`, now or when the value was recorded.
          NotCachedError: The value is missing and the cache is in replay mode.
        """
        cached = await self.look_up(kind, key)
        if cached is not None:
            return cached
        if self._cache.mode == "replay":
            raise NotCachedError("not in the cache; replay mode sends no requests")
        try:
            value = await call()
        except WebError as error:
            if self._cache.mode != "resume" or not _may_recover(kind, error):
                await self.put(kind, key, str(error), failed=True)
            raise
        await self.put(kind, key, value)
        return value

    async def look_up(self, kind: str, key: str) -> Any:
        """Return the cached JSON value, of the type in `VALUE_TYPES`, or None on a miss.

        Raises:
          WebError: The cached entry is a failure.
          NotCachedError: The value is malformed and the cache is in replay mode.
        """
        # Reading from a file is no slower than handing the call to a thread.
        in_thread = isinstance(self._cache, RedisCache)
        entry = await self._try(in_thread, self._cache.get, kind, key)
        if entry is None:
            return None
        data, failed = entry
        try:
            value = checked_json.loads(data, str if failed else VALUE_TYPES[kind])
            if kind == "image" and not failed:
                base64.b64decode(value, validate=True)
        except ValueError as error:  # damaged, or written by another program
            fallbacks.count(
                "cache/malformed",
                f"cache: a malformed value of kind {kind!r} is treated as missing ({error})",
            )
            if self._cache.mode == "replay":
                raise NotCachedError(
                    "malformed in the cache; replay mode sends no requests"
                ) from None
            return None
        if failed:
            raise WebError(value)
        return value

    async def put(self, kind: str, key: str, value: Any, *, failed: bool = False) -> None:
        """Store a JSON value, or the message of a failure, unless the mode is `off` or `replay`."""
        if self._cache.mode in ("off", "replay"):
            return
        data = utf8(json.dumps(value, ensure_ascii=False))
        # Runs in a thread, since another process may briefly hold the lock of the file.
        await self._try(True, self._cache.put, kind, key, data, failed=failed)

    async def _try(
        self, in_thread: bool, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call a method of the cache. If it fails, return None; the first failure is logged."""
        method = functools.partial(method, *args, **kwargs)
        try:
            if not in_thread:
                return method()
            threads = self._cache.threads if isinstance(self._cache, RedisCache) else None
            return await asyncio.get_running_loop().run_in_executor(threads, method)
        except ToolCacheError as error:
            fallbacks.count("cache/failed")
            if not self._has_warned:
                self._has_warned = True
                is_shared = isinstance(self._cache, RedisCache)
                limits = ", and each process with its own rate limits" if is_shared else ""
                log.warning("cache: %s; searches continue without it%s", error, limits)
            return None


class CachedFinder:
    """Cached search for links. `name` identifies the service, as results differ by service."""

    def __init__(self, finder: Finder, cached_calls: CachedCalls, name: str):
        self._finder, self._cached_calls, self._name = finder, cached_calls, name

    async def search(self, query: str, count: int) -> list[Hit]:
        async def call() -> list[tuple[str, str, str]]:
            hits = await self._finder.search(query, count)
            return [dataclasses.astuple(hit) for hit in hits]

        key = json.dumps([self._name, query, count])
        return [Hit(*hit) for hit in await self._cached_calls.get("links", key, call)]


class CachedReader:
    """Cached page reader. `name` identifies the service, as the text differs by service."""

    def __init__(self, reader: PageReader, cached_calls: CachedCalls, name: str):
        self._reader, self._cached_calls, self._name = reader, cached_calls, name

    async def read(self, url: str) -> str:
        key = json.dumps([self._name, url])
        return await self._cached_calls.get("page", key, lambda: self._reader.read(url))


class CachedSummariser:
    """Cached summariser. `name` identifies the model."""

    def __init__(self, summariser: PageSummariser, cached_calls: CachedCalls, name: str):
        self._summariser, self._cached_calls, self._name = summariser, cached_calls, name

    async def summarise(self, page: str, question: str) -> str:
        key = json.dumps([self._name, digest(utf8(page)), question])
        return await self._cached_calls.get(
            "summary", key, lambda: self._summariser.summarise(page, question)
        )


class CachedImages:
    """Cached image download. `fetch` returns the file at a URL."""

    def __init__(self, fetch: Callable[[str], Awaitable[bytes]], cached_calls: CachedCalls):
        self._fetch, self._cached_calls = fetch, cached_calls

    async def __call__(self, url: str) -> bytes:
        async def call() -> str:
            return base64.b64encode(await self._fetch(url)).decode()

        return base64.b64decode(await self._cached_calls.get("image", url, call))


class CachedSearch:
    """Cached text search, with a single lookup per search instead of one per page.

    Args:
      tool: Tool to wrap, whose results consist of text only.
      cached_calls: Cache of results.
      name: Identifies everything that the results depend on besides the query and its question.
    """

    def __init__(self, tool: Tool, cached_calls: CachedCalls, name: str):
        self._tool, self._cached_calls, self._name = tool, cached_calls, name

    async def __call__(self, query: Query) -> Observation:
        key = json.dumps([self._name, query.text, query.question])
        try:
            cached = await self._cached_calls.look_up("search", key)
        except WebError as error:
            return Observation(status="failed", error=str(error))
        if cached is not None:
            status, error, texts = cached
            results = [sum(map(parse_text_result, result), ()) for result in texts]
            return Observation(status=status, error=error, results=results)
        observation = await self._tool(query)
        if observation.status == "failed" and self._cached_calls.mode == "resume":
            pass  # the failures of its requests are cached one by one
        elif observation.status == "failed":
            await self._cached_calls.put("search", key, observation.error, failed=True)
        elif observation.error is None or self._cached_calls.is_recording:
            # Outside of `record`, an incomplete result is not cached, so that it is retried.
            texts = [[part.text for part in result] for result in observation.results]
            value = [observation.status, observation.error, texts]
            await self._cached_calls.put("search", key, value)
        return observation


def _may_recover(kind: str, error: WebError) -> bool:
    """Return whether a resumed batch should repeat a failed request.

    A page or picture of some host is replaced by the next one, for good. A configured service that
    is down or overloaded will be back.
    """
    if kind in ("page", "image"):
        return isinstance(error, ServiceDownError)
    return is_temporary(error)


def digest(data: bytes) -> str:
    """Return 32 hex digits that identify data."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
