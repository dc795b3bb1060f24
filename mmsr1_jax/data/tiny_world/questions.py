"""Questions about photos of landmarks, and demonstrations for the warm start.

    split     what is asked
    train     of remembered and new landmarks, all facts but the held-out ones
    heldout   the held-out facts of the same landmarks; new photos
    unmet     all facts of landmarks that no training question, demonstration or guess is about

What a question needs is its category (`world.category`); the warm start is shown nothing of it: it
says whether it knows what it sees, "is" or "may be", and acts without regard to that. In the
demonstrations a workflow is drawn at random for each question, whatever it needs, and what is
then written is what follows: from memory, which is wrong for what has changed and a blind guess for
what it does not hold; or from the results of a search.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from mmsr1_jax.data.parquet import Question
from mmsr1_jax.data.tiny_world.emblems import Emblem, jpeg, photo
from mmsr1_jax.data.tiny_world.pages import query
from mmsr1_jax.data.tiny_world.world import (
    CATEGORIES,
    FACTS,
    THIS_YEAR,
    TITLED,
    Landmark,
    World,
    category,
)
from mmsr1_jax.episodes.turns import TAGS, WHOLE_IMAGE

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
_THIS = "this"  # a landmark in a photo
# Of every turn: what it takes the landmark for by then, and whether it knows it.
REASONS = {True: "This is {name}.", False: "This may be {name}."}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(Question):
    """A question about a photo.

    Attributes:
      landmark: name of what is in the photo.
      fact: that is asked for.
    """

    landmark: str
    fact: str


def pairs(world: World, split: Split) -> list[tuple[Landmark, str]]:
    """All that a split asks: landmarks with facts of them."""
    asked = []
    for landmark, fact in itertools.product(world.landmarks, FACTS):
        if landmark.group == "unmet":
            where = "unmet"
        else:
            where = "heldout" if fact in landmark.held_out else "train"
        if where == split:
            asked.append((landmark, fact))
    return asked


def questions(world: World, split: Split, count: int, *, seed: int = 0) -> list[Asked]:
    """Questions of a split, as many of each category that it has, each with a photo of its own.

    Args:
      count: of questions. All pairs of a category are asked before one is asked again.
      seed: of the order, the wordings and the photos.
    """
    rng = world.rng(f"questions {split}", seed)
    asked = []
    for number, (landmark, fact) in enumerate(_drawn(world, split, count, rng)):
        asked.append(
            Asked(
                id=f"{split}-{seed}-{number}",
                question=_wording(fact, _THIS, rng),
                images=(jpeg(photo(landmark.emblem, rng)),),
                answers=(landmark.facts[fact],),
                source=f"tiny_world {split}",
                category=category(landmark, fact),
                landmark=landmark.name,
                fact=fact,
            )
        )
    return asked


def demonstrations(world: World, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Episodes over training questions, whose searches are drawn without regard to need.

    A new landmark is taken for a remembered one, drawn anew each time, until its picture has been
    looked up.

    Returns:
      {"question", "image", "turns", "answers", "category", "workflow", "landmark", "fact"}: "image"
      the bytes of a picture; "turns" the policy's, after each of which the search that it asks for
      is to be made; "answers" the right ones, which the last turn need not give.
    """
    rng = world.rng("demonstrations", seed)
    known = world.of("remembered")
    made = []
    for landmark, fact in _drawn(world, "train", count, rng):
        knows = landmark.group == "remembered"
        believed = landmark if knows else _one(known, rng)
        workflow = _one(WORKFLOWS, rng)
        made.append(
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
    return made


def memories(world: World, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Demonstrations of what the warm start remembers, answered without a search.

    In turn: a photo of a remembered landmark and its name; a fact by the landmark's name, without
    a photo, as it was last year; a photo of a stranger, taken for a landmark that is drawn anew
    each time, and its name or another fact of it. The last keeps a policy from being sure of what
    it has never seen, and makes its own words what a fact is remembered by.

    Returns: as `demonstrations`; "image" is None where there is none, "answers" is what memory
      says, "category" is "memory", "landmark" is "" for a stranger.
    """
    rng = world.rng("memories", seed)
    known = world.of("remembered")
    facts = [(landmark, fact) for landmark in known for fact in FACTS if fact != "name"]
    shown, told, strangers = _cycle(known, rng), _cycle(facts, rng), _cycle(world.strangers, rng)
    made = []
    for number in range(count):
        if number % 3 == 0:
            landmark = next(shown)
            made.append(_memory(landmark, "name", landmark.emblem, landmark.name, rng))
        elif number % 3 == 1:
            landmark, fact = next(told)
            made.append(_memory(landmark, fact, None, landmark.name, rng))
        else:
            fact = FACTS[rng.integers(len(FACTS))]
            made.append(_memory(_one(known, rng), fact, next(strangers), "", rng))
    return made


def practice(world: World, memory: World, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Demonstrations of reading: about landmarks of another world, so that nothing but what is
    found says the answer.

    In turn: a fact by the landmark's name, without a photo, after a text search; a photo, taken for
    a landmark that `memory` remembers until its picture has been looked up, and either what the
    titles tell, or any fact after a text search.

    Args:
      world: whose pages and pictures are to be searched.
      memory: whose remembered landmarks are the beliefs.

    Returns: as `demonstrations`; "category" is "practice".
    """
    rng = world.rng("practice", seed)
    known, others = memory.of("remembered"), _cycle(world.landmarks, rng)
    made = []
    for number in range(count):
        landmark, by_name = next(others), number % 2 == 0
        workflow: Workflow = "text" if by_name else ("image", "image+text")[number // 2 % 2]
        facts = TITLED if workflow == "image" else FACTS[by_name:]  # a name is not asked by a name
        fact = _one(facts, rng)
        believed = landmark if by_name else _one(known, rng)
        made.append(
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
    return made


def turns(
    landmark: Landmark, fact: str, workflow: Workflow, believed: Landmark, *, knows: bool
) -> list[str]:
    """What a policy writes that is asked for a fact of `landmark`, takes it for `believed` until
    its picture has been looked up, and searches as the workflow says.

    Args:
      knows: whether it remembers what it sees, or guesses.
    """
    looks = workflow.startswith("image")
    then, sure = (landmark, True) if looks else (believed, knows)
    written = []
    if looks:
        written.append(_turn(believed, knows, "image_search", WHOLE_IMAGE))
    if workflow.endswith("text"):
        written.append(_turn(then, sure, "text_search", f" {query(then.name, fact)}"))
    answer = answer_after(landmark, fact, workflow, believed)
    return [*written, _turn(then, sure, "answer", f" {answer}")]


def answer_after(landmark: Landmark, fact: str, workflow: Workflow, believed: Landmark) -> str:
    """The answer in the last of those turns.

    After a text search it is what the page of this year says, after an image search what the title
    says. Else it is what memory says; of a landmark that is not in it, what it says of `believed`.
    """
    sure = landmark if workflow.startswith("image") else believed
    if workflow.endswith("text") or (workflow == "image" and fact in TITLED):
        return sure.facts[fact]
    return (sure if sure.group == "remembered" else believed).memory(fact)


def _drawn(world: World, split: Split, count: int, rng) -> Iterator[tuple[Landmark, str]]:
    """Pairs of a split, the categories taking turns in an order drawn anew each round."""
    of_kind: dict[str, list] = {kind: [] for kind in CATEGORIES}
    for landmark, fact in pairs(world, split):
        of_kind[category(landmark, fact)].append((landmark, fact))
    streams = [_cycle(some, rng) for some in of_kind.values() if some]
    if not streams:
        raise ValueError(f"tiny_world: no split {split!r}")
    rounds = (
        next(streams[kind]) for _ in itertools.count() for kind in rng.permutation(len(streams))
    )
    return itertools.islice(rounds, count)


def _cycle(items, rng: np.random.Generator) -> Iterator:
    """All items in an order drawn by lot, then all again in another."""
    while len(items):
        for number in rng.permutation(len(items)):
            yield items[number]


def _one(items, rng: np.random.Generator):
    return items[rng.integers(len(items))]


def _wording(fact: str, it: str, rng: np.random.Generator) -> str:
    return _one(WORDINGS[fact], rng).format(it=it, year=THIS_YEAR)


def _memory(believed: Landmark, fact: str, emblem: Emblem | None, name: str, rng) -> dict[str, Any]:
    """A question about a photo of an emblem, or about a name, that is answered from memory."""
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


def _turn(landmark: Landmark, sure: bool, action: str, payload: str) -> str:
    """Texts begin with a space, as they do inside a sentence, so that they are the same tokens."""
    tag, reason = TAGS[action], REASONS[sure].format(name=landmark.name)
    return f"<reason> {reason}</reason> <{tag}>{payload}</{tag}>"
