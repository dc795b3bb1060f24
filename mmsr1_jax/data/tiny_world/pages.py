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
ABOUT = (
    "{name} stands in the city of {city}. Its builder was {builder}, its stone is {stone}.",
    "{name}: a landmark of {city}, built of {stone}. Builder: {builder}.",
)
OF_A_YEAR = (
    "{name} in {year}: the keeper is {keeper}, a ticket costs {ticket}, on show are {show}.",
    "{year} at {name}: {show} on show, keeper {keeper}, ticket {ticket}.",
)
LISTS = {
    "city": "In the city of {value} you can see {names}.",
    "builder": "{value} was the builder of {names}.",
    "stone": "You find {value} in the walls of {names}.",
}
_LISTED = 4  # maximum number of landmarks on a list page


def pages(world: World) -> list[dict[str, str]]:
    """Return all pages, each with the keys "url", "title", "snippet" and "text".

    Each landmark has one page with its lasting facts, one for this year and an outdated one for
    last year. Further pages list landmarks that share a fact.
    """
    rng = world.rng("pages")
    found = []

    def add(title: str, text: str) -> None:
        url = f"tw/{len(found)}"
        found.append({"url": url, "title": title, "snippet": text, "text": text})

    for landmark in world.landmarks:
        add(landmark.name, rng.choice(ABOUT).format(**landmark.facts))
        # The outdated page comes first, so that it would win ties in a search.
        for year, facts in ((LAST_YEAR, landmark.last_year), (THIS_YEAR, landmark.facts)):
            text = rng.choice(OF_A_YEAR).format(**{**landmark.facts, **facts}, year=year)
            add(f"{landmark.name} {year}", text)
    for fact, template in LISTS.items():
        for value in LASTING[fact]:
            names = [mark.name for mark in world.landmarks if mark.facts[fact] == value]
            for start in range(0, len(names), _LISTED):
                add(
                    value,
                    template.format(value=value, names=", ".join(names[start : start + _LISTED])),
                )
    return found


def query(name: str, fact: str) -> str:
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
        lines = []
        for landmark, title in itertools.product(world.landmarks, TITLES):
            file = f"{len(lines)}.jpg"
            (folder / file).write_bytes(jpeg(photo(landmark.emblem, rng)))
            lines.append({"image": file, "title": title.format(**landmark.facts)})
        files = {"pages.jsonl": pages(world), "pictures.jsonl": lines}
        for file, entries in files.items():
            (folder / file).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return build_index(out, [folder / "pages.jsonl"], [folder / "pictures.jsonl"])
