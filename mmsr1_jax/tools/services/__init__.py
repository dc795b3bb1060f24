"""Web APIs that search and read, one file each: what is asked, and how the answer is read.

Answers are data from outside: a field that is missing or of another type leaves that entry out, and
only an answer that is no such answer at all is an error (`BodyError`). Keys come from the
environment, and are in no message.
"""

import dataclasses
import os
from typing import Any

from mmsr1_jax.tools.web import BodyError


class KeyMissingError(ValueError):
    """A service that needs a key, which is not in the environment."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A page that a text search found."""

    link: str
    title: str
    snippet: str


@dataclasses.dataclass(frozen=True)
class Match:
    """A page with a similar picture. `thumbnail`: address of the picture."""

    link: str
    title: str
    thumbnail: str


def key_of(variable: str, *, needed: bool = True) -> str:
    """A key from the environment. Raises KeyMissingError where it is needed and not there."""
    key = os.environ.get(variable, "").strip()
    if needed and not key:
        raise KeyMissingError(f"the environment variable {variable} is not set")
    return key


def entries(data: Any, name: str) -> list[dict]:
    """The objects in the list `data[name]`; none where there is no such list.

    Raises:
      BodyError: `data` is not an object.
    """
    if not isinstance(data, dict):
        raise BodyError("not a JSON object")
    found = data.get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def text_of(entry: dict, name: str) -> str:
    """A text field, valid Unicode; empty where there is none."""
    value = entry.get(name)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
