"""World of landmarks, each with an emblem, a name and facts, and what a policy remembers of them.

    group        landmarks
    remembered   known to the warm start: the name, the lasting facts, and last year's values of
                 the facts that change from year to year
    new          unknown to the warm start, encountered in training
    unmet        unknown to the warm start, never encountered in training

Groups are assigned at random, so neither an image nor a name reveals a landmark's group. Besides
landmarks there are strangers: emblems that belong to no landmark and that memory does not contain.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from mmsr1_jax.data.tiny_world import words
from mmsr1_jax.data.tiny_world.emblems import FIELD_PIECES, SIZES, Emblem, reference_photo
from mmsr1_jax.tools.index_builder import image_hash

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
TITLED = ("name", "city")  # facts that image titles state

_MIN_HASH_BITS = 40  # minimum Hamming distance of two landmarks' difference hashes, of 256 bits
_MIN_TRAITS = 2  # minimum number of differing traits of two emblems; each field piece is one
_MAX_DRAWS = 60  # draws per emblem, on average, to find emblems that differ enough


@dataclasses.dataclass(frozen=True, kw_only=True)
class Landmark:
    """A landmark of the world.

    Attributes:
      index: Index of the landmark, from 0.
      name: Name of two words.
      emblem: Emblem that its photos show.
      group: Group of the landmark, as described in the module docstring.
      facts: Value of each fact this year, keyed by the fact's name.
      last_year: Last year's value of each changing fact.
      held_out: Facts that training never asks for with a photo of the landmark.
    """

    index: int
    name: str
    emblem: Emblem
    group: Group
    facts: Mapping[str, str]
    last_year: Mapping[str, str]
    held_out: frozenset[str]

    def memory(self, fact: str) -> str:
        """Return a fact as of last year.

        The warm start remembers only landmarks of the group "remembered".
        """
        return self.last_year.get(fact, self.facts[fact])


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """All landmarks, and the emblems of strangers."""

    seed: int
    landmarks: tuple[Landmark, ...]
    strangers: tuple[Emblem, ...]

    @classmethod
    def generate(
        cls,
        seed: int = 0,
        *,
        landmarks: int = 300,
        remembered: int = 140,
        unmet: int = 60,
        strangers: int = 600,
    ) -> "World":
        """Generate a world, deterministically for the given arguments.

        Args:
          seed: Seed of all random draws.
          landmarks: Number of landmarks.
          remembered, unmet: Number of landmarks in these groups; the others are new.
          strangers: Number of emblems that belong to no landmark.

        Raises:
          ValueError: The numbers are inconsistent, or ask for more emblems than can be told apart.
        """
        new = landmarks - remembered - unmet
        if min(remembered, unmet, new, strangers) < 1:
            raise ValueError(
                f"tiny_world: landmarks={landmarks}, remembered={remembered}, unmet={unmet}, "
                f"strangers={strangers}: no group may be empty, nor may the new landmarks"
            )
        rng = np.random.default_rng(seed)
        sizes: dict[Group, int] = {"remembered": remembered, "new": new, "unmet": unmet}
        groups: list[Group] = [group for group, size in sizes.items() for _ in range(size)]
        rng.shuffle(groups)
        names = [f"{first} {second}" for first in words.FIRST for second in words.SECOND]
        if landmarks > len(names):
            raise ValueError(
                f"tiny_world: landmarks={landmarks} exceeds the {len(names)} possible names"
            )
        names = rng.permutation(names)[:landmarks].tolist()
        emblems, stranger_emblems = _emblems(rng, landmarks, strangers)
        members = tuple(
            _landmark(rng, index, name, emblem, group)
            for index, (name, emblem, group) in enumerate(zip(names, emblems, groups, strict=True))
        )
        return cls(seed=seed, landmarks=members, strangers=stranger_emblems)

    def landmarks_of(self, group: Group) -> list[Landmark]:
        """Return the landmarks of a group."""
        return [landmark for landmark in self.landmarks if landmark.group == group]

    def rng(self, purpose: str, seed: int = 0) -> np.random.Generator:
        """Return this world's random generator for one purpose."""
        return np.random.default_rng([self.seed, seed, *purpose.encode()])


def category(landmark: Landmark, fact: str) -> str:
    """Return the category of a question about this year's value of a fact.

    It names the searches that a policy with the warm start's memory needs.
    """
    if landmark.group == "remembered":
        return "text-required" if fact in CHANGING else "free"
    return "image-required" if fact in TITLED else "both"


def _emblems(
    rng: np.random.Generator, landmarks: int, strangers: int
) -> tuple[list[Emblem], tuple[Emblem, ...]]:
    """Draw emblems that differ in some traits; those of landmarks also differ in their hashes."""
    count = landmarks + strangers
    accepted = np.zeros((count, FIELD_PIECES + len(SIZES) - 1), np.int64)
    hashes = np.zeros((landmarks, 4), np.uint64)
    emblems: list[Emblem] = []
    for _ in range(_MAX_DRAWS * count):
        if len(emblems) == count:
            break
        index, attributes = len(emblems), rng.integers(SIZES)
        traits = _traits(attributes)
        if ((accepted[:index] != traits).sum(axis=1) < _MIN_TRAITS).any():
            continue
        emblem = Emblem(*attributes.tolist())
        if index < landmarks:
            bits = np.frombuffer(image_hash(reference_photo(emblem)), np.uint64)
            distances = np.bitwise_count(hashes[:index] ^ bits).sum(axis=1)
            if (distances < _MIN_HASH_BITS).any():
                continue
            hashes[index] = bits
        accepted[index] = traits
        emblems.append(emblem)
    if len(emblems) < count:
        raise ValueError(
            f"tiny_world: only {len(emblems)} distinct emblems found for {count} landmarks and "
            "strangers"
        )
    return emblems[:landmarks], tuple(emblems[landmarks:])


def _traits(emblem: np.ndarray) -> np.ndarray:
    """Return an emblem's attributes as a vector, with one entry per piece of the field."""
    return np.concatenate([emblem[0] >> np.arange(FIELD_PIECES) & 1, emblem[1:]])


def _landmark(
    rng: np.random.Generator, index: int, name: str, emblem: Emblem, group: Group
) -> Landmark:
    facts, last_year = {"name": name}, {}
    for fact, values in LASTING.items():
        facts[fact] = str(rng.choice(values))
    for fact, values in CHANGING.items():
        old, new = rng.choice(values, 2, replace=False)
        last_year[fact], facts[fact] = str(old), str(new)
    held_out: list[str] = []
    # One fact of each category of the landmark's questions. The name of a remembered landmark is
    # how its photos are recognised, so it is never held out.
    if group == "remembered":
        held_out = [rng.choice(list(LASTING)), rng.choice(list(CHANGING))]
    elif group == "new":
        held_out = [rng.choice(TITLED), rng.choice([f for f in FACTS if f not in TITLED])]
    return Landmark(
        index=index, name=name, emblem=emblem, group=group, facts=facts, last_year=last_year,
        held_out=frozenset(map(str, held_out)),
    )  # fmt: skip
