"""Episodes: the single, token-level record of a conversation.

    prompt | model  forced  tool | model  forced  tool | model
             sampled ^      ^ the next user turn, with results
                     tokens that close a turn which stopped at a tag

Rewards, training, evaluation and the files on disk all use it; nothing is ever tokenized again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.tools import ImageLike
from mmsr1_jax.utils import checked_json

# Why an episode ended: an answer, the limit of turns, the limit of tokens, or an error.
EndReason = Literal["answer", "turns", "tokens", "error"]
SegmentKind = Literal["prompt", "model", "forced", "tool"]
_SEGMENT_KINDS: tuple[SegmentKind, ...] = get_args(SegmentKind)
_TYPE_NAMES = {str: "a text", int: "a whole number", list: "a list"}
_MAX_TOKEN = 2**31 - 1


class EpisodeError(UserError):
    """Malformed JSON data of an episode; the message names the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A question, as in one row of a dataset.

    Attributes:
      id: Identifier in the dataset.
      question: Text of the question.
      images: Images of the question, in the order in which they are shown.
    """

    id: str = ""
    question: str
    images: Sequence[ImageLike] = ()


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens of one origin.

    Attributes:
      kind: Origin of the tokens: `prompt`; `model`, sampled by the policy; `forced`, inserted to
        close the policy's turn or to force an action (`forcing.py`); `tool`, the user turn after
        it. Only `model` segments carry loss.
      tokens: Token ids, int32[n].
      logprobs: Log-probs of a model segment under the policy at the sampling temperature,
        float32[n].
      sampling_logprobs: Log-probs of a model segment under the distribution sampled from (top-k,
        top-p, no control tokens), float32[n].
    """

    kind: SegmentKind
    tokens: np.ndarray
    logprobs: np.ndarray | None = None
    sampling_logprobs: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownResult:
    """A search result as shown to the policy: external text, escaped and shortened.

    Clients must rely on these fields and not parse the text of the user turn.

    Attributes:
      link, title: Link and title of the result; "" if it has none.
      text: Summary of the result, or all of its text if the tool gave no labels.
      images: Indices of its images among those of the user turn, from 0.
    """

    link: str = ""
    title: str = ""
    text: str = ""
    images: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
    """Record of a search, executed or refused.

    Attributes:
      turn: Index of the policy's turn that requested the search, from 0.
      action: Kind of search.
      query: Search query; None for an image search.
      status: `ok`, `empty`, `failed`, or `refused` (over a limit; no tool was called).
      seconds: Seconds that the tool took.
      num_results: Number of results that the tool returned.
      num_shown: Number of results that the policy saw.
      notes: Results and images that were dropped or changed, and why the search failed.
      results: Results that the policy saw; empty in records that do not have them. Excluded from
        equality, since the tokens already contain them.
    """

    turn: int
    action: str
    query: str | None
    status: str
    seconds: float = 0.0
    num_results: int = 0
    num_shown: int = 0
    notes: tuple[str, ...] = ()
    results: tuple[ShownResult, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(kw_only=True)
class Episode:
    """Record of one rollout of a question.

    Attributes:
      example: The question.
      group: Index of the example in the run, shared by all episodes of the example.
      index: Index of the episode in the run, which seeds its random numbers.
      segments: All tokens, in order.
      images: All images, in the order of their placeholders.
      turns: Parsed turns of the policy.
      calls: Searches of the episode.
      end: Why the episode ended; None while it runs.
      error: Error message if `end == "error"`.
    """

    example: Example
    group: int
    index: int
    segments: list[Segment] = dataclasses.field(default_factory=list)
    images: list[Patches] = dataclasses.field(default_factory=list)
    turns: list[Turn] = dataclasses.field(default_factory=list)
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    end: EndReason | None = None
    error: str | None = None

    def __len__(self) -> int:
        """Return the total number of tokens."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def tokens(self) -> np.ndarray:
        """All token ids, int32[T]."""
        return np.concatenate([np.zeros(0, np.int32), *(s.tokens for s in self.segments)])

    @property
    def loss_mask(self) -> np.ndarray:
        """Mask of the sampled tokens, bool[T]."""
        parts = [np.full(len(s.tokens), s.kind == "model") for s in self.segments]
        return np.concatenate([np.zeros(0, bool), *parts])

    @property
    def logprobs(self) -> np.ndarray:
        """Recorded log-probs, float32[T]; 0 for tokens that were not sampled."""
        parts = [
            np.zeros(len(s.tokens), np.float32) if s.logprobs is None else s.logprobs
            for s in self.segments
        ]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    @property
    def conversation(self) -> Prompt:
        """The whole conversation, as input for the policy."""
        return Prompt(self.tokens, tuple(self.images))

    @property
    def answer(self) -> str | None:
        """Text of the answer; None if the last turn is not an answer."""
        last = self.turns[-1] if self.turns else None
        return last.payload if last is not None and last.action == "answer" else None

    @property
    def last_call(self) -> ToolCall | None:
        """Search that the last turn requested; None if it requested none, or no reply exists."""
        call = self.calls[-1] if self.calls else None
        return call if call is not None and call.turn == len(self.turns) - 1 else None

    def to_json(
        self, processor: Processor, image_paths: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the episode as JSON-compatible data, with both tokens and text.

        A prompt or tool segment has a field `image_spans`: the start and end of each image's
        placeholder in the segment's `text`, in characters and in order.

        Args:
          processor: Decoder of the tokens.
          image_paths: Paths of the files of `images`; None: write only the grids of the images.
        """

        def segment_json(segment: Segment) -> dict[str, Any]:
            text, spans = _decode_segment(segment.tokens, processor)
            data: dict[str, Any] = {"kind": segment.kind, "text": text}
            data |= {"image_spans": spans} if segment.kind in ("prompt", "tool") else {}
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
            "index": self.index,
            "end": self.end,
            "error": self.error,
            "answer": self.answer,
            "turns": [dataclasses.asdict(turn) for turn in self.turns],
            "calls": [dataclasses.asdict(call) for call in self.calls],
            "image_grids": [list(image.grid) for image in self.images],
            **({} if image_paths is None else {"images": list(image_paths)}),
            "segments": [segment_json(segment) for segment in self.segments],
        }

    @classmethod
    def from_json(cls, data: Any, images: Sequence[Patches] = ()) -> "Episode":
        """Restore an episode from `to_json` with identical tokens; the example has no images.

        Args:
          data: JSON data.
          images: All images, in order; they are not checked.

        Raises:
          EpisodeError: The data are malformed.
        """
        if not isinstance(data, dict):
            raise EpisodeError("must be an object")

        def field(name: str, kind: type, default: Any = None) -> Any:
            value = data.get(name, default)
            if not isinstance(value, kind):
                raise EpisodeError(f"{name!r} must be {_TYPE_NAMES[kind]}")
            return value

        segments = field("segments", list)
        try:
            parsed_turns = checked_json.convert(field("turns", list, []), list[Turn])
            calls = checked_json.convert(field("calls", list, []), list[ToolCall])
        except checked_json.FormatError as error:
            raise EpisodeError(f"'turns' or 'calls': {error}") from None
        types: Any = (EndReason | None, str | None)
        try:
            end = checked_json.convert(data.get("end"), types[0])
            message = checked_json.convert(data.get("error"), types[1])
        except checked_json.FormatError as error:
            raise EpisodeError(f"'end' or 'error': {error}") from None
        return cls(
            example=Example(id=field("id", str, ""), question=field("question", str, "")),
            group=field("group", int, 0),
            index=field("index", int, 0),
            segments=[_parse_segment(f"segments[{i}]", item) for i, item in enumerate(segments)],
            images=list(images),
            turns=parsed_turns,
            calls=calls,
            end=end,
            error=message,
        )


