"""Search tools: the tool interface (`tool`), the executor that runs tools alongside the engine
(`tool_executor`), and the implementations: `local`, and `text_search` and `image_search` over web
services (`services/`)."""

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
