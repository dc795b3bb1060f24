"""Metrics of a training step, and the log that writes them."""

import collections
import json
import pathlib
import statistics
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

import msgspec

from mmsr1_jax.config.redaction import redact
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.rewards.reward_function import Reward
from mmsr1_jax.utils import checked_json, outputs


class _Line(TypedDict):
    step: Annotated[int, msgspec.Meta(ge=0)]


def episode_metrics(
    episodes: Sequence[Episode], rewards: Sequence[Reward], categories: Sequence[str]
) -> dict[str, float]:
    """Return metrics of finished episodes; episodes with errors are only counted.

    Args:
      episodes, rewards: Episodes and their rewards, of equal length.
      categories: Category of each episode's question; an empty string means no category.

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
    ran = [i for i, episode in enumerate(episodes) if episode.end != "error"]
    figures = {"errors": float(len(episodes) - len(ran))}
    if not ran:
        return figures
    kinds = {i: {c.action for c in episodes[i].calls if c.status != "refused"} for i in ran}
    calls = [call for i in ran for call in episodes[i].calls]
    made = [call for call in calls if call.status != "refused"]

    def mean(values: Iterable[float]) -> float:
        return float(statistics.fmean(list(values) or [0.0]))

    known = [i for i in ran if rewards[i].known]
    outcomes = [rewards[i].judge for i in ran if rewards[i].judge]
    asked = [outcome for outcome in outcomes if outcome != "match"]
    if known and not (asked and set(asked) == {"failed"}):
        figures["reward"] = mean(rewards[i].reward for i in known)
        figures["accuracy"] = mean(rewards[i].correct for i in known)
    figures |= {
        "format": mean(rewards[i].format for i in ran),
        "searches": len(made) / len(ran),
        "search/any": mean(bool(kinds[i]) for i in ran),
        "search/text": mean(kinds[i] == {"text_search"} for i in ran),
        "search/image": mean(kinds[i] == {"image_search"} for i in ran),
        "search/both": mean(len(kinds[i]) == 2 for i in ran),
        "search/none": mean(not kinds[i] for i in ran),
        "turns": mean(len(episodes[i].turns) for i in ran),
        "tokens": mean(len(episodes[i]) for i in ran),
        "tokens_sampled": mean(int(episodes[i].loss_mask.sum()) for i in ran),
        "tool/calls": float(len(made)),
        "tool/failed": mean(call.status == "failed" for call in made),
        "tool/refused": float(len(calls) - len(made)),
        "tool/seconds": mean(call.seconds for call in made),
    }
    for end in ("answer", "turns", "tokens"):
        figures[f"end/{end}"] = mean(episodes[i].end == end for i in ran)
    if outcomes:
        figures["judge/requests"] = float(len(asked))
        for outcome in ("failed", "unreadable"):
            figures[f"judge/{outcome}"] = mean(one == outcome for one in asked)
    by_category = collections.defaultdict(list)
    for i in ran:
        by_category[categories[i]].append(i)
    for category in sorted(set(by_category) - {""}):
        chosen = by_category[category]
        if judged := [i for i in chosen if rewards[i].known]:
            figures[f"accuracy_by_category/{category}"] = mean(rewards[i].correct for i in judged)
        figures[f"search_by_category/{category}"] = mean(bool(kinds[i]) for i in chosen)
    return figures


def partial_searches(episodes: Sequence[Episode]) -> float:
    """Return the fraction of executed searches that succeeded with omitted or repaired results."""
    calls = [call for episode in episodes for call in episode.calls if call.status != "refused"]
    partial = [call.status == "ok" and bool(call.notes) for call in calls]
    return float(statistics.fmean(partial or [0.0]))


def check(also: str) -> None:
    """Raise ValueError if the settings name wandb but it is not installed."""
    if "wandb" in _names(also):
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ValueError("config.run.log_to names wandb: pip install wandb") from None


def _names(also: str) -> set[str]:
    return {name.strip() for name in also.split(",")} - {""}


class Log:
    """Metrics log: `metrics.jsonl`, one line per step, and the loggers that the settings name.

    Args:
      directory: Directory of the run.
      also: Additional loggers, `tensorboard` and `wandb`, separated by commas.
      step: Step from which the run resumes. Lines of later steps are dropped, since these steps
        will be logged again.
      config: Configuration of the run, for wandb.
    """

    def __init__(self, directory: pathlib.Path, also: str, *, step: int, config: Mapping):
        self._path = directory / "metrics.jsonl"
        lines = [line for line in read(self._path) if line["step"] <= step]
        outputs.write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        names = _names(also)
        self._board = self._wandb = None
        if "tensorboard" in names:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(
                str(directory / "tensorboard"), purge_step=step + 1
            )
        if "wandb" in names:
            import wandb

            path = directory / "wandb_id"  # so that a resumed run has the same ID in wandb
            if not path.is_file():
                path.write_text(uuid.uuid4().hex)
            self._wandb = wandb.init(
                project="mmsr1_jax", dir=directory, config=redact(dict(config)),
                name=directory.name, id=path.read_text(), resume="allow",
            )  # fmt: skip

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(figures), step=step)

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
        for number, text in checked_json.jsonl_lines(file):
            name = f"{path}, line {number}"
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
