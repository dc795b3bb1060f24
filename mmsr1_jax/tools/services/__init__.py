"""Web APIs that search and read, one file each: what is asked, and how the answer is read.

Answers are data from outside: a field that is missing or of another type leaves that entry out, and
only an answer that is no such answer at all is an error (`BodyError`). Keys come from the
environment, and are in no message.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import JSON, BodyError, StatusError, UnreachableError
from mmsr1_jax.utils.checked_json import valid_text

T = TypeVar("T")
# Limits that pass by themselves, whatever else is said of them.
_PASSING = re.compile(r"hour|minute|second|rate limit|too many|try again", re.IGNORECASE)
# What services say of refusals that asking again does not change, by the status that means it.
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


_MAX_BYTES = 2_000_000  # of an answer, which is parsed on the event loop


class KeyMissingError(ValueError):
    """A service that needs a key, which is not in the environment."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A page that a text search found; without a link, an answer that the search engine gave
    itself, whose text is the snippet."""

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


def text_of(entry: dict, name: str) -> str:
    """A text field, valid Unicode; empty where there is none."""
    value = entry.get(name)
    return valid_text(value) if isinstance(value, str) else ""


async def ask(service: Service, method: str, url: str, **request: Any) -> dict:
    """Return the JSON object that a service answers with.

    Raises:
      StatusError: a status other than success; 401, 402 or 403 where the answer says that the key,
        the credit or the account is refused, whatever its status.
      WebError: see `Service.call`; BodyError: no JSON object.
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
    """Return what a search found.

    Args:
      data: the answer.
      name: field of the list of results.
      read: an entry's value; None for an entry that cannot be used, which is left out.
      instead: returned if the list has nothing.
      none_found: the answer says elsewhere that nothing was found.

    Returns:
      The values; none only if the service says so: by an empty list, or by `none_found`.

    Raises:
      WebError: the answer is an error, holds no such list, or no entry of it can be used.
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
    """Raise what an answer with status 200 says of its own failure, if it does.

    Raises:
      StatusError: a status in the answer, or a refusal in words.
      UnreachableError: another error.
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
    """Return an answer of the search engine's own as a hit; None if it has no text."""
    return Hit("", title or "answer of the search engine", text) if has_text(text) else None


def has_text(text: str) -> bool:
    """Whether there is a letter or a digit in a text."""
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
