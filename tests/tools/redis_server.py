"""Real Redis servers with a password, for tests."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time
import urllib.parse

import pytest

from mmsr1_jax.tools.build import make_tools
from tests.tools.configured_tools import configured

PASSWORD = "very/secret#word@?%:"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.getcwd()}


def address_of(port: int, password: str = PASSWORD) -> str:
    return f"redis://:{urllib.parse.quote(password, safe='')}@127.0.0.1:{port}/1"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start(port: int, directory: pathlib.Path, *options: str) -> subprocess.Popen:
    """Start a server without persistence."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server (Debian: apt-get install redis-server)")
    pytest.importorskip("redis", reason="no redis-py (pip install redis)")
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "",
               "--appendonly", "no", "--dir", str(directory), "--requirepass",
               PASSWORD, *options]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return process
        assert process.poll() is None, "redis-server did not start"
        time.sleep(0.02)


@contextlib.contextmanager
def server(directory: pathlib.Path, *options: str):
    """Run a server and yield its process and port."""
    port = free_port()
    process = start(port, directory, *options)
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def client(port: int):
    import redis

    return redis.Redis(port=port, db=1, password=PASSWORD, single_connection_client=True)


def searxng(url: str, cache: str | None, **options):
    """Return the tools with a text search by a server, through a cache."""
    hosts = (url.removeprefix("http://"),)
    services = {"searxng_url": url, "allowed_hosts": hosts, "max_attempts": 1, "reader": "none"}
    return make_tools(configured(text="searxng", services=services | {"cache": cache} | options))
