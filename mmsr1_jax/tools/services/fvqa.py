"""The published cache of image searches for FVQA: results by the example's id, from a file.

Two forms: the pickle as released, which is read as data (no code in it is run: whatever asks for a
class or a function gets a lifeless object), and JSON, {id: [{"title", "thumbnail_url"}, ..]}.
"""

import json
import pathlib
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import PIL.Image

from mmsr1_jax.tools.first import first_that_work
from mmsr1_jax.tools.tool import Observation, Picture, Query, Result, image_result

_MAX_PIXELS = 20_000_000


class CacheError(ValueError):
    """A file that is no such cache; the message names it."""


class FvqaCache:
    """A tool: image search by `Query.example`.

    Args of the constructor:
      path: `.pkl` or `.json`.
      fetch: brings a thumbnail that is known by its address.
      results: at most.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        fetch: Callable[[str], Awaitable[bytes]],
        *,
        results: int = 5,
    ):
        """Raises CacheError."""
        self._entries, self._fetch, self._results = read(path), fetch, results

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
    """(title, picture or its address) of each example's results. Raises CacheError."""
    path = pathlib.Path(path)
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
        else:
            with open(path, "rb") as file:
                data = _Lifeless(file).load()
        if not isinstance(data, dict):
            raise CacheError(f"holds a {type(data).__name__}, not entries by id")
        return {str(key): _entries(value) for key, value in data.items()}
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror or error}") from None
    except CacheError as error:
        raise CacheError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CacheError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def _entries(value: Any) -> list[tuple[str, Picture]]:
    """Of one example, in either form; what cannot be used is left out."""
    if isinstance(value, dict):
        titles = value.get("tool_returned_web_title_list") or []
        pictures = value.get("tool_returned_images_urls") or []
        pairs = zip(titles, map(_picture, pictures), strict=False)
    elif isinstance(value, list):
        known = [entry for entry in value if isinstance(entry, dict)]
        pairs = ((entry.get("title"), entry.get("thumbnail_url")) for entry in known)
    else:
        return []
    return [(title, picture) for title, picture in pairs if isinstance(title, str) and picture]


class _Object:
    """What a pickle wanted to make something else of: what it was to be made from."""

    def __init__(self, *arguments, **keywords):
        self.arguments, self.state = arguments, keywords

    def __setstate__(self, state):
        self.state = state


class _Lifeless(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):  # how old pickles write bytes
            return lambda text, encoding: text.encode("latin-1")
        return type(name, (_Object,), {})

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to something outside")


def _picture(value: Any) -> Picture | None:
    """An address, or the picture whose state Pillow had put into the pickle."""
    if isinstance(value, str):
        return value
    state = getattr(value, "state", None)
    if not isinstance(state, (list, tuple)) or len(state) < 5:
        return None
    _, mode, size, palette, data = state[:5]
    try:
        # A few bytes may claim to be a picture of any size.
        if size[0] * size[1] > min(_MAX_PIXELS, 8 * len(data)):
            return None
        image = PIL.Image.frombytes(mode, tuple(size), data)
        if palette and mode == "P":
            image.putpalette(palette)
        return image.convert("RGB")
    except Exception:  # no picture after all
        return None
