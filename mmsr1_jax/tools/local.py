"""Local search index: pages and images in one SQLite file, searched without network access.

Pages are ranked by BM25 (SQLite's FTS5) over words of any script (`words.py`). Images are found by
their perceptual hash, which records for each cell of a 16 x 16 grid whether the image gets brighter
to the right. It is robust to scaling, compression and slight cropping; a search returns the nearest
hashes. If the index was built with a model, images can be found by that model's embeddings instead
(`tools/embedding.py`).

    index.sqlite    page(url, title, snippet, text)    page_words: their search forms, by row
                    picture(hash, title, link, thumbnail, embedding)    embedded(model)
"""

import asyncio
import contextlib
import functools
import io
import pathlib
import sqlite3
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import imagehash
import numpy as np
import PIL.Image

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.processing.image_files import ImageError, open_image
from mmsr1_jax.tools import checked_sqlite
from mmsr1_jax.tools.passages import best_passages
from mmsr1_jax.tools.tool import Observation, Picture, Query, Result, image_result, text_result
from mmsr1_jax.tools.words import TOKENIZER, search_form, words_of
from mmsr1_jax.utils import checked_json, outputs
from mmsr1_jax.utils.checked_json import valid_text
from mmsr1_jax.utils.files import check_regular, resolve_inside

FILE = "index.sqlite"
_SIDE = 16  # side length of the hash in bits
_HASH_BYTES = _SIDE * _SIDE // 8
_MAX_EMBEDDING = 1 << 17  # bytes
# Maximum Hamming distance of a match. Unrelated images differ in 128 +- 8 bits, and images cropped
# by 5 % in up to 92.
_MOST_BITS = 100
_THUMBNAIL = 336  # pixels of the longer side
_SCHEMA = f"""
CREATE TABLE page (url TEXT, title TEXT, snippet TEXT, text TEXT);
CREATE VIRTUAL TABLE page_words USING fts5(
  title, snippet, text, content = '', tokenize = "{TOKENIZER}"
);
CREATE TABLE picture (hash BLOB, title TEXT, link TEXT, thumbnail BLOB, embedding BLOB);
CREATE TABLE embedded (model TEXT);
"""
_EMBEDDING = np.dtype("<f2")  # as stored in the file


class LocalIndexError(UserError):
    """Unusable index, or unusable input for an index; the message names it."""


class Embed(Protocol):
    """Image embedding function (`tools/embedding.py`), called from several threads.

    Attributes:
      fingerprint: String that identifies the model.
    """

    fingerprint: str

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        """Return float32[D] of length 1. Raises ImageError if the image cannot be embedded."""


