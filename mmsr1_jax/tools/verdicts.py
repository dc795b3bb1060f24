"""Parser of a judge's replies that no quotation of a judged text can deceive.

An answer, a question or a gold answer may contain text that looks like a verdict, or markers that
look like the end of a model's thoughts. A judge that quotes such a text must not have the quotation
read as its verdict. Where a text contains one of them, only replies that cannot be ambiguous count.
"""

import html
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from mmsr1_jax.tools.lookalikes import LOOKS_LIKE
from mmsr1_jax.tools.services.chat import Reply
from mmsr1_jax.tools.web import BodyError
from mmsr1_jax.utils.checked_json import valid_text

_MAX_REPLY_CHARS = 20_000  # a verdict takes a few hundred
_MAX_OBJECTS = 16  # maximum number of JSON objects in a reply
# If an answer contains one of these, a judge that quotes it may write what looks like a verdict.
_QUOTABLE = ("{", "}", "<", "`", "\\", "%7b")
_BRACES = ("{", "}", "%7b", "\\u007", "\\x7")  # likewise for question and gold answers
# Markers that begin or end thoughts, or parts of them, without white space. A judge that quotes one
# may make the quotation look like its verdict.
_MARKERS = (
    "think>", "think]", "think»", "<think", "[think", "«think", "<|", "|>", "«|", "|»",
    "think%3e", "%7c%3e", "%3c%7c", "\\u003", "\\x3", "\\u007", "\\x7",
)  # fmt: skip
# Forms of a reply with thoughts in which a quotation cannot be mistaken for the verdict, provided
# that the thoughts contain no marker.
_THINK_FRAME = re.compile(r"(?:<think>)?(?P<thoughts>.*?)</think>(?P<verdict>.*)", re.DOTALL)
_HARMONY_FRAME = re.compile(
    r"(?:<\|start\|>assistant)?"
    r"(?:<\|channel\|>analysis<\|message\|>(?P<thoughts>.*?)<\|end\|>(?:<\|start\|>assistant)?)?"
    r"<\|channel\|>final(?: ?<\|constrain\|>json)?<\|message\|>"
    r"(?P<verdict>.*?)(?:<\|return\|>|<\|end\|>)?",
    re.DOTALL,
)
_BLANK = "nothing but thoughts or blanks"
NO_VERDICT = "no verdict in the reply: "  # prefix of the reason of an unreadable verdict


class NoVerdictError(BodyError):
    """Reply of the judge without a verdict."""

    def __init__(self, reason: str):
        super().__init__(NO_VERDICT + reason)


def extract_verdict(reply: Reply, answer: str, *others: str) -> tuple[bool, str]:
    """Return (correct, reason) of a judge's reply.

    Args:
      reply: Reply of the judge. A reply that consists of thoughts only is accepted if they are
        exactly a verdict, since some servers mistake a reply for thoughts.
      answer: Judged answer. If it contains text that could be quoted as a verdict, the reply must
        be exactly a verdict, and not be truncated.
      *others: Question and gold answers, to which the same applies. If any of these texts contains
        a marker of thoughts, thoughts are allowed only in the forms of `_THINK_FRAME` and
        `_HARMONY_FRAME`.

    Raises:
      NoVerdictError: The reply contains no verdict.
    """
    text = reply.text or reply.thoughts
    if not text and not reply.raw:
        raise NoVerdictError(_BLANK)
    judged_texts = [_fold(text) for text in (answer, *others)]
    has_marker = any(_contains(text, _MARKERS) for text in judged_texts)
    verdict_only = (
        not reply.text
        or has_marker
        or any(_contains(text, _BRACES) for text in judged_texts)
        or _contains(judged_texts[0], _QUOTABLE)
    )
    if verdict_only and not reply.is_complete:
        raise NoVerdictError("it is truncated")
    if not has_marker:
        if not text:
            raise NoVerdictError(_BLANK)
        return parse_verdict(text, verdict_only=verdict_only)
    has_thoughts, text = _split_thoughts(reply)
    correct, reason = parse_verdict(text, verdict_only=True)
    # Thoughts may end with a quotation, and so may the reply: <think>It says </think>{...}
    may_quote = any(_contains(text, ("correct", "\\")) for text in judged_texts)
    if has_thoughts and correct and may_quote:
        raise NoVerdictError("the verdict may be a quotation of the judged texts")
    return correct, reason


