"""OpenAI-compatible server that answers the prompts of `construct` about a tiny world, by rules.

It is wrong in a share of its replies, in five ways that depend on the request alone:

    unreadable   prose without JSON
    value        another value of the page, or of the world, in place of the right one
    opposite     the opposite verdict; an invented answer or evidence
    named        a question that names the landmark; an empty answer
    down         status 503, the first time that the request is sent
"""

import base64
import collections
import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Sequence

import numpy as np
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmsr1_jax.data.construction.models import PROMPTS
from mmsr1_jax.data.tiny_world import World, words
from mmsr1_jax.data.tiny_world.questions import WORDINGS
from mmsr1_jax.data.tiny_world.world import CHANGING, FACTS, LAST_YEAR, LASTING, THIS_YEAR
from mmsr1_jax.processing.image_files import open_image
from mmsr1_jax.tools.index_builder import image_hash

FAULTS = ("unreadable", "value", "opposite", "named", "down")
VALUES = {
    "city": words.CITIES, "builder": words.PEOPLE, "stone": words.STONES, "keeper": words.PEOPLE,
    "ticket": words.PRICES, "show": words.SHOWS,
}  # fmt: skip
# The parts of each prompt between its fields, by which a request is recognised.
_PARTS = {
    path.stem: [
        part.replace("{{", "{").replace("}}", "}").strip()
        for part in re.split(r"\{\w+\}", path.read_text())
    ]
    for path in PROMPTS.glob("*.txt")
}


class ModelServer:
    """A server for both roles, `writer` and `checker`.

    Args:
      world: World that the pages and pictures are about.
      fault_rate: Share of wrong replies.
      facts: Facts that the writer asks for.
      reply: Function from (prompt, texts, image) to the right reply; None is that of the world.

    Attributes:
      requests: Number of times that each request was sent, by its digest.
      faults: Number of wrong replies by kind.
      refused: Digests of the requests that got status 503.
      on_request: Function called before each reply.
      broken: Names of the prompts that get status 503.
      unanswered: Digests of their requests.
    """

    def __init__(
        self,
        world: World | None,
        fault_rate: float = 0.1,
        *,
        facts: Sequence[str] = FACTS[1:],
        reply: Callable | None = None,
    ):
        self.world, self.fault_rate, self._facts = world, fault_rate, facts
        self._reply = reply or self.true_reply
        self.requests: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.refused: set[str] = set()
        self.on_request: Callable[[], None] = lambda: None
        self.broken: set[str] = set()
        self.unanswered: set[str] = set()
        self._by_name = {mark.name: mark for mark in world.landmarks} if world else {}

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request) -> Response:
        body = await request.body()
        digest = hashlib.blake2b(body, digest_size=16).hexdigest()
        self.requests[digest] += 1
        self.on_request()
        prompt, texts, image = read(json.loads(body))
        if prompt in self.broken:
            self.unanswered.add(digest)
            return Response("down", status_code=503)
        reply = self._reply(prompt, texts, image)
        rng = np.random.default_rng(int(digest[:15], 16))
        if rng.random() < self.fault_rate:
            kind = FAULTS[int(rng.integers(len(FAULTS)))]
            self.faults[kind] += 1
            if kind == "down" and self.requests[digest] == 1:
                self.refused.add(digest)
                return Response("overloaded", status_code=503)
            reply = wrong_reply(kind, reply, texts, rng)
        content = reply if isinstance(reply, str) else f"```json\n{json.dumps(reply)}\n```"
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": len(content) // 4}
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return JSONResponse({"choices": [choice], "usage": usage})

    def true_reply(self, prompt: str, texts: dict[str, str], image: bytes | None):
        """Return what somebody who knows the world would reply."""
        if prompt == "write":
            return {"questions": self._questions(texts["Name"].split("\n")[0], texts["Page"])}
        if prompt == "shown":
            return {"shown": self.landmark_in(image).name == texts["Name"].split("\n")[0]}
        fact, year = parse_question(texts["Question"])
        if prompt == "title":
            title = texts["Title of the picture"]
            mark = next((m for m in self.world.landmarks if m.name in title), None)
            knows = mark is not None and fact in ("name", "city")
            return {"answer": mark.facts[fact] if knows else ""}
        if prompt == "blind":
            return {"answer": ""}
        if prompt == "answerable":
            mark, page = self.landmark_in(image), texts["Page"]
            facts = mark.last_year if year == LAST_YEAR else mark.facts
            value = facts.get(fact, mark.facts[fact])
            return {"answer": value if mark.name in page and value in page else ""}
        if prompt == "sound":
            return {"unambiguous": True, "changes": fact in CHANGING and year is None}
        if prompt == "aliases":
            return {"aliases": [f"the {texts['Answer']}", f"{texts['Answer']} of old"]}
        if prompt == "same":
            lines = texts["Other answers"].split("\n")
            right = [texts["Correct answer"], f"{texts['Correct answer']} of old"]
            return {"same": [i + 1 for i, line in enumerate(lines) if line[3:] in right]}
        assert prompt == "category", prompt
        return {"category": "business" if fact == "ticket" else "architecture"}

    def landmark_in(self, image: bytes):
        """Return the landmark that a picture shows."""
        query = np.frombuffer(image_hash(open_image(image)), np.uint64)
        return self.world.landmarks[nearest(self.world, query)]

    def _questions(self, name: str, page: str) -> list[dict]:
        """Return questions about the lasting facts, or about those of this year."""
        mark = self._by_name[name]
        if page.count(name) != 1 or str(LAST_YEAR) in page or not page_is_about(page, name):
            return []
        facts = CHANGING if str(THIS_YEAR) in page else ("name", *LASTING)
        questions = []
        for fact in (fact for fact in facts if fact in self._facts):
            evidence = next((s for s in re.split(r"(?<=\.) ", page) if mark.facts[fact] in s), page)
            wording = WORDINGS[fact][len(name) % len(WORDINGS[fact])]
            question = wording.format(it="this", year=THIS_YEAR)
            questions.append(
                {"question": question, "answer": mark.facts[fact], "evidence": evidence,
                 "calculation": None}
            )  # fmt: skip
        return questions


