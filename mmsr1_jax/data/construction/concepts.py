"""Visual concepts: files of names with counts, and samples of them by bands of frequency.

A band holds the concepts whose counts have the same number of digits. Bands from `head_count` on
are the head, the others the tail. Each of the two gets its share of the sample, divided equally
among its bands, so that the few most frequent and the many rarest concepts are all represented.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mmsr1_jax.config import Construction
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data.construction.matching import fold
from mmsr1_jax.utils import checked_json
from mmsr1_jax.utils.logs import log

_MAX_NAME = 200  # characters
_MAX_ALIASES = 50
_MAX_WARNINGS = 20  # lines that are reported one by one
_MAX_LINE = 1_000_000  # bytes

T = TypeVar("T")


class ConceptError(UserError):
    """Unusable file of concepts; the message names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concept:
    """A visual concept.

    Attributes:
      name: Name.
      aliases: Other names.
      count: Frequency in the vocabulary; None if the file has no counts.
      band: `head`, `tail`, or empty without counts.
    """

    name: str
    aliases: tuple[str, ...] = ()
    count: int | None = None
    band: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Name and aliases."""
        return (self.name, *self.aliases)


def select(settings: Construction) -> list[Concept]:
    """Return the concepts that the settings select, in the order in which they are worked on.

    Raises:
      ConceptError: A file cannot be read, or no concept is left.
    """
    excluded = {fold(name) for c in read(settings.exclude) for name in c.names}
    concepts = [
        concept
        for concept in read(settings.concepts)
        if not any(fold(name) in excluded for name in concept.names)
    ]
    if not concepts:
        raise ConceptError(
            f"config.construction.concepts={settings.concepts}: no concept to work on"
        )
    return sample(
        concepts,
        settings.num_concepts or len(concepts),
        head_fraction=settings.head_fraction,
        head_count=settings.head_count,
        seed=settings.seed,
    )


def read(files: Sequence[str]) -> list[Concept]:
    """Return the concepts of several files, without duplicates. Unusable lines are reported.

    Raises:
      ConceptError: A file cannot be read.
    """
    concepts: dict[str, Concept] = {}
    num_skipped = 0
    for file in files:
        path = pathlib.Path(file)
        try:
            for number, line in checked_json.jsonl_lines(path, max_bytes=_MAX_LINE):
                try:
                    concept = _parse(line, is_json=path.suffix == ".jsonl")
                except ValueError as error:
                    num_skipped += 1
                    if num_skipped <= _MAX_WARNINGS:
                        log.warning("%s, line %d: %s; skipped", path, number, error)
                    continue
                concepts.setdefault(fold(concept.name), concept)
        except (OSError, checked_json.FormatError) as error:
            raise ConceptError(
                f"{path}: cannot be read ({checked_json.error_reason(error)})"
            ) from None
    if num_skipped > _MAX_WARNINGS:
        log.warning("skipped %d lines of concepts in all", num_skipped)
    return list(concepts.values())


def sample(
    concepts: Sequence[Concept], count: int, *, head_fraction: float, head_count: int, seed: int
) -> list[Concept]:
    """Return a sample of concepts in random order, by bands of frequency if all have counts.

    Any beginning of the result is itself a sample of this kind, apart from rounding, so the first
    concepts can serve as a pilot.

    Args:
      concepts: All concepts, with different names.
      count: Number of concepts to sample. What one band lacks is taken from the others.
      head_fraction: Share of the sample that is taken from the head.
      head_count: Count from which a concept belongs to the head.
      seed: Seed of the sample.
    """
    rng = np.random.default_rng([seed, 1])
    count = min(count, len(concepts))
    if any(concept.count is None for concept in concepts):
        return [concepts[i] for i in rng.permutation(len(concepts))[:count]]
    sides: dict[str, dict[int, list[Concept]]] = {"head": {}, "tail": {}}
    for concept in concepts:
        assert concept.count is not None
        side = "head" if concept.count >= head_count else "tail"
        band = sides[side].setdefault(len(str(concept.count)), [])
        band.append(dataclasses.replace(concept, band=side))
    shuffled = {
        name: [_shuffle(bands[key], rng) for key in sorted(bands, reverse=True)]
        for name, bands in sides.items()
    }
    available = {name: sum(map(len, bands)) for name, bands in shuffled.items()}
    num_head = min(available["head"], max(round(head_fraction * count), count - available["tail"]))
    numbers = {"head": num_head, "tail": count - num_head}
    chosen = [c for name in sides for c in _take_evenly(shuffled[name], numbers[name])]
    return _shuffle(chosen, rng)


def _take_evenly(bands: Sequence[Sequence[T]], count: int) -> list[T]:
    """Return `count` items, one of each band in turn as long as it has any."""
    taken: list[T] = []
    depth = 0
    while len(taken) < count:
        row = [band[depth] for band in bands if depth < len(band)]
        taken += row[: count - len(taken)]
        depth += 1
    return taken


def _shuffle(items: Iterable[T], rng: np.random.Generator) -> list[T]:
    items = list(items)
    return [items[i] for i in rng.permutation(len(items))]


def _parse(line: bytes, *, is_json: bool) -> Concept:
    """Return the concept of a line. Raises ValueError."""
    if is_json:
        entry = checked_json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError("not a JSON object")
    else:
        try:
            name, tab, count = line.decode("utf-8").strip().partition("\t")
        except UnicodeDecodeError:
            raise ValueError("not UTF-8") from None
        entry: dict[str, Any] = {"concept": name}
        if tab:
            if not count.strip().isdecimal() or len(count) > 18:
                raise ValueError("the part after the tab must be a count")
            entry["count"] = int(count)
    return from_entry(entry)


def from_entry(entry: Mapping[str, Any]) -> Concept:
    """Return the concept of an object with the fields `concept`, `aliases`, `count` and `band`.

    Raises:
      ValueError: A field has a wrong type or an invalid value.
    """
    name, aliases = entry.get("concept"), entry.get("aliases") or []
    if not isinstance(name, str) or not name.strip() or len(name) > _MAX_NAME:
        raise ValueError(f"'concept' must be a name of at most {_MAX_NAME} characters")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError("'aliases' must be a list of strings")
    count = entry.get("count")
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError("'count' must be a positive integer")
    kept = [" ".join(alias.split()) for alias in aliases if alias.strip()]
    return Concept(
        name=" ".join(name.split()),
        aliases=tuple(alias for alias in kept if len(alias) <= _MAX_NAME)[:_MAX_ALIASES],
        count=count,
        band=str(entry.get("band") or ""),
    )
