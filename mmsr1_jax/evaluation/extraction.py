"""Answer extraction for document benchmarks, run after the episodes have been judged.

    answer ─► the judge's language model ─► short form ─► score

MMLongBench-Doc scores the short form that a language model extracts from an answer
(`data/benchmarks/scores.py`). Extraction adds this field to a line:

    extracted    {answer, error, model}: the short form, null if the answer contains none; or the
                 error if extraction failed, in which case the line's `score` is null and
                 extraction is retried by the next call

Without a judge, answers are scored unchanged.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mmsr1_jax.config import settings
from mmsr1_jax.data.benchmarks import accuracy_and_f1
from mmsr1_jax.data.benchmarks.grading import document_grade, extraction_messages, parse_extraction
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.batched_queries import digest_of, replies_to
from mmsr1_jax.evaluation.metrics import Outcome
from mmsr1_jax.evaluation.records import EPISODES
from mmsr1_jax.evaluation.scoring import RESULTS, results_of, write_results
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.web import BodyError, WebError
from mmsr1_jax.utils import outputs
from mmsr1_jax.utils.checked_json import valid_text

_EXTRACTIONS = "extractions.jsonl"  # temporary, until they are in the lines
_FIELDS = {"answer", "error", "model"}


def finish_documents(
    config: settings.Config, out: pathlib.Path, results: Mapping[str, Any]
) -> dict[str, Any]:
    """Extract and score short forms, then rewrite `episodes.jsonl` and `results.json`.

    Only answers that `services.judge_model` has not yet extracted are sent to it. If no question in
    `out` is about a document, the results are returned unchanged.

    Args:
      config: Settings; `services` configures the judge.
      out: Results directory, as written by `scoring.finish`.
      results: Results returned by `scoring.finish`.

    Returns:
      The results with these keys added:
        `f1`: F1 of the scored answers, by workflow.
        `scored`: Description of the scored texts: short forms, or unchanged answers.
        `no_extraction`: Number of answers without a score because the language model failed.
        `pages_left_out`: Number of `pages` dropped because they exceed the token budget, and of
          `questions` affected.

    Raises:
      DataError: A line has an invalid `answer_format` or `extracted`.
      ServiceRefusedError: The judge's server refuses all requests; the short forms extracted so far
        are kept.
    """
    path, model = out / EPISODES, config.services.judge_model
    asked: dict[str, tuple[str, str | None]] = {}
    any_document = False
    for _, number, line in records.scan(path):
        any_document |= "pages_left_out" in line or bool(line.get("answer_format"))
        if line.get("answer_format"):
            known = line.get("extracted")
            if known is not None and (not isinstance(known, dict) or set(known) != _FIELDS):
                fields = ", ".join(sorted(_FIELDS))
                raise DataError(
                    f"{path}, line {number}: 'extracted' must have {fields}, and no more"
                )
            if known is None or known["model"] != model or known["error"] is not None:
                asked[_digest(line, model)] = line["question"], line["answer"]
    if not any_document:
        return dict(results)
    judge = make_judge(config)
    found = {} if judge is None else short_forms(asked, judge, model, out / _EXTRACTIONS)

    outcomes: dict[str, list[Outcome]] = {}
    scored: dict[str, list[tuple[float | None, str, str | None]]] = {}
    short, failed = [], 0
    pages: dict[int, int] = {}
    with outputs.new_text_file(path, errors="backslashreplace") as new:
        for _, number, line in records.scan(path):
            if line.get("answer_format"):
                gold = (line["answers"] or [""])[0]
                extracted = found.get(_digest(line, model), line.get("extracted"))
                answer = line["answer"]
                if extracted is not None:
                    line["extracted"], answer = extracted, extracted["answer"]
                    try:
                        score = document_grade(answer, gold, line["answer_format"])
                    except ValueError as error:
                        raise DataError(f"{path}, line {number}: {error}") from None
                    line["score"] = None if extracted["error"] is not None else score
                    failed += line["score"] is None
                short.append(extracted is not None)
                scored.setdefault(line["workflow"], []).append((line.get("score"), gold, answer))
            pages[line["group"]] = line.get("pages_left_out", 0)
            outcomes.setdefault(line["workflow"], []).append(records.outcome_of(line))
            new.write(json.dumps(line, ensure_ascii=False) + "\n")
        (out / RESULTS).unlink(missing_ok=True)  # stale once the episodes are replaced
    (out / _EXTRACTIONS).unlink(missing_ok=True)

    made = {**results, **results_of(outcomes, results["made_with"])}
    if scored:
        made["f1"] = {name: accuracy_and_f1(some)[1] for name, some in scored.items()}
        made["scored"] = "short forms of the answers" if all(short) else "answers as they are"
        if len(set(short)) == 2:
            made["scored"] = "short forms of some answers, the others as they are"
        made["no_extraction"] = failed
    left_out = [count for count in pages.values() if count]
    made["pages_left_out"] = {"pages": sum(left_out), "questions": len(left_out)}
    write_results(out, made)
    return made


def short_forms(
    asked: Mapping[str, tuple[str, str | None]], judge: Judge, model: str, path: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Extract short forms with a language model; return {"answer", "error", "model"} by digest.

    Args:
      asked: Question and answer, by digest.
      judge: Judge whose server, limits, cache and pauses are used.
      model: Name of the judge's model, copied into the returned values.
      path: File to which short forms are appended as they arrive. Those that it contains are not
        requested again.

    Raises:
      ServiceRefusedError: The server refuses all requests.
    """

    async def ask(one: tuple[str, str | None]) -> dict[str, Any]:
        question, answer = one
        short = await _short_form(judge, question, answer) if (answer or "").strip() else None
        return {"answer": short, "error": None, "model": model}

    def failed(error: WebError) -> dict[str, Any]:
        return {"answer": None, "error": str(error), "model": model}

    return replies_to(
        asked,
        ask,
        failed,
        path,
        shape=records.Extracted,
        pauses=judge.retry_waits,
        what="short forms",
    )


async def _short_form(judge: Judge, question: str, answer: str) -> str | None:
    """Request one short form from the judge's server, within its limits and through its cache.

    Raises:
      WebError: The request failed, or the reply is not in the requested format.
    """
    question, answer = (valid_text(text) for text in (question, answer))

    async def ask() -> str:
        reply = await judge.chat(extraction_messages(question, answer))
        try:
            return parse_extraction(reply.text) or ""  # the cache cannot hold None
        except ValueError as error:
            raise BodyError(str(error)) from None

    key = json.dumps([judge.model, question, answer])
    return await judge.cached_calls.get("short form", key, ask) or None


def _digest(line: Mapping[str, Any], model: str) -> str:
    return digest_of(model, line["question"], line["answer"])
