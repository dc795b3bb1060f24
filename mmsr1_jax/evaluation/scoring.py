"""Scoring of episodes on disk: verdicts of the judge, and metrics."""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.batched_queries import fetch_replies, request_digest
from mmsr1_jax.evaluation.compare import compare_workflows
from mmsr1_jax.evaluation.metrics import Outcome, compute_metrics
from mmsr1_jax.evaluation.records import EPISODES
from mmsr1_jax.evaluation.workflows import WORKFLOWS
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.verdicts import NO_VERDICT
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json, fallbacks, outputs
from mmsr1_jax.utils.logs import log

RESULTS = "results.json"
PROVENANCE = "evaluation.json"  # settings and files that the episodes depend on
_VERDICTS = "verdicts.jsonl"  # temporary, until they are in the lines

Key = tuple[str, int]  # workflow, index of the episode
Answered = tuple[str, Sequence[str], str | None]  # question, gold answers, answer


def rescore(
    config: settings.Config, path: pathlib.Path, out: str | os.PathLike | None
) -> dict[str, Any]:
    """Rescore the answers in a file; return the results, see `score_episodes`.

    Args:
      config: Settings; `services` configures the judge.
      path: File of evaluation episodes, or of recorded answers.
      out: Directory for the rescored file and the results. None selects the directory of `path`,
        which must then be an `episodes.jsonl` written by `evaluate`.

    Raises:
      UserError: A line is not a valid episode, or `out` is required but missing.
    """
    if out is None and path.name != EPISODES:
        raise UserError(
            f"--out: required, because {path} is not the {EPISODES} of an evaluation; name a "
            "directory for the results"
        )
    folder = pathlib.Path(path.parent if out is None else out)
    folder.mkdir(parents=True, exist_ok=True)
    stored = path.parent / PROVENANCE
    provenance = {"rescored": str(path)}
    if stored.is_file():
        provenance = checked_json.load(stored, dict[str, Any])
    judge = make_judge(config)
    results = score_episodes(path, folder, judge, config.services.judge_model, provenance)
    if "recorded" in results:
        counts = results["recorded"]
        print(f"actions parsed as recorded: {counts['same_actions']} of {counts['episodes']}")
    return results


