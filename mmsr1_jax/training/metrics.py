"""Metrics of a training step, and the log that writes them."""

import collections
import dataclasses
import json
import pathlib
import statistics
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

import msgspec

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.config.redaction import redact
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.rewards.reward_function import Reward
from mmsr1_jax.utils import checked_json, outputs, processes


class _Line(TypedDict):
    step: Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeFacts:
    """What the metrics need of an episode; processes exchange it as JSON.

    Attributes:
      index: `Episode.index`.
      end: `Episode.end`.
      category: Category of its question; an empty string means no category.
      reward, correct, format, known, judge: See `Reward`.
      turns, tokens, sampled: Numbers of turns, of tokens, and of sampled tokens.
      calls: Action, status, seconds of each tool call, and whether it has notes.
    """

    index: int
    end: str | None
    category: str
    reward: float
    correct: bool | float
    format: bool
    known: bool
    judge: str | None
    turns: int
    tokens: int
    sampled: int
    calls: list[tuple[str, str, float, bool]]


def episode_facts(
    episodes: Sequence[Episode], rewards: Sequence[Reward], categories: Sequence[str]
) -> list[EpisodeFacts]:
    """Return the facts of episodes, of their rewards, and of the categories of their questions."""
    return [
        EpisodeFacts(
            index=episode.index, end=episode.end, category=category, reward=reward.reward,
            correct=reward.correct, format=reward.format, known=reward.known, judge=reward.judge,
            turns=len(episode.turns), tokens=len(episode), sampled=int(episode.loss_mask.sum()),
            calls=[(c.action, c.status, c.seconds, bool(c.notes)) for c in episode.calls],
        )
        for episode, reward, category in zip(episodes, rewards, categories, strict=True)
    ]  # fmt: skip


def gather_facts(facts: Sequence[EpisodeFacts]) -> list[EpisodeFacts]:
    """Return the facts of the episodes of all processes, by index."""
    received = processes.exchange("episodes", [dataclasses.asdict(fact) for fact in facts])
    everywhere = [EpisodeFacts(**fact) for part in received for fact in part]
    return sorted(everywhere, key=lambda fact: fact.index)


def episode_metrics(facts: Sequence[EpisodeFacts]) -> dict[str, float]:
    """Return metrics of finished episodes; episodes with errors are only counted.

    Returns:
      `errors`, the number of episodes that could not be run. If others exist, also their means
      `reward`, `accuracy`, `format` and `searches`; the fractions of episodes `search/any`,
      `/text`, `/image`, `/both` and `/none`; `accuracy_by_category/CATEGORY` and
      `search_by_category/CATEGORY`; the means `turns`, `tokens` and `tokens_sampled`; the fractions
      `end/REASON`; and `tool/calls`, `tool/failed` (fraction of the calls), `tool/refused` and
      `tool/seconds` (mean per call).

      With a judge, also `judge/requests`, the number of answers sent to it, and two fractions of
      these: `judge/failed`, whose requests failed, and `judge/unreadable`, whose replies held no
      verdict, which counts as wrong. Episodes with failed requests are excluded from `reward`,
      `accuracy` and `accuracy_by_category`. `reward` and `accuracy` are absent if all requests
      failed, since answers that need no judge are not representative; `accuracy_by_category` is
      absent if no episode of the category remains.
    """
    finished = [fact for fact in facts if fact.end != "error"]
    values = {"errors": float(len(facts) - len(finished))}
    if not finished:
        return values
    action_sets = [{c[0] for c in fact.calls if c[1] != "refused"} for fact in finished]
    known = [fact for fact in finished if fact.known]
    outcomes = [fact.judge for fact in finished if fact.judge]
    requests = [outcome for outcome in outcomes if outcome != "match"]
    if known and not (requests and set(requests) == {"failed"}):
        values["reward"] = _mean(fact.reward for fact in known)
        values["accuracy"] = _mean(fact.correct for fact in known)
    values |= _call_metrics(finished)
    values |= {
        "format": _mean(fact.format for fact in finished),
        "search/any": _mean(bool(actions) for actions in action_sets),
        "search/text": _mean(actions == {"text_search"} for actions in action_sets),
        "search/image": _mean(actions == {"image_search"} for actions in action_sets),
        "search/both": _mean(len(actions) == 2 for actions in action_sets),
        "search/none": _mean(not actions for actions in action_sets),
        "turns": _mean(fact.turns for fact in finished),
        "tokens": _mean(fact.tokens for fact in finished),
        "tokens_sampled": _mean(fact.sampled for fact in finished),
    }
    for end in ("answer", "turns", "tokens"):
        values[f"end/{end}"] = _mean(fact.end == end for fact in finished)
    if outcomes:
        values["judge/requests"] = float(len(requests))
        for outcome in ("failed", "unreadable"):
            values[f"judge/{outcome}"] = _mean(request == outcome for request in requests)
    return values | _category_metrics(finished, action_sets)


