"""Reading of a directory or a file for the page. Invalid lines are reported and skipped.

WORKDIR/metrics.jsonl            curves
WORKDIR/results.json             table of workflows
WORKDIR/episodes.jsonl           episodes of an evaluation
WORKDIR/episodes/NNNNNN.jsonl    episodes of a training step
WORKDIR/evaluation/              results and episodes of an evaluation of the run
WORKDIR/profile/                 profile of the accelerator
WORKDIR/timelines/*.json         timelines of rollouts
"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from mmsr1_jax.apps.report import records
from mmsr1_jax.apps.report.images import ImageRegistry
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.training import metrics
from mmsr1_jax.utils import checked_json

_MAX_POINTS = 500  # maximum number of points of a curve
_MAX_REPORTED = 100  # maximum number of skipped lines that are reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """Contents of the page.

    Attributes:
      name: Name of the directory or file that was read.
      curves: Metrics by step, or `{}` without metrics:
        `{"steps": [..], "steps_per_point": .., "metrics": {name: [number or None, ..]}}`.
      results: Results of an evaluation as in its file, or None without an evaluation.
      episodes: Episodes, see `records.to_record`.
      num_lines: Number of lines in all episode files.
      num_read: Number of these lines that were read.
      images: Images that the episodes refer to by index.
      skipped: Messages that say what was skipped, and why.
      has_token_texts: Whether the texts of single tokens are known.
      traces: Profile directory and timeline files of the run.
    """

    name: str
    curves: dict[str, Any]
    results: dict[str, Any] | None
    episodes: list[dict[str, Any]]
    num_lines: int
    num_read: int
    images: ImageRegistry
    skipped: list[str]
    has_token_texts: bool
    traces: list[pathlib.Path]


def read(
    source: pathlib.Path,
    max_episodes: int,
    model: str | None = None,
    image_dir: pathlib.Path | None = None,
) -> ReportData:
    """Read a run or evaluation directory, or one file of episodes.

    Args:
      source: Directory or file to read.
      max_episodes: Maximum number of episodes. If there are more, evenly spaced ones are read.
      model: HF directory whose tokenizer decodes tokens; None: that of the run, if it is found.
      image_dir: Additional directory whose images may be shown, besides those in `source`.

    Raises:
      UserError: `source` does not exist or contains nothing to show, or `model` has no tokenizer.
      OSError: A file cannot be read.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or directory")
    files, curves, results = _episode_files(source), {}, None
    skipped: list[str] = []
    if source.is_dir():
        curves = read_curves(metrics.read(source / "metrics.jsonl"))
        results = _read_results(source, skipped)
        if not files and not curves and results is None:
            raise UserError(f"{source}: contains no metrics.jsonl, results.json or episodes")
    token_bytes = _find_token_bytes(source, model, skipped)
    images = ImageRegistry(*_image_folders(source), *([] if image_dir is None else [image_dir]))
    num_lines = sum(1 for path, _ in files for _ in checked_json.jsonl_lines(path))
    num_read = min(max_episodes, num_lines)
    episodes = []
    for path, step, line_number, line in _evenly_spaced(files, num_read, num_lines):
        try:
            data = _parse_object(line)
            episodes.append(records.to_record(data, path.parent, images, token_bytes, step))
        except records.LineError as error:
            skipped.append(f"{path}, line {line_number}: {error}")
    if not episodes and not curves and results is None:
        raise UserError(
            f"{source}: contains no valid episode ({skipped[-1] if skipped else 'empty'})"
        )
    if len(skipped) > _MAX_REPORTED:
        skipped = [*skipped[:_MAX_REPORTED], f"and {len(skipped) - _MAX_REPORTED} more"]
    pieces = (piece for e in episodes for turn in e["turns"] for piece in turn["pieces"])
    return ReportData(
        name=source.resolve().name,
        curves=curves,
        results=results,
        episodes=episodes,
        num_lines=num_lines,
        num_read=num_read,
        images=images,
        skipped=skipped,
        has_token_texts=any("tokens" in piece for piece in pieces),
        traces=find_traces(source),
    )


