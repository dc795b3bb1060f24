"""SearXNG: text search on a server of one's own (its settings must allow `format: json`)."""

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import Hit, entries, text_of
from mmsr1_jax.tools.web import JSON, UnreachableError


class SearXNG:
    def __init__(self, service: Service, *, base_url: str):
        self._service, self._url = service, f"{base_url}/search"

    async def search(self, query: str, count: int) -> list[Hit]:
        """Raises WebError."""
        answer = await self._service.call(
            "GET", self._url, params={"q": query, "format": "json"}, accept=JSON
        )
        data = answer.json()
        found = entries(data, "results")
        if not found and data.get("unresponsive_engines"):
            raise UnreachableError("none of its search engines answered")
        hits = [Hit(text_of(e, "url"), text_of(e, "title"), text_of(e, "content")) for e in found]
        return [hit for hit in hits if hit.link][:count]
