"""Serper: Google's text search, and Lens by an image's address."""

from typing import Any

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import Hit, Match, entries, key_of, text_of
from mmsr1_jax.tools.web import JSON

BASE_URL = "https://google.serper.dev"
KEY = "SERPER_API_KEY"


class Serper:
    """`country`, `language`: Google's gl and hl."""

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
        """Raises WebError."""
        data = await self._post("/search", {"q": query, "num": count} | self._place)
        found = entries(data, "organic")
        hits = [Hit(text_of(e, "link"), text_of(e, "title"), text_of(e, "snippet")) for e in found]
        return [hit for hit in hits if hit.link]

    async def lens(self, url: str) -> list[Match]:
        """Raises WebError."""
        found = entries(await self._post("/lens", {"url": url} | self._place), "organic")
        matches = [
            Match(
                text_of(e, "link"),
                text_of(e, "title"),
                text_of(e, "thumbnailUrl") or text_of(e, "imageUrl"),
            )
            for e in found
        ]
        return [match for match in matches if match.title]

    async def _post(self, path: str, body: dict[str, Any]):
        answer = await self._service.call(
            "POST", self._base + path, json=body, headers=self._headers, accept=JSON
        )
        return answer.json()
