"""Forced actions: the searches and answers that some workflows prescribe for each turn.

The policy first writes its turn freely. If the turn takes the prescribed action, it is kept.
Otherwise it is truncated after the reasoning, the tag of the action is inserted, and the policy
resumes from there. In this example the prescribed action is a text search, and `|` is the place
where the turn is truncated or resumed:

    <reason>..</reason>| <answer>Paris</answer>        sampled
    <reason>..</reason> <text_search>|                 forced; the policy writes a query
    <reason>..</reason> <text_search>Eiffel Tower built</text_search>

The policy thus sees its tokens in the usual order, and does not have to follow an instruction.
Like other forced tokens, the inserted ones carry no loss. If the policy writes no query, the first
words of the question are used as the query.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from mmsr1_jax.episodes.turns import TAGS, WHOLE_IMAGE, Action

_TAG = re.compile("|".join(f"</?{tag}>" for tag in TAGS.values()))
_REASON, _REASON_END = "<reason>", "</reason>"
_QUERY_WORDS = 32


def open_action(text: str, action: Action) -> tuple[int, str]:
    """Make a turn begin the prescribed action.

    Args:
      text: Text of the turn, without its end token.
      action: Prescribed action.

    Returns:
      The number of characters to keep, which are the reasoning or, without one, the text before the
      first tag of an action; and the text to append to them, which is the opening tag, or the
      whole action for an image search.
    """
    reason_end = text.find(_REASON_END)
    if reason_end >= 0:
        num_kept, suffix = reason_end + len(_REASON_END), ""
    else:
        tag = _TAG.search(text)
        num_kept = tag.start() if tag else len(text)
        suffix = _REASON_END if text.lstrip().startswith(_REASON) else ""
    name = TAGS[action]
    content = f"{WHOLE_IMAGE}</{name}>" if action == "image_search" else ""
    return num_kept, f"{suffix} <{name}>{content}"


def close_action(text: str, action: Action, question: str) -> tuple[int, str]:
    """Close an action whose opening tag was forced.

    Args:
      text: Text that the policy wrote after the opening tag.
      action: Action to close.
      question: Question of the episode, used as the query if the policy wrote none.

    Returns:
      The number of characters to keep, and the text to append to them.
    """
    tag = _TAG.search(text)
    num_kept = tag.start() if tag else len(text)
    query = ""
    if action == "text_search" and not text[:num_kept].strip():
        query = " ".join(_TAG.sub(" ", question).split()[:_QUERY_WORDS])
    return num_kept, f"{query}</{TAGS[action]}>"


def num_tag_tokens(action: Action, encode: Callable[[str], Sequence[int]]) -> tuple[int, int]:
    """Return the maximum numbers of tokens that open a forced action and that close it."""
    _, opening = open_action(_REASON, action)
    closing = "" if action == "image_search" else f"</{TAGS[action]}>"
    return len(encode(opening)), len(encode(closing))


def force_action(
    token_bytes: Sequence[bytes],
    action: Action,
    *,
    resumed: bool,
    question: str,
    max_tokens: int,
    encode: Callable[[str], Sequence[int]],
) -> tuple[int, np.ndarray]:
    """Return the tokens that make a turn take the prescribed action.

    Args:
      token_bytes: Bytes of each sampled token, without an end token.
      action: Prescribed action.
      resumed: Whether the opening tag has been forced, and the policy resumed from it.
      question: Question of the episode, used as the query if the policy wrote none.
      max_tokens: Maximum number of tokens to keep and append, at least that of `num_tag_tokens`.
        A question that exceeds it is not used as the query, and sampled tokens are dropped.
      encode: Tokenizer of plain text.

    Returns:
      The number of sampled tokens to keep, and the tokens to append, int32[n].
    """
    while True:
        # One character per byte; tags are ASCII.
        text = b"".join(token_bytes).decode("latin-1")
        chars_kept, suffix = (
            close_action(text, action, question) if resumed else open_action(text, action)
        )
        ends = np.cumsum([len(piece) for piece in token_bytes])
        num_kept = int(np.searchsorted(ends, chars_kept, side="right"))
        # The kept part of a token that is truncated is appended, too.
        fraction = text[ends[num_kept - 1] if num_kept else 0 : chars_kept]
        prefix = fraction.encode("latin-1").decode("utf-8", "replace")
        forced = np.array(encode(prefix + suffix), np.int32)
        if num_kept + len(forced) <= max_tokens:
            return num_kept, forced
        if question:
            question = ""
        else:
            assert token_bytes  # without them, only the tags remain
            token_bytes = token_bytes[: num_kept if fraction else num_kept - 1]
