"""SerpApi: Google's text search, and Lens by an image's address."""

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import Hit, Match, entries, key_of, text_of
from mmsr1_jax.tools.web import JSON, UnreachableError

BASE_URL = "https://serpapi.com"
KEY = "SERPAPI_API_KEY"


class SerpApi:
    def __init__(self, service: Service, *, base_url: str = BASE_URL):
        self._service, self._url, self._key = service, f"{base_url}/search.json", key_of(KEY)

    async def search(self, query: str, count: int) -> list[Hit]:
        """Raises WebError."""
        data = await self._get(engine="google", q=query, num=str(count))
        found = entries(data, "organic_results")
        hits = [Hit(text_of(e, "link"), text_of(e, "title"), text_of(e, "snippet")) for e in found]
        return [hit for hit in hits if hit.link]

    async def lens(self, url: str) -> list[Match]:
        """Raises WebError."""
        data = await self._get(engine="google_lens", url=url)
        found = entries(data, "visual_matches")
        matches = [
            Match(text_of(e, "link"), text_of(e, "title"), text_of(e, "thumbnail")) for e in found
        ]
        return [match for match in matches if match.title]

    async def _get(self, **params: str):
        answer = await self._service.call(
            "GET", self._url, params=params | {"api_key": self._key}, accept=JSON
        )
        data = answer.json()
        metadata = data.get("search_metadata") if isinstance(data, dict) else None
        if isinstance(metadata, dict) and metadata.get("status") == "Error":
            raise UnreachableError("the search itself failed")
        return data
