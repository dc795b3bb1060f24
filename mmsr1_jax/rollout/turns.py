"""What the policy may write in a turn, and how it is read: the one parser of turns.

The engine asks it what to do, the reward whether the turn is well formed; so a search that counts
as well formed is always one that runs. A well-formed turn is one of

    <reason>..</reason> <answer>..</answer>
    <reason>..</reason> <search><img></search>
    <reason>..</reason> <text_search>..</text_search>

with any white space between, before and after, and lines broken anywhere inside the tags.
"""

import dataclasses
import re
from typing import Literal

Action = Literal["answer", "image_search", "text_search"]

TAGS: dict[Action, str] = {
    "answer": "answer",
    "image_search": "search",
    "text_search": "text_search",
}
# A turn pauses where the first of these is complete (`rollout/stop.py`).
STOPS: tuple[str, ...] = tuple(f"</{tag}>" for tag in TAGS.values())
WHOLE_IMAGE = "<img>"  # the only thing that an image search can be asked to look up

_CLOSE = re.compile("|".join(map(re.escape, STOPS)))
_REASON = re.compile(r"\s*<reason>(.*?)</reason>\s*", re.DOTALL)
_ACTION_OF = {f"</{tag}>": action for action, tag in TAGS.items()}


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of the policy, read.

    Attributes:
      action: what it asks for; None where nothing can be made out.
      payload: the answer or the query, without white space around it; None for an image search and
        where there is no action.
      reason: the text of its reasoning, None where there is none in the right place.
      problem: what is wrong with the form, in words; None for a well-formed turn. A turn may have
        an action that can be carried out and still be badly formed.
    """

    action: Action | None
    payload: str | None
    reason: str | None
    problem: str | None

    @property
    def well_formed(self) -> bool:
        return self.problem is None


def parse(text: str) -> Turn:
    """Reads one turn, without its end token. Never raises.

    The action is the one whose closing tag comes first, as that is where the engine stops.
    """
    close = _CLOSE.search(text)
    begin = _REASON.match(text)
    reason = begin[1].strip() if begin else None
    if close is None:
        return Turn(None, None, reason, "no closing tag of an action")
    action = _ACTION_OF[close[0]]
    opening = f"<{TAGS[action]}>"
    start = text.rfind(opening, 0, close.start())
    if start < 0:
        return Turn(None, None, reason, f"{close[0]} without {opening}")
    payload = text[start + len(opening) : close.start()].strip()
    if action == "image_search":
        if payload != WHOLE_IMAGE:
            return Turn(None, None, reason, f"{opening} holds something else than {WHOLE_IMAGE}")
        payload = None
    elif action == "text_search" and not payload:
        return Turn(None, None, reason, "an empty query")
    return Turn(action, payload, reason, _problem(text, begin, start, close.end(), payload))


def _problem(text: str, begin: re.Match | None, start: int, end: int, payload: str | None):
    if begin is None:
        return "does not begin with <reason>..</reason>"
    if begin.end() != start:
        return "text between the reasoning and the action"
    if text[end:].strip():
        return "text after the action"
    if "<reason>" in begin[1]:
        return "<reason> inside the reasoning"
    if payload == "":
        return "an empty answer"
    return None
