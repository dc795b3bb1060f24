"""Picture search by words: pictures whose title names a concept, with the pages that show them.

words ──► hits ──► picture, picture, ..   one after another, until enough of them can be used

Used by `construct`. The policy's own image search goes the other way (`image_search.py`).
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable

import PIL.Image

from mmsr1_jax.processing.image_files import ImageError, process_image_async
from mmsr1_jax.tools import checked_sqlite
from mmsr1_jax.tools.cached_tool import CachedCalls, digest
from mmsr1_jax.tools.index_builder import INDEX_FILE, LocalIndexError, image_hash
from mmsr1_jax.tools.links import display_link, one_line
from mmsr1_jax.tools.services import PictureFinder, PictureHit
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.tools.words import TOKENIZER, fts_query, search_form

_MAX_PIXELS = 50_000_000  # per file
_PREVIEW_SIDE = 320  # maximum pixels of the longer side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that can be used.

    Attributes:
      jpeg: JPEG file without metadata.
      name: Digest of the file.
      hash: Perceptual hash, see `index_builder.image_hash`.
      title: Title of the picture or of its page, one line.
      link: URL of the page.
      licence: Licence, as far as it is known.
    """

    jpeg: bytes = dataclasses.field(repr=False)
    name: str
    hash: bytes
    title: str
    link: str
    licence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureFilter:
    """Requirements on pictures; see the settings of the same names in `config/construction.py`."""

    min_side: int
    max_side: int
    max_ratio: float
    licences: tuple[str, ...]

    def licence_problem(self, licence: str) -> str | None:
        """Return why a licence is not allowed, or None."""
        if not self.licences or any(
            word.casefold() in licence.casefold() for word in self.licences
        ):
            return None
        return f"licence {licence[:60]!r}" if licence else "licence unknown"

    def __call__(self, image: PIL.Image.Image) -> tuple[bytes, bytes] | str:
        """Return (JPEG file, hash), or the reason why the picture is not used."""
        short, long = sorted(image.size)
        if short < self.min_side:
            return "picture too small"
        if long > self.max_ratio * short:
            return "picture too elongated"
        return _shrink(image, self.max_side, quality=95), image_hash(image)


def preview(image: PIL.Image.Image) -> bytes:
    """Return a small version of an image as a JPEG file, for pages that show many."""
    return _shrink(image, _PREVIEW_SIDE, quality=80)


def _shrink(image: PIL.Image.Image, max_side: int, quality: int) -> bytes:
    """Shrink an image in place, and return it as a JPEG file without metadata."""
    image.thumbnail((max_side, max_side))
    file = io.BytesIO()
    image.info = {}
    image.save(file, "jpeg", quality=quality, subsampling=0)
    return file.getvalue()


class PictureSearch:
    """Picture search over a web service.

    Args:
      finder: Client that finds pictures.
      fetch: Function that fetches a picture.
      cached_calls: Cache of hits.
      name: Name of the service, part of the cache key.
      free: Whether only pictures with a free licence are requested.
    """

    def __init__(
        self,
        finder: PictureFinder,
        fetch: Callable[[str], Awaitable[bytes]],
        cached_calls: CachedCalls,
        name: str,
        *,
        free: bool,
    ):
        self._finder, self._fetch, self._cached_calls = finder, fetch, cached_calls
        self._name, self._free = name, free

    async def __call__(self, query: str, count: int) -> list[PictureHit]:
        """Return up to `count` hits. Raises WebError."""

        async def call() -> list[tuple[str, ...]]:
            hits = await self._finder.pictures(query, count, free=self._free)
            return [dataclasses.astuple(hit) for hit in hits]

        key = json.dumps([self._name, query, count, self._free])
        return [PictureHit(*hit) for hit in await self._cached_calls.get("pictures", key, call)]

    async def fetch(self, hit: PictureHit) -> bytes:
        """Return the picture's file, or that of its thumbnail. Raises WebError."""
        try:
            return await self._fetch(hit.url)
        except WebError:
            if not hit.thumbnail:
                raise
        return await self._fetch(hit.thumbnail)


class LocalPictureSearch:
    """Picture search over the titles of a local index, which knows no licences.

    Args:
      path: Directory of the index.
    """

    def __init__(self, path: str | pathlib.Path):
        """Open the index. Raises LocalIndexError."""
        self._path = pathlib.Path(path) / INDEX_FILE
        try:
            self._index = checked_sqlite.connect(self._path, "ro", check_same_thread=False)
            checked_sqlite.check_schema(self._index, ("fts5",))
            rows = self._index.execute(
                "SELECT rowid, title, link FROM image WHERE typeof(title) = 'text' "
                "AND typeof(thumbnail) = 'blob' ORDER BY rowid"
            ).fetchall()
        except sqlite3.Error as error:
            raise LocalIndexError(f"{self._path}: {error}") from None
        self._rows = {str(row): (title, link) for row, title, link in rows}
        self._titles = sqlite3.connect(":memory:", check_same_thread=False)
        self._titles.execute(
            f"CREATE VIRTUAL TABLE title USING fts5(text, content = '', tokenize = \"{TOKENIZER}\")"
        )
        self._titles.executemany(
            "INSERT INTO title (rowid, text) VALUES (?, ?)",
            ((row, search_form(title)) for row, title, _ in rows),
        )

    async def __call__(self, query: str, count: int) -> list[PictureHit]:
        """Return up to `count` pictures with all words of the query in their title."""
        match = fts_query(query).replace(" OR ", " AND ")
        if not match:
            return []
        rows = self._titles.execute(
            "SELECT rowid FROM title WHERE title MATCH ? ORDER BY bm25(title), rowid LIMIT ?",
            (match, count),
        ).fetchall()
        hits = []
        for (row,) in rows:
            title, link = self._rows[str(row)]
            hits.append(PictureHit(link if isinstance(link, str) else "", title, str(row), ""))
        return hits

    async def fetch(self, hit: PictureHit) -> bytes:
        """Return the picture's file. Raises WebError."""
        with contextlib.suppress(sqlite3.Error):
            query = "SELECT thumbnail FROM image WHERE rowid = ?"
            row = self._index.execute(query, (int(hit.url),)).fetchone()
            if row is not None and isinstance(row[0], bytes):
                return row[0]
        raise WebError("the picture cannot be read from the index")


async def usable_pictures(
    search: PictureSearch | LocalPictureSearch, query: str, count: int, allowed: PictureFilter
) -> AsyncIterator[Picture | str]:
    """Yield the pictures found for a query, in order, or the reason why one is not used.

    Args:
      search: Picture search.
      query: Search query.
      count: Maximum number of pictures that are fetched.
      allowed: Requirements on a picture.

    Raises:
      WebError: The search failed.
    """
    for hit in await search(query, count):
        if problem := allowed.licence_problem(hit.licence):
            yield problem
            continue
        try:
            data = await search.fetch(hit)
            result = await process_image_async(data, allowed, max_pixels=_MAX_PIXELS)
        except WebError:
            result = "picture cannot be fetched"
        except ImageError:
            result = "picture cannot be decoded"
        if isinstance(result, str):
            yield result
            continue
        jpeg, bits = result
        yield Picture(
            jpeg=jpeg, name=digest(jpeg), hash=bits, title=one_line(hit.title),
            link=display_link(hit.link), licence=one_line(hit.licence),
        )  # fmt: skip
