"""Fixtures of the tests that need a Redis server."""

import logging
import time

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.servers import serve
from tests.tools.redis_server import address_of, client, server


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with server(tmp_path_factory.mktemp("redis")) as (_, port):
        yield port


@pytest.fixture
def address(port):
    client(port).flushall()
    return address_of(port)


@pytest.fixture(autouse=True)
def nothing_secret_is_logged(caplog):
    """No test logs the password, plain or percent-encoded."""
    caplog.set_level(logging.DEBUG)
    yield
    assert "secret" not in caplog.text


@pytest.fixture
def engine():
    """A search engine and the times of its requests."""
    requests: list[float] = []

    async def search(request):
        requests.append(time.monotonic())
        results = [{"url": f"http://p/{len(requests)}", "title": "t", "content": "c"}]
        return JSONResponse({"results": results})

    with serve(Starlette(routes=[Route("/", search), Route("/search", search)])) as url:
        yield url, requests