def _decode_segment(tokens: np.ndarray, processor: Processor) -> tuple[str, list[list[int]]]:
    """Return the text of tokens, and the character spans of the image placeholders in it.

    Control tokens never split a character, so the pieces between them can be decoded separately.
    """
    starts = np.flatnonzero(tokens == processor.control["<|vision_start|>"])
    ends = np.flatnonzero(tokens == processor.control["<|vision_end|>"]) + 1
    if len(starts) != len(ends) or np.any(starts >= ends) or np.any(ends[:-1] > starts[1:]):
        return processor.decode(tokens), []  # unpaired: sampled, or made by hand
    text, spans, decoded = "", [], 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        text += processor.decode(tokens[decoded:start])
        placeholder = processor.decode(tokens[start:end])
        spans.append([len(text), len(text) + len(placeholder)])
        text, decoded = text + placeholder, end
    return text + processor.decode(tokens[decoded:]), spans


def _parse_segment(name: str, data: Any) -> Segment:
    """Return a segment from JSON data. Raises EpisodeError."""
    if not isinstance(data, dict) or data.get("kind") not in _SEGMENT_KINDS:
        kinds = ", ".join(_SEGMENT_KINDS)
        raise EpisodeError(f"{name} must be an object whose 'kind' is one of {kinds}")
    tokens = data.get("tokens")
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token <= _MAX_TOKEN for token in tokens
    ):
        raise EpisodeError(f"{name}: 'tokens' must be a list of token ids")
    logprobs = {}
    for field in ("logprobs", "sampling_logprobs"):
        values = data.get(field)
        if values is not None:
            try:
                logprobs[field] = np.array(values, np.float32)
            except (TypeError, ValueError):
                logprobs[field] = np.zeros(0)
            if logprobs[field].shape != (len(tokens),):
                raise EpisodeError(f"{name}: {field!r} must be a list of a number for each token")
    return Segment(data["kind"], np.array(tokens, np.int32), **logprobs)
