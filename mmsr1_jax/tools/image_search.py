"""Image search by an image's address: pages with similar pictures, their thumbnails and titles.

picture ──► its address ──► matches ──► thumbnail, thumbnail, ..   in parallel; one that cannot
            published once               be fetched or opened gives way to the next match
"""

import asyncio
import io
import pathlib
from collections.abc import Awaitable, Callable
from typing import Protocol

import PIL.Image

from mmsr1_jax.images import ImageError, open_image
from mmsr1_jax.tools.first import first_that_work
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import Match
from mmsr1_jax.tools.stored import Stored, digest
from mmsr1_jax.tools.tool import Observation, Picture, Query, Result, image_result
from mmsr1_jax.tools.web import IMAGES, WebError

_MAX_PIXELS = 20_000_000  # of a thumbnail's file


class Lens(Protocol):
    async def lens(self, url: str) -> list[Match]: ...


class Publisher:
    """Puts pictures where a service can see them: HTTP PUT to an object store.

    Args of the constructor:
      service: makes the requests.
      put_url: beginning of the address to put to; the picture's name follows.
      public_url: beginning of the address that it will then have.
      stored: remembers what was put, for other runs too.
    """

    def __init__(self, service: Service, stored: Stored, *, put_url: str, public_url: str):
        self._service, self._stored = service, stored
        self._put, self._public = put_url, public_url
        self._published: set[str] = set()

    async def __call__(self, data: bytes) -> str:
        """The address of a picture, which is put there once. Raises WebError."""
        name = digest(data)

        async def put():
            await self._service.call(
                "PUT", self._put + name, content=data, accept=(),
                headers={"Content-Type": "application/octet-stream"},
            )  # fmt: skip
            return True

        if name not in self._published:
            await self._stored.get("published", self._public + name, put)
            self._published.add(name)
        return self._public + name


class Thumbnails:
    """Fetches pictures: `max_bytes` of a file."""

    def __init__(self, service: Service, *, max_bytes: int = 5_000_000):
        self._service, self._max_bytes = service, max_bytes

    async def __call__(self, url: str) -> bytes:
        """Raises WebError."""
        answer = await self._service.call("GET", url, accept=IMAGES, max_bytes=self._max_bytes)
        return answer.body


class ImageSearch:
    """Args of the constructor:
    lens: finds pages by an image's address.
    publish: gives the question's picture an address.
    fetch: brings thumbnails.
    stored: what was found before, by the picture's content.
    results: pages of an observation, at most.
    """

    def __init__(
        self,
        lens: Lens,
        publish: Callable[[bytes], Awaitable[str]],
        fetch: Callable[[str], Awaitable[bytes]],
        stored: Stored,
        *,
        results: int = 5,
    ):
        self._lens, self._publish, self._fetch = lens, publish, fetch
        self._stored, self._results = stored, results

    async def __call__(self, query: Query) -> Observation:
        if not query.images:
            return Observation(status="failed", error="the question has no picture")
        try:
            data = await asyncio.to_thread(_bytes, query.images[0])

            async def ask():
                matches = await self._lens.lens(await self._publish(data))
                return [[match.link, match.title, match.thumbnail] for match in matches]

            matches = [Match(*m) for m in await self._stored.get("matches", digest(data), ask)]
        except (WebError, ImageError) as error:
            return Observation(status="failed", error=f"search: {error}")
        if not matches:
            return Observation(status="empty")
        results, errors = await first_that_work(matches, self._results, self._result)
        if not results:
            return Observation(status="failed", error=f"no picture could be had: {errors[0]}")
        return Observation(results=results, error="; ".join(errors) or None)

    async def _result(self, match: Match) -> Result:
        """Raises WebError where the thumbnail cannot be had or opened."""
        data = await self._fetch(match.thumbnail)
        try:
            await asyncio.to_thread(open_image, data, max_pixels=_MAX_PIXELS)
        except ImageError as error:
            raise WebError(str(error)) from None
        return image_result(data, match.title)


def _bytes(image: Picture) -> bytes:
    """The file of a picture. Raises ImageError."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, PIL.Image.Image):
        file = io.BytesIO()
        image.convert("RGB").save(file, "png")
        return file.getvalue()
    try:
        return pathlib.Path(image).read_bytes()
    except OSError as error:
        raise ImageError(f"{image}: {error.strerror or error}") from None
