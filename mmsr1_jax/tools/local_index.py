"""Local search index: pages and images in one SQLite file, searched without network access.

Pages are ranked by BM25 (SQLite's FTS5) over words of any script (`words.py`). Images are found by
their perceptual hash (`index_builder.py`); a search returns the nearest hashes. If the index was
built with a model, images can be found by that model's embeddings instead (`embedding.py`).
"""

import asyncio
import pathlib
import sqlite3
import threading
from typing import NoReturn

import numpy as np
import PIL.Image

from mmsr1_jax.processing.image_files import ImageError, open_image
from mmsr1_jax.tools import checked_sqlite
from mmsr1_jax.tools.index_builder import (
    EMBEDDING_DTYPE,
    HASH_BYTES,
    INDEX_FILE,
    ImageEmbedder,
    LocalIndexError,
    fill,
    image_hash,
)
from mmsr1_jax.tools.passages import best_passages
from mmsr1_jax.tools.tool import ImageLike, Observation, Query, Result, image_result, text_result
from mmsr1_jax.tools.words import fts_query

_MAX_EMBEDDING_BYTES = 1 << 17
# Maximum Hamming distance of a match. Unrelated images differ in 128 +- 8 bits, and images cropped
# by 5 % in up to 92.
_MAX_DISTANCE = 100
_BUILD_COMMAND = "python -m mmsr1_jax.scripts.index"


