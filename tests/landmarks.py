"""Helpers for tests of the tiny world."""

import asyncio
import re

from mmsr1_jax.data.tiny_world import World
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.tools import Query

SPLITS = ("train", "heldout", "unmet")
ACTIONS = {
    "direct": ["answer"],
    "image": ["image_search", "answer"],
    "text": ["text_search", "answer"],
    "image+text": ["image_search", "text_search", "answer"],
}


def small_world(seed):
    return World.generate(seed, landmarks=30, remembered=12, unmet=8, strangers=20)


def find_pages(index, text):
    """Return the texts of the pages that a text search finds."""
    query = Query(action="text_search", text=text, question="?")
    return [result[0].text for result in asyncio.run(index.text_search(query)).results]


def find_titles(index, file):
    """Return the titles that an image search finds."""
    query = Query(action="image_search", text=None, question="?", images=[file])
    return [result[2].text for result in asyncio.run(index.image_search(query)).results]


def word_set(text):
    return set(re.findall(r"\w+", text))


def by_name(world):
    return {landmark.name: landmark for landmark in world.landmarks}


def named_landmark(text):
    """Return the name of the landmark in the reasoning of a turn."""
    return re.fullmatch(r"This (?:is|may be) (.+)\.", parse(text).reason)[1]


def is_guess(text):
    """Return whether the reasoning of a turn marks the landmark as a guess."""
    return parse(text).reason.startswith("This may be ")


def traits(emblem):
    return [int(bit) for bit in f"{emblem.field:08b}"] + list(emblem[1:])
