"""Cached wrappers of services, each with the interface of the service that it wraps.

The kinds of cached values are:

    links        query -> hits
    page         URL -> text
    summary      page and question -> text
    matches      image -> pages with similar images
    picture      URL -> image file
    published    public URL of an uploaded image
    answer       query and question -> complete result of a text search
    verdict      question, gold answers and answer -> whether the answer is correct, and the reason
    short form   question and answer -> the part of the answer that is scored

Failures are cached too, so that a replay fails where the recorded run did. A cache file may come
from an untrusted source: a value that does not match `SHAPES` is treated as missing.
"""

import asyncio
import base64
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from mmsr1_jax.tools.redis_cache import RedisCache
from mmsr1_jax.tools.services import Hit
from mmsr1_jax.tools.tool import Observation, Query, Tool, text_result_of
from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json, fallbacks

_Hits = list[tuple[str, str, str]]
# JSON type of each kind's values. A failure is always a string.
SHAPES: dict[str, Any] = {
    "links": _Hits,  # link, title, snippet
    "page": str,
    "summary": str,
    "matches": _Hits,  # link, title, thumbnail
    "picture": str,  # base64
    "published": Literal[True],
    # Fields of an `Observation`: status, error, and the texts of each result.
    "answer": tuple[Literal["ok", "empty"], str | None, list[list[str]]],
    "passages": list[tuple[str, str]],  # title, text
    "verdict": tuple[bool, str],
    "short form": str,
}


class NotCachedError(WebError):
    """A value that a replay needs and that was not recorded."""


class CachedCalls:
    """Read-through cache over a store."""

    def __init__(self, store: ToolCache | RedisCache):
        self._store = store
        self._remote = isinstance(store, RedisCache)
        self._complained = False

    @property
    def keeps_all(self) -> bool:
        """Whether all values are recorded for a replay, including failures."""
        return self._store.mode == "record"

    async def get(self, kind: str, key: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Return the cached JSON value, or call `ask` and cache its result on a miss.

        Raises:
          WebError: Raised by `ask`, now or when the value was recorded.
          NotCachedError: The value is missing and the store is in replay mode.
        """
        found = await self.look(kind, key)
        if found is not None:
            return found
        if self._store.mode == "replay":
            raise NotCachedError("not in the store, and a replay asks nobody")
        try:
            value = await ask()
        except WebError as error:
            await self.put(kind, key, str(error), failed=True)
            raise
        await self.put(kind, key, value)
        return value

    async def look(self, kind: str, key: str) -> Any:
        """Return the cached JSON value, of the type in `SHAPES`, or None on a miss.

        Raises:
          WebError: The cached entry is a failure.
          NotCachedError: The value is malformed and the store is in replay mode.
        """
        # Reading from a file is no slower than handing the call to a thread.
        found = await self._try(self._remote, self._store.get, kind, key)
        if found is None:
            return None
        try:
            value = checked_json.loads(found[0], str if found[1] else SHAPES[kind])
            if kind == "picture" and not found[1]:
                base64.b64decode(value, validate=True)
        except ValueError as error:  # damaged, or written by another program
            fallbacks.count(
                "store/damaged",
                f"store: a malformed value of kind {kind!r} is treated as missing ({error})",
            )
            if self._store.mode == "replay":
                raise NotCachedError("malformed in the store, and a replay asks nobody") from None
            return None
        if found[1]:
            raise WebError(value)
        return value

    async def put(self, kind: str, key: str, value: Any, *, failed: bool = False) -> None:
        """Store a JSON value, or the message of a failure, unless the mode is `off` or `replay`."""
        if self._store.mode in ("off", "replay"):
            return
        data = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        # Runs in a thread, since another process may briefly hold the lock of the file.
        await self._try(True, self._store.put, kind, key, data, failed=failed)

    async def _try(self, in_thread: bool, act: Callable, *arguments, **keywords) -> Any:
        """Call the store, or return None if it fails: searches continue without it, logged once."""
        try:
            if not in_thread:
                return act(*arguments, **keywords)
            threads = self._store.threads if self._remote else None
            act = functools.partial(act, *arguments, **keywords)
            return await asyncio.get_running_loop().run_in_executor(threads, act)
        except ToolCacheError as error:
            fallbacks.count("store/failed")
            if not self._complained:
                self._complained = True
                alone = ", each process with its own limits" if self._remote else ""
                print(f"store: {error}; searches go on without it{alone}", file=sys.stderr)
            return None


class CachedFinder:
    """Cached search for links. `name` identifies the service, as results differ by service."""

    def __init__(self, finder, stored: CachedCalls, name: str):
        self._finder, self._stored, self._name = finder, stored, name

    async def search(self, query: str, count: int) -> list[Hit]:
        async def ask():
            hits = await self._finder.search(query, count)
            return [dataclasses.astuple(hit) for hit in hits]

        key = json.dumps([self._name, query, count])
        return [Hit(*hit) for hit in await self._stored.get("links", key, ask)]


class CachedReader:
    """Cached page reader. `name` identifies the service, as the text differs by service."""

    def __init__(self, reader, stored: CachedCalls, name: str):
        self._reader, self._stored, self._name = reader, stored, name

    async def read(self, url: str) -> str:
        key = json.dumps([self._name, url])
        return await self._stored.get("page", key, lambda: self._reader.read(url))


class CachedSummariser:
    """Cached summariser. `name` identifies the model."""

    def __init__(self, summariser, stored: CachedCalls, name: str):
        self._summariser, self._stored, self._name = summariser, stored, name

    async def summarise(self, page: str, question: str) -> str:
        key = json.dumps([self._name, digest(page.encode("utf-8", "replace")), question])
        return await self._stored.get(
            "summary", key, lambda: self._summariser.summarise(page, question)
        )


class CachedImages:
    """Cached image download. `fetch` returns the file at a URL."""

    def __init__(self, fetch: Callable[[str], Awaitable[bytes]], stored: CachedCalls):
        self._fetch, self._stored = fetch, stored

    async def __call__(self, url: str) -> bytes:
        async def ask():
            return base64.b64encode(await self._fetch(url)).decode()

        return base64.b64decode(await self._stored.get("picture", url, ask))


class CachedSearch:
    """Cached text search, with a single lookup per search instead of one per page.

    Args:
      tool: Tool to wrap, whose results consist of text only.
      stored: Cache of results.
      name: Identifies everything that the results depend on besides the query and its question.
    """

    def __init__(self, tool: Tool, stored: CachedCalls, name: str):
        self._tool, self._stored, self._name = tool, stored, name

    async def __call__(self, query: Query) -> Observation:
        key = json.dumps([self._name, query.text, query.question])
        try:
            found = await self._stored.look("answer", key)
        except WebError as error:
            return Observation(status="failed", error=str(error))
        if found is not None:
            status, error, texts = found
            results = [sum(map(text_result_of, result), ()) for result in texts]
            return Observation(status=status, error=error, results=results)
        made = await self._tool(query)
        if made.status == "failed":
            await self._stored.put("answer", key, made.error, failed=True)
        elif made.error is None or self._stored.keeps_all:
            # Outside of `record`, an incomplete result is not cached, so that it is retried.
            texts = [[part.text for part in result] for result in made.results]
            await self._stored.put("answer", key, [made.status, made.error, texts])
        return made


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
