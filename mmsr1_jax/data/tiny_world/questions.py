"""Questions about photos of landmarks, and demonstrations for the warm start.

    split     questions
    train     about remembered and new landmarks, on all facts but the held-out ones
    heldout   about the same landmarks, on the held-out facts, with new photos
    unmet     on all facts of landmarks that occur in no training question, demonstration or guess

A question's category (`world.category`) names the searches that it needs. The warm start does not
teach categories. It teaches the policy to say whether it knows what it sees ("is") or guesses ("may
be"), but to act independently of that. Each demonstration draws a random workflow, whatever the
question needs, and its turns follow from the workflow. Its answer comes from search results or from
memory, which is outdated for facts that change and a blind guess for facts that it does not hold.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from mmsr1_jax.data.parquet import Question
from mmsr1_jax.data.tiny_world.emblems import Emblem, jpeg, photo
from mmsr1_jax.data.tiny_world.pages import search_query
from mmsr1_jax.data.tiny_world.world import (
    CATEGORIES,
    FACTS,
    THIS_YEAR,
    TITLED,
    Landmark,
    World,
    category,
)
from mmsr1_jax.episodes.turns import TAGS, WHOLE_IMAGE, Action

T = TypeVar("T")
Split = Literal["train", "heldout", "unmet"]
Workflow = Literal["direct", "image", "text", "image+text"]
WORKFLOWS: tuple[Workflow, ...] = ("direct", "image", "text", "image+text")

WORDINGS: dict[str, tuple[str, ...]] = {
    "name": ("What is {it} called?", "What is the name of {it}?"),
    "city": ("Which city is {it} in?", "In which city does {it} stand?"),
    "builder": ("Who built {it}?", "Who was the builder of {it}?"),
    "stone": ("Of what stone is {it}?", "Which stone is {it} built of?"),
    "keeper": ("Who is the keeper of {it} in {year}?", "Who keeps {it} in {year}?"),
    "ticket": ("What does a ticket for {it} cost in {year}?", "How much is {it} in {year}?"),
    "show": ("What is on show at {it} in {year}?", "What does {it} show in {year}?"),
}  # fmt: skip
_THIS = "this"  # refers to the landmark in the photo
# Reasoning of each turn, by whether the policy knows the landmark or guesses its name.
REASONS = {True: "This is {name}.", False: "This may be {name}."}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LandmarkQuestion(Question):
    """A question about a photo of a landmark.

    Attributes:
      landmark: Name of the landmark in the photo.
      fact: Fact that the question asks for.
    """

    landmark: str
    fact: str


def pairs(world: World, split: Split) -> list[tuple[Landmark, str]]:
    """Return all (landmark, fact) pairs that a split asks about."""
    members = []
    for landmark, fact in itertools.product(world.landmarks, FACTS):
        if landmark.group == "unmet":
            own_split = "unmet"
        else:
            own_split = "heldout" if fact in landmark.held_out else "train"
        if own_split == split:
            members.append((landmark, fact))
    return members


def questions(world: World, split: Split, count: int, *, seed: int = 0) -> list[LandmarkQuestion]:
    """Generate questions of a split, balanced over its categories, each with its own photo.

    Args:
      count: Number of questions. A pair repeats only after all pairs of its category were used.
      seed: Seed of the order, the wordings and the photos.
    """
    rng = world.rng(f"questions {split}", seed)
    return [
        LandmarkQuestion(
            id=f"{split}-{seed}-{index}",
            question=_wording(fact, _THIS, rng),
            images=(jpeg(photo(landmark.emblem, rng)),),
            answers=(landmark.facts[fact],),
            source=f"tiny_world {split}",
            category=category(landmark, fact),
            landmark=landmark.name,
            fact=fact,
        )
        for index, (landmark, fact) in enumerate(_sample_pairs(world, split, count, rng))
    ]


def demonstrations(world: World, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Generate episodes over training questions, with searches drawn regardless of need.

    A new landmark is mistaken for a remembered one, resampled for each episode, until its image
    has been looked up.

    Returns:
      One {"question", "image", "turns", "answers", "category", "workflow", "landmark", "fact"} per
      episode. "image" is an image file as bytes. "turns" are the policy's turns; the search that a
      turn requests has to be executed after it. "answers" are the correct answers, which the last
      turn may not give.
    """
    rng = world.rng("demonstrations", seed)
    known = world.landmarks_of("remembered")
    episodes = []
    for landmark, fact in _sample_pairs(world, "train", count, rng):
        knows = landmark.group == "remembered"
        believed = landmark if knows else _choose(known, rng)
        workflow = _choose(WORKFLOWS, rng)
        episodes.append(
            {
                "question": _wording(fact, _THIS, rng),
                "image": jpeg(photo(landmark.emblem, rng)),
                "turns": turns(landmark, fact, workflow, believed, knows=knows),
                "answers": [landmark.facts[fact]],
                "category": category(landmark, fact),
                "workflow": workflow,
                "landmark": landmark.name,
                "fact": fact,
            }
        )
    return episodes