def page_is_about(page: str, name: str) -> bool:
    """Return whether a page is about one landmark, rather than a list of them."""
    return not page.startswith(("In the city of", "You find")) and "was the builder of" not in page


_HASHES: dict[int, np.ndarray] = {}


def nearest(world: World, query: np.ndarray) -> int:
    """Return the index of the landmark whose photos are nearest to a perceptual hash."""
    from mmsr1_jax.data.tiny_world.emblems import photo, reference_photo

    if world.seed not in _HASHES:
        rng = np.random.default_rng(7)
        photos = [
            [reference_photo(mark.emblem), *(photo(mark.emblem, rng) for _ in range(8))]
            for mark in world.landmarks
        ]
        hashes = [[np.frombuffer(image_hash(p), np.uint64) for p in row] for row in photos]
        _HASHES[world.seed] = np.array(hashes)
    distance = np.bitwise_count(_HASHES[world.seed] ^ query).sum(-1, dtype=np.int64)
    return int(np.sort(distance, axis=1)[:, :3].mean(axis=1).argmin())


def read(body: dict) -> tuple[str, dict[str, str], bytes | None]:
    """Return the name of the prompt, the fenced texts by name, and the picture of a request."""
    system, content = (turn["content"] for turn in body["messages"])
    (prompt,) = (name for name, parts in _PARTS.items() if all(p in system for p in parts))
    image = None
    if isinstance(content, list):
        picture, text = content
        image = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        content = text["text"]
    fence = content.split("\n")[1]
    parts = content.split(fence)
    names = [part.strip().removesuffix(":") for part in parts[:-1:2]]
    return prompt, dict(zip(names, (part[1:-1] for part in parts[1::2]), strict=True)), image


def parse_question(question: str) -> tuple[str, int | None]:
    """Return the fact and the year that a question of the world asks for."""
    year = re.search("20[0-9]{2}", question)
    for fact in FACTS:
        for wording in WORDINGS[fact]:
            pattern = re.escape(wording.format(it="\0", year="\1"))
            pattern = pattern.replace(re.escape("\0"), ".+").replace(re.escape("\1"), "20[0-9]{2}")
            if re.fullmatch(pattern, question):
                return fact, int(year[0]) if year else None
    raise ValueError(question)


def _values(question: str) -> tuple[str, ...]:
    """Return possible answers to a question; those to one that is not of the world are prices."""
    with contextlib.suppress(ValueError):
        return VALUES.get(parse_question(question)[0], words.CITIES)
    return words.PRICES


def wrong_reply(kind: str, reply: dict, texts: dict[str, str], rng: np.random.Generator):
    """Return a wrong reply of a kind."""
    if kind in ("unreadable", "down"):
        return reply if kind == "down" else "I would rather not say {so}."
    reply = json.loads(json.dumps(reply))
    if "questions" in reply:
        for written in reply["questions"]:
            if kind == "value":  # another word of the sentence
                others = [
                    q["answer"] for q in reply["questions"] if q["answer"] != written["answer"]
                ]
                present = [other for other in others if other in written["evidence"]]
                written["answer"] = present[0] if present else str(rng.choice(words.PRICES))
            elif kind == "opposite":
                written["evidence"] = f"A page gives {written['answer']}."
            else:
                written["question"] = written["question"].replace("this", texts["Name"])
        return reply
    if "answer" in reply:
        return {"answer": "" if kind == "named" else str(rng.choice(_values(texts["Question"])))}
    if "aliases" in reply:
        return {"aliases": [str(value) for value in rng.choice(words.CITIES, 2)]}
    if "same" in reply:
        return {"same": [] if kind == "named" else [1, 2, 3, 99]}
    if "category" in reply:
        return {"category": "nonsense" if kind == "named" else "food"}
    return {name: not value for name, value in reply.items()}
