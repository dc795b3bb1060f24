"""Episodes of an evaluation on disk, one line of JSON each.

A line contains the fields that `train` writes for an episode (`training/sft_dataset.to_line`, with
`answers`, `category`, `source` and `reward`) and

    workflow, sample     the workflow, and the index of the episode among those of its question
    allowed              maximum number of searches of the episode
    tokens, tokens_sampled
                         number of tokens in total, and of tokens sampled from the policy
    em, subem            whether the answer is correct by exact match, and by SubEM
    judge                {correct, reason, by, model}: the judge's verdict; `correct` is null if
                         the judge gave none; null if the judge was not queried
    score, answer_format score in [0, 1] under a benchmark's own rules, null if no short form could
                         be extracted (see `extraction`), and the gold answer's format
    extracted            see `extraction`
    omitted_pages        number of document pages dropped because they exceed the token budget

Recorded answers, {question, ground_truth, candidate_answers, turns: [{response, action}]}, can be
read as well. Their turns are parsed by the engine's parser.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from mmsr1_jax.config import Rewards
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.episodes import turns
from mmsr1_jax.evaluation.metrics import CRITERIA, SEARCH_ACTIONS, Outcome
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.utils import checked_json
from mmsr1_jax.utils.logs import log

EPISODES = "episodes.jsonl"  # file name within the results directory
RECORDED = "recorded"  # workflow of recorded answers, of which only the text is known


Count = Annotated[int, msgspec.Meta(ge=0)]
Finite = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]


class Verdict(TypedDict):
    correct: bool | None
    reason: NotRequired[str]
    by: NotRequired[str]
    model: NotRequired[str]


class Extracted(TypedDict):
    answer: str | None
    error: str | None
    model: str


class _Call(TypedDict):
    action: str
    status: str
    query: NotRequired[str | None]
    turn: NotRequired[Count]


class _Reward(TypedDict):
    reward: Finite
    format: bool


class _Line(TypedDict):
    """Fields read from a line (see the module docstring). Other fields are ignored."""

    workflow: str
    id: str
    question: str
    source: str
    category: str
    group: Count
    index: NotRequired[Count]
    sample: Count
    allowed: Count
    tokens: Count
    tokens_sampled: Count
    answers: list[str]
    answer: str | None
    end: str
    turns: list[dict[str, Any]]
    calls: list[_Call]
    reward: _Reward
    judge: NotRequired[Verdict | None]
    score: NotRequired[Finite | None]
    images: NotRequired[list[str]]
    answer_format: NotRequired[str | None]
    extracted: NotRequired[dict[str, str | None] | None]
    omitted_pages: NotRequired[Count]


class LineError(UserError):
    """A line that is not a valid episode; the message gives the reason."""


class NotJsonError(LineError):
    """A line that is not valid JSON, such as a truncated one."""


def scan(path: pathlib.Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (byte offset, line number from 1, parsed line) for each non-blank line of a file.

    A truncated last line is skipped with a warning.

    Raises:
      DataError: A line is not a valid episode; the message names the file and the line.
    """
    offset = 0
    with open(path, "rb") as file:
        for line_number, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield offset, line_number, parse_line(text, line_number)
                except LineError as error:
                    if isinstance(error, NotJsonError) and not text.endswith(b"\n"):
                        log.warning("%s, line %d: truncated; skipped", path, line_number)
                        return
                    raise DataError(f"{path}, line {line_number}: {error}") from None
            offset += len(text)


def parse_line(text: bytes, line_number: int) -> dict[str, Any]:
    """Parse a line of a file, whose number counts from 1.

    Raises:
      LineError: The line is not a valid episode.
    """
    try:
        # Log-probs of a diverged run are NaN.
        line = checked_json.loads(text, surrogates=True, nan=True)
    except checked_json.NotJsonError as error:
        raise NotJsonError(str(error)) from None
    except checked_json.FormatError as error:
        raise LineError(str(error)) from None
    if not isinstance(line, dict):
        raise LineError("must be an object")
    if "ground_truth" in line:
        line = _from_recorded(line, line_number)
    try:
        to_outcome(line)
        checked_json.convert(line, _Line)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise LineError(f"not an evaluation episode ({_reason(error)})") from None
    return line