def memories(world: World, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Generate demonstrations of what the warm start remembers, answered without a search.

    Three kinds alternate. The first names a remembered landmark from its photo. The second states
    a fact as of last year, given the landmark's name and no photo. The third shows a photo of a
    stranger, mistaken for a landmark that is resampled each time, and asks for its name or another
    fact. The third kind discourages confident answers about unseen landmarks and teaches the policy
    to recall facts from the name that it wrote itself.

    Returns:
      Dicts as in `demonstrations`. "image" is None for questions without a photo, "answers" holds
      the remembered answer, "category" is "memory" and "landmark" is "" for a stranger.
    """
    rng = world.rng("memories", seed)
    known = world.landmarks_of("remembered")
    facts = [(landmark, fact) for landmark in known for fact in FACTS if fact != "name"]
    landmarks, pairs_by_name = _cycle(known, rng), _cycle(facts, rng)
    strangers = _cycle(world.strangers, rng)
    episodes = []
    for index in range(count):
        if index % 3 == 0:
            landmark = next(landmarks)
            episodes.append(_memory(landmark, "name", landmark.emblem, landmark.name, rng))
        elif index % 3 == 1:
            landmark, fact = next(pairs_by_name)
            episodes.append(_memory(landmark, fact, None, landmark.name, rng))
        else:
            fact = FACTS[rng.integers(len(FACTS))]
            episodes.append(_memory(_choose(known, rng), fact, next(strangers), "", rng))
    return episodes


def practice(world: World, memory: World, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Generate demonstrations of reading search results.

    They are about landmarks of another world, so that only search results give the answer. Two
    kinds alternate. The first asks for a fact by the landmark's name, without a photo, and answers
    after a text search. The second shows a photo, mistaken for a landmark that `memory` remembers
    until its image has been looked up, and asks either for what the image titles state or, with an
    additional text search, for any fact.

    Args:
      world: World whose pages and images are searched.
      memory: World for whose remembered landmarks the photos are mistaken.

    Returns:
      Dicts as in `demonstrations`; "category" is "practice".
    """
    rng = world.rng("practice", seed)
    known, landmarks = memory.landmarks_of("remembered"), _cycle(world.landmarks, rng)
    episodes = []
    for index in range(count):
        landmark, by_name = next(landmarks), index % 2 == 0
        workflow: Workflow = "text" if by_name else ("image", "image+text")[index // 2 % 2]
        # A question that names the landmark cannot ask for its name, which is the first fact.
        facts = TITLED if workflow == "image" else FACTS[by_name:]
        fact = _choose(facts, rng)
        believed = landmark if by_name else _choose(known, rng)
        episodes.append(
            {
                "question": _wording(fact, landmark.name if by_name else _THIS, rng),
                "image": None if by_name else jpeg(photo(landmark.emblem, rng)),
                "turns": turns(landmark, fact, workflow, believed, knows=by_name),
                "answers": [landmark.facts[fact]],
                "category": "practice",
                "workflow": workflow,
                "landmark": landmark.name,
                "fact": fact,
            }
        )
    return episodes


def turns(
    landmark: Landmark, fact: str, workflow: Workflow, believed: Landmark, *, knows: bool
) -> list[str]:
    """Return the turns of a policy that answers a question about a fact of `landmark`.

    The policy takes the landmark for `believed` until it has looked up its image, and searches as
    the workflow prescribes.

    Args:
      knows: Whether the policy remembers what it sees, rather than guessing.
    """
    searches_image = workflow.startswith("image")
    subject, sure = (landmark, True) if searches_image else (believed, knows)
    steps = []
    if searches_image:
        steps.append(_turn(believed, knows, "image_search", WHOLE_IMAGE))
    if workflow.endswith("text"):
        steps.append(_turn(subject, sure, "text_search", f" {search_query(subject.name, fact)}"))
    answer = answer_after(landmark, fact, workflow, believed)
    return [*steps, _turn(subject, sure, "answer", f" {answer}")]


def answer_after(landmark: Landmark, fact: str, workflow: Workflow, believed: Landmark) -> str:
    """Return the answer in the last turn of `turns`.

    After a text search, this is the value on this year's page; after an image search, the value in
    the title. Otherwise it is the remembered value, taken from `believed` if the landmark is not in
    memory.
    """
    subject = landmark if workflow.startswith("image") else believed
    if workflow.endswith("text") or (workflow == "image" and fact in TITLED):
        return subject.facts[fact]
    return (subject if subject.group == "remembered" else believed).memory(fact)


def _sample_pairs(
    world: World, split: Split, count: int, rng: np.random.Generator
) -> Iterator[tuple[Landmark, str]]:
    """Yield pairs of a split, cycling through its categories in a new random order each round."""
    by_category: dict[str, list[tuple[Landmark, str]]] = {name: [] for name in CATEGORIES}
    for landmark, fact in pairs(world, split):
        by_category[category(landmark, fact)].append((landmark, fact))
    streams = [_cycle(group, rng) for group in by_category.values() if group]
    if not streams:
        raise ValueError(f"tiny_world: unknown or empty split {split!r}")
    rounds = (
        next(streams[index]) for _ in itertools.count() for index in rng.permutation(len(streams))
    )
    return itertools.islice(rounds, count)


def _cycle(items: Sequence[T], rng: np.random.Generator) -> Iterator[T]:
    """Yield all items in random order, over and over, reshuffled for each pass."""
    while len(items):
        for index in rng.permutation(len(items)):
            yield items[index]


def _choose(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]


def _wording(fact: str, it: str, rng: np.random.Generator) -> str:
    return _choose(WORDINGS[fact], rng).format(it=it, year=THIS_YEAR)


def _memory(
    believed: Landmark, fact: str, emblem: Emblem | None, name: str, rng: np.random.Generator
) -> dict[str, Any]:
    """Return a demonstration about a photo of an emblem or a name, answered from memory."""
    return {
        "question": _wording(fact, name if emblem is None else _THIS, rng),
        "image": None if emblem is None else jpeg(photo(emblem, rng)),
        "turns": turns(believed, fact, "direct", believed, knows=bool(name)),
        "answers": [believed.memory(fact)],
        "category": "memory",
        "workflow": "direct",
        "landmark": name,
        "fact": fact,
    }


def _turn(landmark: Landmark, sure: bool, action: Action, payload: str) -> str:
    """Format a turn.

    Texts begin with a space, as they do inside a sentence, so that they have the same tokens.
    """
    tag, reason = TAGS[action], REASONS[sure].format(name=landmark.name)
    return f"<reason> {reason}</reason> <{tag}>{payload}</{tag}>"