def build(
    out: str | pathlib.Path,
    pages: Iterable[str | pathlib.Path] = (),
    pictures: Iterable[str | pathlib.Path] = (),
    *,
    embed: Embed | None = None,
    image_roots: Sequence[str] = (),
) -> tuple[int, int]:
    """Write `out/index.sqlite` atomically.

    Invalid lines are reported and skipped.

    Args:
      out: Output directory, which is created if missing.
      pages: JSONL files with one {"url", "title", "snippet", "summary" or "text"} per line. One of
        the fields other than "url" is required.
      pictures: JSONL files with one {"image": PATH, "title" or "titles", "link"} per line. Paths
        are relative to the folder of the JSONL file and must stay inside it, since an index exposes
        its images to others and the lines may be untrusted.
      embed: Embedding function. If given, images can also be searched by embeddings.
      image_roots: Further directories in which images may lie.

    Returns:
      Number of pages, and number of image titles.

    Raises:
      LocalIndexError: A file cannot be read, or no file contains an entry.
      LockedError: Another process is writing to `out`.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)  # kept even if nothing is written
    with (
        outputs.lock(out),
        outputs.new_file(out / FILE) as partial,
        contextlib.closing(sqlite3.connect(partial)) as connection,
    ):
        counts = _fill(connection, pages, pictures, embed, image_roots)
        connection.commit()
    return counts


def _fill(
    connection: sqlite3.Connection, pages, pictures, embed: Embed | None, image_roots: Sequence[str]
) -> tuple[int, int]:
    connection.executescript(_SCHEMA)
    if embed is not None:
        connection.execute("INSERT INTO embedded VALUES (?)", (embed.fingerprint,))
    to_rows = functools.partial(_picture, embed=embed, image_roots=image_roots)
    page_rows = (row for path in pages for row in _read(path, _page))
    picture_rows = (row for path in pictures for row in _read(path, to_rows))
    connection.create_function("search_form", 1, search_form, deterministic=True)
    connection.executemany("INSERT INTO page VALUES (?, ?, ?, ?)", page_rows)
    connection.execute(
        "INSERT INTO page_words (rowid, title, snippet, text) SELECT rowid, search_form(title), "
        "search_form(snippet), search_form(text) FROM page ORDER BY rowid"
    )
    connection.executemany("INSERT INTO picture VALUES (?, ?, ?, ?, ?)", picture_rows)
    counts = tuple(
        connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("page", "picture")
    )
    if not any(counts):
        files = ", ".join(map(str, [*pages, *pictures]))
        raise LocalIndexError(f"{files or 'no files'}: neither pages nor pictures in it")
    return counts


class LocalIndex:
    """Index opened for searching, whose methods `text_search` and `image_search` are tools.

    Args:
      path: Directory with an `index.sqlite`, or a `pages.jsonl` file or a directory that contains
        one, which is then indexed in memory.
      results: Maximum number of results per search.
      chars: Maximum number of characters of a page's text in a result, which consists of the
        paragraphs most relevant to the question.
      embed: Embedding function of the model that the index was built with. If given, images are
        found by embeddings.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        results: int = 5,
        chars: int = 1500,
        embed: Embed | None = None,
    ):
        """Open the index.

        Raises:
          LocalIndexError: The index is missing or malformed, no page can be indexed, or the index
            has no embeddings of the model of `embed`.
        """
        path = pathlib.Path(path)
        self._results, self._chars, self._embed = results, chars, embed
        self._lock = threading.Lock()
        self._file = str(path)
        if (path / FILE).is_file():
            try:
                connection = checked_sqlite.connect(path / FILE, "ro", check_same_thread=False)
            except sqlite3.Error as error:
                raise LocalIndexError(f"{self._file}: {error}") from None
            self._open(connection)
        else:
            connection = sqlite3.connect(":memory:", check_same_thread=False)
            _fill(connection, [path / "pages.jsonl" if path.is_dir() else path], [], None, ())
            self._open(connection)

    def _open(self, connection: sqlite3.Connection) -> None:
        """Read the hashes and embeddings of the images from a file that may be untrusted.

        Raises:
          LocalIndexError: The tables are not those of an index, or an image row has values of wrong
            types or sizes. The message names table and row.
        """
        self._connection = connection
        try:
            checked_sqlite.check_schema(connection, ("fts5",))
            self._check_pages(connection)
            rows = connection.execute(
                f"SELECT rowid, CASE WHEN length(hash) = {_HASH_BYTES} THEN hash END, "
                "typeof(title), typeof(thumbnail) FROM picture ORDER BY rowid"
            )
            self._ids, hashes = [], bytearray()
            for row, bits, title, thumbnail in rows:
                if not isinstance(bits, bytes):
                    self._refuse(row, f"'hash' must be {_HASH_BYTES} bytes")
                if title != "text" or thumbnail != "blob":
                    self._refuse(row, "'title' must be text and 'thumbnail' bytes")
                self._ids.append(row)
                hashes += bits
            self._hashes = np.frombuffer(bytes(hashes), np.uint64).reshape(-1, _HASH_BYTES // 8)
            if self._embed is not None:
                self._open_embeddings(self._embed.fingerprint)
        except sqlite3.DatabaseError as error:
            raise LocalIndexError(f"{self._file}: {error}") from None

    def _refuse(self, row: int, reason: str) -> None:
        raise LocalIndexError(f"{self._file}: table picture, row {row}: {reason}")

    def _check_pages(self, connection: sqlite3.Connection) -> None:
        connection.execute("SELECT url, title, snippet, text FROM page LIMIT 1")
        if not connection.execute("PRAGMA table_info(page_words)").fetchall():
            raise LocalIndexError(
                f"{self._file}: an index of an earlier version, whose pages are not found in all "
                "languages; make it anew: python -m mmsr1_jax.scripts.index --pages=.. "
                "--images=.. --out=.."
            )

    def _open_embeddings(self, model: str) -> None:
        made = None
        if self._connection.execute("PRAGMA table_info(embedded)").fetchall():
            made = self._connection.execute("SELECT substr(model, 1, 100) FROM embedded").fetchone()
        how = "python -m mmsr1_jax.scripts.index --images=.. --out=.. --model=DIR"
        if made is None:
            raise LocalIndexError(
                f"{self._file}: has no embeddings of pictures, which tools.image_model asks for; "
                f"make it anew: {how}"
            )
        if made[0] != model:
            raise LocalIndexError(
                f"{self._file}: its embeddings were made with another model ({made[0]}) than "
                f"tools.image_model ({model}); name that one, or make the index anew: {how}"
            )
        # The rows of an image, one per title, share one vector. This saves memory, and rounding
        # errors cannot reorder rows of the same image.
        numbers: dict[bytes, int] = {}
        self._vector_of = np.zeros(len(self._ids), np.int64)
        rows = self._connection.execute(
            f"SELECT rowid, CASE WHEN length(embedding) <= {_MAX_EMBEDDING} THEN embedding END "
            "FROM picture ORDER BY rowid"
        )
        size = 0
        for place, (row, data) in enumerate(rows):
            if not isinstance(data, bytes) or not data or len(data) % _EMBEDDING.itemsize:
                self._refuse(row, f"'embedding' must be at most {_MAX_EMBEDDING} bytes of float16")
            size = size or len(data)
            vector = np.frombuffer(data, _EMBEDDING)
            if len(data) != size or not np.isfinite(vector).all() or not vector.any():
                self._refuse(row, f"'embedding' must be {size} bytes of finite numbers, not all 0")
            self._vector_of[place] = numbers.setdefault(data, len(numbers))
        vectors = np.frombuffer(b"".join(numbers), _EMBEDDING).astype(np.float32)
        vectors = vectors.reshape(len(numbers), -1) if numbers else np.zeros((0, 0), np.float32)
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    async def text_search(self, query: Query) -> Observation:
        """Return pages that match the query."""
        words = words_of(query.text or "")
        found = await asyncio.to_thread(self._find_pages, words, query.question) if words else []
        return Observation(status="ok" if found else "empty", results=found)

    async def image_search(self, query: Query) -> Observation:
        """Return images similar to the first image of the question, with their titles."""
        if not query.images:
            return Observation(status="failed", error="the question has no picture")
        try:
            found = await asyncio.to_thread(self._find_pictures, query.images[0])
        except ImageError as error:
            return Observation(status="failed", error=str(error))
        return Observation(status="ok" if found else "empty", results=found)

    def _find_pages(self, words: str, question: str) -> list[Result]:
        with self._lock:
            rows = self._connection.execute(
                "SELECT url, page.title, page.snippet, page.text FROM page_words "
                "JOIN page ON page.rowid = page_words.rowid WHERE page_words MATCH ? "
                "ORDER BY bm25(page_words, 2, 1, 1), page.rowid LIMIT ?",
                (words, self._results),
            ).fetchall()
        return [
            text_result(url, best_passages(text or snippet or title, question, self._chars))
            for url, title, snippet, text in rows
        ]

    def _find_pictures(self, image: Picture) -> list[Result]:
        image = open_image(image)
        nearest = self._by_hash(image) if self._embed is None else self._by_embedding(image)
        found = []
        for number in nearest:
            with self._lock:
                title, thumbnail = self._connection.execute(
                    "SELECT title, thumbnail FROM picture WHERE rowid = ?", (self._ids[number],)
                ).fetchone()
            found.append(image_result(thumbnail, title))
        return found

    def _by_hash(self, image: PIL.Image.Image) -> np.ndarray:
        wanted = np.frombuffer(hash_of(image), np.uint64)
        distance = np.bitwise_count(self._hashes ^ wanted).sum(axis=1, dtype=np.int64)
        nearest = np.argsort(distance, kind="stable")[: self._results]
        return nearest[distance[nearest] <= _MOST_BITS]

    def _by_embedding(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the row indices of the nearest images by cosine similarity.

        No minimum similarity is required, since the similarity of unrelated images depends on the
        model, and search services also return their best matches, however poor.
        """
        if not self._ids:
            return np.zeros(0, np.int64)
        similarity = (self._vectors @ self._embed(image))[self._vector_of]
        return np.argsort(-similarity, kind="stable")[: self._results]


def hash_of(image: PIL.Image.Image) -> bytes:
    """Return the 256-bit difference hash (dHash) of an image."""
    return np.packbits(imagehash.dhash(image, hash_size=_SIDE).hash).tobytes()


def _read(path: str | pathlib.Path, parse) -> Iterator[tuple]:
    """Yield the rows that `parse(object, folder)` makes of a JSONL file; report invalid lines."""
    path = pathlib.Path(path)
    try:
        yield from _rows(path, checked_json.jsonl_lines(path), parse)
    except (OSError, checked_json.FormatError) as error:
        raise LocalIndexError(f"{path}: {checked_json.error_reason(error)}") from None


def _rows(path: pathlib.Path, lines: Iterable[tuple[int, bytes]], parse) -> Iterator[tuple]:
    for number, line in lines:
        try:
            entry = checked_json.loads(line, surrogates=True)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
            yield from parse(entry, path.parent)
        except ValueError as error:
            print(f"{path}, line {number}: left out, {error}", file=sys.stderr)


def _page(entry: dict, _: pathlib.Path) -> list[tuple]:
    values = [_text(entry, name) for name in ("url", "title", "snippet", "text", "summary")]
    if not any(values[1:]):
        raise ValueError("neither title, snippet, text nor summary")
    return [(*values[:3], values[3] or values[4])]


def _picture(
    entry: dict, folder: pathlib.Path, embed: Embed | None, image_roots: Sequence[str]
) -> list[tuple]:
    path, titles = _text(entry, "image"), entry.get("titles", [entry.get("title")])
    if not path:
        raise ValueError("no 'image'")
    if not isinstance(titles, list) or not titles or not all(isinstance(t, str) for t in titles):
        raise ValueError("'title' must be text, or 'titles' a list of texts")
    file = resolve_inside(path, folder, image_roots, allow="--image_roots")
    check_regular(file)
    image = open_image(file)
    bits = hash_of(image)
    embedding = None if embed is None else embed(image).astype(_EMBEDDING).tobytes()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small = io.BytesIO()
    image.save(small, "jpeg", quality=85)
    link, thumbnail = _text(entry, "link"), small.getvalue()
    return [(bits, valid_text(title), link, thumbnail, embedding) for title in titles]


def _text(entry: dict, name: str) -> str:
    value = entry.get(name) or ""
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is not text")
    return valid_text(value)