def _split_thoughts(reply: Reply) -> tuple[bool, str]:
    """Return (has thoughts, text without thoughts) of a reply that may quote markers of thoughts.

    Raises:
      NoVerdictError: The thoughts contain a marker, or cannot be separated from the rest.
    """
    raw = reply.raw or reply.thoughts
    if raw.startswith(("{", "```")):
        return bool(reply.raw and reply.thoughts), raw
    match = _THINK_FRAME.fullmatch(raw) or _HARMONY_FRAME.fullmatch(raw)
    if match and not _contains(_fold(match["thoughts"] or ""), _MARKERS):
        return True, match["verdict"]
    raise NoVerdictError("text besides the verdict, which may quote markers of thoughts")


def _fold(text: str) -> str:
    """Return a text normalised for `_contains`: HTML entities decoded, lower case, no white space.

    The result consists of two versions of the text, one by Unicode's compatibility forms (NFKC) and
    one by the appearance of characters (`lookalikes.py`).
    """
    text = html.unescape(html.unescape(text))
    forms = unicodedata.normalize("NFKC", text).casefold(), text.translate(LOOKS_LIKE).casefold()
    return "\n".join("".join(form.split()) for form in forms)


def _contains(folded: str, substrings: Sequence[str]) -> bool:
    return any(substring in folded for substring in substrings)


def parse_verdict(text: str, *, verdict_only: bool = False) -> tuple[bool, str]:
    """Parse (correct, reason) from the JSON object in a judge's reply, ignoring text around it.

    The object's `correct` must be true or false; `reason` is optional, and other fields are
    ignored. Several objects must agree. A malformed object makes the whole text unreadable, since
    apparent objects may be parts of it. The time is linear in the length of the text.

    Args:
      text: Reply without thoughts.
      verdict_only: Whether the text must consist of the object only, with or without a code fence.

    Raises:
      NoVerdictError: The text contains no verdict, or contradictory ones.
    """
    if len(text) > _MAX_REPLY_CHARS:
        raise NoVerdictError(f"more than {_MAX_REPLY_CHARS} characters")
    values = [_decode(_strip_fence(text), 0)] if verdict_only else _find_objects(text)
    if verdict_only and _strip_fence(text)[values[0][1] :].strip():
        raise NoVerdictError("text besides the verdict")
    verdicts = [value for value, _ in values if isinstance(value, dict) and "correct" in value]
    if not verdicts:
        raise NoVerdictError("the verdict is not an object with the field 'correct'")
    if not all(isinstance(value["correct"], bool) for value in verdicts):
        raise NoVerdictError("the verdict's 'correct' must be true or false")
    if len({value["correct"] for value in verdicts}) > 1:
        raise NoVerdictError("contradictory verdicts")
    reason = verdicts[-1].get("reason")
    return verdicts[-1]["correct"], valid_text(reason) if isinstance(reason, str) else ""


def _find_objects(text: str) -> list[tuple[Any, int]]:
    """Return (object, end index) of each outermost JSON object in a text."""
    objects: list[tuple[Any, int]] = []
    position = text.find("{")
    while position >= 0:
        end = position + 1
        # Other braces are part of the prose.
        if text[end : end + 100].lstrip().startswith(('"', "}")):
            objects.append(_decode(text, position))
            end = objects[-1][1]
        if len(objects) > _MAX_OBJECTS:
            raise NoVerdictError(f"more than {_MAX_OBJECTS} JSON objects")
        position = text.find("{", end)
    return objects


def _decode(text: str, position: int) -> tuple[Any, int]:
    """Return (value, end index) of the JSON value at an index. Raises NoVerdictError."""
    try:
        return _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):
        raise NoVerdictError("the verdict is not JSON") from None


def _strip_fence(text: str) -> str:
    """Return the text without the code fence around it, if it has one."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and len(text) >= 6:
        text = text[3:-3].lstrip()
        text = text[4:] if text[:4].lower() == "json" else text
    return text.strip()


def _check_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of the pairs. Raises ValueError for two different values of `correct`."""
    if len({repr(value) for name, value in pairs if name == "correct"}) > 1:
        raise ValueError("two values of 'correct'")
    return dict(pairs)


# Not strict, since models write unescaped line breaks in strings.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_check_pairs)
