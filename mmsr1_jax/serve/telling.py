"""What has happened to a question, as the page gets it: plain data, a line of JSON each.

    {"event": "waiting", "ahead": 2}
    {"event": "begun"}
    {"event": "drawn", "text": ..}                            the next of the turn under way
    {"event": "turn", "action": .., "payload": .., "reason": .., "problem": .., "text": ..}
    {"event": "reply", "call": {..} or null, "results": [..], "said": ..}
    {"event": "end", "end": .., "answer": .., "error": ..}    or {"event": "failed", "error": ..}

Texts are as they came from outside: the page puts them into text nodes. Pictures are encoded anew.
Notes of searches are left out, as they may hold addresses with keys.
"""

import base64
import codecs
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsr1_jax.images import ImageError, Patches
from mmsr1_jax.processor import Processor
from mmsr1_jax.rollout.episode import Episode, ToolCall
from mmsr1_jax.rollout.turns import Turn

_THUMBNAIL = 224  # pixels of the longer side
_LABEL = re.compile(r"(link|title|summary): ")


class Teller:
    """Tells of one question.

    Args of the constructor:
      processor: turns tokens into text.
      token_bytes: of each token, by id (`Processor.token_bytes`, which takes its time).
    """

    def __init__(self, processor: Processor, token_bytes: Sequence[bytes]):
        self._processor, self._bytes = processor, token_bytes
        self._control = frozenset(processor.control.values())
        self._begin()

    def _begin(self) -> None:
        """A turn: its text comes in pieces that may end inside a character."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""

    def __call__(self, name: str, *what: Any) -> dict[str, Any]:
        """The event of what is in `Question.happened`."""
        return {"event": name} | getattr(self, f"_{name}")(*what)

    def _begun(self) -> dict[str, Any]:
        return {}

    def _drawn(self, tokens: np.ndarray) -> dict[str, Any]:
        known = [self._bytes[token] for token in tokens.tolist() if token not in self._control]
        text = self._decoder.decode(b"".join(known))
        self._text += text
        return {"text": text}

    def _turn(self, turn: Turn) -> dict[str, Any]:
        text = self._text + self._decoder.decode(b"", True)
        self._begin()
        return {
            "action": turn.action,
            "payload": turn.payload,
            "reason": turn.reason,
            "problem": turn.problem,
            "text": text,
        }

    def _reply(
        self, tokens: np.ndarray, images: Sequence[Patches], call: ToolCall | None
    ) -> dict[str, Any]:
        lines = self._lines(tokens, images)
        results = [self._result(result) for result in results_of(lines)]
        said = "\n".join("".join(p for p in line if isinstance(p, str)) for line in lines)
        told = None if call is None else {
            "action": call.action,
            "query": call.query,
            "status": call.status,
            "seconds": call.seconds,
            "found": call.found,
            "shown": call.shown,
        }  # fmt: skip
        return {"call": told, "results": results, "said": "" if results else said.strip()}

    def _end(self, episode: Episode) -> dict[str, Any]:
        return {"end": episode.end, "answer": episode.answer, "error": episode.error}

    def _failed(self) -> dict[str, Any]:
        return {"error": "The policy's engine failed. Ask again; if it does not help, the "
                         "server's log says why."}  # fmt: skip

    def _lines(self, tokens: np.ndarray, images: Sequence[Patches]) -> list[list[str | Patches]]:
        """The lines of a user turn, each of texts and pictures. By ids, so no text is taken for a
        placeholder."""
        control, ids = self._processor.control, tokens.tolist()
        start, end = control["<|vision_start|>"], control["<|vision_end|>"]
        own = iter(images[len(images) - ids.count(start) :])
        begin = ids.index(control["<|im_start|>"]) + 1
        lines: list[list[str | Patches]] = [[]]
        text: list[int] = []
        for token in ids[begin : ids.index(control["<|im_end|>"]) + 1]:
            if token not in self._control:
                text.append(token)
                continue
            first, *others = self._processor.decode(text).split("\n")
            lines[-1] += [first] if first else []
            lines += [[line] if line else [] for line in others]
            text = []
            if token == end:
                lines[-1].append(next(own))
        return lines[1:]  # the first is the role

    def _result(self, lines: Sequence[Sequence[str | Patches]]) -> dict[str, Any]:
        """A result by its labels; what has none is its text."""
        told: dict[str, Any] = {"title": "", "link": "", "text": "", "picture": None}
        text = []
        for line in lines:
            written = "".join(part for part in line if isinstance(part, str))
            pictures = [part for part in line if isinstance(part, Patches)]
            if pictures and told["picture"] is None:
                told["picture"] = self._thumbnail(pictures[0])
            if pictures and written.strip() == "image:":
                continue
            label = _LABEL.match(written)
            name = label[1] if label else "text"
            if name in ("title", "link") and not told[name] and not text:
                told[name] = written[label.end() :].strip()
            else:
                text.append(written[label.end() :] if label and not text else written)
        return told | {"text": "\n".join(text).strip()}

    def _thumbnail(self, picture: Patches) -> str | None:
        """A data URL of what the policy saw."""
        try:
            image = self._processor.images.uncut(picture)
        except ImageError:
            return None
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        out = io.BytesIO()
        image.save(out, "webp", quality=80)
        return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def results_of(
    lines: Sequence[Sequence[str | Patches]],
) -> list[list[list[str | Patches]]]:
    """The numbered results between the tags, which no page can write (`rules.harmless`): for each
    its lines, without the number."""
    results: list[list[list[str | Patches]]] = []
    inside = False
    for line in lines:
        first = line[0] if line and isinstance(line[0], str) else ""
        if list(line) == ["</information>"]:
            break
        number = f"{len(results) + 1}. "
        if inside and first.startswith(number):
            results.append([[first[len(number) :], *line[1:]]])
        elif results:
            results[-1].append(list(line))
        inside = inside or list(line) == ["<information>"]
    return results
