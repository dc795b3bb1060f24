"""Turns, and a second implementation of answer normalisation, for tests of rewards."""

import itertools

from mmsr1_jax.episodes.turns import parse

TURNS = {
    "answer": "<reason>r</reason> <answer>Tagus</answer>",
    "image": "<reason>r</reason> <search><img></search>",
    "text": "<reason>r</reason> <text_search>q</text_search>",
}
MALFORMED = {name: f"So: {text}" for name, text in TURNS.items()}  # the same actions, malformed


def texts(sequence, table=TURNS):
    return [table[name] for name in sequence.split(",") if name]


def parsed(sequence, table=TURNS):
    return [parse(text) for text in texts(sequence, table)]


def slow_normalise(text):
    """Normalise a text letter by letter and word by word."""
    ascii_punctuation = {chr(c) for c in range(33, 127) if not chr(c).isalnum()}
    letters = [c for c in text.lower() if c not in ascii_punctuation]
    words = ["".join(run) for _, run in itertools.groupby(letters, key=str.isalnum)]
    kept = ["" if word in ("a", "an", "the") else word for word in words]
    # An article is replaced by a space.
    return " ".join("".join(w or " " for w in kept).split())
