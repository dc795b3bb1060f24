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
from mmsr1_jax.tools.first_completed import first_successful
from mmsr1_jax.tools.tool import ImageLike, Observation, Query, Result, image_result
from mmsr1_jax.utils import checked_json, checked_pickle, workers

# Generous limits: reading the released file takes seconds.
_LIMITS = workers.Limits(cpu_seconds=1200.0, wall_seconds=7200.0, memory_bytes=64 << 30)
_MAX_PIXELS = 20_000_000
_MAX_PICKLE_BYTES = 8_000_000_000  # a pickle may contain images as raw pixels
_MAX_JSON_BYTES = 1_000_000_000
_MAX_RESULTS_PER_EXAMPLE = 100  # further ones are ignored
_MAX_RESULTS = 2_000_000
# Bits per pixel in Pillow's raw encoding, for the modes that web images may have.
_BITS_PER_PIXEL = {"1": 1, "L": 8, "P": 8, "LA": 16, "PA": 16, "I;16": 16, "RGB": 24, "YCbCr": 24}
_BITS_PER_PIXEL |= {"LAB": 24, "HSV": 24, "RGBA": 32, "RGBX": 32, "CMYK": 32, "I": 32, "F": 32}


class FvqaCacheError(UserError):
    """File that is not a valid cache; the message names it."""


