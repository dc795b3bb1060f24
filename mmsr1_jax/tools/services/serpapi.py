"""Client of SerpApi for Google text search and for Google Lens by image URL."""

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
from mmsr1_jax.tools.web import UnreachableError

BASE_URL = "https://serpapi.com"
KEY = "SERPAPI_API_KEY"
# "Google hasn't returned any results for this query.", or Google Lens.
_NO_RESULTS = "hasn't returned any results"


class SerpApi:
    """Client of SerpApi."""

    def __init__(self, service: Service, *, base_url: str = BASE_URL):
        self._service, self._url, self._key = service, f"{base_url}/search.json", api_key(KEY)

    async def search(self, query: str, count: int) -> list[Hit]:
        """Return the hits of a text search. Raises WebError."""
        data = await self._get(engine="google", q=query, num=str(count))
        state = text_field(data.get("search_information"), "organic_results_state")
        return parse_results(
            data,
            "organic_results",
            _hit,
            fallback=_answer_hits(data),
            is_empty=_reports_no_results(data) or state == "Fully empty",
        )

    async def lens(self, url: str) -> list[Match]:
        """Return the pages with images similar to the one at a URL. Raises WebError."""
        data = await self._get(engine="google_lens", url=url)
        return parse_results(data, "visual_matches", _match, is_empty=_reports_no_results(data))

    async def pictures(self, query: str, count: int, *, free: bool) -> list[PictureHit]:
        """Return pictures found by words. Raises WebError. See `Serper.pictures`."""
        filters = {"licenses": "cl"} if free else {}
        data = await self._get(engine="google_images", q=query, **filters)
        licence = FREE_LICENCE if free else ""
        hits = parse_results(
            data,
            "images_results",
            lambda entry: _picture(entry, licence),
            is_empty=_reports_no_results(data),
        )
        return hits[:count]

    async def _get(self, **params: str) -> dict[str, Any]:
        params |= {"api_key": self._key}
        data = await request_json(self._service, "GET", self._url, params=params)
        status = text_field(data.get("search_metadata"), "status")
        if status == "Error":
            raise UnreachableError("the service reports a failed search")
        if status in ("Processing", "Queued"):
            raise UnreachableError("the search is not finished")
        return data


def _hit(entry: dict[str, Any]) -> Hit | None:
    hit = Hit(text_field(entry, "link"), text_field(entry, "title"), text_field(entry, "snippet"))
    return hit if hit.link else None


def _picture(entry: dict[str, Any], licence: str) -> PictureHit | None:
    names = ("link", "title", "original", "thumbnail")
    link, title, url, thumbnail = (text_field(entry, name) for name in names)
    hit = PictureHit(link, title, url, thumbnail, licence)
    return hit if hit.url and hit.title else None


def _match(entry: dict[str, Any]) -> Match | None:
    match = Match(
        text_field(entry, "link"), text_field(entry, "title"), text_field(entry, "thumbnail")
    )
    return match if match.title else None


def _answer_hits(data: dict[str, Any]) -> list[Hit]:
    """Return the answers that Google shows above its results, as hits."""
    hits = []
    for name in ("answer_box", "knowledge_graph"):
        box = data.get(name)
        if isinstance(box, dict):
            texts = (text_field(box, key) for key in ("answer", "result", "snippet", "description"))
            hits.append(answer_box_hit(text_field(box, "title"), next(filter(None, texts), "")))
    return [hit for hit in hits if hit is not None]


def _reports_no_results(data: dict[str, Any]) -> bool:
    return _NO_RESULTS in text_field(data, "error")
