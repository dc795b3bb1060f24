"""Client of a self-hosted SearXNG for text search (its settings must allow `format: json`)."""

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import Hit, ask, found_in, snippet_hit, text_of
from mmsr1_jax.tools.web import UnreachableError


class SearXNG:
    def __init__(self, service: Service, *, base_url: str):
        self._service, self._url = service, f"{base_url}/search"

    async def search(self, query: str, count: int) -> list[Hit]:
        """Return up to `count` hits. Raises WebError."""
        params = {"q": query, "format": "json"}
        data = await ask(self._service, "GET", self._url, params=params)
        hits = found_in(data, "results", _hit, instead=_boxes(data))
        if not hits and data.get("unresponsive_engines"):
            raise UnreachableError("none of its search engines answered")
        return hits[:count]


def _hit(entry: dict) -> Hit | None:
    hit = Hit(text_of(entry, "url"), text_of(entry, "title"), text_of(entry, "content"))
    return hit if hit.link else None


def _boxes(data: dict) -> list[Hit]:
    """Return the answers of the search engines themselves as hits."""
    made = []
    for name, title, text in (("answers", "", "answer"), ("infoboxes", "infobox", "content")):
        boxes = data.get(name)
        for box in boxes if isinstance(boxes, list) else ():
            if isinstance(box, str):  # an answer, in older versions
                box = {text: box}
            if isinstance(box, dict):
                made.append(snippet_hit(text_of(box, title), text_of(box, text)))
    return [hit for hit in made if hit is not None]