class FvqaCache:
    """Image search tool that looks up cached results by `Query.example`.

    Args:
      path: Path of the cache, a pickle or a `.json` file.
      fetch: Function that fetches a thumbnail from its URL.
      max_results: Maximum number of results in an observation.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        fetch: Callable[[str], Awaitable[bytes]],
        *,
        max_results: int = 5,
    ):
        """Load the cache. Raises FvqaCacheError."""
        self._fetch, self._max_results = fetch, max_results
        try:  # in a worker, like all processing of untrusted bytes
            self._entries = workers.run(load_results, os.path.abspath(path), limits=_LIMITS)
        except workers.WorkerError as error:
            raise FvqaCacheError(f"{path}: reading the file {error}") from None

    async def __call__(self, query: Query) -> Observation:
        entries = self._entries.get(query.example)
        if entries is None:
            return Observation(status="failed", error=f"no entry for example {query.example!r}")
        if not entries:
            return Observation(status="empty")
        results, errors = await first_successful(entries, self._max_results, self._result)
        if not results:
            return Observation(status="failed", error=f"no image could be fetched: {errors[0]}")
        return Observation(results=results, error="; ".join(errors) or None)

    async def _result(self, entry: tuple[str, ImageLike]) -> Result:
        title, image = entry
        if isinstance(image, str):
            image = await self._fetch(image)
        return image_result(image, title)


def load_results(path: str | pathlib.Path) -> dict[str, list[tuple[str, ImageLike]]]:
    """Return (title, image or its URL) of up to 100 results per example.

    Raises:
      FvqaCacheError: The file cannot be read, is not a valid cache, has too many results, or has
        images with more bytes than the file.
    """
    path = pathlib.Path(path)
    try:
        if path.suffix == ".json":
            data = checked_json.load(
                path, dict[str, Any], max_bytes=_MAX_JSON_BYTES, surrogates=True
            )
            return _Converter(0).convert(data)
        with open(path, "rb") as file:
            if not path.stat().st_size:
                raise FvqaCacheError("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                entries = checked_pickle.loads(
                    data, _InertGlobals(len(data)).find, max_bytes=_MAX_PICKLE_BYTES
                )
                if not isinstance(entries, dict):
                    kind = type(entries).__name__
                    raise FvqaCacheError(f"the file contains a {kind}, not a dict of entries by id")
                return _Converter(len(data)).convert(entries)
    except OSError as error:
        raise FvqaCacheError(f"{path}: {error.strerror or error}") from None
    except checked_json.FormatError as error:
        raise FvqaCacheError(str(error)) from None
    except checked_pickle.PickleError as error:
        raise FvqaCacheError(f"{path}: not a readable pickle: {error}") from None
    except FvqaCacheError as error:
        raise FvqaCacheError(f"{path}: {error}") from None


class _PickledObject:
    """Stand-in for an instance of a class in a pickle, which keeps only its state."""

    def __init__(self, *args: Any):
        self.state: Any = args

    def __setstate__(self, state: Any):
        self.state = state


class _InertGlobals:
    """Inert stand-ins for the classes and functions that a pickle names.

    Args:
      char_budget: Maximum total number of characters that the pickle may encode as bytes.
    """

    def __init__(self, char_budget: int):
        self._char_budget = char_budget

    def find(self, module: str, name: str) -> Any:
        """Return the stand-in for a class or function."""
        return self._encode if (module, name) == ("_codecs", "encode") else _PickledObject

    def _encode(self, text: str, encoding: str) -> bytes:
        """Return the bytes that pickles of protocol 2 and older write as text."""
        self._char_budget -= len(text)
        if self._char_budget < 0:
            raise checked_pickle.PickleError("it encodes more text than the file contains")
        return text.encode("latin-1")


class _Converter:
    """Converter from raw entries to results, which converts each object of a pickle only once.

    Args:
      byte_budget: Maximum total number of bytes of pixels in all images.
    """

    def __init__(self, byte_budget: int):
        self._byte_budget, self._num_results = byte_budget, 0
        self._images: dict[int, ImageLike | None] = {}

    def convert(self, data: dict[Any, Any]) -> dict[str, list[tuple[str, ImageLike]]]:
        """Return the results of all examples."""
        return {str(key): self._convert_entry(value) for key, value in data.items()}

    def _convert_entry(self, value: Any) -> list[tuple[str, ImageLike]]:
        """Return the results of one example, in either format; unusable entries are skipped."""
        if isinstance(value, dict):
            titles = value.get("tool_returned_web_title_list")
            images = value.get("tool_returned_images_urls")
            if not isinstance(titles, (list, tuple)) or not isinstance(images, (list, tuple)):
                return []
            pairs = zip(titles, map(self._convert_image, images), strict=False)
        elif isinstance(value, list):
            entries = (entry for entry in value if isinstance(entry, dict))
            pairs = ((entry.get("title"), entry.get("thumbnail_url")) for entry in entries)
        else:
            return []
        results: list[tuple[str, ImageLike]] = [
            (checked_json.valid_text(title), image)
            for title, image in itertools.islice(pairs, _MAX_RESULTS_PER_EXAMPLE)
            if isinstance(title, str) and isinstance(image, (str, PIL.Image.Image))
            if image != ""
        ]
        self._num_results += len(results)
        if self._num_results > _MAX_RESULTS:
            raise FvqaCacheError(f"more than {_MAX_RESULTS} results")
        return results

    def _convert_image(self, value: Any) -> ImageLike | None:
        """Return a URL, or the image decoded from its pickled Pillow state, or None if invalid."""
        if isinstance(value, str):
            return value
        if id(value) not in self._images:
            state = _image_state(value)
            self._byte_budget -= len(state[3]) if state else 0
            if self._byte_budget < 0:
                raise FvqaCacheError("the images have more bytes than the file")
            self._images[id(value)] = _decode(*state) if state else None
        return self._images[id(value)]


def _image_state(value: Any) -> tuple[str, tuple[int, int], Any, bytes, dict[str, Any]] | None:
    """Return (mode, size, palette, pixels, info) of a pickled image, or None if inconsistent.

    The check is needed because a few bytes may claim to be an image of any size.
    """
    state = value.state if isinstance(value, _PickledObject) else None
    if not isinstance(state, (list, tuple)) or len(state) < 5:
        return None
    info, mode, size, palette, pixels = state[:5]
    if not isinstance(pixels, (bytes, bytearray)) or not isinstance(mode, str):
        return None
    if not isinstance(size, (list, tuple)) or [type(side) for side in size] != [int, int]:
        return None
    width, height = size
    if mode not in _BITS_PER_PIXEL or min(size) < 1 or width * height > _MAX_PIXELS:
        return None
    if len(pixels) != (width * _BITS_PER_PIXEL[mode] + 7) // 8 * height:
        return None
    return mode, (width, height), palette, bytes(pixels), info if isinstance(info, dict) else {}


def _decode(
    mode: str, size: tuple[int, int], palette: Any, pixels: bytes, info: dict[str, Any]
) -> PIL.Image.Image | None:
    """Return the image as upright RGB on a white background, or None if it is damaged."""
    try:
        image = PIL.Image.frombytes(mode, size, pixels)
        if palette and mode in ("P", "PA"):
            image.putpalette(palette)
        image.info = {key: info[key] for key in ("exif", "transparency") if key in info}
        return upright_rgb(image)
    except Exception:  # Pillow raises many kinds of errors on a damaged palette
        return None
