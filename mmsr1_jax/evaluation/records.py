"""Episodes of an evaluation on disk, one line of JSON each.

A line contains the fields that `train` writes for an episode (`training/sft_dataset.line_of`, with
`answers`, `category`, `source` and `reward`) and

    workflow, sample     the workflow, and the index of the episode among those of its question
    allowed              number of searches that the episode was allowed to make
    tokens, tokens_sampled
                         number of tokens in total, and of tokens sampled from the policy
    em, subem            whether the answer is correct by exact match, and by SubEM
    judge                {correct, reason, by, model}: the judge's verdict; `correct` is null if
                         the judge gave none; null: the judge has not been asked
    score, answer_format score in [0, 1] under a benchmark's own rules, null if no short form could
                         be extracted (see `extraction`), and the gold answer's format
    extracted            see `extraction`
    pages_left_out       number of document pages dropped because they exceed the token budget

Recorded answers, {question, ground_truth, candidate_answers, turns: [{response, action}]}, can be
read as well. Their turns are parsed by the engine's parser.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from mmsr1_jax.config import Rewards
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.episodes import turns
from mmsr1_jax.evaluation.metrics import KINDS, MATCHES, Outcome
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.utils import checked_json

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
    pages_left_out: NotRequired[Count]


class LineError(UserError):
    """A line that is not a valid episode; the message gives the reason."""


class NotJsonError(LineError):
    """A line that is not valid JSON, such as a truncated one."""


def scan(path: pathlib.Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (byte offset, line number from 1, parsed line) for each non-blank line of a file.

    A truncated last line is skipped with a message on stderr.

    Raises:
      DataError: A line is not a valid episode; the message names the file and the line.
    """
    place = 0
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield place, number, parse(text, number)
                except LineError as error:
                    if isinstance(error, NotJsonError) and not text.endswith(b"\n"):
                        print(f"{path}, line {number}: not written to its end; left out",
                              file=sys.stderr)  # fmt: skip
                        return
                    raise DataError(f"{path}, line {number}: {error}") from None
            place += len(text)


def truncate_partial_line(path: pathlib.Path) -> None:
    """Remove a truncated last line from a file. A missing file is ignored."""
    if path.is_file():
        with open(path, "rb+") as file:
            end = 0
            for line in file:
                end += len(line) if line.endswith(b"\n") else 0
            file.truncate(end)


def parse(text: bytes, number: int) -> dict[str, Any]:
    """Parse line `number` (from 1) of a file.

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
        line = _recorded(line, number)
    try:
        outcome_of(line)
        checked_json.convert(line, _Line)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise LineError(f"no episode of an evaluation ({_said(error)})") from None
    return line


def outcome_of(line: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a line. EM and SubEM are recomputed.

    Raises:
      KeyError, TypeError, AttributeError, ValueError: The line is not an evaluation episode.
    """
    calls = [call for call in line["calls"] if call["status"] != "refused"]
    verdict = (line.get("judge") or {}).get("correct")
    right = dict(zip(MATCHES, (*matched(line), verdict, line.get("score")), strict=True))
    return Outcome(
        workflow=str(line["workflow"]),
        index=int(line["group"]),
        sample=int(line["sample"]),
        id=str(line["id"]),
        question=str(line["question"]),
        source=checked_json.valid_text(str(line["source"])),
        category=checked_json.valid_text(str(line["category"])),
        right=right,
        reward=float(line["reward"]["reward"]),
        format=bool(line["reward"]["format"]),
        made={kind: sum(call["action"] == kind for call in calls) for kind in KINDS},
        failed={
            kind: sum(call["action"] == kind and call["status"] == "failed" for call in calls)
            for kind in KINDS
        },
        refused=len(line["calls"]) - len(calls),
        allowed=int(line["allowed"]),
        turns=len(line["turns"]),
        tokens=int(line["tokens"]),
        tokens_sampled=int(line["tokens_sampled"]),
        end=str(line["end"]),
    )


def matched(line: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether the answer of a line is correct by exact match, and by SubEM."""
    answer, golds = line["answer"], line["answers"]
    return reward_function.exact_match(answer, golds), reward_function.sub_exact_match(
        answer, golds
    )


def moved(line: dict[str, Any], source: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Rewrite the image paths of a line from `source` so that they are relative to `folder`."""
    if not line.get("images") or source.resolve() == folder.resolve():
        return line
    paths = [os.path.relpath(source.resolve() / path, folder.resolve()) for path in line["images"]]
    return line | {"images": paths}


def _recorded(line: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Convert a recorded answer to an evaluation line.

    Raises:
      LineError: The line is not a valid recorded answer.
    """
    try:
        read = [turns.parse(turn["response"]) for turn in line["turns"]]
        golds = line.get("candidate_answers") or []
        golds = checked_json.loads(golds, surrogates=True) if isinstance(golds, str) else golds
        answers = [line["ground_truth"], *(gold for gold in golds if gold is not None)]
        answers = list(dict.fromkeys(answers))
        if not all(isinstance(answer, str) for answer in answers):
            raise TypeError("answers must be texts")
        sampled = [int(turn.get("output_tokens", 0)) for turn in line["turns"]]
        last = line["turns"][-1] if line["turns"] else {}
        in_all = int(last.get("input_tokens", 0)) + int(last.get("output_tokens", 0))
        question = line["question"]
        recorded = [turn.get("action") for turn in line["turns"]]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise LineError(f"no recorded answer ({_said(error)})") from None
    searches = [
        {"turn": place, "action": turn.action, "query": turn.payload, "status": "unknown"}
        for place, turn in enumerate(read)
        if turn.action in KINDS
    ]
    reward = reward_function.compute_reward(
        read,
        reward_function.exact_match(reward_function.final_answer(read), answers),
        Rewards(),
    )
    return {
        "id": str(line.get("data_id", number)),
        "question": question,
        "group": number - 1,
        "index": number - 1,
        "sample": 0,
        "workflow": RECORDED,
        "end": "answer" if read and read[-1].action == "answer" else "turns",
        "error": None,
        "answer": reward_function.final_answer(read),
        "turns": [dataclasses.asdict(turn) for turn in read],
        "recorded_actions": recorded,
        "calls": searches,
        "segments": [],
        "answers": answers,
        "category": str(line.get("category") or ""),
        "source": str(line.get("data_source") or ""),
        "reward": dataclasses.asdict(reward),
        "allowed": 2,  # as published, see `config.settings.Turns`
        "tokens": in_all,
        "tokens_sampled": sum(sampled),
    }


def _said(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
