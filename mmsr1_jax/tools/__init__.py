"""Search tools: the tool interface (`tool`), the executor that runs tools alongside the engine
(`tool_executor`), and the implementations: `local`, and `text_search` and `image_search` over web
services (`services/`)."""

from mmsr1_jax.tools.tool import (
    Observation,
    Part,
    Picture,
    Query,
    Result,
    Tool,
    image_result,
    text_result,
)

__all__ = [
    "Observation",
    "Part",
    "Picture",
    "Query",
    "Result",
    "Tool",
    "image_result",
    "text_result",
]
