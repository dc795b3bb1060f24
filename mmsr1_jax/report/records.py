"""An episode's line as a record of the page: what is shown of it, and nothing else."""

import codecs
import itertools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmsr1_jax.report.pictures import QUESTION, RESULT, Pictures
from mmsr1_jax.rewards import NAMES
from mmsr1_jax.rollout.episode import Episode, Segment

_PICTURE = re.compile(r"<\|vision_start\|>((?:<\|image_pad\|>)+)<\|vision_end\|>")
_PAD = len("<|image_pad|>")
_MERGED = 4  # patches of a merged token
_USER = re.compile(r"\A<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n\Z", re.S)
_TEXTS = ("category", "source", "workflow")


class LineError(ValueError):
    """A line that is no episode, with the reason."""


def record(
    data: Mapping[str, Any],
    folder: pathlib.Path,
    pictures: Pictures,
    token_bytes: Sequence[bytes] | None,
    step: int | None = None,
) -> dict[str, Any]:
    """An episode, as plain data.

    Args:
      data: a line of an episodes file; what a command adds to an episode may be missing.
      folder: of the file, from which its pictures are named.
      pictures: where they get their numbers.
      token_bytes: of each token, by id; None: not known.
      step: of training.

    Returns:
      `id`, `question`, `answers`, `answer`, `correct` (in [0, 1]; None: not judged), `verdicts`,
      `actions` (names with commas), `category`, `source`, `workflow`, `step`, `reward` (its parts),
      `end`, `error`, `pictures` (of the question), `prompt` (parts), `turns`. A part is a text or
      the number of a picture, -1 where there is no file of it. A turn holds its reading, `pieces`
      (sampled or forced), `calls` and `reply` (parts).

    Raises:
      LineError: no episode; the message names the field.
    """
    try:
        episode = Episode.from_json(data)
    except (ValueError, OverflowError) as error:
        raise LineError(str(error)) from None
    texts = _segment_texts(data)
    shown = _Shown(data, folder, pictures)
    kinds = [segment.kind for segment in episode.segments]
    prompt = shown.parts(texts[0], QUESTION) if kinds[:1] == ["prompt"] else []
    begin = 1 if prompt else 0
    turns: list[dict[str, Any]] = []
    fresh = True
    for segment, text in zip(episode.segments[begin:], texts[begin:], strict=True):
        if fresh:
            turns.append({"pieces": [], "reply": None})
            fresh = False
        if segment.kind == "tool":
            user = _USER.match(text)
            turns[-1]["reply"] = shown.parts(user[1] if user else text, RESULT)
            fresh = True
        elif segment.kind == "model":
            turns[-1]["pieces"].append(_sampled(segment, text, token_bytes))
        else:
            turns[-1]["pieces"].append({"kind": segment.kind, "text": text})
    for number, (turn, read) in enumerate(itertools.zip_longest(turns, episode.turns)):
        if turn is None:  # what was read, of a turn that there are no tokens of
            turn = {"pieces": [], "reply": None}
            turns.append(turn)
        for field in ("action", "payload", "reason", "problem"):
            turn[field] = _text(getattr(read, field, None))
        turn["calls"] = [
            {"action": _text(call.action), "query": _text(call.query), "status": _text(call.status),
             "seconds": finite(call.seconds), "found": finite(call.found),
             "shown": finite(call.shown), "notes": [str(note) for note in call.notes]}
            for call in episode.calls if call.turn == number
        ]  # fmt: skip
    reward = data.get("reward") if isinstance(data.get("reward"), dict) else {}
    answers = data.get("answers")
    return {
        "id": episode.example.id,
        "question": episode.example.question,
        "answers": [str(a) for a in answers] if isinstance(answers, list) else [],
        "answer": episode.answer if isinstance(episode.answer, str) else None,
        "actions": ",".join(NAMES.get(turn["action"], "none") for turn in turns),
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
    """Texts with placeholders to parts, the episode's pictures in their order."""

    def __init__(self, data: Mapping[str, Any], folder: pathlib.Path, pictures: Pictures):
        paths, grids = data.get("images"), data.get("image_grids")
        self._paths = iter(paths if isinstance(paths, list) else ())
        self._grids = [_merged(grid) for grid in (grids if isinstance(grids, list) else ())]
        self._folder, self._pictures = folder, pictures

    def parts(self, text: str, side: int) -> list[str | int]:
        """A page may write a placeholder out: so only one of the next picture's length is it."""
        parts: list[str | int] = []
        begin = 0
        for match in _PICTURE.finditer(text):
            if self._grids[:1] != [len(match[1]) // _PAD]:
                continue
            del self._grids[0]
            parts += [text[begin : match.start()], self._number(side)]
            begin = match.end()
        return [part for part in [*parts, text[begin:]] if part != ""]

    def _number(self, side: int) -> int:
        path = next(self._paths, None)
        return self._pictures.number(self._folder / path, side) if isinstance(path, str) else -1


def _merged(grid: Any) -> int | None:
    whole = isinstance(grid, list) and all(type(n) is int for n in grid)
    return math.prod(grid) // _MERGED if whole else None


def _segment_texts(data: Mapping[str, Any]) -> list[str]:
    """Raises LineError."""
    texts = [segment.get("text") for segment in data["segments"]]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise LineError(f"segments[{number}]: 'text' must be a text")
    return texts


def _sampled(segment: Segment, text: str, token_bytes: Sequence[bytes] | None) -> dict[str, Any]:
    """What was sampled: `tokens` (texts) where they are known to be right, else `text` and `ids`;
    `logprobs`, and `drawn` where those of the sampler differ from them."""
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
    """The text that each token adds: where a character is of several tokens, the last one has it.
    None where a token is not known."""
    if max(ids, default=0) >= len(token_bytes):
        return None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(ids) - 1
    return [decoder.decode(token_bytes[token], place == last) for place, token in enumerate(ids)]


def _judged(data: Mapping[str, Any], reward: Mapping[str, Any]) -> dict[str, Any]:
    """`correct`: by a benchmark's own rules, by the judge, or as it was rewarded, the first that
    there is; a judge that was asked and said nothing is there, and makes it None. And all that an
    evaluation found, in words."""
    asked = isinstance(data.get("judge"), dict)
    judge = data["judge"] if asked else {}
    score, said = finite(data.get("score")), finite(judge.get("correct"))
    correct = said if asked else finite(reward.get("correct"))
    if "score" in data and data["score"] is None:  # to be had from a server that failed
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
    """A finite number, or None; true is 1."""
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:  # of a whole number
        return None