def _category_metrics(
    facts: Sequence[EpisodeFacts], action_sets: Sequence[set[str]]
) -> dict[str, float]:
    """Return `accuracy_by_category/..` and `search_by_category/..`.

    Args:
      facts: Facts of the episodes.
      action_sets: Kinds of search that each episode executed.
    """
    values, by_category = {}, collections.defaultdict(list)
    for fact, actions in zip(facts, action_sets, strict=True):
        by_category[fact.category].append((fact, actions))
    for category in sorted(set(by_category) - {""}):
        members = by_category[category]
        if judged := [fact for fact, _ in members if fact.known]:
            values[f"accuracy_by_category/{category}"] = _mean(fact.correct for fact in judged)
        values[f"search_by_category/{category}"] = _mean(bool(actions) for _, actions in members)
    return values


def _call_metrics(facts: Sequence[EpisodeFacts]) -> dict[str, float]:
    """Return `searches` per episode, and the metrics `tool/..` of all calls."""
    calls = [call for fact in facts for call in fact.calls]
    executed = [call for call in calls if call[1] != "refused"]
    return {
        "searches": len(executed) / len(facts),
        "tool/calls": float(len(executed)),
        "tool/failed": _mean(status == "failed" for _, status, _, _ in executed),
        "tool/refused": float(len(calls) - len(executed)),
        "tool/seconds": _mean(seconds for _, _, seconds, _ in executed),
    }


def _mean(values: Iterable[float]) -> float:
    """Return the mean; 0 if there are no values."""
    return float(statistics.fmean(list(values) or [0.0]))


def partial_search_fraction(facts: Sequence[EpisodeFacts]) -> float:
    """Return the fraction of executed searches that succeeded with omitted or repaired results."""
    calls = [call for fact in facts for call in fact.calls if call[1] != "refused"]
    return _mean(status == "ok" and has_notes for _, status, _, has_notes in calls)


def check_loggers(log_to: str) -> None:
    """Raise UserError if `run.log_to` names wandb but it is not installed."""
    if "wandb" in _names(log_to):
        try:
            import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "config.run.log_to names wandb, which is not installed: pip install wandb"
            ) from None


def _names(log_to: str) -> set[str]:
    return {name.strip() for name in log_to.split(",")} - {""}


class Log:
    """Metrics log: `metrics.jsonl`, one line per step, and the loggers that the settings name.

    Args:
      directory: Directory of the run.
      log_to: Additional loggers, `tensorboard` and `wandb`, separated by commas.
      step: Step from which the run resumes. Lines of later steps are dropped, since these steps
        will be logged again.
      config: Configuration of the run, for wandb.
    """

    def __init__(self, directory: pathlib.Path, log_to: str, *, step: int, config: Mapping):
        self._path = directory / "metrics.jsonl"
        lines = [line for line in read(self._path) if line["step"] <= step]
        outputs.write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        names = _names(log_to)
        self._board = self._wandb = None
        if "tensorboard" in names:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(
                str(directory / "tensorboard"), purge_step=step + 1
            )
        if "wandb" in names:
            import wandb  # pyright: ignore[reportMissingImports]

            path = directory / "wandb_id"  # so that a resumed run has the same ID in wandb
            if not path.is_file():
                path.write_text(uuid.uuid4().hex)
            self._wandb = wandb.init(
                project="mmsr1_jax", dir=directory, config=redact(dict(config)),
                name=directory.name, id=path.read_text(), resume="allow",
            )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(path: pathlib.Path) -> list[dict]:
    """Return the lines of a `metrics.jsonl`, without a truncated last line.

    The list is empty if the file does not exist.

    Raises:
      FormatError: A line is not JSON, or not an object with a `step`; the message names file and
        line.
    """
    lines: list[dict] = []
    if not path.is_file():
        return lines
    with open(path, "rb") as file:
        for line_number, text in checked_json.jsonl_lines(file):
            name = f"{path}, line {line_number}"
            try:
                # Metrics of a diverged run may be NaN.
                line = checked_json.loads(text, dict[str, Any], name=name, nan=True)
            except checked_json.NotJsonError:
                if not text.endswith(b"\n"):
                    break
                raise
            checked_json.convert(line, _Line, name=name)
            lines.append(line)
    return lines
