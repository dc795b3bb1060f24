"""Reverse image search: titles and thumbnails of pages with similar images.

image ──► public URL ──► matches ──► thumbnail, thumbnail, ..   in parallel; if one cannot be
          uploaded once                                         fetched or decoded, the next match
                                                                replaces it
"""

import json
import os
import time
from collections.abc import Awaitable, Callable

from mmsr1_jax.processing.image_files import ImageError, check_image, public_jpeg
from mmsr1_jax.tools.cached_tool import CachedCalls, digest
from mmsr1_jax.tools.first_completed import first_successful
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import Lens, Match
from mmsr1_jax.tools.tool import Observation, Query, Result, image_result
from mmsr1_jax.tools.web import IMAGE_TYPES, WebError

_MAX_PIXELS = 20_000_000  # per thumbnail file


class ImageUploader:
    """Image uploader that gives images a public URL, by HTTP PUT to an object store.

    Credentials come from the environment: UPLOAD_AUTHORIZATION is the value of the `Authorization`
    header, and UPLOAD_QUERY is the query string of the upload URL.

    Args:
      service: HTTP client for the requests.
      cached_calls: Cache that records uploads, also for other runs.
      upload_url: Upload URL, in which `{name}` is replaced by the file name. Without `{name}`, the
        file name is appended.
      public_url: Public URL of an uploaded image, in the same form.
    """

    def __init__(
        self, service: Service, cached_calls: CachedCalls, *, upload_url: str, public_url: str
    ):
        self._service, self._cached_calls = service, cached_calls
        self._upload_url, self._public_url = upload_url, public_url
        self._query = os.environ.get("UPLOAD_QUERY", "").strip().removeprefix("?")
        authorization = os.environ.get("UPLOAD_AUTHORIZATION", "").strip()
        self._headers = {"Authorization": authorization} if authorization else {}
        self._uploaded: set[str] = set()  # names of files

    async def __call__(self, jpeg: bytes) -> str:
        """Return the public URL of an image, uploading it the first time.

        Args:
          jpeg: Output of `image_files.public_jpeg`, never the user's file, which may reveal where
            the image was taken or contain other data after the image.

        Raises:
          WebError: The upload failed.
        """
        name = f"{digest(jpeg)}.jpg"
        target = _insert_name(self._upload_url, name) + (f"?{self._query}" if self._query else "")

        async def upload() -> bool:
            headers = self._headers | {"Content-Type": "image/jpeg"}
            await self._service.call("PUT", target, content=jpeg, accept=(), headers=headers)
            return True

        public = _insert_name(self._public_url, name)
        if name not in self._uploaded:
            await self._cached_calls.get("upload", digest(public.encode()), upload)
            self._uploaded.add(name)
        return public


def _insert_name(url: str, name: str) -> str:
    return url.replace("{name}", name) if "{name}" in url else url + name


class ImageFetcher:
    """Image fetcher that accepts files of up to `max_bytes` bytes."""

    def __init__(self, service: Service, *, max_bytes: int = 5_000_000):
        self._service, self._max_bytes = service, max_bytes

    async def __call__(self, url: str) -> bytes:
        """Return the bytes of an image file. Raises WebError."""
        response = await self._service.call(
            "GET", url, accept=IMAGE_TYPES, max_bytes=self._max_bytes
        )
        return response.body


class ImageSearch:
    """Image search tool.

    Args:
      lens: Client that finds pages by an image's URL.
      upload: Function that uploads the question's image and returns its URL.
      fetch: Function that fetches a thumbnail.
      cached_calls: Cache of matches, by the image's pixels.
      name: Name of the search service, part of the cache key because services find different pages.
      max_results: Maximum number of pages in an observation.
      timeout: Seconds after which the search returns the thumbnails fetched so far. None waits for
        all.
    """

    def __init__(
        self,
        lens: Lens,
        upload: Callable[[bytes], Awaitable[str]],
        fetch: Callable[[str], Awaitable[bytes]],
        cached_calls: CachedCalls,
        name: str,
        *,
        max_results: int = 5,
        timeout: float | None = None,
    ):
        self._name, self._timeout = name, timeout
        self._lens, self._upload, self._fetch = lens, upload, fetch
        self._cached_calls, self._max_results = cached_calls, max_results

    async def __call__(self, query: Query) -> Observation:
        if not query.images:
            return Observation(status="failed", error="the question has no image")
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        try:
            jpeg, pixels = await public_jpeg(query.images[0])

            async def call() -> list[list[str]]:
                matches = await self._lens.lens(await self._upload(jpeg))
                return [[match.link, match.title, match.thumbnail] for match in matches]

            key = json.dumps([self._name, pixels])
            matches = [Match(*m) for m in await self._cached_calls.get("matches", key, call)]
        except (WebError, ImageError) as error:
            return Observation(status="failed", error=f"search: {error}")
        if not matches:
            return Observation(status="empty")
        results, errors = await first_successful(
            matches, self._max_results, self._result, deadline=deadline
        )
        if not results:
            return Observation(status="failed", error=f"no image could be fetched: {errors[0]}")
        return Observation(results=results, error="; ".join(errors) or None)

    async def _result(self, match: Match) -> Result:
        """Return a match with its thumbnail. Raises WebError if it cannot be fetched or decoded."""
        data = await self._fetch(match.thumbnail)
        try:
            await check_image(data, max_pixels=_MAX_PIXELS)
        except ImageError as error:
            raise WebError(str(error)) from None
        return image_result(data, match.title)
