"""Client of Serper for Google text search and for Google Lens by image URL."""

from typing import Any

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import (
    FREE_LICENCE,
    Hit,
    Match,
    PictureHit,
    answer_box_hit,
    api_key,
    parse_results,
    request_json,
    text_field,
)

BASE_URL = "https://google.serper.dev"
KEY = "SERPER_API_KEY"


class Serper:
    """Client of Serper.

    Args:
      service: HTTP client for the requests.
      base_url: Base URL of the API.
      country: Country of the search, Google's `gl` parameter.
      language: Language of the search, Google's `hl` parameter.
    """

    def __init__(
        self,
        service: Service,
        *,
        base_url: str = BASE_URL,
        country: str = "us",
        language: str = "en",
    ):
        self._service, self._base = service, base_url
        self._headers = {"X-API-KEY": api_key(KEY)}
        self._locale = {"gl": country, "hl": language}

    async def search(self, query: str, count: int) -> list[Hit]:
        """Return the hits of a text search. Raises WebError."""
        data = await self._post("/search", {"q": query, "num": count} | self._locale)
        return parse_results(data, "organic", _hit, fallback=_answer_hits(data))

    async def lens(self, url: str) -> list[Match]:
        """Return the pages with images similar to the one at a URL. Raises WebError."""
        data = await self._post("/lens", {"url": url} | self._locale)
        return parse_results(data, "organic", _match)

    async def pictures(self, query: str, count: int, *, free: bool) -> list[PictureHit]:
        """Return pictures found by words. Raises WebError.

        Args:
          query: Search query.
          count: Maximum number of pictures.
          free: Whether to search only for pictures with a Creative Commons licence.
        """
        filters = {"tbs": "il:cl"} if free else {}
        data = await self._post("/images", {"q": query, "num": count} | filters | self._locale)
        licence = FREE_LICENCE if free else ""
        hits = parse_results(data, "images", lambda entry: _picture(entry, licence))
        return hits[:count]

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await request_json(
            self._service, "POST", self._base + path, json=body, headers=self._headers
        )


def _hit(entry: dict[str, Any]) -> Hit | None:
    hit = Hit(text_field(entry, "link"), text_field(entry, "title"), text_field(entry, "snippet"))
    return hit if hit.link else None


def _picture(entry: dict[str, Any], licence: str) -> PictureHit | None:
    names = ("link", "title", "imageUrl", "thumbnailUrl")
    link, title, url, thumbnail = (text_field(entry, name) for name in names)
    hit = PictureHit(link, title, url, thumbnail, licence)
    return hit if hit.url and hit.title else None


def _match(entry: dict[str, Any]) -> Match | None:
    thumbnail = text_field(entry, "thumbnailUrl") or text_field(entry, "imageUrl")
    match = Match(text_field(entry, "link"), text_field(entry, "title"), thumbnail)
    return match if match.title else None


def _answer_hits(data: dict[str, Any]) -> list[Hit]:
    """Return the answers that Google shows above its results, as hits."""
    hits = []
    for name in ("answerBox", "knowledgeGraph"):
        box = data.get(name)
        if isinstance(box, dict):
            texts = (text_field(box, key) for key in ("answer", "snippet", "description"))
            hits.append(answer_box_hit(text_field(box, "title"), next(filter(None, texts), "")))
    return [hit for hit in hits if hit is not None]
