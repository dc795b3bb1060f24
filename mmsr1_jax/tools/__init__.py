"""Search tools: what one is (`tool`), how they run beside the engine (`background`), and a small
one over a file of pages (`pages`)."""

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
