"""Client of the Search-R1 retrieval server (arXiv 2503.09516) and compatible servers, which
return passages from a local index."""

from typing import Any

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import ask, has_text, raise_failure, text_of
from mmsr1_jax.tools.web import BodyError


class Retrieval:
    def __init__(self, service: Service, *, base_url: str):
        self._service, self._url = service, f"{base_url}/retrieve"

    async def passages(self, query: str, count: int) -> list[tuple[str, str]]:
        """Return (title, text) of passages, best first.

        Raises:
          WebError: The request failed, or the answer has no list of documents or no text in them.
        """
        body = {"queries": [query], "topk": count, "return_scores": True}
        documents = _documents(await ask(self._service, "POST", self._url, json=body))
        passages = [passage for passage in map(_passage, documents) if passage is not None]
        if documents and not passages:
            raise BodyError("no document has text in 'contents', 'content' or 'text'")
        return passages


def _documents(data: dict) -> list:
    """Return the documents for the query, from one list per query or from a flat list."""
    for name in ("result", "results"):
        found = data.get(name)
        if not isinstance(found, list):
            continue
        if len(found) == 1 and isinstance(found[0], list):
            return found[0]
        # An empty `result` lacks the list for the query; an empty `results` is a flat list.
        if not any(isinstance(entry, list) for entry in found) and (found or name == "results"):
            return found
    raise_failure(data)
    raise BodyError("not one list of documents")


def _passage(entry: Any) -> tuple[str, str] | None:
    """Return (title, text) of a document, or None if it has no text."""
    # Without scores, the document is not nested in an entry.
    document = entry.get("document", entry) if isinstance(entry, dict) else entry
    if isinstance(document, str):
        document = {"contents": document}
    if not isinstance(document, dict):
        return None
    texts = (text_of(document, name) for name in ("contents", "content", "text"))
    contents = next((text for text in texts if has_text(text)), "").strip()
    if not contents:
        return None
    # Search-R1 writes the title as the first line.
    first, _, rest = contents.partition("\n")
    title = text_of(document, "title").strip()
    if title and title != first.strip().strip('"'):
        return title, contents
    return first.strip().strip('"'), rest.strip() or first.strip()
