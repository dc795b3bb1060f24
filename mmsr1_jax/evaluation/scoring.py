"""From episodes on disk to results: verdicts of the judge, and figures."""

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
from mmsr1_jax.tools.judge import NO_VERDICT, Judge
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json, fallbacks, outputs

RESULTS = "results.json"
MADE_WITH = "evaluation.json"  # what the episodes depend on
_VERDICTS = "verdicts.jsonl"  # of the judge, until they are in the lines

Key = tuple[str, int]  # workflow, number of the episode


def rescore(
    config: settings.Config, path: pathlib.Path, out: str | os.PathLike | None
) -> dict[str, Any]:
    """Decides anew which answers of a file are right; returns the results, see `finish`.

    Args:
      config: `services` has the judge.
      path: lines of an evaluation, or recorded answers.
      out: directory for the file as it is then, and the results; None: that of `path`, where it is
        a file of `evaluate`.

    Raises:
      ValueError: a line that is no episode, or no `out` where there must be one.
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
    """Has the episodes of a file judged, as far as `judge_model` has given no verdict on them, and
    writes `episodes.jsonl`, sorted and with the verdicts, and then `results.json`. A process killed
    between the two leaves no `results.json`; the same command writes it.

    Args:
      path: of the file; may be `out / EPISODES`.
      out: directory.
      judge: None: verdicts stay as they are.
      judge_model: its name of the model.
      made_with: goes into the results.

    Returns:
      The results: `made_with`; `workflows`: `figures.figures` by workflow; `comparisons`:
      `compare.pairs_of` them by exact match, and by the judge and by a benchmark's score where
      there are any; `no_verdict`: episodes that a judge could not be asked about, which are left
      out of its accuracy; `unreadable`: those on which its reply held no verdict, which are wrong;
      `partial_searches`: searches that found something, but left out or mended part of it;
      `recorded`, of recorded answers: how many `episodes`, and `same_actions`: those whose actions
      are read as recorded.

    Raises:
      DataError: a line that is no episode, none at all, or one that comes twice.
      ServiceRefusedError: the judge refuses all requests; verdicts so far are kept.
    """
    found: dict[Key, tuple[int, int]] = {}
    to_judge: dict[Key, tuple[str, Sequence[str], str | None]] = {}
    for place, number, line in records.scan(path):
        key = (line["workflow"], line["number"])
        if key in found:
            raise DataError(f"{path}, line {number}: episode {key[1]} of {key[0]} comes twice")
        found[key] = place, number
        verdict = line.get("judge") or {}
        unread = str(verdict.get("reason")).startswith(NO_VERDICT)  # the judge may be mended by now
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
        outputs.new_file(out / EPISODES) as partial,
        # Half of a surrogate pair, as JSON can hold, is written as JSON writes it: \udXXX.
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as new,
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
        (out / RESULTS).unlink(missing_ok=True)  # of the episodes that are about to be replaced
    (out / _VERDICTS).unlink(missing_ok=True)

    results = results_of(outcomes, made_with) | {
        "no_verdict": open_ones, "unreadable": unreadable, "partial_searches": partial_searches,
    }  # fmt: skip
    for name, count in fallbacks.take().items():
        print(f"{out}: {name}: {count:g}", file=sys.stderr)
    if recorded:
        results["recorded"] = {"episodes": len(recorded), "same_actions": sum(recorded)}
    write_results(out, results)
    return results


def write_results(out: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json`, whole or not at all."""
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    with outputs.new_file(out / RESULTS) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def results_of(
    outcomes: Mapping[str, Sequence[Outcome]], made_with: Mapping[str, Any]
) -> dict[str, Any]:
    """The results of episodes by workflow, `made_with`, `workflows` and `comparisons`; see
    `finish`."""
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
    """What the judge says of answers: {"correct", "reason", "by", "model"}; `correct` is None where
    it could not be asked, after the last of `judge.pauses` neither.

    Args:
      asked: question, gold answers and answer.
      judge: a service that was down is asked again after each of its pauses, and no more.
      model: the judge's; goes into the verdicts.
      path: keeps the verdicts as they come, each with a digest of what was asked: what it has is
        not asked for again, and what it has of other answers is not looked at.

    Raises:
      ServiceRefusedError: the judge refuses all requests.
    """
    digests = {key: digest_of(model, *one) for key, one in asked.items()}

    async def ask(one: tuple[str, Sequence[str], str | None]) -> dict[str, Any]:
        said = await judge.verdict(*one)
        return {"correct": said.correct, "reason": said.reason, "by": said.by, "model": model}

    def failed(error: WebError) -> dict[str, Any]:
        reason = f"no verdict: {error}"
        return {"correct": None, "reason": reason, "by": "judge", "model": model}

    found = replies_to(
        {digest: asked[key] for key, digest in digests.items()}, ask, failed, path,
        shape=records.Verdict, pauses=judge.pauses, what="judge",
    )  # fmt: skip
    return {key: found[digest] for key, digest in digests.items()}