def _episode_files(source: pathlib.Path) -> list[tuple[pathlib.Path, int | None]]:
    """Return the episode files of a directory, each with its training step, or `source` itself."""
    if not source.is_dir():
        return [(source, None)]
    steps = [
        (path, int(path.stem) if path.stem.isdecimal() else None)
        for path in sorted((source / "episodes").glob("*.jsonl"))
    ]
    evaluations = [(folder / "episodes.jsonl", None) for folder in (source, source / "evaluation")]
    return [(path, step) for path, step in [*steps, *evaluations] if path.is_file()]


def _evenly_spaced(
    files: Sequence[tuple[pathlib.Path, int | None]], count: int, total: int
) -> Iterator[tuple[pathlib.Path, int | None, int, bytes]]:
    """Yield (file, step, line number, line) of `count` evenly spaced lines out of `total`."""
    index = -1
    for path, step in files:
        for line_number, line in checked_json.jsonl_lines(path):
            index += 1
            if index == 0 or index * count // total != (index - 1) * count // total:
                yield path, step, line_number, line


def find_traces(source: pathlib.Path) -> list[pathlib.Path]:
    """Return the profile directory and the timeline files of a run directory."""
    if not source.is_dir():
        return []
    profile = source / "profile"
    return [*([profile] if profile.is_dir() else []), *sorted(source.glob("timelines/*.json"))]


def read_curves(lines: Sequence[Any]) -> dict[str, Any]:
    """Convert the lines of `metrics.jsonl` to columns, or `{}` if there are none.

    Values that are not finite numbers become None. For long runs, a point is the mean of several
    steps and is placed at the last of them.
    """
    lines = [line for line in lines if isinstance(line, dict) and _is_number(line.get("step"))]
    if not lines:
        return {}
    steps_per_point = math.ceil(len(lines) / _MAX_POINTS)
    blocks = [lines[i : i + steps_per_point] for i in range(0, len(lines), steps_per_point)]
    names = dict.fromkeys(name for line in lines for name in line if name != "step")

    def mean(block: Sequence[dict[str, Any]], name: str) -> float | None:
        values = [line[name] for line in block if _is_number(line.get(name))]
        return statistics.fmean(values) if values else None

    columns = {name: [mean(block, name) for block in blocks] for name in names}
    return {
        "steps": [block[-1]["step"] for block in blocks],
        "steps_per_point": steps_per_point,
        "metrics": {
            name: values
            for name, values in columns.items()
            if any(value is not None for value in values)
        },
    }


def _image_folders(source: pathlib.Path) -> list[pathlib.Path]:
    """Return the directories that contain the images of a directory or an episodes file."""
    if source.is_dir():
        return [source]
    folder = source.absolute().parent
    # The images of a training step's file are in a sibling of its directory.
    return [folder, *([folder.parent / "images"] if folder.name == "episodes" else [])]


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and not a bool."""
    return not isinstance(value, bool) and records.finite(value) is not None


def _read_results(source: pathlib.Path, skipped: list[str]) -> dict[str, Any] | None:
    for path in (source / "results.json", source / "evaluation" / "results.json"):
        try:
            return _parse_object(path.read_bytes())
        except FileNotFoundError:
            pass
        except records.LineError as error:
            skipped.append(f"{path}: {error}")
    return None


def _parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises LineError if the text is not one."""
    try:
        data = checked_json.loads(text, surrogates=True, nan=True)
    except checked_json.FormatError as error:
        raise records.LineError(str(error)) from None
    if not isinstance(data, dict):
        raise records.LineError("must be an object")
    return data


def _find_token_bytes(
    source: pathlib.Path, model: str | None, skipped: list[str]
) -> list[bytes] | None:
    """Return the bytes of each token, from the tokenizer of `model` or one found with the run."""
    if model is not None:
        return Processor.from_directory(model).token_bytes()
    directory = source if source.is_dir() else source.parent
    for folder in (directory, directory.parent):
        candidates = [folder / "policy"]
        for name in ("config.json", "evaluation.json"):
            try:
                model_dir = _parse_object((folder / name).read_bytes()).get("model")
            except (OSError, records.LineError):
                continue
            candidates += [pathlib.Path(model_dir)] if isinstance(model_dir, str) else []
        for candidate in candidates:
            if (candidate / "tokenizer.json").is_file():
                try:
                    return Processor.from_directory(candidate).token_bytes()
                except ValueError as error:
                    skipped.append(f"texts of tokens: {error}")
    return None
