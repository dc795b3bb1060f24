"""Image search by an image's address: pages with similar pictures, their thumbnails and titles.

picture ──► its address ──► matches ──► thumbnail, thumbnail, ..   in parallel; one that cannot
            published once               be fetched or opened gives way to the next match
"""

import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from mmsr1_jax.processing.image_files import ImageError, check_image, public_jpeg
from mmsr1_jax.tools.cached_tool import Stored, digest
from mmsr1_jax.tools.first_completed import first_that_work
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import Match
from mmsr1_jax.tools.tool import Observation, Query, Result, image_result
from mmsr1_jax.tools.web import IMAGES, WebError

_MAX_PIXELS = 20_000_000  # of a thumbnail's file


class Lens(Protocol):
    async def lens(self, url: str) -> list[Match]: ...


class Publisher:
    """Puts pictures where a service can see them: HTTP PUT to an object store.

    What the store wants to know who asks comes from the environment: PUBLISHER_AUTHORIZATION, the
    header of that name, and PUBLISHER_QUERY, what follows the `?` of the address that is put to.

    Args of the constructor:
      service: makes the requests.
      stored: remembers what was put, for other runs too.
      put_url: address to put to, `{name}` being the picture's; without it, the beginning of one.
      public_url: address that the picture then has, in the same form.
    """

    def __init__(self, service: Service, stored: Stored, *, put_url: str, public_url: str):
        self._service, self._stored = service, stored
        self._put, self._public = put_url, public_url
        self._query = os.environ.get("PUBLISHER_QUERY", "").strip().removeprefix("?")
        authorization = os.environ.get("PUBLISHER_AUTHORIZATION", "").strip()
        self._headers = {"Authorization": authorization} if authorization else {}
        self._published: set[str] = set()

    async def __call__(self, jpeg: bytes) -> str:
        """Return the public address of an image, which is uploaded once.

        Args:
          jpeg: Of `image_files.public_jpeg`: never the user's file, which may say where it was
            taken and hold other things behind the image.

        Raises:
          WebError: It could not be uploaded.
        """
        name = f"{digest(jpeg)}.jpg"
        target = _named(self._put, name) + (f"?{self._query}" if self._query else "")

        async def put():
            headers = self._headers | {"Content-Type": "image/jpeg"}
            await self._service.call("PUT", target, content=jpeg, accept=(), headers=headers)
            return True

        public = _named(self._public, name)
        if name not in self._published:
            await self._stored.get("published", digest(public.encode()), put)
            self._published.add(name)
        return public


def _named(url: str, name: str) -> str:
    return url.replace("{name}", name) if "{name}" in url else url + name


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
    stored: what was found before, by the image's pixels.
    name: of the service; others find other pages.
    results: pages of an observation, at most.
    seconds: after which it makes do with the pictures that are there; None: it waits for all.
    """

    def __init__(
        self,
        lens: Lens,
        publish: Callable[[bytes], Awaitable[str]],
        fetch: Callable[[str], Awaitable[bytes]],
        stored: Stored,
        name: str,
        *,
        results: int = 5,
        seconds: float | None = None,
    ):
        self._name, self._seconds = name, seconds
        self._lens, self._publish, self._fetch = lens, publish, fetch
        self._stored, self._results = stored, results

    async def __call__(self, query: Query) -> Observation:
        if not query.images:
            return Observation(status="failed", error="the question has no picture")
        until = None if self._seconds is None else time.monotonic() + self._seconds
        try:
            jpeg, pixels = await public_jpeg(query.images[0])

            async def ask():
                matches = await self._lens.lens(await self._publish(jpeg))
                return [[match.link, match.title, match.thumbnail] for match in matches]

            key = json.dumps([self._name, pixels])
            matches = [Match(*m) for m in await self._stored.get("matches", key, ask)]
        except (WebError, ImageError) as error:
            return Observation(status="failed", error=f"search: {error}")
        if not matches:
            return Observation(status="empty")
        results, errors = await first_that_work(matches, self._results, self._result, until=until)
        if not results:
            return Observation(status="failed", error=f"no picture could be had: {errors[0]}")
        return Observation(results=results, error="; ".join(errors) or None)

    async def _result(self, match: Match) -> Result:
        """Raises WebError where the thumbnail cannot be had or opened."""
        data = await self._fetch(match.thumbnail)
        try:
            await check_image(data, max_pixels=_MAX_PIXELS)
        except ImageError as error:
            raise WebError(str(error)) from None
        return image_result(data, match.title)
