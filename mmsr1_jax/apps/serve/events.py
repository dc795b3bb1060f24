"""Events of a question as sent to the page: plain data, one line of JSON each.

    {"event": "waiting", "ahead": 2}
    {"event": "started"}
    {"event": "tokens", "text": ..}                            next text of the current turn
    {"event": "turn", "action": .., "payload": .., "reason": .., "problem": .., "text": ..}
    {"event": "reply", "call": {..} or null, "results": [..], "text": ..}
    {"event": "end", "end": .., "answer": .., "error": ..}    or {"event": "failed", "error": ..}

Texts are not escaped: the page puts them into text nodes. Images are re-encoded. Notes of searches
are omitted, as they may contain URLs with API keys.
"""

import base64
import codecs
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsr1_jax.episodes.episode import Episode, ShownResult, ToolCall
from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.processing.images import ImageError, Patches
from mmsr1_jax.processing.processor import Processor

_THUMBNAIL = 224  # longer side in pixels


class EventSerializer:
    """Serializer of the events of one question.

    Args:
      processor: The policy's processor, which decodes tokens.
      token_bytes: Bytes of each token by id, from `Processor.token_bytes`, which is slow.
    """

    def __init__(self, processor: Processor, token_bytes: Sequence[bytes]):
        self._processor, self._token_bytes = processor, token_bytes
        self._control = frozenset(processor.control.values())
        self._start_turn()

    def _start_turn(self) -> None:
        """Start a turn, with an incremental decoder, as chunks may end inside a character."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""

    def __call__(self, name: str, *data: Any) -> dict[str, Any]:
        """Convert an item of `Question.events` to an event."""
        return {"event": name} | getattr(self, f"_{name}")(*data)

    def _started(self) -> dict[str, Any]:
        return {}

    def _tokens(self, tokens: np.ndarray) -> dict[str, Any]:
        pieces = [self._token_bytes[t] for t in tokens.tolist() if t not in self._control]
        text = self._decoder.decode(b"".join(pieces))
        self._text += text
        return {"text": text}

    def _turn(self, turn: Turn) -> dict[str, Any]:
        text = self._text + self._decoder.decode(b"", True)
        self._start_turn()
        return {
            "action": turn.action,
            "payload": turn.payload,
            "reason": turn.reason if turn.strict_form else None,
            "problem": turn.problem,
            "text": text,
        }

    def _reply(
        self, tokens: np.ndarray, images: Sequence[Patches], call: ToolCall | None
    ) -> dict[str, Any]:
        num_images = int(np.sum(tokens == self._processor.control["<|vision_start|>"]))
        new = images[len(images) - num_images :]
        if call is None:
            return {"call": None, "results": [], "text": self._reply_text(tokens)}
        results = [self._result(result, new) for result in call.results]
        summary = {
            "action": call.action,
            "query": call.query,
            "status": call.status,
            "seconds": call.seconds,
            "num_results": call.num_results,
            "num_shown": call.num_shown,
        }
        text = "" if results else self._reply_text(tokens)
        return {"call": summary, "results": results, "text": text}

    def _end(self, episode: Episode) -> dict[str, Any]:
        return {"end": episode.end, "answer": episode.answer, "error": episode.error}

    def _failed(self) -> dict[str, Any]:
        reason = "The policy's engine failed. Ask again. If that fails too, see the server's log."
        return {"error": reason}

    def _reply_text(self, tokens: np.ndarray) -> str:
        """Return the text of a user turn, without its role."""
        control, ids = self._processor.control, tokens.tolist()
        turn = ids[ids.index(control["<|im_start|>"]) : ids.index(control["<|im_end|>"])]
        text = self._processor.decode(token for token in turn if token not in self._control)
        return text.removeprefix("user\n").strip()

    def _result(self, result: ShownResult, images: Sequence[Patches]) -> dict[str, Any]:
        """Convert a recorded result, with a thumbnail of its first image.

        Args:
          result: Result as the policy saw it.
          images: Images of its user turn.
        """
        shown = [images[index] for index in result.images if 0 <= index < len(images)]
        return {
            "title": result.title,
            "link": result.link,
            "text": result.text.strip(),
            "image": self._thumbnail(shown[0]) if shown else None,
        }

    def _thumbnail(self, patches: Patches) -> str | None:
        """Return a data URL of an image as the policy saw it, or None if that fails."""
        try:
            image = self._processor.images.unpatchify(patches)
        except ImageError:
            return None
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        out = io.BytesIO()
        image.save(out, "webp", quality=80)
        return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
