"""Published cache of image search results for FVQA, by example id.

Two formats are read: the released pickle, which is loaded without running code in it (classes and
functions are replaced by inert objects), and JSON, {id: [{"title", "thumbnail_url"}, ..]}.
"""

import itertools
import mmap
import os
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any

import PIL.Image

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.processing.image_files import upright_rgb
from mmsr1_jax.tools.first_completed import first_that_work
from mmsr1_jax.tools.tool import Observation, Picture, Query, Result, image_result
from mmsr1_jax.utils import checked_json, checked_pickle, workers

# Generous limits: reading the released file takes seconds.
_LIMITS = workers.Limits(cpu_seconds=1200.0, wall_seconds=7200.0, memory_bytes=64 << 30)
_MAX_PIXELS = 20_000_000
_MAX_BYTES = 8_000_000_000  # per pickle, which may hold images as raw pixels
_MAX_JSON = 1_000_000_000
_MAX_OF_EXAMPLE = 100  # results; further ones are ignored
_MAX_RESULTS = 2_000_000
# Bits per pixel in Pillow's raw encoding, for the modes that web images may have.
_BITS = {"1": 1, "L": 8, "P": 8, "LA": 16, "PA": 16, "I;16": 16, "RGB": 24, "YCbCr": 24}
_BITS |= {"LAB": 24, "HSV": 24, "RGBA": 32, "RGBX": 32, "CMYK": 32, "I": 32, "F": 32}


class CacheError(UserError):
    """A file that is not a valid cache; the message names it."""


