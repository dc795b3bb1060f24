"""Conversion of an episode's JSON line to the record that the page shows."""

import codecs
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmsr1_jax.apps.report.pictures import QUESTION, RESULT, Pictures
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.episodes.episode import Episode, Segment, ToolCall
from mmsr1_jax.rewards.reward_function import ACTION_NAMES

_PICTURE = re.compile(r"<\|vision_start\|>((?:<\|image_pad\|>)++)<\|vision_end\|>")
_PAD = len("<|image_pad|>")
_MERGED = 4  # patches merged into one token
_USER = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")  # around a user turn
_TEXTS = ("category", "source", "workflow")


class LineError(UserError):
    """A line that is not a valid episode; the message gives the reason."""


def record(
    data: Mapping[str, Any],
    folder: pathlib.Path,
    pictures: Pictures,
    token_bytes: Sequence[bytes] | None,
    step: int | None = None,
) -> dict[str, Any]:
    """Convert an episode to plain data for the page.

    Args:
      data: Parsed line of an episodes file. Fields that commands add to an episode may be missing.
      folder: Directory of the file, to which image paths are relative.
      pictures: Registry that numbers the images.
      token_bytes: Bytes of each token by id, or None if unknown.
      step: Training step.

    Returns:
      A dict with `id`, `question`, `answers`, `answer`, `correct` (in [0, 1], or None if not
      judged), `verdicts`, `actions` (names separated by commas), `category`, `source`, `workflow`,
      `step`, `reward` (its components), `end`, `error`, `pictures` (of the question), `prompt`
      (parts) and `turns`.

      A part is a text or the number of an image, -1 if its file is missing. A turn has its parsed
      fields, `pieces` (sampled or forced), `calls` and `reply` (parts). A call has its recorded
      `results`: `link`, `title`, `text`, and `pictures` by number. Older lines have no results;
      the page shows only the text of their replies.

    Raises:
      LineError: The line is not a valid episode; the message names the field.
    """
    try:
        episode = Episode.from_json(data)
    except (ValueError, OverflowError) as error:
        raise LineError(str(error)) from None
    texts = _segment_texts(data)
    shown = _Shown(data, folder, pictures)
    kinds = [segment.kind for segment in episode.segments]
    prompt = shown.parts(0, texts[0], QUESTION) if kinds[:1] == ["prompt"] else []
    begin = 1 if prompt else 0
    turns: list[dict[str, Any]] = []
    fresh = True
    for number in range(begin, len(texts)):
        segment, text = episode.segments[number], texts[number]
        if fresh:
            turns.append({"pieces": [], "reply": None})
            fresh = False
        if segment.kind == "tool":
            turns[-1]["reply"] = _without_roles(shown.parts(number, text, RESULT))
            fresh = True
        elif segment.kind == "model":
            turns[-1]["pieces"].append(_sampled(segment, text, token_bytes))
        else:
            turns[-1]["pieces"].append({"kind": segment.kind, "text": text})
    for number, (turn, read) in enumerate(itertools.zip_longest(turns, episode.turns)):
        if turn is None:  # a parsed turn without recorded tokens
            turn = {"pieces": [], "reply": None}
            turns.append(turn)
        for field in ("action", "payload", "reason", "problem"):
            turn[field] = _text(getattr(read, field, None))
        turn["calls"] = [
            {"action": _text(call.action), "query": _text(call.query), "status": _text(call.status),
             "seconds": finite(call.seconds), "num_results": finite(call.num_results),
             "num_shown": finite(call.num_shown), "notes": [str(note) for note in call.notes],
             "results": _results(call, turn["reply"])}
            for call in episode.calls if call.turn == number
        ]  # fmt: skip
    reward = data.get("reward") if isinstance(data.get("reward"), dict) else {}
    answers = data.get("answers")
    return {
        "id": episode.example.id,
        "question": episode.example.question,
        "answers": [str(a) for a in answers] if isinstance(answers, list) else [],
        "answer": episode.answer if isinstance(episode.answer, str) else None,
        "actions": ",".join(ACTION_NAMES.get(turn["action"], "none") for turn in turns),
        **{field: _text(data.get(field)) or "" for field in _TEXTS},
        "step": step,
        "reward": {str(name): finite(value) for name, value in reward.items() if name != "judge"},
        **_judged(data, reward),
        "end": _text(episode.end),
        "error": _text(episode.error),
        "pictures": [part for part in prompt if isinstance(part, int)],
        "prompt": prompt,
        "turns": turns,
    }


