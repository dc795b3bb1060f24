"""Interface of `rollout.engine.Engine` that its scheduler uses."""

import concurrent.futures
from typing import Protocol

from mmsr1_jax.config import settings
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout.device import Device
from mmsr1_jax.rollout.stop import StopTable
from mmsr1_jax.tools import Tool
from mmsr1_jax.tools.tool_executor import ToolExecutor


class Engine(Protocol):
    """Parts of an engine; `rollout.engine.Engine` describes them."""

    config: settings.Config
    processor: Processor
    device: Device
    tools: dict[str, Tool]
    stops: StopTable
    token_bytes: list[bytes]
    image_token: int
    merge_size: int
    pool: concurrent.futures.ThreadPoolExecutor
    tool_executor: ToolExecutor
