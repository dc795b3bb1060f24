"""Client of SerpApi for Google text search and for Google Lens by image URL."""

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import Hit, Match, ask, found_in, key_of, snippet_hit, text_of
from mmsr1_jax.tools.web import UnreachableError

BASE_URL = "https://serpapi.com"
KEY = "SERPAPI_API_KEY"
# "Google hasn't returned any results for this query.", or Google Lens.
_NONE_FOUND = "hasn't returned any results"


class SerpApi:
    def __init__(self, service: Service, *, base_url: str = BASE_URL):
        self._service, self._url, self._key = service, f"{base_url}/search.json", key_of(KEY)

    async def search(self, query: str, count: int) -> list[Hit]:
        """Return the hits of a text search. Raises WebError."""
        data = await self._get(engine="google", q=query, num=str(count))
        information = data.get("search_information")
        state = text_of(information, "organic_results_state") if _is(information) else ""
        return found_in(
            data,
            "organic_results",
            _hit,
            instead=_boxes(data),
            none_found=_none_found(data) or state == "Fully empty",
        )

    async def lens(self, url: str) -> list[Match]:
        """Return the pages with images similar to the one at a URL. Raises WebError."""
        data = await self._get(engine="google_lens", url=url)
        return found_in(data, "visual_matches", _match, none_found=_none_found(data))

    async def _get(self, **params: str) -> dict:
        params |= {"api_key": self._key}
        data = await ask(self._service, "GET", self._url, params=params)
        metadata = data.get("search_metadata")
        status = text_of(metadata, "status") if _is(metadata) else ""
        if status == "Error":
            raise UnreachableError("the search itself failed")
        if status in ("Processing", "Queued"):
            raise UnreachableError("the search is not finished")
        return data


def _hit(entry: dict) -> Hit | None:
    hit = Hit(text_of(entry, "link"), text_of(entry, "title"), text_of(entry, "snippet"))
    return hit if hit.link else None


def _match(entry: dict) -> Match | None:
    match = Match(text_of(entry, "link"), text_of(entry, "title"), text_of(entry, "thumbnail"))
    return match if match.title else None


def _boxes(data: dict) -> list[Hit]:
    """Return the answers that Google shows above its results, as hits."""
    made = []
    for name in ("answer_box", "knowledge_graph"):
        box = data.get(name)
        if _is(box):
            texts = (text_of(box, key) for key in ("answer", "result", "snippet", "description"))
            made.append(snippet_hit(text_of(box, "title"), next(filter(None, texts), "")))
    return [hit for hit in made if hit is not None]


def _none_found(data: dict) -> bool:
    return _NONE_FOUND in text_of(data, "error")


def _is(value: object) -> bool:
    return isinstance(value, dict)
