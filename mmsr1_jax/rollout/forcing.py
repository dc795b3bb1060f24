"""Turns that are made to do something: the forced searches and answers of other workflows.

The policy writes its turn as it likes. Where the turn then does what it is to do, it stays as it
is. Else it is cut off after its reasoning, the action's tag is put there, and the policy goes on:

    <reason>..</reason>| <answer>Paris</answer>        asked to search for text
    <reason>..</reason> <text_search>|                 forced; the policy writes a query
    <reason>..</reason> <text_search>Eiffel Tower built</text_search>

So it meets the tokens of its own turns in their usual order, and no instruction has to be followed.
What was forced carries no loss, as other forced tokens. Where it writes no query, the question is
the query, cut to some words.
"""

import re

from mmsr1_jax.episodes.turns import TAGS, WHOLE_IMAGE, Action

_TAG = re.compile("|".join(f"</?{tag}>" for tag in TAGS.values()))
_REASON, _REASON_ENDS = "<reason>", "</reason>"
_QUERY_WORDS = 32


def opened(text: str, action: Action) -> tuple[int, str]:
    """How a turn that was written is made to begin an action.

    Args:
      text: of the turn, without its end token.
      action: that it is to do.

    Returns:
      Characters that stay: the reasoning, else what comes before the first tag of an action. And
      what is to follow them: the opening tag, for an image search all of it.
    """
    end = text.find(_REASON_ENDS)
    if end >= 0:
        stay, follows = end + len(_REASON_ENDS), ""
    else:
        tag = _TAG.search(text)
        stay = tag.start() if tag else len(text)
        follows = _REASON_ENDS if text.lstrip().startswith(_REASON) else ""
    name = TAGS[action]
    inside = f"{WHOLE_IMAGE}</{name}>" if action == "image_search" else ""
    return stay, f"{follows} <{name}>{inside}"


def closed(text: str, action: Action, question: str) -> tuple[int, str]:
    """The same for an action that was opened and not closed.

    Args:
      text: that the policy wrote after the opening tag.
      action: that it is to close.
      question: of the episode.
    """
    tag = _TAG.search(text)
    stay = tag.start() if tag else len(text)
    query = ""
    if action == "text_search" and not text[:stay].strip():
        query = " ".join(_TAG.sub(" ", question).split()[:_QUERY_WORDS])
    return stay, f"{query}</{TAGS[action]}>"
