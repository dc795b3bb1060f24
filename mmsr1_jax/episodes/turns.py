"""The format of the policy's turns, and the only parser for them.

The engine needs to know which action to execute (`parse`), and the reward whether the format is
correct. There are two formats; the first is the default of `config.rewards`:

    published   <reason>..</reason> any text <answer>..</answer>
                <reason>..</reason> any text <search><img></search>
                <reason>..</reason> any text <text_search>..</text_search>
    strict      only whitespace between the reasoning and the action, which is not empty;
                whitespace is allowed around <img>

A turn may have leading and trailing whitespace, and line breaks anywhere inside the tags.
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
# A turn pauses when the first of these is complete (`rollout/stop.py`).
STOPS: tuple[str, ...] = tuple(f"</{tag}>" for tag in TAGS.values())
WHOLE_IMAGE = "<img>"  # the only valid content of an image search

_CLOSE = re.compile("|".join(map(re.escape, STOPS)))
_REASON = re.compile(r"\s*<reason>(.*?)</reason>\s*", re.DOTALL)
_REASON_TAGS = ("<reason>", "</reason>")
_CLOSING_ACTIONS: dict[str, Action] = {f"</{tag}>": action for action, tag in TAGS.items()}
# Tags of each action in the published format. Those of an image search are a single string:
# `<search>` alone does not count.
_PUBLISHED_TAGS: dict[Action, tuple[str, ...]] = {
    "answer": ("<answer>", "</answer>"),
    "image_search": (f"<search>{WHOLE_IMAGE}</search>",),
    "text_search": ("<text_search>", "</text_search>"),
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """A parsed turn of the policy.

    Attributes:
      action: Action that the engine executes; None if the turn has no valid action.
      payload: Text of the answer (see `extract_answer`) or of the query, stripped of whitespace;
        None for an image search or if there is no action.
      reason: Text of the reasoning; None if the turn does not begin with it.
      problem: Description of why there is no action, or of what violates the published format; None
        if nothing does. A turn with a valid action may still violate the format.
      text: Text of the turn; None if loaded from a file of an older version, which lacks it.
    """

    action: Action | None
    payload: str | None
    reason: str | None
    problem: str | None
    text: str | None = None

    @property
    def form(self) -> Action | None:
        """Action whose published format the turn has, see `published_form`."""
        return self._recorded_form if self.text is None else published_form(self.text)

    @property
    def strict_form(self) -> Action | None:
        """Action whose strict format the turn has, see `strict_form`."""
        return self._recorded_form if self.text is None else strict_form(self.text)

    @property
    def _recorded_form(self) -> Action | None:
        return self.action if self.problem is None else None


def parse(text: str) -> Turn:
    """Parse a turn, given as text without its end token. Never raises.

    The action is the one whose closing tag comes first, since that is where the engine stops.
    """
    reasoning = _REASON.match(text)
    reason = reasoning[1].strip() if reasoning else None
    action, start, end, content = _find_action(text)
    if action is None:
        return Turn(None, None, reason, content, text)
    payload: str | None = content
    if action != "text_search":
        payload = extract_answer(text[:end]) if action == "answer" else None
    problem = None
    if published_form(text) != action:
        problem = _format_problem(text, reasoning, action, start, end)
    return Turn(action, payload, reason, problem, text)


def published_form(text: str) -> Action | None:
    """Return the action whose published format a turn has; None if it has none.

    The rules are those of the MMSearch-R1 code, including letter case, applied to the turn after
    `str.strip`:

    - The turn begins with `<reason>` and ends with the action's closing tag.
    - `</reason>` precedes the action; any text may stand between them.
    - `<reason>`, `</reason>` and the tags of the action occur exactly once each, counting the text
      that they enclose. The tags of an image search are the single string
      `<search><img></search>`, without whitespace inside; `<search>` or `</search>` elsewhere is
      ignored.
    - No tag of another action occurs (`<answer>`, `</answer>`, `<text_search>`, `</text_search>`,
      and the string `<search><img></search>`).

    The reasoning, an answer and a query may be empty.
    """
    text = text.strip()
    if not text.startswith("<reason>") or any(text.count(tag) != 1 for tag in _REASON_TAGS):
        return None
    present = {tag: text.count(tag) for tags in _PUBLISHED_TAGS.values() for tag in tags}
    for action, tags in _PUBLISHED_TAGS.items():
        if (
            all(count == (tag in tags) for tag, count in present.items())
            and text.index("</reason>") < text.index(tags[0])
            and text.endswith(tags[-1])
        ):
            return action
    return None


def strict_form(text: str) -> Action | None:
    """Return the action whose strict format a turn has; None if it has none.

    The action is the one that the engine executes. Only whitespace may stand between the reasoning
    and the action, and after the action. The reasoning contains no second `<reason>`, and an answer
    or query is not empty. Whitespace is allowed around the `<img>` of an image search.
    """
    reasoning = _REASON.match(text)
    action, start, end, content = _find_action(text)
    if action is None or reasoning is None or reasoning.end() != start or text[end:].strip():
        return None
    return action if content and "<reason>" not in reasoning[1] else None


def extract_answer(text: str) -> str | None:
    """Return the answer that is scored if this is the last turn; None if there is no answer.

    It is the last `<answer>..</answer>`, stripped of whitespace. As in the published code, pairs
    are matched from the left, each from an opening tag to the first closing tag after it. An
    opening tag inside an answer is therefore part of the answer.
    """
    answer, start = None, text.find("<answer>")
    while start >= 0:
        start += len("<answer>")
        end = text.find("</answer>", start)
        if end < 0:
            break
        answer = text[start:end].strip()
        start = text.find("<answer>", end)
    return answer


def requests_search(text: str) -> bool:
    """Return whether a turn counts as a search, by the published rule.

    A turn counts if it contains `<search><img></search>` or both tags of a text search, in any
    position.
    """
    return any(
        all(tag in text for tag in _PUBLISHED_TAGS[action])
        for action in ("image_search", "text_search")
    )


def _find_action(text: str) -> tuple[Action | None, int, int, str]:
    """Find the action that the engine executes.

    Returns:
      The action, its start and end, and the text between its tags; or None, 0, 0 and the reason why
      there is no action.
    """
    close = _CLOSE.search(text)
    if close is None:
        return None, 0, 0, "no closing tag of an action"
    action = _CLOSING_ACTIONS[close[0]]
    opening = f"<{TAGS[action]}>"
    start = text.rfind(opening, 0, close.start())
    if start < 0:
        return None, 0, 0, f"{close[0]} without {opening}"
    content = text[start + len(opening) : close.start()].strip()
    if action == "image_search" and content != WHOLE_IMAGE:
        return None, 0, 0, f"{opening} holds something else than {WHOLE_IMAGE}"
    if action == "text_search" and not content:
        return None, 0, 0, "an empty query"
    return action, start, close.end(), content


def _format_problem(
    text: str, reasoning: re.Match | None, action: Action, start: int, end: int
) -> str:
    """Describe how a turn violates the published format of its action."""
    if reasoning is None or reasoning.end() > start:
        return "does not begin with <reason>..</reason>"
    if text[end:].strip():
        return "text after the action"
    for tag in _REASON_TAGS:
        if text.count(tag) > 1:
            return f"{tag} comes more than once"
    for other, tags in _PUBLISHED_TAGS.items():
        for tag in tags:
            if text.count(tag) > (other == action):
                problem = "comes more than once" if other == action else "stands beside the action"
                return f"{tag} {problem}"
    return f"{_PUBLISHED_TAGS['image_search'][0]} with white space inside"
