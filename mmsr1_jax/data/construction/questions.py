"""Questions about pictures: written by a model from a page, and checked by rules.

The rules need no model: the answer is in the page, word for word or by a stated calculation; so is
the sentence that it comes from; and the question does not name what the picture shows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmsr1_jax.config import Construction
from mmsr1_jax.data.construction.matching import (
    calculate,
    fold,
    is_result,
    names_any,
    occurs,
)
from mmsr1_jax.data.construction.models import Model
from mmsr1_jax.data.construction.sources import Source
from mmsr1_jax.data.construction.stages import StageResult
from mmsr1_jax.tools.links import one_line

MAX_ATTEMPTS = 2  # samples of the writer until a reply is readable
_QUESTION_MARKS = ("?", "\u061f", ";")  # after `fold`; also Arabic and Greek
_MAX_QUESTION = 300  # characters
_MAX_ANSWER = 200
_MAX_EVIDENCE = 2000
_MAX_NUMBERS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calculation:
    """Calculation of an answer from numbers in the page; see `matching.calculate`."""

    operation: str
    numbers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A question with its answer, and the source that it was written from.

    Attributes:
      source: Page and picture.
      question: Text of the question.
      answer: Answer.
      evidence: Sentence of the page that contains the answer, or numbers to calculate it from.
      calculation: Calculation of the answer, or None if it is in the page word for word.
    """

    source: Source
    question: str
    answer: str
    evidence: str
    calculation: Calculation | None = None

    @property
    def name(self) -> str:
        """Concept and question, for messages."""
        return f"{self.source.concept}: {self.question}"


@dataclasses.dataclass(frozen=True)
class _Written:
    question: str
    answer: str
    evidence: str = ""
    calculation: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class _Reply:
    questions: list[_Written]


async def write_questions(
    source: Source, image: bytes, writer: Model, settings: Construction
) -> StageResult[Draft]:
    """Return the questions that the writer makes of a source and that pass the rules.

    Args:
      source: Page and picture.
      image: Picture, as a JPEG file.
      writer: Model that writes.
      settings: Settings.

    Raises:
      WebError, ServiceRefusedError: See `Model.ask`.
    """
    result: StageResult[Draft] = StageResult()
    texts = {"Name": "\n".join(source.names), "Page": source.page}
    reply = None
    for sample in range(MAX_ATTEMPTS):
        reply = await writer.ask(
            "write", _Reply, texts, image=image, sample=sample,
            count=settings.questions_per_page, words=settings.max_answer_words,
        )  # fmt: skip
        if reply is not None:
            break
    if reply is None or not reply.questions:
        result.drop(source.concept, "reply unreadable" if reply is None else "no question written")
        return result
    seen: set[str] = set()
    for written in reply.questions[: settings.questions_per_page]:
        draft = Draft(
            source=source,
            question=" ".join(one_line(written.question).split()),
            answer=" ".join(one_line(written.answer).split()),
            evidence=" ".join(one_line(written.evidence).split()),
            calculation=_calculation(written.calculation),
        )
        problem = find_problem(
            draft, settings.max_answer_words, has_calculation=bool(written.calculation)
        )
        if problem is None and fold(draft.answer) in seen:
            problem = "same answer as another question about the page"
        if problem is None:
            seen.add(fold(draft.answer))
            result.kept.append(draft)
        else:
            result.drop(draft.name[:500], problem)
    return result


def find_problem(draft: Draft, max_words: int, *, has_calculation: bool = False) -> str | None:
    """Return which rule a question violates, or None.

    Args:
      draft: Question.
      max_words: Maximum number of words of an answer.
      has_calculation: Whether the writer states a calculation, of whatever form.
    """
    source, answer = draft.source, draft.answer
    if not 0 < len(draft.question) <= _MAX_QUESTION or not fold(draft.question).endswith(
        _QUESTION_MARKS
    ):
        return "not a question"
    if not 0 < len(answer) <= _MAX_ANSWER or len(answer.split()) > max_words:
        return "answer empty or too long"
    if names_any(draft.question, source.names):
        return "question names the concept"
    if occurs(answer, draft.question):
        return "question contains the answer"
    if not 0 < len(draft.evidence) <= _MAX_EVIDENCE or not occurs(draft.evidence, source.page):
        return "evidence not in the page"
    if not has_calculation:
        return None if occurs(answer, draft.evidence) else "answer not in the evidence"
    calculation = draft.calculation
    if calculation is None or not all(occurs(n, source.page) for n in calculation.numbers):
        return "calculation from numbers that are not in the page"
    result = calculate(calculation.operation, calculation.numbers)
    return None if result is not None and is_result(answer, result) else "calculation is wrong"


def _calculation(value: dict[str, Any] | None) -> Calculation | None:
    """Return a calculation that a model states, or None if it has another form."""
    match value:
        case {"operation": str(operation), "numbers": list(numbers)}:
            texts: Sequence[str] = [str(n) for n in numbers if isinstance(n, (str, int, float))]
            if len(texts) == len(numbers) <= _MAX_NUMBERS:
                return Calculation(operation=operation[:20], numbers=tuple(texts))
    return None
