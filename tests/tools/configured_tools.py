"""Settings of tools, and queries to the tools that they configure, for tests."""

import asyncio

from mmsr1_jax.config import settings
from mmsr1_jax.tools import Query


def configured(*, services=None, **tools):
    return settings.validate(
        settings.Config(
            tools=settings.Tools(**tools), services=settings.Services(**(services or {}))
        )
    )


def ask(tools, action="text_search", **query):
    fields = {"text": "q" if action == "text_search" else None, "question": "What?"} | query
    return asyncio.run(tools[action](Query(action=action, **fields)))
