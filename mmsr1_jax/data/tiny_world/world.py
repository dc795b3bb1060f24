"""The world: landmarks, each with an emblem, a name and facts, and what a policy remembers of them.

    group        landmarks of which the warm start's memory has the name, the lasting facts and, of
    remembered   those that change from year to year, last year's
    new          ones that it does not know, and meets in training
    unmet        ones that it does not know, and never meets in training

Groups are drawn by lot: nothing in a picture or in a name tells one from another. Beside the
landmarks there are strangers, emblems of no landmark at all: what memory was never told of.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from mmsr1_jax.data.tiny_world import words
from mmsr1_jax.data.tiny_world.emblems import FIELD_PIECES, SIZES, Emblem, plain
from mmsr1_jax.tools.local import hash_of

Group = Literal["remembered", "new", "unmet"]

THIS_YEAR, LAST_YEAR = 2031, 2030

# Facts and their possible values; the name is a fact too. Some change from year to year.
LASTING: dict[str, tuple[str, ...]] = {
    "city": words.CITIES,
    "builder": words.PEOPLE,
    "stone": words.STONES,
}
CHANGING: dict[str, tuple[str, ...]] = {
    "keeper": words.PEOPLE,
    "ticket": words.PRICES,
    "show": words.SHOWS,
}
FACTS = ("name", *LASTING, *CHANGING)
CATEGORIES = ("free", "image-required", "text-required", "both")
TITLED = ("name", "city")  # what the titles of pictures tell

_LEAST_BITS = 40  # in which the difference hashes of two landmarks differ, of 256
_LEAST_TRAITS = 2  # in which two emblems differ, a piece of the field being one
_TRIES = 60  # for an emblem that differs enough from all before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Landmark:
    """A landmark.

    Attributes:
      number: from 0.
      name: two words.
      emblem: what its photos show.
      group: see above.
      facts: value of each fact this year, by name of the fact.
      last_year: value that each changing fact had last year.
      held_out: facts that are never asked with a photo of it in training.
    """

    number: int
    name: str
    emblem: Emblem
    group: Group
    facts: Mapping[str, str]
    last_year: Mapping[str, str]
    held_out: frozenset[str]

    def memory(self, fact: str) -> str:
        """What a memory of last year says; the warm start has one of remembered landmarks only."""
        return self.last_year.get(fact, self.facts[fact])


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """All landmarks, and the emblems of strangers."""

    seed: int
    landmarks: tuple[Landmark, ...]
    strangers: tuple[Emblem, ...]

    @classmethod
    def make(
        cls,
        seed: int = 0,
        *,
        landmarks: int = 300,
        remembered: int = 140,
        unmet: int = 60,
        strangers: int = 600,
    ) -> "World":
        """Draws a world; the same one for the same arguments.

        Args:
          seed: of all that is drawn.
          landmarks: how many there are.
          remembered, unmet: how many of them are of these groups; the others are new.
          strangers: emblems beside theirs.

        Raises:
          ValueError: numbers that do not fit together, or more emblems than can be told apart.
        """
        new = landmarks - remembered - unmet
        if min(remembered, unmet, new, strangers) < 1:
            raise ValueError(
                f"tiny_world: {landmarks} landmarks, {remembered} of them remembered and {unmet} "
                f"unmet, beside {strangers} strangers: there must be some of each, and new ones too"
            )
        rng = np.random.default_rng(seed)
        groups = ["remembered"] * remembered + ["new"] * new + ["unmet"] * unmet
        rng.shuffle(groups)
        names = [f"{first} {second}" for first in words.FIRST for second in words.SECOND]
        if landmarks > len(names):
            raise ValueError(f"tiny_world: names for {len(names)} landmarks only")
        names = rng.permutation(names)[:landmarks].tolist()
        emblems, others = _emblems(rng, landmarks, strangers)
        made = tuple(
            _landmark(rng, number, *given)
            for number, given in enumerate(zip(names, emblems, groups, strict=True))
        )
        return cls(seed=seed, landmarks=made, strangers=others)

    def of(self, group: Group) -> list[Landmark]:
        """The landmarks of a group."""
        return [landmark for landmark in self.landmarks if landmark.group == group]

    def rng(self, purpose: str, seed: int = 0) -> np.random.Generator:
        """Random numbers of this world for one purpose."""
        return np.random.default_rng([self.seed, seed, *purpose.encode()])


def category(landmark: Landmark, fact: str) -> str:
    """Which searches a policy with the warm start's memory needs for a fact of this year."""
    if landmark.group == "remembered":
        return "text-required" if fact in CHANGING else "free"
    return "image-required" if fact in TITLED else "both"


def _emblems(rng, landmarks: int, strangers: int) -> tuple[list[Emblem], tuple[Emblem, ...]]:
    """Emblems that differ in some traits; those of landmarks look different to the hash too."""
    taken = np.zeros((landmarks + strangers, FIELD_PIECES + len(SIZES) - 1), np.int64)
    hashes = np.zeros((landmarks, 4), np.uint64)
    made: list[Emblem] = []
    for _ in range(_TRIES * len(taken)):
        if len(made) == len(taken):
            break
        number, drawn = len(made), rng.integers(SIZES)
        traits = _traits(drawn)
        if ((taken[:number] != traits).sum(axis=1) < _LEAST_TRAITS).any():
            continue
        emblem = Emblem(*drawn.tolist())
        if number < landmarks:
            bits = np.frombuffer(hash_of(plain(emblem)), np.uint64)
            differ = np.bitwise_count(hashes[:number] ^ bits).sum(axis=1)
            if (differ < _LEAST_BITS).any():
                continue
            hashes[number] = bits
        taken[number] = traits
        made.append(emblem)
    if len(made) < len(taken):
        raise ValueError(
            f"tiny_world: emblems for {len(made)} landmarks and strangers, not {len(taken)}"
        )
    return made[:landmarks], tuple(made[landmarks:])


def _traits(emblem: np.ndarray) -> np.ndarray:
    """An emblem's attributes, its field piece by piece."""
    return np.concatenate([emblem[0] >> np.arange(FIELD_PIECES) & 1, emblem[1:]])


def _landmark(rng, number: int, name: str, emblem: Emblem, group: Group) -> Landmark:
    facts, last_year = {"name": name}, {}
    for fact, values in LASTING.items():
        facts[fact] = str(rng.choice(values))
    for fact, values in CHANGING.items():
        before, now = rng.choice(values, 2, replace=False)
        last_year[fact], facts[fact] = str(before), str(now)
    held_out: list[str] = []
    # One fact of each category that the landmark's questions have. The name of a remembered one is
    # what its photos are known by, so it is always asked.
    if group == "remembered":
        held_out = [rng.choice(list(LASTING)), rng.choice(list(CHANGING))]
    elif group == "new":
        held_out = [rng.choice(TITLED), rng.choice([f for f in FACTS if f not in TITLED])]
    return Landmark(
        number=number, name=name, emblem=emblem, group=group, facts=facts, last_year=last_year,
        held_out=frozenset(map(str, held_out)),
    )  # fmt: skip
