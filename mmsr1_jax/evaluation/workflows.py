"""Ways to answer a question, all by the same engine.

    on_demand   the policy searches when it likes, as it was trained
    rag         an image search, a text search for a query that the policy writes, an answer
    direct      an answer, without a search
    agent       as `on_demand`, by a prompt that asks for searches

`rag` and `direct` do not depend on how well the policy obeys: what their turns do is forced
(`rollout/forcing.py`). A question without a picture has no image search. Prompts of a workflow are
in the directory of its name among the prompts (`episodes/prompts.py`).
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmsr1_jax.episodes.turns import Action

if TYPE_CHECKING:
    from mmsr1_jax.config.settings import Turns


@dataclasses.dataclass(frozen=True)
class Workflow:
    """A way to answer.

    Attributes:
      forced: what the turns are made to do; empty: what the policy likes, within `config.turns`.
    """

    forced: Sequence[Action] = ()


WORKFLOWS: dict[str, Workflow] = {
    "on_demand": Workflow(),
    "rag": Workflow(forced=("image_search", "text_search", "answer")),
    "direct": Workflow(forced=("answer",)),
    "agent": Workflow(),
}


def limits_of(name: str, limits: "Turns") -> "Turns":
    """`config.turns` as a workflow has them: where turns are forced, as many and as many searches
    as that takes."""
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
    """Searches that an episode may make.

    Args:
      limits: of its workflow.
      pictures: whether its question has any.
    """
    return min(limits.max_searches, limits.max_image_searches * pictures + limits.max_text_searches)