class LocalIndex:
    """Index opened for searching, whose methods `text_search` and `image_search` are tools.

    Args:
      path: Directory with an `index.sqlite`, or a `pages.jsonl` file or a directory that contains
        one, which is then indexed in memory.
      max_results: Maximum number of results per search.
      max_chars: Maximum number of characters of a page's text in a result, which consists of the
        paragraphs most relevant to the question.
      embed: Embedding function of the model that the index was built with. If given, images are
        found by embeddings.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        max_results: int = 5,
        max_chars: int = 1500,
        embed: ImageEmbedder | None = None,
    ):
        """Open the index.

        Raises:
          LocalIndexError: The index is missing or malformed, no page can be indexed, or the index
            has no embeddings of the model of `embed`.
        """
        path = pathlib.Path(path)
        self._max_results, self._max_chars, self._embed = max_results, max_chars, embed
        self._lock = threading.Lock()
        self._path = str(path)
        if (path / INDEX_FILE).is_file():
            try:
                self._connection: sqlite3.Connection = checked_sqlite.connect(
                    path / INDEX_FILE, "ro", check_same_thread=False
                )
            except sqlite3.Error as error:
                raise LocalIndexError(f"{self._path}: {error}") from None
        else:
            self._connection = sqlite3.connect(":memory:", check_same_thread=False)
            fill(self._connection, [path / "pages.jsonl" if path.is_dir() else path])
        self._read_images()

    def _read_images(self) -> None:
        """Read the hashes and embeddings of the images from a file that may be untrusted.

        Raises:
          LocalIndexError: The tables are not those of an index, or an image row has values of wrong
            types or sizes. The message names table and row.
        """
        try:
            self._check_tables()
            rows = self._connection.execute(
                f"SELECT rowid, CASE WHEN length(hash) = {HASH_BYTES} THEN hash END, "
                "typeof(title), typeof(thumbnail) FROM image ORDER BY rowid"
            )
            self._rows: list[int] = []
            hashes = bytearray()
            for row, bits, title, thumbnail in rows:
                if not isinstance(bits, bytes):
                    self._invalid_row(row, f"'hash' must be {HASH_BYTES} bytes")
                if title != "text" or thumbnail != "blob":
                    self._invalid_row(row, "'title' must be text and 'thumbnail' bytes")
                self._rows.append(row)
                hashes += bits
            self._hashes = np.frombuffer(bytes(hashes), np.uint64).reshape(-1, HASH_BYTES // 8)
            if self._embed is not None:
                self._check_model(self._embed.fingerprint)
                self._read_embeddings()
        except sqlite3.DatabaseError as error:
            raise LocalIndexError(f"{self._path}: {error}") from None

    def _invalid_row(self, row: int, reason: str) -> NoReturn:
        raise LocalIndexError(f"{self._path}: table image, row {row}: {reason}")

    def _check_tables(self) -> None:
        """Raise LocalIndexError or sqlite3.Error unless the tables are those of an index."""
        checked_sqlite.check_schema(self._connection, ("fts5",))
        self._connection.execute("SELECT url, title, snippet, text FROM page LIMIT 1")
        for table in ("page_words", "image"):
            if not self._connection.execute(f"PRAGMA table_info({table})").fetchall():
                raise LocalIndexError(
                    f"{self._path}: no table {table!r}, as in indexes of earlier versions; rebuild "
                    f"the index: {_BUILD_COMMAND} --pages=.. --images=.. --out=.."
                )

    def _check_model(self, fingerprint: str) -> None:
        """Raise LocalIndexError unless the index has embeddings of a model."""
        row = None
        if self._connection.execute("PRAGMA table_info(embedding_model)").fetchall():
            query = "SELECT substr(fingerprint, 1, 100) FROM embedding_model"
            row = self._connection.execute(query).fetchone()
        command = f"{_BUILD_COMMAND} --images=.. --out=.. --model=DIR"
        if row is None:
            raise LocalIndexError(
                f"{self._path}: no image embeddings, which tools.image_model requires; rebuild the "
                f"index: {command}"
            )
        if row[0] != fingerprint:
            raise LocalIndexError(
                f"{self._path}: the embeddings are of another model ({row[0]}) than "
                f"tools.image_model ({fingerprint}); set tools.image_model to that model, or "
                f"rebuild the index: {command}"
            )

    def _read_embeddings(self) -> None:
        """Read the embeddings as unit vectors, float32[vectors, D], and the vector of each row."""
        # The rows of an image, one per title, share one vector. This saves memory, and rounding
        # errors cannot reorder rows of the same image.
        indices: dict[bytes, int] = {}  # by the bytes of a vector
        self._vector_index = np.zeros(len(self._rows), np.int64)
        rows = self._connection.execute(
            "SELECT rowid, "
            f"CASE WHEN length(embedding) <= {_MAX_EMBEDDING_BYTES} THEN embedding END "
            "FROM image ORDER BY rowid"
        )
        size = 0
        for position, (row, data) in enumerate(rows):
            if not isinstance(data, bytes) or not data or len(data) % EMBEDDING_DTYPE.itemsize:
                self._invalid_row(
                    row, f"'embedding' must be at most {_MAX_EMBEDDING_BYTES} bytes of float16"
                )
            size = size or len(data)
            vector = np.frombuffer(data, EMBEDDING_DTYPE)
            if len(data) != size or not np.isfinite(vector).all() or not vector.any():
                self._invalid_row(
                    row, f"'embedding' must be {size} bytes of finite numbers, not all 0"
                )
            self._vector_index[position] = indices.setdefault(data, len(indices))
        vectors = np.frombuffer(b"".join(indices), EMBEDDING_DTYPE).astype(np.float32)
        vectors = vectors.reshape(len(indices), -1) if indices else np.zeros((0, 0), np.float32)
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    async def text_search(self, query: Query) -> Observation:
        """Return pages that match the query."""
        match_query = fts_query(query.text or "")
        if not match_query:
            return Observation(status="empty")
        results = await asyncio.to_thread(self._find_pages, match_query, query.question)
        return Observation(status="ok" if results else "empty", results=results)

    async def image_search(self, query: Query) -> Observation:
        """Return images similar to the first image of the question, with their titles."""
        if not query.images:
            return Observation(status="failed", error="the question has no image")
        try:
            results = await asyncio.to_thread(self._find_images, query.images[0])
        except ImageError as error:
            return Observation(status="failed", error=str(error))
        return Observation(status="ok" if results else "empty", results=results)

    def _find_pages(self, match_query: str, question: str) -> list[Result]:
        with self._lock:
            rows = self._connection.execute(
                "SELECT url, page.title, page.snippet, page.text FROM page_words "
                "JOIN page ON page.rowid = page_words.rowid WHERE page_words MATCH ? "
                "ORDER BY bm25(page_words, 2, 1, 1), page.rowid LIMIT ?",
                (match_query, self._max_results),
            ).fetchall()
        return [
            text_result(url, best_passages(text or snippet or title, question, self._max_chars))
            for url, title, snippet, text in rows
        ]

    def _find_images(self, image: ImageLike) -> list[Result]:
        query = open_image(image)
        if self._embed is None:
            nearest = self._nearest_by_hash(query)
        else:
            nearest = self._nearest_by_embedding(query, self._embed)
        results = []
        for index in nearest:
            with self._lock:
                title, thumbnail = self._connection.execute(
                    "SELECT title, thumbnail FROM image WHERE rowid = ?", (self._rows[index],)
                ).fetchone()
            results.append(image_result(thumbnail, title))
        return results

    def _nearest_by_hash(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the row indices of the images within `_MAX_DISTANCE`, nearest first."""
        query = np.frombuffer(image_hash(image), np.uint64)
        distance = np.bitwise_count(self._hashes ^ query).sum(axis=1, dtype=np.int64)
        nearest = np.argsort(distance, kind="stable")[: self._max_results]
        return nearest[distance[nearest] <= _MAX_DISTANCE]

    def _nearest_by_embedding(self, image: PIL.Image.Image, embed: ImageEmbedder) -> np.ndarray:
        """Return the row indices of the nearest images by cosine similarity.

        No minimum similarity is required, since the similarity of unrelated images depends on the
        model, and search services also return their best matches, however poor.
        """
        if not self._rows:
            return np.zeros(0, np.int64)
        similarity = (self._vectors @ embed(image))[self._vector_index]
        return np.argsort(-similarity, kind="stable")[: self._max_results]
