"""The retrieval server of Search-R1 (arXiv 2503.09516), and others of its kind: passages from a
local index."""

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
          WebError: no such answer, or documents without text.
        """
        body = {"queries": [query], "topk": count, "return_scores": True}
        documents = _documents(await ask(self._service, "POST", self._url, json=body))
        passages = [passage for passage in map(_passage, documents) if passage is not None]
        if documents and not passages:
            raise BodyError("no document has text in 'contents', 'content' or 'text'")
        return passages


def _documents(data: dict) -> list:
    """Return what was found for the query: one list for each of the queries, or a flat one."""
    for name in ("result", "results"):
        found = data.get(name)
        if not isinstance(found, list):
            continue
        if len(found) == 1 and isinstance(found[0], list):
            return found[0]
        # An empty list of lists has no list for the query.
        if not any(isinstance(entry, list) for entry in found) and (found or name == "results"):
            return found
    raise_failure(data)
    raise BodyError("not one list of documents")


def _passage(entry: Any) -> tuple[str, str] | None:
    """Return (title, text) of a document; None if it has no text."""
    # Without scores the document comes bare.
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
