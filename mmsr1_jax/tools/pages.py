"""A text search over a JSONL of pages, in this process and without a network.

A line: {"url": .., "title": .., "snippet": .., "summary": ..}; all but one of them may be missing.
"""

import asyncio
import codecs
import json
import pathlib
import sqlite3
import sys
import threading

from mmsr1_jax.tools.passages import words_of
from mmsr1_jax.tools.tool import Observation, Query, Result, text_result

_FIELDS = ("url", "title", "snippet", "summary")


class PagesError(ValueError):
    """A file of pages that cannot be used; the message names it."""


class PageSearch:
    """Ranks pages by BM25 (SQLite's FTS5), the words of title, snippet and summary."""

    def __init__(self, path: str | pathlib.Path, *, results: int = 5):
        """Args: the JSONL, or a directory with a `pages.jsonl`; and how many pages to return.

        Lines that are not pages are named and left out.

        Raises:
          PagesError: no such file, or not one page in it.
        """
        path = pathlib.Path(path)
        if path.is_dir():
            path = path / "pages.jsonl"
        self._results = results
        self._lock = threading.Lock()
        self._pages = sqlite3.connect(":memory:", check_same_thread=False)
        self._pages.execute(
            "CREATE VIRTUAL TABLE page USING fts5(url UNINDEXED, title, snippet, summary)"
        )
        try:
            lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        except OSError as error:
            raise PagesError(f"{path}: {error.strerror or error}") from None
        count = 0
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = _page(line)
            except ValueError as error:
                print(f"{path}, line {number}: left out, {error}", file=sys.stderr)
                continue
            self._pages.execute("INSERT INTO page VALUES (?, ?, ?, ?)", values)
            count += 1
        if not count:
            raise PagesError(f"{path}: no pages in it")

    async def __call__(self, query: Query) -> Observation:
        if query.text is None:
            return Observation(status="failed", error="searches by text only")
        words = words_of(query.text)
        if not words:
            return Observation(status="empty")
        found = await asyncio.to_thread(self._search, words)
        return Observation(status="ok" if found else "empty", results=found)

    def _search(self, words: str) -> list[Result]:
        with self._lock:
            rows = self._pages.execute(
                "SELECT url, title, snippet, summary FROM page WHERE page MATCH ? "
                "ORDER BY bm25(page, 1, 2, 1, 1), rowid LIMIT ?",
                (words, self._results),
            ).fetchall()
        return [
            text_result(url, summary or snippet or title) for url, title, snippet, summary in rows
        ]


def _page(line: bytes) -> list[str]:
    """The fields of one line. Raises ValueError where it is not a page."""
    try:
        page = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(page, dict):
        raise ValueError("not an object")
    values = [page.get(name) or "" for name in _FIELDS]
    if not all(isinstance(value, str) for value in values) or not any(values):
        raise ValueError(f"none of {', '.join(_FIELDS)} is text, or one is something else")
    return [value.encode("utf-8", "replace").decode("utf-8") for value in values]