class _Shown:
    """Splitter of segment texts into parts; it consumes the episode's images in order."""

    def __init__(self, data: Mapping[str, Any], folder: pathlib.Path, pictures: Pictures):
        paths, grids = data.get("images"), data.get("image_grids")
        self._paths = iter(paths if isinstance(paths, list) else ())
        self._grids = [_merged(grid) for grid in (grids if isinstance(grids, list) else ())]
        self._segments = data["segments"]
        self._folder, self._pictures = folder, pictures

    def parts(self, number: int, text: str, side: int) -> list[str | int]:
        """Return the parts of a segment. Raises LineError if its image spans are invalid."""
        parts: list[str | int] = []
        done = 0
        segment = self._segments[number]
        written = "pictures" in segment
        for begin, end in _spans(number, segment, text) if written else self._guessed(text):
            parts += [text[done:begin], self._number(side)]
            done = end
        return [part for part in [*parts, text[done:]] if part != ""]

    def _guessed(self, text: str) -> Iterator[tuple[int, int]]:
        """Find the spans of images in a segment of an older file, which does not record them.

        Text from a web page may contain placeholders, so only one with the length of the next image
        counts.
        """
        for match in _PICTURE.finditer(text):
            if self._grids[:1] == [len(match[1]) // _PAD]:
                del self._grids[0]
                yield match.span()

    def _number(self, side: int) -> int:
        path = next(self._paths, None)
        return self._pictures.number(self._folder / path, side) if isinstance(path, str) else -1


def _merged(grid: Any) -> int | None:
    whole = isinstance(grid, list) and all(type(n) is int for n in grid)
    return math.prod(grid) // _MERGED if whole else None


def _spans(number: int, segment: Mapping[str, Any], text: str) -> list[list[int]]:
    """Return the spans of images in a segment's text. Raises LineError if they are invalid."""
    spans = segment.get("pictures", [])
    whole = isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
        for span in spans
    )
    places = [place for span in spans for place in span] if whole else [-1]
    if places != sorted(places) or any(not 0 <= place <= len(text) for place in places):
        raise LineError(
            f"segments[{number}]: 'pictures' must be ascending pairs of places in 'text'"
        )
    return spans


def _without_roles(parts: list[str | int]) -> list[str | int]:
    """Remove the chat-template markers around a user turn."""
    begin, end = _USER
    inside = [part if isinstance(part, str) else "" for part in parts]
    if inside and inside[0].startswith(begin) and inside[-1].endswith(end):
        parts = [*parts[:-1], inside[-1].removesuffix(end)]
        parts[0] = parts[0].removeprefix(begin)
    return [part for part in parts if part != ""]


def _results(call: ToolCall, reply: list[str | int] | None) -> list[dict[str, Any]]:
    """Return a call's results as shown to the policy, with their images by number."""
    numbers = [part for part in reply or () if isinstance(part, int)]
    return [
        {"link": result.link, "title": result.title, "text": result.text,
         "pictures": [numbers[i] for i in result.images if 0 <= i < len(numbers)]}
        for result in call.results
    ]  # fmt: skip


def _segment_texts(data: Mapping[str, Any]) -> list[str]:
    """Return the text of each segment. Raises LineError if one is not a string."""
    texts = [segment.get("text") for segment in data["segments"]]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise LineError(f"segments[{number}]: 'text' must be a text")
    return texts


def _sampled(segment: Segment, text: str, token_bytes: Sequence[bytes] | None) -> dict[str, Any]:
    """Convert a sampled segment.

    Returns:
      A dict with `tokens` (their texts) if these match the recorded text, else `text` and `ids`;
      `logprobs`; and `drawn`, the sampler's log-probs, if they differ.
    """
    ids = segment.tokens.tolist()
    pieces = None if token_bytes is None else _pieces(ids, token_bytes)
    known = pieces is not None and "".join(pieces) == text
    made: dict[str, Any] = {"kind": "model"}
    made |= {"tokens": pieces} if known else {"text": text, "ids": ids}
    columns = [
        [None] * len(ids) if values is None else [finite(round(v, 4)) for v in values.tolist()]
        for values in (segment.logprobs, segment.sampling_logprobs)
    ]
    made["logprobs"] = columns[0]
    if columns[1] != columns[0] and segment.sampling_logprobs is not None:
        made["drawn"] = columns[1]
    return made


def _pieces(ids: Sequence[int], token_bytes: Sequence[bytes]) -> list[str] | None:
    """Return the text that each token adds, or None if a token is unknown.

    A character that spans several tokens belongs to the last of them.
    """
    if max(ids, default=0) >= len(token_bytes):
        return None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(ids) - 1
    return [decoder.decode(token_bytes[token], place == last) for place, token in enumerate(ids)]


def _judged(data: Mapping[str, Any], reward: Mapping[str, Any]) -> dict[str, Any]:
    """Return `correct`, and the `verdicts` of an evaluation as text.

    `correct` is the first available of the benchmark's score, the judge's verdict and the reward's
    `correct`. A judge that was asked but gave no verdict counts as available and makes it None.
    """
    asked = isinstance(data.get("judge"), dict)
    judge = data["judge"] if asked else {}
    score, said = finite(data.get("score")), finite(judge.get("correct"))
    correct = said if asked else finite(reward.get("correct"))
    if "score" in data and data["score"] is None:  # extraction of the short form failed
        correct = None
    verdicts = [] if score is None else [["score", f"{score:.2f}"]]
    verdicts += [
        [name, "right" if right else "wrong"]
        for name, right in (("judge", said), ("EM", data.get("em")), ("SubEM", data.get("subem")))
        if right is not None
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
