"""Checks of questions by a second model: n of m replies must agree.

    title        not answerable from the question and the title of the picture
    blind        not answerable from the question alone
    shown        the picture shows the concept
    answerable   answerable from page and picture, with the same answer
    sound        one answer only, which does not change unless the question is dated

A single correct guess in `title` or `blind` drops the question. The checks run in this order, the
cheaper ones first; `shown` runs once for all questions of a source.
"""

import dataclasses
import re
from collections.abc import Awaitable, Callable, Sequence

from mmsr1_jax.config import Construction
from mmsr1_jax.data.construction.matching import same_answer
from mmsr1_jax.data.construction.models import Model, votes
from mmsr1_jax.data.construction.questions import Draft
from mmsr1_jax.data.construction.stages import StageResult

_DATED = re.compile(r"(?<![0-9])(?:1[0-9]|20|21)[0-9]{2}(?![0-9])")  # a year

_REASONS = {
    "title": "answerable from the question or the picture's title",
    "blind": "answerable from the question alone",
    "shown": "picture does not show the concept",
    "answerable": "answer not confirmed from page and picture",
    "sound": "ambiguous, or changes with time",
}


@dataclasses.dataclass(frozen=True)
class _Answer:
    answer: str


@dataclasses.dataclass(frozen=True)
class _Shown:
    shown: bool


@dataclasses.dataclass(frozen=True)
class _Sound:
    unambiguous: bool
    changes: bool


async def check_questions(
    drafts: Sequence[Draft], image: bytes, checker: Model, settings: Construction
) -> StageResult[Draft]:
    """Check the questions about one source.

    Args:
      drafts: Questions about the same source.
      image: Picture of the source, as a JPEG file.
      checker: Model that checks.
      settings: Settings.

    Raises:
      WebError, ServiceRefusedError: See `Model.ask`.
    """
    result: StageResult[Draft] = StageResult()
    remaining = list(drafts)
    for name in ("title", "blind"):
        if name in settings.checks:
            remaining = await _keep(remaining, name, result, _not_guessed(name, checker, settings))
    if "shown" in settings.checks and remaining:
        is_shown, _ = await votes(
            _shown(remaining[0], image, checker), settings.votes, settings.agreement
        )
        if not is_shown:
            for draft in remaining:
                result.drop(draft.name, _REASONS["shown"])
            remaining = []
    for name, vote in (("answerable", _answerable), ("sound", _sound)):
        if name in settings.checks:

            async def passes(draft: Draft, vote=vote) -> bool:
                ask = vote(draft, image, checker)
                return (await votes(ask, settings.votes, settings.agreement))[0]

            remaining = await _keep(remaining, name, result, passes)
    result.kept += remaining
    return result


async def _keep(
    drafts: Sequence[Draft],
    name: str,
    result: StageResult[Draft],
    passes: Callable[[Draft], Awaitable[bool]],
) -> list[Draft]:
    """Return the questions that pass a check, and drop the others."""
    kept = []
    for draft in drafts:
        if await passes(draft):
            kept.append(draft)
        else:
            result.drop(draft.name, _REASONS[name])
    return kept


def _not_guessed(
    name: str, checker: Model, settings: Construction
) -> Callable[[Draft], Awaitable[bool]]:
    """Return a function that says whether no reply without page and picture is correct."""

    async def passes(draft: Draft) -> bool:
        texts = {"Question": draft.question}
        if name == "title":
            texts["Title of the picture"] = draft.source.image_title
        for sample in range(settings.votes):
            reply = await checker.ask(name, _Answer, texts, sample=sample)
            if reply is not None and same_answer(reply.answer, [draft.answer]):
                return False
        return True

    return passes


def _shown(draft: Draft, image: bytes, checker: Model) -> Callable[[int], Awaitable[bool | None]]:
    async def ask(sample: int) -> bool | None:
        texts = {"Name": "\n".join(draft.source.names)}
        reply = await checker.ask("shown", _Shown, texts, image=image, sample=sample)
        return None if reply is None else reply.shown

    return ask


def _answerable(
    draft: Draft, image: bytes, checker: Model
) -> Callable[[int], Awaitable[bool | None]]:
    async def ask(sample: int) -> bool | None:
        texts = {"Page": draft.source.page, "Question": draft.question}
        reply = await checker.ask("answerable", _Answer, texts, image=image, sample=sample)
        return None if reply is None else same_answer(reply.answer, [draft.answer])

    return ask


def _sound(draft: Draft, image: bytes, checker: Model) -> Callable[[int], Awaitable[bool | None]]:
    del image  # the question must be sound for whoever knows what the picture shows
    is_dated = _DATED.search(draft.question) is not None

    async def ask(sample: int) -> bool | None:
        texts = {"Question": draft.question, "Answer": draft.answer, "Sentence": draft.evidence}
        reply = await checker.ask("sound", _Sound, texts, sample=sample)
        return None if reply is None else reply.unambiguous and (is_dated or not reply.changes)

    return ask
