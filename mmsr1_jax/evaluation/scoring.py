"""Scoring of episodes on disk: verdicts of the judge, and metrics."""

import itertools
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mmsr1_jax.config import settings
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.batched_queries import digest_of, replies_to
from mmsr1_jax.evaluation.compare import pairs_of
from mmsr1_jax.evaluation.metrics import Outcome, figures
from mmsr1_jax.evaluation.records import EPISODES
from mmsr1_jax.evaluation.workflows import WORKFLOWS
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.verdicts import NO_VERDICT
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json, fallbacks, outputs

RESULTS = "results.json"
MADE_WITH = "evaluation.json"  # settings and files that the episodes depend on
_VERDICTS = "verdicts.jsonl"  # temporary, until they are in the lines

Key = tuple[str, int]  # workflow, number of the episode


def rescore(
    config: settings.Config, path: pathlib.Path, out: str | os.PathLike | None
) -> dict[str, Any]:
    """Rescore the answers in a file; return the results, see `finish`.

    Args:
      config: Settings; `services` configures the judge.
      path: File of evaluation episodes, or of recorded answers.
      out: Directory for the rescored file and the results. None selects the directory of `path`,
        which must then be an `episodes.jsonl` written by `evaluate`.

    Raises:
      ValueError: A line is not a valid episode, or `out` is required but missing.
    """
    if out is None and path.name != EPISODES:
        raise ValueError(f"--out: needed, as {path} is no {EPISODES} of an evaluation")
    folder = pathlib.Path(path.parent if out is None else out)
    folder.mkdir(parents=True, exist_ok=True)
    known = path.parent / MADE_WITH
    made_with = {"rescored": str(path)}
    if known.is_file():
        made_with = checked_json.load(known, dict[str, Any])
    judge = make_judge(config)
    results = finish(path, folder, judge, config.services.judge_model, made_with)
    if "recorded" in results:
        count = results["recorded"]
        print(f"actions read as recorded: {count['same_actions']} of {count['episodes']}")
    return results