class FvqaCache:
    """Image search tool that looks up cached results by `Query.example`.

    Args:
      path: Path of the cache, a pickle or a `.json` file.
      fetch: Function that fetches a thumbnail from its URL.
      results: Maximum number of results in an observation.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        fetch: Callable[[str], Awaitable[bytes]],
        *,
        results: int = 5,
    ):
        """Load the cache. Raises CacheError."""
        self._fetch, self._results = fetch, results
        try:  # in a worker, like all processing of untrusted bytes
            self._entries = workers.run(read, os.path.abspath(path), limits=_LIMITS)
        except workers.WorkerError as error:
            raise CacheError(f"{path}: reading it {error}") from None

    async def __call__(self, query: Query) -> Observation:
        entries = self._entries.get(query.example)
        if entries is None:
            return Observation(status="failed", error=f"{query.example!r} is not in the cache")
        if not entries:
            return Observation(status="empty")
        results, errors = await first_that_work(entries, self._results, self._result)
        if not results:
            return Observation(status="failed", error=f"no picture could be had: {errors[0]}")
        return Observation(results=results, error="; ".join(errors) or None)

    async def _result(self, entry: tuple[str, Picture]) -> Result:
        title, picture = entry
        if isinstance(picture, str):
            picture = await self._fetch(picture)
        return image_result(picture, title)


def read(path: str | pathlib.Path) -> dict[str, list[tuple[str, Picture]]]:
    """Return (title, image or its URL) of up to 100 results per example.

    Raises:
      CacheError: The file cannot be read, is not a valid cache, has too many results, or has images
        with more bytes than the file.
    """
    path = pathlib.Path(path)
    try:
        if path.suffix == ".json":
            data = checked_json.load(path, dict[str, Any], max_bytes=_MAX_JSON, surrogates=True)
            return _Entries(0).of(data)
        with open(path, "rb") as file:
            if not path.stat().st_size:
                raise CacheError("an empty file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = checked_pickle.loads(
                    data, _RestrictedUnpickler(len(data)).find, max_bytes=_MAX_BYTES
                )
                if not isinstance(found, dict):
                    raise CacheError(f"holds a {type(found).__name__}, not entries by id")
                return _Entries(len(data)).of(found)
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror or error}") from None
    except checked_json.FormatError as error:
        raise CacheError(str(error)) from None
    except checked_pickle.PickleError as error:
        raise CacheError(f"{path}: not a pickle that can be read: {error}") from None
    except CacheError as error:
        raise CacheError(f"{path}: {error}") from None


class _Object:
    """Stand-in for an instance of a class in a pickle, which keeps only its state."""

    def __init__(self, *arguments):
        self.state = arguments

    def __setstate__(self, state: Any):
        self.state = state


class _RestrictedUnpickler:
    """Inert stand-ins for the classes and functions that a pickle names.

    Args:
      room: Maximum total number of characters that the pickle may encode as bytes.
    """

    def __init__(self, room: int):
        self._room = room

    def find(self, module: str, name: str) -> Any:
        return self._encode if (module, name) == ("_codecs", "encode") else _Object

    def _encode(self, text: str, encoding: str) -> bytes:
        """Return the bytes that pickles of protocol 2 and older write as text."""
        self._room -= len(text)
        if self._room < 0:
            raise checked_pickle.PickleError("encodes more text than the file holds")
        return text.encode("latin-1")


class _Entries:
    """Converter from raw entries to results, which converts each object of a pickle only once.

    Args:
      room: Maximum total number of bytes of pixels in all images.
    """

    def __init__(self, room: int):
        self._room, self._results = room, 0
        self._pictures: dict[int, Picture | None] = {}

    def of(self, data: dict) -> dict[str, list[tuple[str, Picture]]]:
        return {str(key): self._entries(value) for key, value in data.items()}

    def _entries(self, value: Any) -> list[tuple[str, Picture]]:
        """Return the results of one example, in either format; unusable entries are skipped."""
        if isinstance(value, dict):
            titles = value.get("tool_returned_web_title_list")
            pictures = value.get("tool_returned_images_urls")
            if not all(isinstance(some, (list, tuple)) for some in (titles, pictures)):
                return []
            pairs = zip(titles, map(self._picture, pictures), strict=False)
        elif isinstance(value, list):
            known = (entry for entry in value if isinstance(entry, dict))
            pairs = ((entry.get("title"), entry.get("thumbnail_url")) for entry in known)
        else:
            return []
        found = [
            (checked_json.valid_text(title), picture)
            for title, picture in itertools.islice(pairs, _MAX_OF_EXAMPLE)
            if isinstance(title, str) and isinstance(picture, (str, PIL.Image.Image))
            if picture != ""
        ]
        self._results += len(found)
        if self._results > _MAX_RESULTS:
            raise CacheError(f"more than {_MAX_RESULTS} results")
        return found

    def _picture(self, value: Any) -> Picture | None:
        """Return a URL, or the image decoded from its pickled Pillow state, or None if invalid."""
        if isinstance(value, str):
            return value
        if id(value) not in self._pictures:
            state = _state(value)
            self._room -= len(state[3]) if state else 0
            if self._room < 0:
                raise CacheError("its pictures have more bytes than the file")
            self._pictures[id(value)] = _decoded(*state) if state else None
        return self._pictures[id(value)]


def _state(value: Any) -> tuple[str, tuple[int, int], Any, bytes, dict[str, Any]] | None:
    """Return (mode, size, palette, pixels, info) of a pickled image, or None if inconsistent.

    The check is needed because a few bytes may claim to be an image of any size.
    """
    state = value.state if isinstance(value, _Object) else None
    if not isinstance(state, (list, tuple)) or len(state) < 5:
        return None
    about, mode, size, palette, pixels = state[:5]
    if not isinstance(pixels, (bytes, bytearray)) or not isinstance(mode, str):
        return None
    if not isinstance(size, (list, tuple)) or [type(side) for side in size] != [int, int]:
        return None
    width, height = size
    if mode not in _BITS or min(size) < 1 or width * height > _MAX_PIXELS:
        return None
    if len(pixels) != (width * _BITS[mode] + 7) // 8 * height:
        return None
    return mode, (width, height), palette, pixels, about if isinstance(about, dict) else {}


def _decoded(
    mode: str, size: tuple[int, int], palette: Any, pixels: bytes, about: dict[str, Any]
) -> PIL.Image.Image | None:
    """Return the image as upright RGB on a white background, or None if it is damaged."""
    try:
        image = PIL.Image.frombytes(mode, size, pixels)
        if palette and mode in ("P", "PA"):
            image.putpalette(palette)
        image.info = {key: about[key] for key in ("exif", "transparency") if key in about}
        return upright_rgb(image)
    except Exception:  # Pillow raises many kinds of errors on a damaged palette
        return None
