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


def limits_of(name: str, limits: "Turns") -> "Turns":
    """Return `config.turns` for a workflow. Forced actions determine the turn and search limits."""
    forced = WORKFLOWS[name].forced
    if not forced:
        return limits
    images, texts = forced.count("image_search"), forced.count("text_search")
    return dataclasses.replace(
        limits,
        max_turns=len(forced),
        max_searches=images + texts,
        max_image_searches=images,
        max_text_searches=texts,
    )


def allowed(limits: "Turns", pictures: bool) -> int:
    """Return the number of searches that an episode may make.

    Args:
      limits: Limits of its workflow, see `limits_of`.
      pictures: Whether its question has images.
    """
    return min(limits.max_searches, limits.max_image_searches * pictures + limits.max_text_searches)
