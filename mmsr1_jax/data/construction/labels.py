"""Labels of questions: other forms of the answer, and the category of knowledge.

Other forms come from a table, such as an export of Wikidata's labels, and from the writer. The
checker votes on each of them.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from mmsr1_jax.config import Construction
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data.construction.matching import fold
from mmsr1_jax.data.construction.models import Model
from mmsr1_jax.data.construction.questions import Draft
from mmsr1_jax.data.construction.stages import StageResult
from mmsr1_jax.rewards.reward_function import normalise
from mmsr1_jax.tools.links import one_line
from mmsr1_jax.utils import checked_json
from mmsr1_jax.utils.logs import log

TAXONOMY = pathlib.Path(__file__).parent / "taxonomy.txt"
OTHER = "other"  # category of questions for which the model names none
MAX_ALIASES = 12  # other forms of an answer, from the table and from the writer together
_MAX_ALIAS = 200  # characters
_MAX_CATEGORIES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """A checked question.

    Attributes:
      draft: Question, answer and source.
      aliases: Other forms of the answer.
      category: Category of knowledge.
    """

    draft: Draft
    aliases: tuple[str, ...]
    category: str


@dataclasses.dataclass(frozen=True)
class _Aliases:
    aliases: list[str]


@dataclasses.dataclass(frozen=True)
class _Same:
    same: list[int]


@dataclasses.dataclass(frozen=True)
class _Category:
    category: str


async def label_question(
    draft: Draft,
    writer: Model,
    checker: Model,
    table: Mapping[str, Sequence[str]],
    taxonomy: Mapping[str, str],
    settings: Construction,
) -> StageResult[Labelled]:
    """Return a question with other forms of its answer and its category.

    Raises:
      WebError, ServiceRefusedError: See `Model.ask`.
    """
    aliases = await _checked_aliases(draft, writer, checker, table, settings)
    category = await _category(draft, checker, taxonomy, settings)
    return StageResult(kept=[Labelled(draft=draft, aliases=aliases, category=category)])


async def _checked_aliases(
    draft: Draft,
    writer: Model,
    checker: Model,
    table: Mapping[str, Sequence[str]],
    settings: Construction,
) -> tuple[str, ...]:
    """Return the other forms of an answer that enough votes accept."""
    texts = {"Question": draft.question, "Answer": draft.answer, "Sentence": draft.evidence}
    reply = await writer.ask("aliases", _Aliases, texts, count=MAX_ALIASES)
    written = [] if reply is None else reply.aliases
    candidates = list(_distinct(draft.answer, [*table.get(fold(draft.answer), ()), *written]))
    if not candidates:
        return ()
    numbered = "\n".join(f"{i + 1}. {candidate}" for i, candidate in enumerate(candidates))
    texts = {
        "Question": draft.question,
        "Sentence": draft.evidence,
        "Correct answer": draft.answer,
        "Other answers": numbered,
    }
    accepted: collections.Counter[int] = collections.Counter()
    for sample in range(settings.votes):
        vote = await checker.ask("same", _Same, texts, sample=sample)
        if vote is not None:
            accepted.update(set(vote.same) & set(range(1, len(candidates) + 1)))
    return tuple(
        candidate for i, candidate in enumerate(candidates) if accepted[i + 1] >= settings.agreement
    )


def _distinct(answer: str, candidates: Sequence[str]) -> Iterator[str]:
    """Yield usable forms that a match by `normalise` does not treat as equal, at most a few."""
    seen = {normalise(answer)}
    for candidate in candidates:
        text = " ".join(one_line(candidate).split())
        if normalise(text) in seen or not normalise(text) or len(text) > _MAX_ALIAS:
            continue
        seen.add(normalise(text))
        yield text
        if len(seen) > MAX_ALIASES:
            return


async def _category(
    draft: Draft, checker: Model, taxonomy: Mapping[str, str], settings: Construction
) -> str:
    """Return the category of the first reply that names one."""
    names = {fold(name): name for name in taxonomy}
    texts = {"Question": draft.question, "Answer": draft.answer, "Sentence": draft.evidence}
    lines = "\n".join(f"- {name}: {meaning}" for name, meaning in taxonomy.items())
    for sample in range(settings.votes):
        reply = await checker.ask("category", _Category, texts, sample=sample, taxonomy=lines)
        if reply is not None and fold(reply.category) in names:
            return names[fold(reply.category)]
    return OTHER


def read_taxonomy(path: str | None) -> dict[str, str]:
    """Return the description of each category in a file of `name: description` lines.

    Args:
      path: File; None is that of the package.

    Raises:
      UserError: The file cannot be read, or a line has another form.
    """
    file = TAXONOMY if path is None else pathlib.Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = checked_json.error_reason(error)
        raise UserError(f"config.construction.taxonomy: {file}: {reason}") from None
    categories = {}
    for number, line in enumerate(lines, 1):
        name, colon, meaning = line.partition(":")
        if line.strip():
            if not colon or not name.strip():
                raise UserError(f"{file}, line {number}: must be `name: description`")
            categories[name.strip()] = meaning.strip()
    if not 0 < len(categories) <= _MAX_CATEGORIES:
        raise UserError(f"{file}: must have 1 to {_MAX_CATEGORIES} categories")
    return categories


def read_alias_table(path: str | None) -> dict[str, list[str]]:
    """Return the other names of each label in a JSONL file, keyed by `matching.fold` of the label.

    Each name of an entry leads to all others. Unusable lines are reported.

    Raises:
      UserError: The file cannot be read.
    """
    table: dict[str, list[str]] = {}
    if path is None:
        return table
    try:
        for number, line in checked_json.jsonl_lines(path):
            try:
                entry = checked_json.loads(line, dict[str, str | list[str]], name="")
                label, others = entry["label"], entry["aliases"]
                if not isinstance(label, str) or not isinstance(others, list):
                    raise ValueError("'label' must be a string, and 'aliases' a list of strings")
            except (ValueError, KeyError) as error:
                problem = f"no field {error}" if isinstance(error, KeyError) else error
                log.warning("%s, line %d: %s; skipped", path, number, problem)
                continue
            names = [label, *others]
            for name in names:
                table.setdefault(fold(name), []).extend(n for n in names if n != name)
    except (OSError, checked_json.FormatError) as error:
        reason = checked_json.error_reason(error)
        raise UserError(f"config.construction.aliases: {path}: {reason}") from None
    return table
