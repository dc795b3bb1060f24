"""Jina Reader: a page as markdown. Works without a key, more slowly."""

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import key_of

BASE_URL = "https://r.jina.ai"
KEY = "JINA_API_KEY"


class Jina:
    def __init__(self, service: Service, *, base_url: str = BASE_URL):
        self._service, self._base = service, base_url
        key = key_of(KEY, needed=False)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def read(self, url: str) -> str:
        """Markdown. Raises WebError."""
        answer = await self._service.call(
            "GET", f"{self._base}/{url}", headers=self._headers, accept=("text/",)
        )
        return answer.body.decode("utf-8", "replace")
