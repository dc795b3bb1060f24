"""The retrieval server of Search-R1 (arXiv 2503.09516): passages from a local dense index."""

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import entries, text_of
from mmsr1_jax.tools.web import JSON, BodyError


class Retrieval:
    def __init__(self, service: Service, *, base_url: str):
        self._service, self._url = service, f"{base_url}/retrieve"

    async def passages(self, query: str, count: int) -> list[tuple[str, str]]:
        """(title, text) of passages, best first: the first line of a document is its title.

        Raises:
          WebError: no such answer.
        """
        body = {"queries": [query], "topk": count, "return_scores": True}
        answer = await self._service.call("POST", self._url, json=body, accept=JSON)
        data = answer.json()
        result = data.get("result") if isinstance(data, dict) else None
        if not isinstance(result, list) or len(result) != 1:
            raise BodyError("not one list of documents")
        passages = []
        for entry in entries({"documents": result[0]}, "documents"):
            # Without scores the document comes bare.
            document = entry.get("document", entry)
            contents = text_of(document, "contents") if isinstance(document, dict) else ""
            title, _, text = contents.partition("\n")
            if contents.strip():
                passages.append((title.strip().strip('"'), text.strip() or title.strip()))
        return passages
