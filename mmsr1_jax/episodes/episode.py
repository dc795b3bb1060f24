"""An episode: the single record of what happened, token by token.

    prompt | model  forced  tool | model  forced  tool | model
             sampled ^      ^ the next user turn, with results
                     tokens that close a turn which stopped at a tag

Reward, training, evaluation and the files on disk all read it; nothing is ever tokenised again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.tools import Picture
from mmsr1_jax.utils import checked_json

# Why an episode ended: it answered; its turns or its tokens were used up; it could not be run.
End = Literal["answer", "turns", "tokens", "error"]
Kind = Literal["prompt", "model", "forced", "tool"]
SEGMENTS: tuple[Kind, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A question, as a row of a dataset has it.

    Attributes:
      id: by which it is found again.
      question: text.
      images: of the question, in the order in which they are shown.
    """

    id: str = ""
    question: str
    images: Sequence[Picture] = ()


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens of one origin.

    Attributes:
      kind: `prompt`; `model`: sampled; `forced`: closing the policy's turn in its place, or put
        into it (`forcing.py`); `tool`: the user turn after it. Only what the policy sampled carries
        loss.
      tokens: int32[n].
      logprobs: float32[n] of a model segment, under the policy at the sampling temperature.
      sampling_logprobs: float32[n] of a model segment, under what was drawn from (top-k, top-p, no
        control tokens).
    """

    kind: Kind
    tokens: np.ndarray
    logprobs: np.ndarray | None = None
    sampling_logprobs: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownResult:
    """A result as the policy saw it: what came from outside, escaped and shortened as it was
    written. Clients must rely on these fields and not parse the text.

    Attributes:
      link, title: "" where it has none.
      text: its summary, or all of its text where a tool gave no labels.
      images: numbers of its pictures among those of the user turn, from 0.
    """

    link: str = ""
    title: str = ""
    text: str = ""
    images: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A search, made or refused.

    Attributes:
      turn: number of the policy's turn that asked for it, from 0.
      action, query: what was asked; an image search has no query.
      status: `ok`, `empty`, `failed`, or `refused` (over a limit; no tool was called).
      seconds: that the tool took.
      found, shown: results that came back, and that the policy saw.
      notes: what was left out or mended, and why a search failed.
      results: Results that the policy saw; empty in records that do not have them. Excluded from
        equality, since the tokens already contain them.
    """

    turn: int
    action: str
    query: str | None
    status: str
    seconds: float = 0.0
    found: int = 0
    shown: int = 0
    notes: tuple[str, ...] = ()
    results: tuple[ShownResult, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(kw_only=True)
class Episode:
    """What happened with one question, once.

    Attributes:
      example: the question.
      group: number of the example in the run; its rollouts share it.
      number: of the episode in the run; seeds its random numbers.
      segments: all tokens, in order.
      images: all pictures, in the order of their placeholders.
      turns: what the policy wrote, read.
      calls: its searches.
      end: why it ended; None while it runs.
      error: for `end == "error"`, what was wrong.
    """

    example: Example
    group: int
    number: int
    segments: list[Segment] = dataclasses.field(default_factory=list)
    images: list[Patches] = dataclasses.field(default_factory=list)
    turns: list[Turn] = dataclasses.field(default_factory=list)
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    end: End | None = None
    error: str | None = None

    def __len__(self) -> int:
        """Tokens in all."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def tokens(self) -> np.ndarray:
        """int32[T]."""
        return np.concatenate([np.zeros(0, np.int32), *(s.tokens for s in self.segments)])

    @property
    def loss_mask(self) -> np.ndarray:
        """bool[T]: the tokens that were sampled."""
        parts = [np.full(len(s.tokens), s.kind == "model") for s in self.segments]
        return np.concatenate([np.zeros(0, bool), *parts])

    @property
    def logprobs(self) -> np.ndarray:
        """float32[T]: as recorded, 0 where nothing was sampled."""
        parts = [
            np.zeros(len(s.tokens), np.float32) if s.logprobs is None else s.logprobs
            for s in self.segments
        ]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    @property
    def conversation(self) -> Prompt:
        """All of it, as the policy reads it."""
        return Prompt(self.tokens, tuple(self.images))

    @property
    def answer(self) -> str | None:
        """The text of the answer, None where there is none."""
        last = self.turns[-1] if self.turns else None
        return last.payload if last is not None and last.action == "answer" else None

    def to_json(
        self, processor: Processor, pictures: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """The episode as plain data, tokens and text.

        A prompt or tool segment has `pictures`: for each of them in order, where its placeholders
        begin and end in the segment's `text`, in characters.

        Args:
          processor: turns tokens into text.
          pictures: where `images` are, by path; None: only their grids are told.
        """

        def of_segment(segment: Segment) -> dict[str, Any]:
            text, spans = _text_of(segment.tokens, processor)
            data: dict[str, Any] = {"kind": segment.kind, "text": text}
            data |= {"pictures": spans} if segment.kind in ("prompt", "tool") else {}
            data["tokens"] = segment.tokens.tolist()
            for field in ("logprobs", "sampling_logprobs"):
                values = getattr(segment, field)
                if values is not None:
                    data[field] = values.tolist()
            return data

        return {
            "id": self.example.id,
            "question": self.example.question,
            "group": self.group,
            "number": self.number,
            "end": self.end,
            "error": self.error,
            "answer": self.answer,
            "turns": [dataclasses.asdict(turn) for turn in self.turns],
            "calls": [dataclasses.asdict(call) for call in self.calls],
            "image_grids": [list(image.grid) for image in self.images],
            **({} if pictures is None else {"images": list(pictures)}),
            "segments": [of_segment(segment) for segment in self.segments],
        }

    @classmethod
    def from_json(cls, data: Any, images: Sequence[Patches] = ()) -> "Episode":
        """The episode that `to_json` wrote, with the tokens as they were; the example is without
        its pictures.

        Args:
          data: plain data.
          images: all pictures, in order; not looked at.

        Raises:
          ValueError: not in that form; the message names the field.
        """
        if not isinstance(data, dict):
            raise ValueError("must be an object")

        def field(name: str, kind: type, default: Any = None) -> Any:
            value = data.get(name, default)
            if not isinstance(value, kind):
                raise ValueError(f"{name!r} must be {_KINDS[kind]}")
            return value

        segments = field("segments", list)
        try:
            read = checked_json.convert(field("turns", list, []), list[Turn])
            calls = checked_json.convert(field("calls", list, []), list[ToolCall])
        except checked_json.FormatError as error:
            raise ValueError(f"'turns' or 'calls': {error}") from None
        try:
            end = checked_json.convert(data.get("end"), End | None)
            why = checked_json.convert(data.get("error"), str | None)
        except checked_json.FormatError as error:
            raise ValueError(f"'end' or 'error': {error}") from None
        return cls(
            example=Example(id=field("id", str, ""), question=field("question", str, "")),
            group=field("group", int, 0),
            number=field("number", int, 0),
            segments=[_segment_of(f"segments[{i}]", values) for i, values in enumerate(segments)],
            images=list(images),
            turns=read,
            calls=calls,
            end=end,
            error=why,
        )


def _text_of(tokens: np.ndarray, processor: Processor) -> tuple[str, list[list[int]]]:
    """The text of tokens, and where in it are the placeholders of pictures. Control tokens stand
    between characters, so the pieces between them can be decoded one by one."""
    begins = np.flatnonzero(tokens == processor.control["<|vision_start|>"])
    ends = np.flatnonzero(tokens == processor.control["<|vision_end|>"]) + 1
    if len(begins) != len(ends) or np.any(begins >= ends) or np.any(ends[:-1] > begins[1:]):
        return processor.decode(tokens), []  # sampled, or made by hand
    text, spans, done = "", [], 0
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        text += processor.decode(tokens[done:begin])
        placeholder = processor.decode(tokens[begin:end])
        spans.append([len(text), len(text) + len(placeholder)])
        text, done = text + placeholder, end
    return text + processor.decode(tokens[done:]), spans


_KINDS = {str: "a text", int: "a whole number", list: "a list"}
_MOST_TOKEN = 2**31 - 1


def _segment_of(name: str, data: Any) -> Segment:
    """A segment from plain data. Raises ValueError."""
    if not isinstance(data, dict) or data.get("kind") not in SEGMENTS:
        raise ValueError(f"{name} must be an object whose 'kind' is one of {', '.join(SEGMENTS)}")
    tokens = data.get("tokens")
    whole = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    if not whole or not all(0 <= token <= _MOST_TOKEN for token in tokens):
        raise ValueError(f"{name}: 'tokens' must be a list of token ids")
    drawn = {}
    for field in ("logprobs", "sampling_logprobs"):
        values = data.get(field)
        if values is not None:
            try:
                drawn[field] = np.array(values, np.float32)
            except (TypeError, ValueError):
                drawn[field] = np.zeros(0)
            if drawn[field].shape != (len(tokens),):
                raise ValueError(f"{name}: {field!r} must be a list of a number for each token")
    return Segment(data["kind"], np.array(tokens, np.int32), **drawn)
