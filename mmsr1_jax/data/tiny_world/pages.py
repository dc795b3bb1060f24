"""Search corpus of the world: pages about landmarks, and images of landmarks with titles."""

import itertools
import json
import pathlib
import tempfile

from mmsr1_jax.data.tiny_world.emblems import jpeg, photo
from mmsr1_jax.data.tiny_world.world import CHANGING, LAST_YEAR, LASTING, THIS_YEAR, World
from mmsr1_jax.tools.index_builder import build_index

# Titles of each landmark's images, with one photo per title.
TITLES = ("{name}, {city}", "{name} in {city}", "View of {name}, {city}", "{city}: {name}")
FACT_PAGES = (
    "{name} stands in the city of {city}. Its builder was {builder}, its stone is {stone}.",
    "{name}: a landmark of {city}, built of {stone}. Builder: {builder}.",
)
YEAR_PAGES = (
    "{name} in {year}: the keeper is {keeper}, a ticket costs {ticket}, on show are {show}.",
    "{year} at {name}: {show} on show, keeper {keeper}, ticket {ticket}.",
)
LIST_PAGES = {
    "city": "In the city of {value} you can see {names}.",
    "builder": "{value} was the builder of {names}.",
    "stone": "You find {value} in the walls of {names}.",
}
_LANDMARKS_PER_LIST = 4  # maximum number of landmarks on a list page


def pages(world: World) -> list[dict[str, str]]:
    """Return all pages, each with the keys "url", "title", "snippet" and "text".

    Each landmark has one page with its lasting facts, one for this year and an outdated one for
    last year. Further pages list landmarks that share a fact.
    """
    rng = world.rng("pages")
    entries: list[dict[str, str]] = []

    def add(title: str, text: str) -> None:
        url = f"tw/{len(entries)}"
        entries.append({"url": url, "title": title, "snippet": text, "text": text})

    for landmark in world.landmarks:
        add(landmark.name, rng.choice(FACT_PAGES).format(**landmark.facts))
        # The outdated page comes first, so that it would win ties in a search.
        for year, facts in ((LAST_YEAR, landmark.last_year), (THIS_YEAR, landmark.facts)):
            text = rng.choice(YEAR_PAGES).format(**{**landmark.facts, **facts}, year=year)
            add(f"{landmark.name} {year}", text)
    for fact, template in LIST_PAGES.items():
        for value in LASTING[fact]:
            names = [mark.name for mark in world.landmarks if mark.facts[fact] == value]
            for start in range(0, len(names), _LANDMARKS_PER_LIST):
                add(
                    value,
                    template.format(
                        value=value, names=", ".join(names[start : start + _LANDMARKS_PER_LIST])
                    ),
                )
    return entries


def search_query(name: str, fact: str) -> str:
    """Return a sensible text search query for a fact as of this year."""
    if fact == "name":
        return name
    return f"{name} {fact} {THIS_YEAR}" if fact in CHANGING else f"{name} {fact}"


def write_index(world: World, out: str | pathlib.Path) -> tuple[int, int]:
    """Write `out/index.sqlite` with all pages and several images of each landmark.

    Returns:
      The number of pages and the number of images.
    """
    rng = world.rng("pictures")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        images = []
        for landmark, title in itertools.product(world.landmarks, TITLES):
            file = f"{len(images)}.jpg"
            (folder / file).write_bytes(jpeg(photo(landmark.emblem, rng)))
            images.append({"image": file, "title": title.format(**landmark.facts)})
        for file, entries in {"pages.jsonl": pages(world), "images.jsonl": images}.items():
            (folder / file).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return build_index(out, [folder / "pages.jsonl"], [folder / "images.jsonl"])