def to_outcome(line: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a line. EM and SubEM are recomputed.

    Raises:
      KeyError, TypeError, AttributeError, ValueError: The line is not an evaluation episode.
    """
    calls = [call for call in line["calls"] if call["status"] != "refused"]
    verdict = (line.get("judge") or {}).get("correct")
    values = (*match_answer(line), verdict, line.get("score"))
    correct: dict[str, float | None] = dict(zip(CRITERIA, values, strict=True))
    return Outcome(
        workflow=str(line["workflow"]),
        index=int(line["group"]),
        sample=int(line["sample"]),
        id=str(line["id"]),
        question=str(line["question"]),
        source=checked_json.valid_text(str(line["source"])),
        category=checked_json.valid_text(str(line["category"])),
        correct=correct,
        reward=float(line["reward"]["reward"]),
        format=bool(line["reward"]["format"]),
        made={action: sum(c["action"] == action for c in calls) for action in SEARCH_ACTIONS},
        failed={
            action: sum(c["action"] == action and c["status"] == "failed" for c in calls)
            for action in SEARCH_ACTIONS
        },
        refused=len(line["calls"]) - len(calls),
        allowed=int(line["allowed"]),
        turns=len(line["turns"]),
        tokens=int(line["tokens"]),
        tokens_sampled=int(line["tokens_sampled"]),
        end=str(line["end"]),
    )


def match_answer(line: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether the answer of a line is correct by exact match, and by SubEM."""
    answer, golds = line["answer"], line["answers"]
    return (
        reward_function.exact_match(answer, golds),
        reward_function.sub_exact_match(answer, golds),
    )


def rebase_images(
    line: dict[str, Any], source: pathlib.Path, folder: pathlib.Path
) -> dict[str, Any]:
    """Rewrite the image paths of a line from `source` so that they are relative to `folder`."""
    if not line.get("images") or source.resolve() == folder.resolve():
        return line
    paths = [os.path.relpath(source.resolve() / path, folder.resolve()) for path in line["images"]]
    return line | {"images": paths}


def _from_recorded(line: Mapping[str, Any], line_number: int) -> dict[str, Any]:
    """Convert a recorded answer to an evaluation line.

    Raises:
      LineError: The line is not a valid recorded answer.
    """
    try:
        parsed = [turns.parse(turn["response"]) for turn in line["turns"]]
        answers = _recorded_golds(line)
        tokens_sampled = [int(turn.get("output_tokens", 0)) for turn in line["turns"]]
        last = line["turns"][-1] if line["turns"] else {}
        tokens = int(last.get("input_tokens", 0)) + int(last.get("output_tokens", 0))
        question = line["question"]
        recorded_actions = [turn.get("action") for turn in line["turns"]]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise LineError(f"not a recorded answer ({_reason(error)})") from None
    calls = [
        {"turn": index, "action": turn.action, "query": turn.payload, "status": "unknown"}
        for index, turn in enumerate(parsed)
        if turn.action in SEARCH_ACTIONS
    ]
    answer = reward_function.final_answer(parsed)
    correct = reward_function.exact_match(answer, answers)
    reward = reward_function.compute_reward(parsed, correct, Rewards())
    return {
        "id": str(line.get("data_id", line_number)),
        "question": question,
        "group": line_number - 1,
        "index": line_number - 1,
        "sample": 0,
        "workflow": RECORDED,
        "end": "answer" if parsed and parsed[-1].action == "answer" else "turns",
        "error": None,
        "answer": answer,
        "turns": [dataclasses.asdict(turn) for turn in parsed],
        "recorded_actions": recorded_actions,
        "calls": calls,
        "segments": [],
        "answers": answers,
        "category": str(line.get("category") or ""),
        "source": str(line.get("data_source") or ""),
        "reward": dataclasses.asdict(reward),
        "allowed": 2,  # as published, see `config.settings.Turns`
        "tokens": tokens,
        "tokens_sampled": sum(tokens_sampled),
    }


def _recorded_golds(line: Mapping[str, Any]) -> list[str]:
    """Return the gold answers of a recorded answer, without duplicates.

    Raises:
      KeyError, TypeError, ValueError: The answers are missing or invalid.
    """
    golds = line.get("candidate_answers") or []
    golds = checked_json.loads(golds, surrogates=True) if isinstance(golds, str) else golds
    answers = [line["ground_truth"], *(gold for gold in golds if gold is not None)]
    answers = list(dict.fromkeys(answers))
    if not all(isinstance(answer, str) for answer in answers):
        raise TypeError("answers must be strings")
    return answers


def _reason(error: Exception) -> str:
    return f"missing field {error}" if isinstance(error, KeyError) else str(error)
