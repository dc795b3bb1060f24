"""Search tools: what one is (`tool`), how they run beside the engine (`background`), and those
that there are: `local`, and `text_search` over web services (`services/`)."""

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
