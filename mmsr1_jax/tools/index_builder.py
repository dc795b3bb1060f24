"""Builder of the local index: pages and images from JSONL files into one SQLite file.

    index.sqlite    page(url, title, snippet, text)    page_words: their search forms, by row
                    image(hash, title, link, thumbnail, embedding)    embedding_model(fingerprint)

The hash of an image records for each cell of a 16 x 16 grid whether the image gets brighter to the
right. It is robust to scaling, compression and slight cropping.
"""

import contextlib
import functools
import io
import pathlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import imagehash
import numpy as np
import PIL.Image

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.processing.image_files import open_image
from mmsr1_jax.tools.words import TOKENIZER, search_form
from mmsr1_jax.utils import checked_json, outputs
from mmsr1_jax.utils.checked_json import valid_text
from mmsr1_jax.utils.files import check_regular, resolve_inside
from mmsr1_jax.utils.logs import log

INDEX_FILE = "index.sqlite"
_HASH_SIDE = 16  # bits
HASH_BYTES = _HASH_SIDE * _HASH_SIDE // 8
_THUMBNAIL_SIDE = 336  # maximum pixels of the longer side
SCHEMA = f"""
CREATE TABLE page (url TEXT, title TEXT, snippet TEXT, text TEXT);
CREATE VIRTUAL TABLE page_words USING fts5(
  title, snippet, text, content = '', tokenize = "{TOKENIZER}"
);
CREATE TABLE image (hash BLOB, title TEXT, link TEXT, thumbnail BLOB, embedding BLOB);
CREATE TABLE embedding_model (fingerprint TEXT);
"""
EMBEDDING_DTYPE = np.dtype("<f2")  # in the file


class LocalIndexError(UserError):
    """Unusable index, or unusable input for an index; the message names it."""


class ImageEmbedder(Protocol):
    """Image embedding function (`embedding.py`), called from several threads.

    Attributes:
      fingerprint: String that identifies the model.
    """

    fingerprint: str

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        """Return float32[D] of length 1. Raises ImageError if the image cannot be embedded."""
        ...


def build_index(
    out: str | pathlib.Path,
    pages: Iterable[str | pathlib.Path] = (),
    images: Iterable[str | pathlib.Path] = (),
    *,
    embed: ImageEmbedder | None = None,
    image_roots: Sequence[str] = (),
) -> tuple[int, int]:
    """Write `out/index.sqlite` atomically.

    Invalid lines are skipped and logged.

    Args:
      out: Output directory, which is created if missing.
      pages: JSONL files with one {"url", "title", "snippet", "summary" or "text"} per line. One of
        the fields other than "url" is required.
      images: JSONL files with one {"image": PATH, "title" or "titles", "link"} per line. Paths
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
        outputs.new_file(out / INDEX_FILE) as partial,
        contextlib.closing(sqlite3.connect(partial)) as connection,
    ):
        counts = fill(connection, pages, images, embed=embed, image_roots=image_roots)
        connection.commit()
    return counts


def fill(
    connection: sqlite3.Connection,
    pages: Iterable[str | pathlib.Path] = (),
    images: Iterable[str | pathlib.Path] = (),
    *,
    embed: ImageEmbedder | None = None,
    image_roots: Sequence[str] = (),
) -> tuple[int, int]:
    """Write an index to an empty database. See `build_index`."""
    pages, images = list(pages), list(images)
    connection.executescript(SCHEMA)
    if embed is not None:
        connection.execute("INSERT INTO embedding_model VALUES (?)", (embed.fingerprint,))
    parse_image = functools.partial(_image_rows, embed=embed, image_roots=image_roots)
    page_rows = (row for path in pages for row in _read_rows(path, _page_rows))
    image_rows = (row for path in images for row in _read_rows(path, parse_image))
    connection.create_function("search_form", 1, search_form, deterministic=True)
    connection.executemany("INSERT INTO page VALUES (?, ?, ?, ?)", page_rows)
    connection.execute(
        "INSERT INTO page_words (rowid, title, snippet, text) SELECT rowid, search_form(title), "
        "search_form(snippet), search_form(text) FROM page ORDER BY rowid"
    )
    connection.executemany("INSERT INTO image VALUES (?, ?, ?, ?, ?)", image_rows)
    (num_pages,) = connection.execute("SELECT count(*) FROM page").fetchone()
    (num_titles,) = connection.execute("SELECT count(*) FROM image").fetchone()
    if not num_pages and not num_titles:
        files = ", ".join(map(str, [*pages, *images]))
        raise LocalIndexError(f"{files or 'no files'}: no valid page and no valid image")
    return num_pages, num_titles


def image_hash(image: PIL.Image.Image) -> bytes:
    """Return the 256-bit difference hash (dHash) of an image."""
    return np.packbits(imagehash.dhash(image, hash_size=_HASH_SIDE).hash).tobytes()


_Row = tuple[str | bytes | None, ...]
_Parser = Callable[[dict[str, Any], pathlib.Path], list[_Row]]


def _read_rows(path: str | pathlib.Path, parse: _Parser) -> Iterator[_Row]:
    """Yield the rows that `parse(object, folder)` makes of a JSONL file; log invalid lines."""
    path = pathlib.Path(path)
    try:
        yield from _parse_lines(path, checked_json.jsonl_lines(path), parse)
    except (OSError, checked_json.FormatError) as error:
        raise LocalIndexError(f"{path}: {checked_json.error_reason(error)}") from None


def _parse_lines(
    path: pathlib.Path, lines: Iterable[tuple[int, bytes]], parse: _Parser
) -> Iterator[_Row]:
    for line_number, line in lines:
        try:
            entry = checked_json.loads(line, surrogates=True)
            if not isinstance(entry, dict):
                raise ValueError("not a JSON object")
            yield from parse(entry, path.parent)
        except ValueError as error:
            log.warning("%s, line %d: skipped: %s", path, line_number, error)


def _page_rows(entry: dict[str, Any], _: pathlib.Path) -> list[_Row]:
    values = [_text(entry, name) for name in ("url", "title", "snippet", "text", "summary")]
    if not any(values[1:]):
        raise ValueError("one of 'title', 'snippet', 'text' and 'summary' is required")
    return [(*values[:3], values[3] or values[4])]


def _image_rows(
    entry: dict[str, Any],
    folder: pathlib.Path,
    embed: ImageEmbedder | None,
    image_roots: Sequence[str],
) -> list[_Row]:
    path, titles = _text(entry, "image"), entry.get("titles", [entry.get("title")])
    if not path:
        raise ValueError("'image' is missing")
    if not isinstance(titles, list) or not titles or not all(isinstance(t, str) for t in titles):
        raise ValueError("'title' must be a string, or 'titles' a list of strings")
    file = resolve_inside(path, folder, image_roots, allow="--image_roots")
    check_regular(file)
    image = open_image(file)
    bits = image_hash(image)
    embedding = None if embed is None else embed(image).astype(EMBEDDING_DTYPE).tobytes()
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    jpeg = io.BytesIO()
    image.save(jpeg, "jpeg", quality=85)
    link, thumbnail = _text(entry, "link"), jpeg.getvalue()
    return [(bits, valid_text(title), link, thumbnail, embedding) for title in titles]


def _text(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name) or ""
    if not isinstance(value, str):
        raise ValueError(f"'{name}' must be a string")
    return valid_text(value)
