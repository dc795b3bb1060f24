"""Client of the Search-R1 retrieval server (arXiv 2503.09516) and compatible servers, which
return passages from a local index."""

from typing import Any

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import has_text, raise_reported_error, request_json, text_field
from mmsr1_jax.tools.web import BodyError


class Retrieval:
    """Client of a retrieval server."""

    def __init__(self, service: Service, *, base_url: str):
        self._service, self._url = service, f"{base_url}/retrieve"

    async def passages(self, query: str, count: int) -> list[tuple[str, str]]:
        """Return (title, text) of passages, best first.

        Raises:
          WebError: The request failed, or the response has no documents with text.
        """
        body = {"queries": [query], "topk": count, "return_scores": True}
        documents = _documents(await request_json(self._service, "POST", self._url, json=body))
        passages = [passage for passage in map(_passage, documents) if passage is not None]
        if documents and not passages:
            raise BodyError("no document has text in 'contents', 'content' or 'text'")
        return passages


def _documents(data: dict[str, Any]) -> list[Any]:
    """Return the documents for the query, from one list per query or from a flat list."""
    for name in ("result", "results"):
        value = data.get(name)
        if not isinstance(value, list):
            continue
        if len(value) == 1 and isinstance(value[0], list):
            return value[0]
        # An empty `result` lacks the list for the query; an empty `results` is a flat list.
        if not any(isinstance(entry, list) for entry in value) and (value or name == "results"):
            return value
    raise_reported_error(data)
    raise BodyError("the response is not a list of documents for the query")


def _passage(entry: Any) -> tuple[str, str] | None:
    """Return (title, text) of a document, or None if it has no text."""
    # Without scores, the document is not nested in an entry.
    document = entry.get("document", entry) if isinstance(entry, dict) else entry
    if isinstance(document, str):
        document = {"contents": document}
    if not isinstance(document, dict):
        return None
    texts = (text_field(document, name) for name in ("contents", "content", "text"))
    contents = next((text for text in texts if has_text(text)), "").strip()
    if not contents:
        return None
    # Search-R1 writes the title as the first line.
    first, _, rest = contents.partition("\n")
    title = text_field(document, "title").strip()
    if title and title != first.strip().strip('"'):
        return title, contents
    return first.strip().strip('"'), rest.strip() or first.strip()
