"""Answer extraction for document benchmarks, run after the episodes have been judged.

    answer ─► the judge's language model ─► short form ─► score

MMLongBench-Doc scores the short form that a language model extracts from an answer
(`data/benchmarks/grading.py`). Extraction adds this field to a line:

    extracted    {answer, error, model}: the short form, null if the answer contains none; or the
                 error if extraction failed, in which case the line's `score` is null and
                 extraction is retried by the next call

Without a judge, answers are scored unchanged.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mmsr1_jax.config import settings
from mmsr1_jax.data.benchmarks.grading import (
    accuracy_and_f1,
    document_grade,
    extraction_messages,
    parse_extraction,
)
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.batched_queries import fetch_replies, request_digest
from mmsr1_jax.evaluation.metrics import Outcome
from mmsr1_jax.evaluation.records import EPISODES
from mmsr1_jax.evaluation.scoring import RESULTS, compute_results, write_results
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.web import BodyError, WebError
from mmsr1_jax.utils import outputs
from mmsr1_jax.utils.checked_json import valid_text

_EXTRACTIONS = "extractions.jsonl"  # temporary, until they are in the lines
_FIELDS = {"answer", "error", "model"}


def score_documents(
    config: settings.Config, out: pathlib.Path, results: Mapping[str, Any]
) -> dict[str, Any]:
    """Extract and score short forms, then rewrite `episodes.jsonl` and `results.json`.

    Only answers that `services.judge_model` has not yet extracted are sent to it. If no question in
    `out` is about a document, the results are returned unchanged.

    Args:
      config: Settings; `services` configures the judge.
      out: Results directory, as written by `scoring.score_episodes`.
      results: Results returned by `scoring.score_episodes`.

    Returns:
      The results with these keys added:
        `f1`: F1 of the scored answers, by workflow.
        `scored`: Description of the scored texts: short forms, or unchanged answers.
        `no_extraction`: Number of answers without a score because the language model failed.
        `omitted_pages`: Number of `pages` dropped because they exceed the token budget, and of
          `questions` affected.

    Raises:
      DataError: A line has an invalid `answer_format` or `extracted`.
      ServiceRefusedError: The judge's server refuses all requests; the short forms extracted so far
        are kept.
    """
    path, model = out / EPISODES, config.services.judge_model
    requests, any_document = _pending_requests(path, model)
    if not any_document:
        return dict(results)
    judge = make_judge(config)
    extracted = {}
    if judge is not None:
        extracted = extract_short_forms(requests, judge, model, out / _EXTRACTIONS)
    scored = _rewrite_episodes(path, extracted, model)
    (out / _EXTRACTIONS).unlink(missing_ok=True)

    results = {**results, **compute_results(scored.outcomes, results["provenance"])}
    if scored.scores:
        results["f1"] = {name: accuracy_and_f1(rows)[1] for name, rows in scored.scores.items()}
        results["scored"] = scored.description()
        results["no_extraction"] = scored.num_failed
    dropped = [count for count in scored.omitted_pages.values() if count]
    results["omitted_pages"] = {"pages": sum(dropped), "questions": len(dropped)}
    write_results(out, results)
    return results


def _pending_requests(
    path: pathlib.Path, model: str
) -> tuple[dict[str, tuple[str, str | None]], bool]:
    """Return the questions and answers whose short form is missing, by digest.

    Also return whether any question is about a document.
    """
    requests: dict[str, tuple[str, str | None]] = {}
    any_document = False
    for _, line_number, line in records.scan(path):
        any_document |= "omitted_pages" in line or bool(line.get("answer_format"))
        if not line.get("answer_format"):
            continue
        stored = line.get("extracted")
        if stored is not None and (not isinstance(stored, dict) or set(stored) != _FIELDS):
            fields = ", ".join(sorted(_FIELDS))
            raise DataError(
                f"{path}, line {line_number}: 'extracted' must have exactly the fields {fields}"
            )
        if stored is None or stored["model"] != model or stored["error"] is not None:
            requests[_digest(line, model)] = line["question"], line["answer"]
    return requests, any_document


@dataclasses.dataclass
class _Scored:
    """Totals over rewritten episodes.

    Attributes:
      outcomes: Outcome of each episode, by workflow.
      scores: (score, gold answer, scored text) of each answer with a format, by workflow.
      num_extracted, num_unchanged: Number of answers scored by their short form, and unchanged.
      num_failed: Number of answers whose extraction failed.
      omitted_pages: Number of dropped pages, by question.
    """

    outcomes: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    scores: dict[str, list[tuple[float | None, str, str | None]]] = dataclasses.field(
        default_factory=dict
    )
    num_extracted: int = 0
    num_unchanged: int = 0
    num_failed: int = 0
    omitted_pages: dict[int, int] = dataclasses.field(default_factory=dict)

    def description(self) -> str:
        """Describe the scored texts."""
        if self.num_extracted and self.num_unchanged:
            return "short forms of some answers, the others unchanged"
        return "short forms of the answers" if self.num_extracted else "unchanged answers"


def _rewrite_episodes(
    path: pathlib.Path, extracted: Mapping[str, dict[str, Any]], model: str
) -> _Scored:
    """Score the answers in a file of episodes and rewrite it with short forms and scores."""
    scored = _Scored()
    with (
        outputs.new_file(path) as partial,
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for _, line_number, line in records.scan(path):
            workflow = line["workflow"]
            if line.get("answer_format"):
                short_form = extracted.get(_digest(line, model), line.get("extracted"))
                try:
                    row = _score_line(line, short_form)
                except ValueError as error:
                    raise DataError(f"{path}, line {line_number}: {error}") from None
                scored.num_extracted += short_form is not None
                scored.num_unchanged += short_form is None
                scored.num_failed += short_form is not None and line["score"] is None
                scored.scores.setdefault(workflow, []).append(row)
            scored.omitted_pages[line["group"]] = line.get("omitted_pages", 0)
            scored.outcomes.setdefault(workflow, []).append(records.to_outcome(line))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        (path.parent / RESULTS).unlink(missing_ok=True)  # stale once the episodes are replaced
    return scored


def _score_line(
    line: dict[str, Any], short_form: Mapping[str, Any] | None
) -> tuple[float | None, str, str | None]:
    """Score an answer by its short form, if any, and store both in the line.

    Returns:
      (score, gold answer, scored text).

    Raises:
      ValueError: The answer's format is unknown.
    """
    gold, answer = (line["answers"] or [""])[0], line["answer"]
    if short_form is not None:
        answer = short_form["answer"]
        score = document_grade(answer, gold, line["answer_format"])
        line["extracted"] = short_form
        line["score"] = None if short_form["error"] is not None else score
    return line.get("score"), gold, answer


def extract_short_forms(
    requests: Mapping[str, tuple[str, str | None]], judge: Judge, model: str, path: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Extract short forms with a language model; return {"answer", "error", "model"} by digest.

    Args:
      requests: Question and answer, by digest.
      judge: Judge whose server, limits, cache and pauses are used.
      model: Name of the judge's model, copied into the returned values.
      path: File to which short forms are appended as they arrive. Those that it contains are not
        requested again.

    Raises:
      ServiceRefusedError: The server refuses all requests.
    """

    async def send(request: tuple[str, str | None]) -> dict[str, Any]:
        question, answer = request
        short_form = None
        if answer is not None and answer.strip():
            short_form = await _short_form(judge, question, answer)
        return {"answer": short_form, "error": None, "model": model}

    def placeholder(error: WebError) -> dict[str, Any]:
        return {"answer": None, "error": str(error), "model": model}

    return fetch_replies(
        requests, send, placeholder, path,
        reply_type=records.Extracted, pauses=judge.retry_waits, name="short forms",
    )  # fmt: skip


async def _short_form(judge: Judge, question: str, answer: str) -> str | None:
    """Request one short form from the judge's server, within its limits and through its cache.

    Raises:
      WebError: The request failed, or the reply is not in the requested format.
    """
    question, answer = (valid_text(text) for text in (question, answer))

    async def send() -> str:
        reply = await judge.chat(extraction_messages(question, answer))
        try:
            return parse_extraction(reply.text) or ""  # the cache cannot store None
        except ValueError as error:
            raise BodyError(str(error)) from None

    key = json.dumps([judge.model, question, answer])
    return await judge.cached_calls.get("short form", key, send) or None


def _digest(line: Mapping[str, Any], model: str) -> str:
    return request_digest(model, line["question"], line["answer"])
