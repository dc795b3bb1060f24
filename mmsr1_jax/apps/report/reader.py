"""Reading of a directory or a file for the page. Invalid lines are reported and skipped.

WORKDIR/metrics.jsonl            curves
WORKDIR/results.json             table of workflows
WORKDIR/episodes.jsonl           episodes of an evaluation
WORKDIR/episodes/NNNNNN.jsonl    episodes of a training step
WORKDIR/evaluation/              results and episodes of an evaluation of the run
"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from mmsr1_jax.apps.report import records
from mmsr1_jax.apps.report.pictures import Pictures
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.training import metrics
from mmsr1_jax.utils import checked_json

_MOST_POINTS = 500  # maximum number of points of a curve
_MOST_NAMED = 100  # maximum number of skipped lines that are reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Contents of the page.

    Attributes:
      name: Name of the directory or file that was read.
      curves: Metrics by step:
        `{"steps": [..], "mean_of": steps per point, "figures": {name: [number or None, ..]}}`.
      results: Results of an evaluation as in its file, or None without an evaluation.
      episodes: Episodes, see `records.record`.
      lines: Number of lines in all episode files.
      looked_at: Number of these lines that were read.
      pictures: Images that the episodes refer to by number.
      skipped: Messages that say what was left out, and why.
      token_texts: Whether the texts of single tokens are known.
    """

    name: str
    curves: dict[str, Any]
    results: dict[str, Any] | None
    episodes: list[dict[str, Any]]
    lines: int
    looked_at: int
    pictures: Pictures
    skipped: list[str]
    token_texts: bool


def read(
    source: pathlib.Path, most: int, model: str | None = None, shown: pathlib.Path | None = None
) -> Found:
    """Read a run or evaluation directory, or one file of episodes.

    Args:
      source: Directory or file to read.
      most: Maximum number of episodes. If there are more, evenly spaced ones are read.
      model: HF directory whose tokenizer decodes tokens; None: that of the run, if it is found.
      shown: Additional directory whose images may be shown, besides those in `source`.

    Raises:
      ValueError: `source` does not exist or contains nothing to show, or `model` has no tokenizer.
      OSError: A file cannot be read.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or directory")
    files, curves, results = [(source, None)], {}, None
    skipped: list[str] = []
    if source.is_dir():
        files = [
            *((path, _step(path)) for path in sorted((source / "episodes").glob("*.jsonl"))),
            *((place / "episodes.jsonl", None) for place in (source, source / "evaluation")),
        ]
        files = [(path, step) for path, step in files if path.is_file()]
        curves = curves_of(metrics.read(source / "metrics.jsonl"))
        results = _results(source, skipped)
        if not files and not curves and results is None:
            raise ValueError(f"{source}: no metrics.jsonl, results.json or episodes in it")
    token_bytes = _token_bytes(source, model, skipped)
    pictures = Pictures(*_folders(source), *([] if shown is None else [shown]))
    total = sum(1 for path, _ in files for _ in _lines(path))
    most = min(most, total)
    episodes, place = [], -1
    for path, step in files:
        for number, line in _lines(path):
            place += 1
            if place and place * most // total == (place - 1) * most // total:
                continue
            try:
                data = _object(line)
                episodes.append(records.record(data, path.parent, pictures, token_bytes, step))
            except records.LineError as error:
                skipped.append(f"{path}, line {number}: {error}")
    if not episodes and not curves and results is None:
        raise ValueError(f"{source}: no episode in it ({skipped[-1] if skipped else 'empty'})")
    if len(skipped) > _MOST_NAMED:
        skipped = [*skipped[:_MOST_NAMED], f"and {len(skipped) - _MOST_NAMED} more"]
    return Found(
        name=source.resolve().name,
        curves=curves,
        results=results,
        episodes=episodes,
        lines=total,
        looked_at=most,
        pictures=pictures,
        skipped=skipped,
        token_texts=any(
            "tokens" in piece
            for episode in episodes
            for turn in episode["turns"]
            for piece in turn["pieces"]
        ),
    )


def curves_of(lines: Sequence[Any]) -> dict[str, Any]:
    """Convert the lines of `metrics.jsonl` to columns, or `{}` if there are none.

    Values that are not finite numbers become None. For long runs, a point is the mean of several
    steps and is placed at the last of them.
    """
    lines = [line for line in lines if isinstance(line, dict) and _number(line.get("step"))]
    if not lines:
        return {}
    every = math.ceil(len(lines) / _MOST_POINTS)
    blocks = [lines[begin : begin + every] for begin in range(0, len(lines), every)]
    names = dict.fromkeys(name for line in lines for name in line if name != "step")

    def mean(block: Sequence[dict], name: str) -> float | None:
        values = [line[name] for line in block if _number(line.get(name))]
        return statistics.fmean(values) if values else None

    figures = {name: [mean(block, name) for block in blocks] for name in names}
    figures = {
        name: values for name, values in figures.items() if any(v is not None for v in values)
    }
    return {"steps": [block[-1]["step"] for block in blocks], "mean_of": every, "figures": figures}


def _folders(source: pathlib.Path) -> list[pathlib.Path]:
    """Return the directories that contain the images of a directory or an episodes file."""
    if source.is_dir():
        return [source]
    folder = source.absolute().parent
    # The images of a training step's file are in a sibling of its directory.
    return [folder, *([folder.parent / "pictures"] if folder.name == "episodes" else [])]


def _number(value: Any) -> bool:
    """Return whether a value is a finite number, and not a bool."""
    return not isinstance(value, bool) and records.finite(value) is not None


def _step(path: pathlib.Path) -> int | None:
    return int(path.stem) if path.stem.isdecimal() else None


def _results(source: pathlib.Path, skipped: list[str]) -> dict[str, Any] | None:
    for path in (source / "results.json", source / "evaluation" / "results.json"):
        try:
            return _object(path.read_bytes())
        except FileNotFoundError:
            pass
        except records.LineError as error:
            skipped.append(f"{path}: {error}")
    return None


def _object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises LineError if the text is not one."""
    try:
        data = checked_json.loads(text, surrogates=True, nan=True)
    except checked_json.FormatError as error:
        raise records.LineError(str(error)) from None
    if not isinstance(data, dict):
        raise records.LineError("must be an object")
    return data


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of non-blank lines; only a newline ends a line."""
    return checked_json.jsonl_lines(path)


def _token_bytes(source: pathlib.Path, model: str | None, skipped: list[str]) -> list[bytes] | None:
    """Return the bytes of each token, from the tokenizer of `model` or one found with the run."""
    if model is not None:
        return Processor.from_directory(model).token_bytes()
    directory = source if source.is_dir() else source.parent
    for place in (directory, directory.parent):
        candidates = [place / "policy"]
        for name in ("config.json", "evaluation.json"):
            try:
                named = _object((place / name).read_bytes()).get("model")
            except (OSError, records.LineError):
                continue
            candidates += [pathlib.Path(named)] if isinstance(named, str) else []
        for candidate in candidates:
            if (candidate / "tokenizer.json").is_file():
                try:
                    return Processor.from_directory(candidate).token_bytes()
                except ValueError as error:
                    skipped.append(f"texts of tokens: {error}")
    return None
