"""Conversion of an episode's JSON line to the record that the page shows."""

import codecs
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmsr1_jax.apps.report.images import QUESTION, RESULT, ImageRegistry
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.episodes.episode import Episode, Segment, ToolCall
from mmsr1_jax.rewards.reward_function import ACTION_NAMES

_IMAGE = re.compile(r"<\|vision_start\|>((?:<\|image_pad\|>)++)<\|vision_end\|>")
_PAD_CHARS = len("<|image_pad|>")
_PATCHES_PER_TOKEN = 4
# Chat-template markers around a user turn.
_USER_PREFIX, _USER_SUFFIX = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


class LineError(UserError):
    """A line that is not a valid episode; the message gives the reason."""


def to_record(
    data: Mapping[str, Any],
    folder: pathlib.Path,
    images: ImageRegistry,
    token_bytes: Sequence[bytes] | None,
    step: int | None = None,
) -> dict[str, Any]:
    """Convert an episode to plain data for the page.

    Args:
      data: Parsed line of an episodes file. Fields that commands add to an episode may be missing.
      folder: Directory of the file, to which image paths are relative.
      images: Registry of the images.
      token_bytes: Bytes of each token by id, or None if unknown.
      step: Training step.

    Returns:
      A dict with `id`, `question`, `answers`, `answer`, `correct` (in [0, 1], or None if not
      judged), `verdicts`, `actions` (names separated by commas), `category`, `source`, `workflow`,
      `step`, `reward` (its components), `end`, `error`, `images` (of the question), `prompt`
      (parts) and `turns`.

      A part is a text or the index of an image, -1 if its file is missing. A turn has its parsed
      fields, `pieces` (sampled or forced), `calls` and `reply` (parts). A call has its recorded
      `results`: `link`, `title`, `text`, and `images` by index. Older lines have no results; the
      page shows only the text of their replies.

    Raises:
      LineError: The line is not a valid episode; the message names the field.
    """
    try:
        episode = Episode.from_json(data)
    except (ValueError, OverflowError) as error:
        raise LineError(str(error)) from None
    texts = _segment_texts(data)
    splitter = _PartSplitter(data, folder, images)
    has_prompt = bool(episode.segments) and episode.segments[0].kind == "prompt"
    prompt = splitter.parts(0, texts[0], QUESTION) if has_prompt else []
    turns = _turns(episode, texts, splitter, token_bytes, start=1 if prompt else 0)
    reward, answers = data.get("reward"), data.get("answers")
    reward = reward if isinstance(reward, dict) else {}
    return {
        "id": episode.example.id,
        "question": episode.example.question,
        "answers": [str(a) for a in answers] if isinstance(answers, list) else [],
        "answer": episode.answer if isinstance(episode.answer, str) else None,
        "actions": ",".join(ACTION_NAMES.get(turn["action"], "none") for turn in turns),
        "category": _text(data.get("category")) or "",
        "source": _text(data.get("source")) or "",
        "workflow": _text(data.get("workflow")) or "",
        "step": step,
        "reward": {str(name): finite(value) for name, value in reward.items() if name != "judge"},
        **_correctness(data, reward),
        "end": _text(episode.end),
        "error": _text(episode.error),
        "images": [part for part in prompt if isinstance(part, int)],
        "prompt": prompt,
        "turns": turns,
    }


def _turns(
    episode: Episode,
    texts: Sequence[str],
    splitter: "_PartSplitter",
    token_bytes: Sequence[bytes] | None,
    start: int,
) -> list[dict[str, Any]]:
    """Return the turns of an episode, whose segments begin at index `start`."""
    turns: list[dict[str, Any]] = []
    is_new = True  # whether the next segment begins a turn
    for index in range(start, len(texts)):
        segment, text = episode.segments[index], texts[index]
        if is_new:
            turns.append({"pieces": [], "reply": None})
        is_new = segment.kind == "tool"
        if segment.kind == "tool":
            turns[-1]["reply"] = _strip_roles(splitter.parts(index, text, RESULT))
        elif segment.kind == "model":
            turns[-1]["pieces"].append(_sampled_piece(segment, text, token_bytes))
        else:
            turns[-1]["pieces"].append({"kind": segment.kind, "text": text})
    while len(turns) < len(episode.turns):  # parsed turns without recorded tokens
        turns.append({"pieces": [], "reply": None})
    for index, turn in enumerate(turns):
        parsed = episode.turns[index] if index < len(episode.turns) else None
        for field in ("action", "payload", "reason", "problem"):
            turn[field] = _text(getattr(parsed, field, None))
        turn["calls"] = [_call(c, turn["reply"]) for c in episode.calls if c.turn == index]
    return turns


def _call(call: ToolCall, reply: list[str | int] | None) -> dict[str, Any]:
    """Convert a tool call, with its results as shown to the policy and their images by index."""
    images = [part for part in reply or () if isinstance(part, int)]
    return {
        "action": _text(call.action),
        "query": _text(call.query),
        "status": _text(call.status),
        "seconds": finite(call.seconds),
        "num_results": finite(call.num_results),
        "num_shown": finite(call.num_shown),
        "notes": [str(note) for note in call.notes],
        "results": [
            {
                "link": result.link,
                "title": result.title,
                "text": result.text,
                "images": [images[i] for i in result.images if 0 <= i < len(images)],
            }
            for result in call.results
        ],
    }


