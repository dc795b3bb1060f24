"""Client of a self-hosted SearXNG for text search (its settings must allow `format: json`)."""

from typing import Any

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import (
    Hit,
    PictureHit,
    answer_box_hit,
    parse_results,
    request_json,
    text_field,
)
from mmsr1_jax.tools.web import UnreachableError


class SearXNG:
    """Client of SearXNG."""

    def __init__(self, service: Service, *, base_url: str):
        self._service, self._url = service, f"{base_url}/search"

    async def search(self, query: str, count: int) -> list[Hit]:
        """Return up to `count` hits. Raises WebError."""
        params = {"q": query, "format": "json"}
        data = await request_json(self._service, "GET", self._url, params=params)
        hits = parse_results(data, "results", _hit, fallback=_answer_hits(data))
        if not hits and data.get("unresponsive_engines"):
            raise UnreachableError("no search engine responded")
        return hits[:count]

    async def pictures(self, query: str, count: int, *, free: bool) -> list[PictureHit]:
        """Return up to `count` pictures found by words. Raises WebError.

        Args:
          query: Search query.
          count: Maximum number of pictures.
          free: Ignored: the engines' licences are in the hits, if they state any.
        """
        params = {"q": query, "format": "json", "categories": "images"}
        data = await request_json(self._service, "GET", self._url, params=params)
        hits = parse_results(data, "results", _picture)
        if not hits and data.get("unresponsive_engines"):
            raise UnreachableError("no search engine responded")
        return hits[:count]


def _picture(entry: dict[str, Any]) -> PictureHit | None:
    names = ("url", "title", "img_src", "thumbnail_src", "license")
    hit = PictureHit(*(text_field(entry, name) for name in names))
    return hit if hit.url and hit.title else None


def _hit(entry: dict[str, Any]) -> Hit | None:
    hit = Hit(text_field(entry, "url"), text_field(entry, "title"), text_field(entry, "content"))
    return hit if hit.link else None


def _answer_hits(data: dict[str, Any]) -> list[Hit]:
    """Return the answers of the search engines themselves as hits."""
    hits = []
    for name, title, text in (("answers", "", "answer"), ("infoboxes", "infobox", "content")):
        answers = data.get(name)
        for answer in answers if isinstance(answers, list) else ():
            if isinstance(answer, str):  # an answer, in older versions
                answer = {text: answer}
            if isinstance(answer, dict):
                hits.append(answer_box_hit(text_field(answer, title), text_field(answer, text)))
    return [hit for hit in hits if hit is not None]
