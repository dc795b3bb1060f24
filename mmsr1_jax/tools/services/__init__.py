"""Clients of web APIs for search and page reading, one per file.

Answers are untrusted: an entry with a missing field or a field of the wrong type is skipped, and
only an answer without the expected structure or without usable entries raises an error
(`WebError`). API keys come from the environment and never appear in messages.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import JSON, BodyError, StatusError, UnreachableError
from mmsr1_jax.utils.checked_json import valid_text

T = TypeVar("T")
# Phrases of temporary limits, which take precedence over `_REFUSALS`.
_PASSING = re.compile(r"hour|minute|second|rate limit|too many|try again", re.IGNORECASE)
# Phrases of permanent refusals, which a retry does not change, by the status that they stand for.
_REFUSALS = {
    402: re.compile(
        r"run out of|not enough credit|(?:out of|no|insufficient) (?:credit|searches|balance|funds"
        r"|quota)|balance (?:is )?not enough|quota (?:has been |was )?exceeded|payment required"
        r"|exceeded your [\w ]{0,40}(?:quota|plan)",
        re.IGNORECASE,
    ),
    401: re.compile(
        r"(?:invalid|incorrect|missing|wrong|expired) (?:api[ _-]?)?(?:key|token)|unauthori[sz]ed"
        r"|(?:key|token) (?:is |was )?(?:invalid|missing|expired|required|not valid)"
        r"|authentication (?:failed|required)",
        re.IGNORECASE,
    ),
    403: re.compile(
        r"forbidden|account [\w ]{0,40}(?:disabled|suspended|deactivated|deleted|not verified)",
        re.IGNORECASE,
    ),
}


_MAX_BYTES = 2_000_000  # per answer, because answers are parsed on the event loop


class KeyMissingError(UserError):
    """A required API key that is not set in the environment."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A page found by a text search, or, without a link, an answer of the search engine itself in
    `snippet`."""

    link: str
    title: str
    snippet: str


@dataclasses.dataclass(frozen=True)
class Match:
    """A page with a similar image.

    Attributes:
      link: URL of the page.
      title: Title of the page.
      thumbnail: URL of the image.
    """

    link: str
    title: str
    thumbnail: str


def key_of(variable: str, *, needed: bool = True) -> str:
    """Return a key from the environment. Raises KeyMissingError if it is needed but missing."""
    key = os.environ.get(variable, "").strip()
    if needed and not key:
        raise KeyMissingError(f"the environment variable {variable} is not set")
    return key


def text_of(entry: dict, name: str) -> str:
    """Return a text field as valid Unicode, or an empty text if the entry has none."""
    value = entry.get(name)
    return valid_text(value) if isinstance(value, str) else ""


async def ask(service: Service, method: str, url: str, **request: Any) -> dict:
    """Return the JSON object with which a service answers.

    Raises:
      StatusError: The status is not success. The error has status 401, 402 or 403 if the answer
        has one of 400, 401, 402, 403 and 429 and says that the key, the credit or the account is
        refused.
      BodyError: The answer is not a JSON object.
      WebError: The request failed, see `Service.call`.
    """
    try:
        answer = await service.call(method, url, accept=JSON, max_bytes=_MAX_BYTES, **request)
    except StatusError as error:
        status = _refused(error.body.decode("utf-8", "replace"))
        if status and error.status in (400, 401, 402, 403, 429):
            raise _refusal(status, f"HTTP status {error.status}") from None
        raise
    data = answer.json()
    if not isinstance(data, dict):
        raise BodyError("not a JSON object")
    return data


def found_in(
    data: dict,
    name: str,
    read: Callable[[dict], T | None],
    *,
    instead: Sequence[T] = (),
    none_found: bool = False,
) -> list[T]:
    """Return the results of a search.

    Args:
      data: Answer of the service.
      name: Field that contains the list of results.
      read: Function that parses an entry. It returns None for an unusable entry, which is skipped.
      instead: Results to return if the list has no usable entry.
      none_found: Whether another part of the answer says that there are no results.

    Returns:
      The parsed results. They are empty only if the service says so, by an empty list or by
      `none_found`.

    Raises:
      WebError: The answer is an error, has no such list, or has no usable entry.
    """
    listed = data.get(name)
    entries = listed if isinstance(listed, list) else []
    values = [read(entry) for entry in entries if isinstance(entry, dict)]
    if found := [value for value in values if value is not None] or list(instead):
        return found
    if none_found:
        return []
    raise_failure(data)
    if name not in data:
        raise UnreachableError(f"an answer without '{name}'")
    if listed:
        raise BodyError(f"nothing in '{name}' can be used")
    return []


def raise_failure(data: dict) -> None:
    """Raise the error that an answer with status 200 reports, if any.

    Raises:
      StatusError: The answer contains an error status or the phrase of a refusal.
      UnreachableError: The answer reports another error.
    """
    error = data.get("error")
    inner = error if isinstance(error, dict) else {}
    numbers = (part.get(key) for part in (data, inner) for key in ("statusCode", "code", "status"))
    status = next((n for n in numbers if type(n) is int and 400 <= n < 600), None)
    texts = [data.get("error"), inner.get("message")]
    if status is not None:
        texts += [data.get("message"), data.get("detail")]
    words = " ".join(text for text in texts if isinstance(text, str))
    if refused := _refused(words[:1000]):
        raise _refusal(refused, "an error in the answer")
    if status is not None:
        raise _refusal(status, "an error in the answer")
    if error:
        raise UnreachableError("the service answered with an error")


def snippet_hit(title: str, text: str) -> Hit | None:
    """Return an answer of the search engine itself as a hit, or None if it has no text."""
    return Hit("", title or "answer of the search engine", text) if has_text(text) else None


def has_text(text: str) -> bool:
    """Return whether a text contains a letter or a digit."""
    return re.search(r"[^\W_]", text) is not None


def _refused(words: str) -> int | None:
    if _PASSING.search(words):
        return None
    return next((status for status, said in _REFUSALS.items() if said.search(words)), None)


def _refusal(status: int, where: str) -> StatusError:
    meaning = {401: "the key is refused", 402: "no credit is left", 403: "access is refused"}
    error = StatusError(status)
    error.args = (f"{where}: {meaning.get(status, f'status {status}')}",)
    return error
