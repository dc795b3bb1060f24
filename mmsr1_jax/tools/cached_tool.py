"""What services found, through the store: each of these does what the service it wraps does.

    links     query -> hits                 page      address -> text
    summary   page and question -> text     matches   picture -> pages with similar ones
    picture   address -> file               published address at which a picture is
    answer    query and question -> all of a text search
    verdict   question, gold answers and answer -> right or not, and why
    short form question and answer -> what of the answer is scored

Failures are kept too, so that a replay fails where the record did. A store may come from anyone: a
value that does not match `SHAPES` is treated as missing.
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

from mmsr1_jax.tools.redis_cache import RedisStore
from mmsr1_jax.tools.services import Hit
from mmsr1_jax.tools.tool import Observation, Query, Tool, text_result_of
from mmsr1_jax.tools.tool_cache import Store, StoreError
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json, fallbacks

_Hits = list[tuple[str, str, str]]
# The type of each kind's values, as JSON has them; that of a failure is a text.
SHAPES: dict[str, Any] = {
    "links": _Hits,  # link, title, snippet
    "page": str,
    "summary": str,
    "matches": _Hits,  # link, title, thumbnail
    "picture": str,  # base64
    "published": Literal[True],
    # Of an `Observation`: status, error, texts of each result.
    "answer": tuple[Literal["ok", "empty"], str | None, list[list[str]]],
    "passages": list[tuple[str, str]],  # title, text
    "verdict": tuple[bool, str],
    "short form": str,
}


class NotStoredError(WebError):
    """In a replay, something that was not recorded."""


class Stored:
    """A store, with what is asked where it has nothing."""

    def __init__(self, store: Store | RedisStore):
        self._store = store
        self._remote = isinstance(store, RedisStore)
        self._complained = False

    @property
    def keeps_all(self) -> bool:
        """Whether what is put is there to be replayed, failures and all."""
        return self._store.mode == "record"

    async def get(self, kind: str, key: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        """The JSON value that the store has, else what `ask` brings, which it then keeps.

        Raises:
          WebError: of `ask`, now or when it was recorded; NotStoredError.
        """
        found = await self.look(kind, key)
        if found is not None:
            return found
        if self._store.mode == "replay":
            raise NotStoredError("not in the store, and a replay asks nobody")
        try:
            value = await ask()
        except WebError as error:
            await self.put(kind, key, str(error), failed=True)
            raise
        await self.put(kind, key, value)
        return value

    async def look(self, kind: str, key: str) -> Any:
        """The JSON value that the store has, of the type in `SHAPES`, or None.

        Raises:
          WebError: it was recorded; NotStoredError: malformed, and this is a replay.
        """
        # A look into a file takes no longer than handing it to a thread would.
        found = await self._try(self._remote, self._store.get, kind, key)
        if found is None:
            return None
        try:
            value = checked_json.loads(found[0], str if found[1] else SHAPES[kind])
            if kind == "picture" and not found[1]:
                base64.b64decode(value, validate=True)
        except ValueError as error:  # damaged, or put there by another program
            fallbacks.note(
                "store/damaged",
                f"store: a malformed value of kind {kind!r} is treated as missing ({error})",
            )
            if self._store.mode == "replay":
                raise NotStoredError("malformed in the store, and a replay asks nobody") from None
            return None
        if found[1]:
            raise WebError(value)
        return value

    async def put(self, kind: str, key: str, value: Any, *, failed: bool = False) -> None:
        """Keeps a JSON value, or the words of a failure, where the store is to keep anything."""
        if self._store.mode in ("off", "replay"):
            return
        data = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        # In a thread: another process may hold the file for a moment.
        await self._try(True, self._store.put, kind, key, data, failed=failed)

    async def _try(self, in_thread: bool, act: Callable, *arguments, **keywords) -> Any:
        """A store that cannot be used costs its use, and no search; that is said once."""
        try:
            if not in_thread:
                return act(*arguments, **keywords)
            threads = self._store.threads if self._remote else None
            act = functools.partial(act, *arguments, **keywords)
            return await asyncio.get_running_loop().run_in_executor(threads, act)
        except StoreError as error:
            fallbacks.note("store/failed")
            if not self._complained:
                self._complained = True
                alone = ", each process with its own limits" if self._remote else ""
                print(f"store: {error}; searches go on without it{alone}", file=sys.stderr)
            return None


class StoredFinder:
    """`name`: of the service; others find other links."""

    def __init__(self, finder, stored: Stored, name: str):
        self._finder, self._stored, self._name = finder, stored, name

    async def search(self, query: str, count: int) -> list[Hit]:
        async def ask():
            hits = await self._finder.search(query, count)
            return [dataclasses.astuple(hit) for hit in hits]

        key = json.dumps([self._name, query, count])
        return [Hit(*hit) for hit in await self._stored.get("links", key, ask)]


class StoredReader:
    """`name`: of the service; others make another text of a page."""

    def __init__(self, reader, stored: Stored, name: str):
        self._reader, self._stored, self._name = reader, stored, name

    async def read(self, url: str) -> str:
        key = json.dumps([self._name, url])
        return await self._stored.get("page", key, lambda: self._reader.read(url))


class StoredSummariser:
    """`name`: of the model."""

    def __init__(self, summariser, stored: Stored, name: str):
        self._summariser, self._stored, self._name = summariser, stored, name

    async def summarise(self, page: str, question: str) -> str:
        key = json.dumps([self._name, digest(page.encode("utf-8", "replace")), question])
        return await self._stored.get(
            "summary", key, lambda: self._summariser.summarise(page, question)
        )


class StoredPictures:
    """`fetch`: brings the file at an address."""

    def __init__(self, fetch: Callable[[str], Awaitable[bytes]], stored: Stored):
        self._fetch, self._stored = fetch, stored

    async def __call__(self, url: str) -> bytes:
        async def ask():
            return base64.b64encode(await self._fetch(url)).decode()

        return base64.b64decode(await self._stored.get("picture", url, ask))


class StoredSearch:
    """A text search as a whole: one look into the store in place of one for every page.

    Args of the constructor:
      tool: of which all results are text.
      stored: what was found before.
      name: of all that the results depend on, beside the query and its question.
    """

    def __init__(self, tool: Tool, stored: Stored, name: str):
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
            # Elsewhere, what is not whole is worth another try.
            texts = [[part.text for part in result] for result in made.results]
            await self._stored.put("answer", key, [made.status, made.error, texts])
        return made


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
