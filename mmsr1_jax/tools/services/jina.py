"""Jina Reader: a page as markdown. Works without a key, more slowly."""

import re

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import key_of
from mmsr1_jax.tools.web import StatusError

BASE_URL = "https://r.jina.ai"
KEY = "JINA_API_KEY"
_FAILED = re.compile(r"^Warning: Target URL returned error (\d{3})\b", re.MULTILINE)


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
        text = answer.body.decode("utf-8", "replace")
        failed = _FAILED.search(text[:2000])
        if failed:  # what follows is the page that says so
            raise StatusError(int(failed[1]))
        return text
