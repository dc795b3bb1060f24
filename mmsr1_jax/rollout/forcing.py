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

from mmsr1_jax.episodes.turns import TAGS, WHOLE_IMAGE, Action

_TAG = re.compile("|".join(f"</?{tag}>" for tag in TAGS.values()))
_REASON, _REASON_ENDS = "<reason>", "</reason>"
_QUERY_WORDS = 32


def opened(text: str, action: Action) -> tuple[int, str]:
    """Make a turn begin the prescribed action.

    Args:
      text: Text of the turn, without its end token.
      action: Prescribed action.

    Returns:
      The number of characters to keep, which are the reasoning or, without one, the text before the
      first tag of an action; and the text to append to them, which is the opening tag, or the
      whole action for an image search.
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
    """Close an action whose opening tag was forced.

    Args:
      text: Text that the policy wrote after the opening tag.
      action: Action to close.
      question: Question of the episode, used as the query if the policy wrote none.

    Returns:
      The number of characters to keep, and the text to append to them.
    """
    tag = _TAG.search(text)
    stay = tag.start() if tag else len(text)
    query = ""
    if action == "text_search" and not text[:stay].strip():
        query = " ".join(_TAG.sub(" ", question).split()[:_QUERY_WORDS])
    return stay, f"{query}</{TAGS[action]}>"