def finish(
    path: pathlib.Path, out: pathlib.Path, judge: Judge | None, judge_model: str,
    made_with: Mapping[str, Any],
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
      made_with: Settings that the episodes depend on, copied into the results.

    Returns:
      A dict with these keys:
        `made_with`: The argument.
        `workflows`: `metrics.figures` by workflow.
        `comparisons`: `compare.pairs_of` the workflows by exact match, and, if available, by the
          judge and by a benchmark's score.
        `no_verdict`: Number of episodes for which the judge could not be reached. They are left out
          of its accuracy.
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
    found: dict[Key, tuple[int, int]] = {}
    to_judge: dict[Key, tuple[str, Sequence[str], str | None]] = {}
    for place, number, line in records.scan(path):
        key = (line["workflow"], line["index"])
        if key in found:
            raise DataError(f"{path}, line {number}: episode {key[1]} of {key[0]} comes twice")
        found[key] = place, number
        verdict = line.get("judge") or {}
        unread = str(verdict.get("reason")).startswith(NO_VERDICT)  # the judge may work by now
        if verdict.get("correct") is None or unread or verdict.get("model") != judge_model:
            to_judge[key] = line["question"], line["answers"], line["answer"]
    if not found:
        raise DataError(f"{path}: no episode")
    verdicts = {}
    if judge is not None:
        verdicts = judged(to_judge, judge, judge_model, out / _VERDICTS)

    names = [*WORKFLOWS, *sorted({name for name, _ in found} - set(WORKFLOWS))]
    outcomes: dict[str, list[Outcome]] = {}
    recorded: list[bool] = []
    open_ones = unreadable = partial_searches = 0
    with (
        open(path, "rb") as old,
        # A lone surrogate, which JSON can hold, is written as its JSON escape: \udXXX.
        outputs.new_text_file(out / EPISODES, errors="backslashreplace") as new,
    ):
        for key in sorted(found, key=lambda key: (names.index(key[0]), key[1])):
            place, number = found[key]
            old.seek(place)
            line = records.moved(records.parse(old.readline(), number), path.parent, out)
            line["em"], line["subem"] = records.matched(line)
            line["judge"] = verdicts.get(key, line.get("judge"))
            verdict = line["judge"] or {"correct": False, "reason": ""}
            open_ones += verdict["correct"] is None
            unreadable += str(verdict.get("reason")).startswith(NO_VERDICT)
            partial_searches += sum(
                call["status"] == "ok" and bool(call.get("notes")) for call in line["calls"]
            )
            outcomes.setdefault(key[0], []).append(records.outcome_of(line))
            if "recorded_actions" in line:
                read = [turn["action"] for turn in line["turns"]]
                recorded.append(read == line["recorded_actions"])
            new.write(json.dumps(line, ensure_ascii=False) + "\n")
        (out / RESULTS).unlink(missing_ok=True)  # stale once the episodes are replaced
    (out / _VERDICTS).unlink(missing_ok=True)

    results = results_of(outcomes, made_with) | {
        "no_verdict": open_ones, "unreadable": unreadable, "partial_searches": partial_searches,
    }  # fmt: skip
    for name, count in fallbacks.take_counts().items():
        print(f"{out}: {name}: {count:g}", file=sys.stderr)
    if recorded:
        results["recorded"] = {"episodes": len(recorded), "same_actions": sum(recorded)}
    write_results(out, results)
    return results


def write_results(out: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Write `results.json` atomically."""
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    outputs.write_text(out / RESULTS, text, errors="backslashreplace")


def results_of(
    outcomes: Mapping[str, Sequence[Outcome]], made_with: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the `made_with`, `workflows` and `comparisons` of the results, see `finish`."""
    everything = list(itertools.chain(*outcomes.values()))
    judged = any(outcome.right["judge"] is not None for outcome in everything)
    scored = any(outcome.right["score"] is not None for outcome in everything)
    used = [m for m, use in (("em", True), ("judge", judged), ("score", scored)) if use]
    comparisons = [pairs_of(outcomes, match) for match in used]
    return {
        "made_with": dict(made_with),
        "workflows": {name: figures(some) for name, some in outcomes.items()},
        "comparisons": list(itertools.chain(*comparisons)),
    }


def judged(
    asked: Mapping[Key, tuple[str, Sequence[str], str | None]], judge: Judge, model: str,
    path: pathlib.Path,
) -> dict[Key, dict[str, Any]]:  # fmt: skip
    """Return the judge's verdicts: {"correct", "reason", "by", "model"} by key.

    `correct` is None if the judge could not be reached, even after the last of `judge.retry_waits`.

    Args:
      asked: Question, gold answers and answer.
      judge: Judge. If its server is down, requests are retried after each of `judge.retry_waits`.
      model: Name of the judge's model, copied into the verdicts.
      path: File to which verdicts are appended as they arrive, each with a digest of its request.
        Its verdicts are reused; those on other answers are ignored.

    Raises:
      ServiceRefusedError: The judge refuses all requests.
    """
    digests = {key: digest_of(model, *one) for key, one in asked.items()}

    async def ask(one: tuple[str, Sequence[str], str | None]) -> dict[str, Any]:
        said = await judge.verdict(*one)
        return {"correct": said.correct, "reason": said.reason, "by": said.source, "model": model}

    def failed(error: WebError) -> dict[str, Any]:
        reason = f"no verdict: {error}"
        return {"correct": None, "reason": reason, "by": "judge", "model": model}

    found = replies_to(
        {digest: asked[key] for key, digest in digests.items()}, ask, failed, path,
        shape=records.Verdict, pauses=judge.retry_waits, what="judge",
    )  # fmt: skip
    return {key: found[digest] for key, digest in digests.items()}
