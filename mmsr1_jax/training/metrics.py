"""What is measured of a step, and where it is written."""

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


def of_episodes(
    episodes: Sequence[Episode], rewards: Sequence[Reward], categories: Sequence[str]
) -> dict[str, float]:
    """Figures of finished episodes, those that could not be run left out but counted.

    Args:
      episodes, rewards: one for the other.
      categories: of their questions; empty: none.

    Returns:
      `errors`: those that could not be run; where there are others, of these
      `reward`, `accuracy`, `format`; `searches` an episode; `search/any`, `/text`, `/image`,
      `/both`, `/none`: shares of the episodes; `accuracy_of/CATEGORY`, `search_of/CATEGORY`;
      `turns`, `tokens` of an episode, `tokens_sampled`; `end/REASON`; `tool/calls`, `tool/failed`
      (share of the calls), `tool/refused`, `tool/seconds` (mean of a call).

      With a judge: `judge/asked`: answers that it was asked about; of these the shares
      `judge/failed`: those that it could not be asked about, and `judge/unreadable`: those whose
      reply held no verdict, which count as wrong. Episodes of `judge/failed` are left out of
      `reward`, `accuracy` and `accuracy_of`. The first two are absent where the judge failed about
      all answers (those that need no judge say little of the others), the last where no episode of
      the category is left.
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
        figures["judge/asked"] = float(len(asked))
        for outcome in ("failed", "unreadable"):
            figures[f"judge/{outcome}"] = mean(one == outcome for one in asked)
    by_category = collections.defaultdict(list)
    for i in ran:
        by_category[categories[i]].append(i)
    for category in sorted(set(by_category) - {""}):
        chosen = by_category[category]
        if judged := [i for i in chosen if rewards[i].known]:
            figures[f"accuracy_of/{category}"] = mean(rewards[i].correct for i in judged)
        figures[f"search_of/{category}"] = mean(bool(kinds[i]) for i in chosen)
    return figures


def partial_searches(episodes: Sequence[Episode]) -> float:
    """Return the share of made searches that found something, but left out or mended part of it."""
    calls = [call for episode in episodes for call in episode.calls if call.status != "refused"]
    partial = [call.status == "ok" and bool(call.notes) for call in calls]
    return float(statistics.fmean(partial or [0.0]))


def check(also: str) -> None:
    """Raises ValueError where `Log` could not write to what the settings name."""
    if "wandb" in _names(also):
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ValueError("config.run.log_to names wandb: pip install wandb") from None


def _names(also: str) -> set[str]:
    return {name.strip() for name in also.split(",")} - {""}


class Log:
    """`metrics.jsonl`, a line a step, and what else the settings name.

    Args of the constructor:
      directory: of the run.
      also: `tensorboard` and `wandb`, separated by commas.
      step: that the run goes on from; lines of later ones, which will be written anew, are dropped.
      config: of the run, for wandb.
    """

    def __init__(self, directory: pathlib.Path, also: str, *, step: int, config: Mapping):
        self._path = directory / "metrics.jsonl"
        lines = [line for line in read(self._path) if line["step"] <= step]
        with outputs.new_file(self._path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        names = _names(also)
        self._board = self._wandb = None
        if "tensorboard" in names:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(
                str(directory / "tensorboard"), purge_step=step + 1
            )
        if "wandb" in names:
            import wandb

            path = directory / "wandb_id"  # by which a run that is gone on with is the same one
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
    """Return the lines of a `metrics.jsonl`, without a last one that was cut off; none where the
    file does not exist.

    Raises:
      FormatError: a line that is not JSON, or not an object with a `step`; names file and line.
    """
    lines: list[dict] = []
    if not path.is_file():
        return lines
    with open(path, "rb") as file:
        for number, text in checked_json.lines(file):
            name = f"{path}, line {number}"
            try:
                # A figure of a run that diverged is NaN.
                line = checked_json.loads(text, dict[str, Any], name=name, nan=True)
            except checked_json.NotJsonError:
                if not text.endswith(b"\n"):
                    break
                raise
            checked_json.convert(line, _Line, name=name)
            lines.append(line)
    return lines