def score_episodes(
    path: pathlib.Path, out: pathlib.Path, judge: Judge | None, judge_model: str,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Judge the episodes of a file and compute the results.

    Episodes without a verdict by `judge_model` are sent to the judge. `episodes.jsonl`, sorted and
    with the verdicts, is written first, then `results.json`. A process killed between the two
    leaves no `results.json`; running the same command again writes it.

    Args:
      path: File of episodes; may be `out / EPISODES`.
      out: Directory for the results.
      judge: Judge, or None to keep the verdicts in the file.
      judge_model: Name of the judge's model.
      provenance: Settings that the episodes depend on, copied into the results.

    Returns:
      A dict with these keys:
        `provenance`: The argument.
        `workflows`: `metrics.compute_metrics` by workflow.
        `comparisons`: `compare.compare_workflows` by exact match, and, if available, by the judge
          and by a benchmark's score.
        `no_verdict`: Number of episodes for which the judge could not be reached. They are excluded
          from its accuracy.
        `unreadable`: Number of episodes for which the judge's reply contained no verdict. They
          count as wrong.
        `partial_searches`: Number of successful searches whose results were partly dropped or
          repaired.
        `recorded`: Only for recorded answers: number of `episodes`, and of `same_actions`, the
          episodes whose parsed actions equal the recorded ones.

    Raises:
      DataError: A line is not a valid episode, an episode occurs twice, or the file has no
        episodes.
      ServiceRefusedError: The judge refuses all requests; the verdicts received so far are kept.
    """
    positions, unjudged = _index_episodes(path, judge_model)
    if not positions:
        raise DataError(f"{path}: contains no episode")
    verdicts = {}
    if judge is not None:
        verdicts = judge_answers(unjudged, judge, judge_model, out / _VERDICTS)
    scored = _rewrite_episodes(path, out, positions, verdicts)
    (out / _VERDICTS).unlink(missing_ok=True)

    results = compute_results(scored.outcomes, provenance) | {
        "no_verdict": scored.no_verdict,
        "unreadable": scored.unreadable,
        "partial_searches": scored.partial_searches,
    }
    for name, count in fallbacks.take_counts().items():
        log.warning("%s: %s: %g", out, name, count)
    if scored.same_actions:
        same_actions = sum(scored.same_actions)
        results["recorded"] = {"episodes": len(scored.same_actions), "same_actions": same_actions}
    write_results(out, results)
    return results


def _index_episodes(
    path: pathlib.Path, judge_model: str
) -> tuple[dict[Key, tuple[int, int]], dict[Key, Answered]]:
    """Return (byte offset, line number) of each episode, and the answers without a verdict."""
    positions: dict[Key, tuple[int, int]] = {}
    unjudged: dict[Key, Answered] = {}
    for offset, line_number, line in records.scan(path):
        key = (line["workflow"], line["index"])
        if key in positions:
            raise DataError(
                f"{path}, line {line_number}: episode {key[1]} of {key[0]} is already in line "
                f"{positions[key][1]}; remove one of them"
            )
        positions[key] = offset, line_number
        verdict = line.get("judge") or {}
        unreadable = _is_unreadable(verdict)  # the judge may work by now
        if verdict.get("correct") is None or unreadable or verdict.get("model") != judge_model:
            unjudged[key] = line["question"], line["answers"], line["answer"]
    return positions, unjudged


@dataclasses.dataclass
class _Scored:
    """Totals over rewritten episodes.

    Attributes:
      outcomes: Outcome of each episode, by workflow.
      same_actions: Whether the parsed actions equal the recorded ones, of each recorded answer.
      no_verdict, unreadable, partial_searches: Counts, see `score_episodes`.
    """

    outcomes: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    same_actions: list[bool] = dataclasses.field(default_factory=list)
    no_verdict: int = 0
    unreadable: int = 0
    partial_searches: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a judged line."""
        verdict = line["judge"] or {"correct": False, "reason": ""}
        self.no_verdict += verdict["correct"] is None
        self.unreadable += _is_unreadable(verdict)
        self.partial_searches += sum(
            call["status"] == "ok" and bool(call.get("notes")) for call in line["calls"]
        )
        self.outcomes.setdefault(line["workflow"], []).append(records.to_outcome(line))
        if "recorded_actions" in line:
            actions = [turn["action"] for turn in line["turns"]]
            self.same_actions.append(actions == line["recorded_actions"])


def _rewrite_episodes(
    path: pathlib.Path,
    out: pathlib.Path,
    positions: Mapping[Key, tuple[int, int]],
    verdicts: Mapping[Key, dict[str, Any]],
) -> _Scored:
    """Write `out / EPISODES`, sorted by workflow and index, with the verdicts."""
    workflows = [*WORKFLOWS, *sorted({name for name, _ in positions} - set(WORKFLOWS))]
    scored = _Scored()
    with (
        open(path, "rb") as source,
        outputs.new_file(out / EPISODES) as partial,
        # A lone surrogate, which JSON can contain, is written as its JSON escape: \udXXX.
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for key in sorted(positions, key=lambda key: (workflows.index(key[0]), key[1])):
            offset, line_number = positions[key]
            source.seek(offset)
            line = records.parse_line(source.readline(), line_number)
            line = records.rebase_images(line, path.parent, out)
            line["em"], line["subem"] = records.match_answer(line)
            line["judge"] = verdicts.get(key, line.get("judge"))
            scored.add(line)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        (out / RESULTS).unlink(missing_ok=True)  # stale once the episodes are replaced
    return scored


def _is_unreadable(verdict: Mapping[str, Any]) -> bool:
    """Return whether a verdict only says that the judge's reply contained none."""
    return str(verdict.get("reason")).startswith(NO_VERDICT)


def write_results(out: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Write `results.json` atomically."""
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    outputs.write_text(out / RESULTS, text, errors="backslashreplace")


def compute_results(
    outcomes: Mapping[str, Sequence[Outcome]], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keys `provenance`, `workflows` and `comparisons`, see `score_episodes`."""
    all_outcomes = list(itertools.chain(*outcomes.values()))
    criteria = ["em"]
    for criterion in ("judge", "score"):
        if any(outcome.correct[criterion] is not None for outcome in all_outcomes):
            criteria.append(criterion)
    comparisons = [compare_workflows(outcomes, criterion) for criterion in criteria]
    return {
        "provenance": dict(provenance),
        "workflows": {name: compute_metrics(episodes) for name, episodes in outcomes.items()},
        "comparisons": list(itertools.chain(*comparisons)),
    }


def judge_answers(
    answers: Mapping[Key, Answered], judge: Judge, model: str, path: pathlib.Path
) -> dict[Key, dict[str, Any]]:
    """Return the judge's verdicts: {"correct", "reason", "by", "model"} by key.

    `correct` is None if the judge could not be reached, even after the last of `judge.retry_waits`.

    Args:
      answers: Question, gold answers and answer.
      judge: Judge. If its server is down, requests are retried after each of `judge.retry_waits`.
      model: Name of the judge's model, copied into the verdicts.
      path: File to which verdicts are appended as they arrive, each with a digest of its request.
        Its verdicts are reused; those on other answers are ignored.

    Raises:
      ServiceRefusedError: The judge refuses all requests.
    """
    digests = {key: request_digest(model, *answered) for key, answered in answers.items()}

    async def send(answered: Answered) -> dict[str, Any]:
        verdict = await judge.verdict(*answered)
        return {
            "correct": verdict.correct, "reason": verdict.reason, "by": verdict.source,
            "model": model,
        }  # fmt: skip

    def placeholder(error: WebError) -> dict[str, Any]:
        reason = f"no verdict: {error}"
        return {"correct": None, "reason": reason, "by": "judge", "model": model}

    replies = fetch_replies(
        {digest: answers[key] for key, digest in digests.items()}, send, placeholder, path,
        reply_type=records.Verdict, pauses=judge.retry_waits, name="judge",
    )  # fmt: skip
    return {key: replies[digest] for key, digest in digests.items()}
