"""Clients of web APIs for search and page reading, one per file.

Responses are untrusted: an entry with a missing field or a field of the wrong type is skipped, and
only a response without the expected structure or without usable entries raises an error
(`WebError`). API keys come from the environment and never appear in messages.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import JSON_TYPES, BodyError, StatusError, UnreachableError
from mmsr1_jax.utils.checked_json import valid_text

T = TypeVar("T")
# Phrases of temporary limits, which take precedence over `_REFUSALS`.
_TRANSIENT = re.compile(r"hour|minute|second|rate limit|too many|try again", re.IGNORECASE)
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
_REFUSAL_MESSAGES = {401: "the key is refused", 402: "no credit is left", 403: "access is refused"}
# Licence of the pictures that a search for free pictures finds.
FREE_LICENCE = "Creative Commons"
_MAX_BYTES = 2_000_000  # per response, because responses are parsed on the event loop


class KeyMissingError(UserError):
    """Required API key that is not set in the environment."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """Result of a text search.

    Attributes:
      link: URL of the page. Empty for an answer of the search engine itself.
      title: Title of the page.
      snippet: Excerpt of the page, or the answer.
    """

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


@dataclasses.dataclass(frozen=True)
class PictureHit:
    """Result of a picture search by words.

    Attributes:
      link: URL of the page with the picture.
      title: Title of the picture or of the page.
      url: URL of the picture.
      thumbnail: URL of a smaller version of it.
      licence: Licence of the picture, as far as the service states it.
    """

    link: str
    title: str
    url: str
    thumbnail: str
    licence: str = ""


class PictureFinder(Protocol):
    """Client that finds pictures by words."""

    async def pictures(self, query: str, count: int, *, free: bool) -> list[PictureHit]: ...


class Finder(Protocol):
    """Client that finds pages by a text query."""

    async def search(self, query: str, count: int) -> list[Hit]: ...


class PageReader(Protocol):
    """Client that returns the text of a page."""

    async def read(self, url: str) -> str: ...


class PageSummariser(Protocol):
    """Client that summarises a page for a question."""

    async def summarise(self, page: str, question: str) -> str: ...


class Lens(Protocol):
    """Client that finds pages with images similar to the one at a URL."""

    async def lens(self, url: str) -> list[Match]: ...


def api_key(variable: str, *, required: bool = True) -> str:
    """Return a key from the environment. Raises KeyMissingError if it is required but missing."""
    key = os.environ.get(variable, "").strip()
    if required and not key:
        raise KeyMissingError(f"the environment variable {variable} is not set")
    return key


def text_field(entry: Any, name: str) -> str:
    """Return a field of an object as valid Unicode, or an empty text if that is not a text."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return valid_text(value) if isinstance(value, str) else ""


async def request_json(service: Service, method: str, url: str, **request: Any) -> dict[str, Any]:
    """Send a request and return the JSON object in the response.

    Raises:
      StatusError: The status is not success. The error has status 401, 402 or 403 if the response
        has one of 400, 401, 402, 403 and 429 and says that the key, the credit or the account is
        refused.
      BodyError: The response is not a JSON object.
      WebError: The request failed, see `Service.call`.
    """
    try:
        response = await service.call(
            method, url, accept=JSON_TYPES, max_bytes=_MAX_BYTES, **request
        )
    except StatusError as error:
        status = _refusal_status(error.body.decode("utf-8", "replace"))
        if status and error.status in (400, 401, 402, 403, 429):
            raise _status_error(status, f"HTTP status {error.status}") from None
        raise
    data = response.json()
    if not isinstance(data, dict):
        raise BodyError("the response is not a JSON object")
    return data


def parse_results(
    data: dict[str, Any],
    name: str,
    parse: Callable[[dict[str, Any]], T | None],
    *,
    fallback: Sequence[T] = (),
    is_empty: bool = False,
) -> list[T]:
    """Return the results of a search.

    Args:
      data: Response of the service.
      name: Field that contains the list of results.
      parse: Function that parses an entry. It returns None for an unusable entry, which is skipped.
      fallback: Results to return if the list has no usable entry.
      is_empty: Whether another part of the response says that there are no results.

    Returns:
      The parsed results. They are empty only if the service says so, by an empty list or by
      `is_empty`.

    Raises:
      WebError: The response is an error, has no such list, or has no usable entry.
    """
    value = data.get(name)
    entries = value if isinstance(value, list) else []
    parsed = [parse(entry) for entry in entries if isinstance(entry, dict)]
    if results := [result for result in parsed if result is not None] or list(fallback):
        return results
    if is_empty:
        return []
    raise_reported_error(data)
    if name not in data:
        raise UnreachableError(f"the response has no field '{name}'")
    if value:
        raise BodyError(f"field '{name}' of the response has no usable entry")
    return []


def raise_reported_error(data: dict[str, Any]) -> None:
    """Raise the error that a response with status 200 reports, if any.

    Raises:
      StatusError: The response contains an error status or the phrase of a refusal.
      UnreachableError: The response reports another error.
    """
    error = data.get("error")
    inner = error if isinstance(error, dict) else {}
    codes = (part.get(key) for part in (data, inner) for key in ("statusCode", "code", "status"))
    status = next((n for n in codes if type(n) is int and 400 <= n < 600), None)
    texts = [data.get("error"), inner.get("message")]
    if status is not None:
        texts += [data.get("message"), data.get("detail")]
    message = " ".join(text for text in texts if isinstance(text, str))
    if refusal := _refusal_status(message[:1000]):
        raise _status_error(refusal, "the response reports an error")
    if status is not None:
        raise _status_error(status, "the response reports an error")
    if error:
        raise UnreachableError("the response reports an error")


def answer_box_hit(title: str, text: str) -> Hit | None:
    """Return an answer of the search engine itself as a hit, or None if it has no text."""
    return Hit("", title or "answer of the search engine", text) if has_text(text) else None


def has_text(text: str) -> bool:
    """Return whether a text contains a letter or a digit."""
    return re.search(r"[^\W_]", text) is not None


def _refusal_status(message: str) -> int | None:
    """Return the HTTP status that a message of a permanent refusal stands for, or None."""
    if _TRANSIENT.search(message):
        return None
    return next((status for status, phrase in _REFUSALS.items() if phrase.search(message)), None)


def _status_error(status: int, context: str) -> StatusError:
    error = StatusError(status)
    error.args = (f"{context}: {_REFUSAL_MESSAGES.get(status, f'status {status}')}",)
    return error
