"""Evaluation workflows: ways to answer a question, all run by the same engine.

    on_demand   the policy decides when to search, as in training
    rag         an image search, a text search with a query written by the policy, an answer
    direct      an answer without a search
    agent       like `on_demand`, with a prompt that asks for searches

`rag` and `direct` do not depend on how well the policy follows instructions: the action of each
turn is forced (`rollout/forcing.py`). A question without an image has no image search. The prompts
of a workflow are in the prompt directory of the same name (`episodes/prompts.py`).
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmsr1_jax.episodes.turns import Action

if TYPE_CHECKING:
    from mmsr1_jax.config.settings import Turns


@dataclasses.dataclass(frozen=True)
class Workflow:
    """An evaluation workflow.

    Attributes:
      forced: Forced action of each turn. If empty, the policy chooses, within `config.turns`.
    """

    forced: Sequence[Action] = ()


WORKFLOWS: dict[str, Workflow] = {
    "on_demand": Workflow(),
    "rag": Workflow(forced=("image_search", "text_search", "answer")),
    "direct": Workflow(forced=("answer",)),
    "agent": Workflow(),
}


def workflow_limits(name: str, limits: "Turns") -> "Turns":
    """Return `config.turns` for a workflow. Forced actions determine the turn and search limits."""
    forced = WORKFLOWS[name].forced
    if not forced:
        return limits
    image_searches, text_searches = forced.count("image_search"), forced.count("text_search")
    return dataclasses.replace(
        limits,
        max_turns=len(forced),
        max_searches=image_searches + text_searches,
        max_image_searches=image_searches,
        max_text_searches=text_searches,
    )


def max_searches(limits: "Turns", has_images: bool) -> int:
    """Return the maximum number of searches of an episode.

    Args:
      limits: Limits of its workflow, see `workflow_limits`.
      has_images: Whether its question has images.
    """
    max_image_searches = limits.max_image_searches if has_images else 0
    return min(limits.max_searches, max_image_searches + limits.max_text_searches)
