"""Search tools: the interface (`tool`), the executor that runs tools beside the engine
(`tool_executor`), a local index (`local_index`), and searches over web services (`text_search`,
`image_search`, `services/`).

`build` creates them from settings. Used by episodes, rollouts and the commands.
"""

from mmsr1_jax.tools.tool import (
    ImageLike,
    Observation,
    Part,
    Query,
    Result,
    Tool,
    image_result,
    text_result,
)

__all__ = [
    "ImageLike",
    "Observation",
    "Part",
    "Query",
    "Result",
    "Tool",
    "image_result",
    "text_result",
]