class _PartSplitter:
    """Splitter of segment texts into parts; it consumes the episode's images in order."""

    def __init__(self, data: Mapping[str, Any], folder: pathlib.Path, images: ImageRegistry):
        paths, grids = data.get("images"), data.get("image_grids")
        self._paths = iter(paths if isinstance(paths, list) else ())
        self._num_tokens = [
            _num_tokens(grid) for grid in (grids if isinstance(grids, list) else ())
        ]
        self._segments = data["segments"]
        self._folder, self._images = folder, images

    def parts(self, index: int, text: str, side: int) -> list[str | int]:
        """Return the parts of a segment. Raises LineError if its image spans are invalid."""
        parts: list[str | int] = []
        position = 0
        segment = self._segments[index]
        is_recorded = "image_spans" in segment
        spans = _image_spans(index, segment, text) if is_recorded else self._guess_spans(text)
        for start, end in spans:
            parts += [text[position:start], self._next_image(side)]
            position = end
        return [part for part in [*parts, text[position:]] if part != ""]

    def _guess_spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Find the spans of images in a segment of an older file, which does not record them.

        Text from a web page may contain placeholders, so only one with the length of the next image
        counts.
        """
        for match in _IMAGE.finditer(text):
            if self._num_tokens[:1] == [len(match[1]) // _PAD_CHARS]:
                del self._num_tokens[0]
                yield match.span()

    def _next_image(self, side: int) -> int:
        path = next(self._paths, None)
        return self._images.register(self._folder / path, side) if isinstance(path, str) else -1


def _num_tokens(grid: Any) -> int | None:
    """Return the number of tokens of an image by its grid of patches, or None if it is invalid."""
    is_valid = isinstance(grid, list) and all(type(size) is int for size in grid)
    return math.prod(grid) // _PATCHES_PER_TOKEN if is_valid else None


def _image_spans(index: int, segment: Mapping[str, Any], text: str) -> list[list[int]]:
    """Return the spans of images in a segment's text. Raises LineError if they are invalid."""
    spans = segment.get("image_spans", [])
    is_valid = isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(type(offset) is int for offset in span)
        for span in spans
    )
    offsets = [offset for span in spans for offset in span] if is_valid else [-1]
    if offsets != sorted(offsets) or any(not 0 <= offset <= len(text) for offset in offsets):
        raise LineError(
            f"segments[{index}]: 'image_spans' must be ascending pairs of offsets into 'text'"
        )
    return spans


def _strip_roles(parts: list[str | int]) -> list[str | int]:
    """Remove the chat-template markers around a user turn."""
    if not parts:
        return parts
    first, last = parts[0], parts[-1]
    if (
        isinstance(first, str) and first.startswith(_USER_PREFIX)
        and isinstance(last, str) and last.endswith(_USER_SUFFIX)
    ):  # fmt: skip
        parts = [*parts[:-1], last.removesuffix(_USER_SUFFIX)]
        parts[0] = str(parts[0]).removeprefix(_USER_PREFIX)
    return [part for part in parts if part != ""]


def _segment_texts(data: Mapping[str, Any]) -> list[str]:
    """Return the text of each segment. Raises LineError if one is not a string."""
    texts = [segment.get("text") for segment in data["segments"]]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise LineError(f"segments[{index}]: 'text' must be a string")
    return texts


def _sampled_piece(
    segment: Segment, text: str, token_bytes: Sequence[bytes] | None
) -> dict[str, Any]:
    """Convert a sampled segment.

    Returns:
      A dict with `tokens` (their texts) if these match the recorded text, else `text` and `ids`;
      `logprobs`; and `sampling_logprobs`, if they differ.
    """
    ids = segment.tokens.tolist()
    texts = None if token_bytes is None else _token_texts(ids, token_bytes)
    piece: dict[str, Any] = {"kind": "model"}
    if texts is not None and "".join(texts) == text:
        piece["tokens"] = texts
    else:
        piece |= {"text": text, "ids": ids}
    logprobs, sampling_logprobs = (
        [None] * len(ids) if values is None else [finite(round(v, 4)) for v in values.tolist()]
        for values in (segment.logprobs, segment.sampling_logprobs)
    )
    piece["logprobs"] = logprobs
    if sampling_logprobs != logprobs and segment.sampling_logprobs is not None:
        piece["sampling_logprobs"] = sampling_logprobs
    return piece


def _token_texts(ids: Sequence[int], token_bytes: Sequence[bytes]) -> list[str] | None:
    """Return the text that each token adds, or None if a token is unknown.

    A character that spans several tokens belongs to the last of them.
    """
    if max(ids, default=0) >= len(token_bytes):
        return None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(ids) - 1
    return [decoder.decode(token_bytes[token], index == last) for index, token in enumerate(ids)]


def _correctness(data: Mapping[str, Any], reward: Mapping[str, Any]) -> dict[str, Any]:
    """Return `correct`, and the `verdicts` of an evaluation as text.

    `correct` is the first available of the benchmark's score, the judge's verdict and the reward's
    `correct`. A judge that was queried but gave no verdict counts as available and makes it None.
    """
    is_judged = isinstance(data.get("judge"), dict)
    judge = data["judge"] if is_judged else {}
    score, verdict = finite(data.get("score")), finite(judge.get("correct"))
    correct = verdict if is_judged else finite(reward.get("correct"))
    if "score" in data and data["score"] is None:  # extraction of the short form failed
        correct = None
    values = (("judge", verdict), ("EM", data.get("em")), ("SubEM", data.get("subem")))
    verdicts = [] if score is None else [["score", f"{score:.2f}"]]
    verdicts += [
        [name, "correct" if value else "wrong"] for name, value in values if value is not None
    ]
    if judge.get("reason"):
        verdicts.append(["reason", str(judge["reason"])])
    return {"correct": correct if score is None else score, "verdicts": verdicts}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def finite(value: Any) -> float | None:
    """Return a finite number as float, or None for any other value; True is 1.0."""
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:  # an integer too large for a float
        return None
