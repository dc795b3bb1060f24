"""Client of Serper for Google text search and for Google Lens by image URL."""

from typing import Any

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import Hit, Match, ask, found_in, key_of, snippet_hit, text_of

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
        self._headers = {"X-API-KEY": key_of(KEY)}
        self._place = {"gl": country, "hl": language}

    async def search(self, query: str, count: int) -> list[Hit]:
        """Return the hits of a text search. Raises WebError."""
        data = await self._post("/search", {"q": query, "num": count} | self._place)
        return found_in(data, "organic", _hit, instead=_boxes(data))

    async def lens(self, url: str) -> list[Match]:
        """Return the pages with images similar to the one at a URL. Raises WebError."""
        data = await self._post("/lens", {"url": url} | self._place)
        return found_in(data, "organic", _match)

    async def _post(self, path: str, body: dict[str, Any]) -> dict:
        return await ask(self._service, "POST", self._base + path, json=body, headers=self._headers)


def _hit(entry: dict) -> Hit | None:
    hit = Hit(text_of(entry, "link"), text_of(entry, "title"), text_of(entry, "snippet"))
    return hit if hit.link else None


def _match(entry: dict) -> Match | None:
    thumbnail = text_of(entry, "thumbnailUrl") or text_of(entry, "imageUrl")
    match = Match(text_of(entry, "link"), text_of(entry, "title"), thumbnail)
    return match if match.title else None


def _boxes(data: dict) -> list[Hit]:
    """Return the answers that Google shows above its results, as hits."""
    made = []
    for name in ("answerBox", "knowledgeGraph"):
        box = data.get(name)
        if isinstance(box, dict):
            texts = (text_of(box, key) for key in ("answer", "snippet", "description"))
            made.append(snippet_hit(text_of(box, "title"), next(filter(None, texts), "")))
    return [hit for hit in made if hit is not None]
