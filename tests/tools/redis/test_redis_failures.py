"""Redis servers that fail or refuse: searches continue, and no message shows a secret."""

import asyncio
import concurrent.futures
import signal
import sys
import time

import pytest

from mmsr1_jax.tools import Query, redis_cache
from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.redis_cache import RedisCache, is_redis, open_cache
from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from tests.tools.redis_server import PASSWORD, address_of, client, free_port, searxng, server, start


async def with_lag(work):
    """Return the result, and the longest time in seconds for which the loop was blocked."""
    longest, last = 0.0, time.monotonic()

    async def measure_lag():
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last - 0.01), time.monotonic()

    heartbeat = asyncio.ensure_future(measure_lag())
    result = await work
    heartbeat.cancel()
    return result, longest


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_searches_continue_when_the_server_dies(tmp_path, engine, how, capfd):
    """A killed server refuses connections; a stopped one does not respond."""
    url, requests = engine

    async def searches(tools):
        observations = []
        for index in range(60):
            if index == 20:
                process.send_signal(how)
            start = time.monotonic()
            observations += await asyncio.gather(*(
                tools["text_search"](Query(
                    action="text_search", text=f"{index} {part}", question="?"
                )) for part in range(4)
            ))  # fmt: skip
            assert time.monotonic() - start < 2 * redis_cache._TIMEOUT
        return observations

    with server(tmp_path) as (process, port):
        tools = searxng(url, address_of(port), max_qps=2000.0)
        observations, lag = asyncio.run(with_lag(searches(tools)))
        process.send_signal(signal.SIGKILL)
    assert [observation.status for observation in observations] == ["ok"] * 240 and len(
        requests
    ) == 240
    assert lag < 0.2
    stderr = capfd.readouterr().err
    assert stderr.count("searches continue without it") == 1 == stderr.count("cache: ")
    assert f"redis://127.0.0.1:{port}/1: " in stderr and "secret" not in stderr


def test_failed_server_is_avoided_and_then_contacted_again(tmp_path, monkeypatch):
    """In replay mode it is always contacted."""
    monkeypatch.setattr(redis_cache, "_RETRY_AFTER", 0.4)
    with server(tmp_path) as (process, port):
        cache, replaying = RedisCache(address_of(port)), RedisCache(address_of(port), "replay")
        cache.put("page", "p", b"x")
        process.kill()
        process.wait()
        for cache_ in (cache, replaying):
            with pytest.raises(ToolCacheError, match="127.0.0.1"):
                cache_.get("page", "p")
        restarted = start(port, tmp_path)
        try:
            assert replaying.get("page", "p") is None
            with pytest.raises(ToolCacheError, match="127.0.0.1"):
                cache.put("page", "p", b"y")
            time.sleep(0.4)
            cache.put("page", "p", b"y")
            assert cache.get("page", "p") == replaying.get("page", "p") == (b"y", False)
        finally:
            restarted.kill()
            restarted.wait()


def test_only_one_call_probes_an_unresponsive_server(tmp_path, monkeypatch):
    """The other calls fail without waiting."""
    monkeypatch.setattr(redis_cache, "_TIMEOUT", 0.5)
    monkeypatch.setattr(redis_cache, "_RETRY_AFTER", 0.2)
    with server(tmp_path) as (process, port):
        cache = RedisCache(address_of(port))
        process.send_signal(signal.SIGSTOP)

        def seconds_to_failure(_):
            start = time.monotonic()
            with pytest.raises(ToolCacheError, match="127.0.0.1"):
                cache.get("page", "p")
            return time.monotonic() - start

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            seconds_to_failure(0)
            time.sleep(0.25)
            durations = list(threads.map(seconds_to_failure, range(8)))
        assert sum(s > 0.4 for s in durations) == 1, durations


def test_refused_command_does_not_disable_the_cache(address, port, capfd):
    """A full server still returns its entries."""
    cache = RedisCache(address)
    cache.put("page", "p", b"x")
    client(port).config_set("maxmemory", 1)
    try:
        with pytest.raises(ToolCacheError, match="maxmemory"):
            cache.put("page", "q", b"y")
        assert cache.get("page", "p") == (b"x", False)
        asyncio.run(CachedCalls(cache).put("page", "q", "y"))
    finally:
        client(port).config_set("maxmemory", 0)
    assert capfd.readouterr().err.count("searches continue without it") == 1
    cache.put("page", "q", b"y")


def test_password_is_read_from_the_environment(port, monkeypatch):
    monkeypatch.setenv("CACHE_PASSWORD", PASSWORD)
    RedisCache(f"redis://127.0.0.1:{port}/1").put("page", "p", b"x")
    with pytest.raises(ToolCacheError, match="invalid username-password pair"):
        RedisCache(address_of(port, "wrong"))
    monkeypatch.delenv("CACHE_PASSWORD")
    with pytest.raises(ToolCacheError, match="Authentication required"):
        RedisCache(f"redis://127.0.0.1:{port}/1")


def test_wrong_password_is_reported_without_showing_it(port, capfd):
    for password in ("secret too", "", "secret@/?#:[%"):
        with pytest.raises(ToolCacheError, match=f"redis://127.0.0.1:{port}/1: ") as error:
            RedisCache(address_of(port, password))
        assert "secret" not in str(error.value)
    cache = RedisCache(address_of(port))
    admin = client(port)
    admin.config_set("requirepass", "another")
    try:
        admin.client_kill_filter(_type="normal", skipme=True)
        assert asyncio.run(CachedCalls(cache).look_up("page", "p")) is None
    finally:
        admin.config_set("requirepass", PASSWORD)
    stderr = capfd.readouterr().err
    assert "invalid username-password pair" in stderr and "secret" not in stderr


def test_secrets_echoed_by_the_server_are_removed(tmp_path):
    """Servers without the command AUTH echo the password, or the beginning of a long one."""
    with server(tmp_path, "--rename-command", "AUTH", "") as (_, port):
        for password in (PASSWORD, "secret" * 50):
            with pytest.raises(
                ToolCacheError, match=f"127.0.0.1:{port}/1: unknown command"
            ) as error:
                RedisCache(address_of(port, password))
            assert "secret" not in str(error.value)


@pytest.mark.parametrize("invalid", [
    "redis://", "redis://:12@", "redis://:secret/1@h/0", "redis://u:1#secret@h", "redis://u:1?secret@h",
    "redis://:secret@h:port", "redis://:secret@h/one", "rediss://h?password=secret",
    "redis://:se[cret@h", "REDIS://h/0?db=secret",
])  # fmt: skip
def test_invalid_address_is_reported_without_showing_it(invalid):
    assert is_redis(invalid)
    with pytest.raises(ToolCacheError, match="not an address of a Redis server") as error:
        open_cache(invalid)
    assert "secret" not in str(error.value) and "se[" not in str(error.value)


def test_unreachable_server_and_unknown_option_are_reported():
    pytest.importorskip("redis", reason="no redis-py (pip install redis)")
    with pytest.raises(ToolCacheError, match=r"redis://\[::1\]:\d+/0: "):
        open_cache(f"redis://u:secret@[::1]:{free_port()}")
    with pytest.raises(ToolCacheError, match="h:6379/0: unknown ssl_ option"):
        open_cache("rediss://u:secret@h?ssl_secret=1")


def test_missing_redis_package_is_reported(monkeypatch, tmp_path):
    assert not is_redis(tmp_path / "redis.sqlite") and not is_redis("redis")
    assert isinstance(open_cache(str(tmp_path / "cache.sqlite")), ToolCache)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(
        ToolCacheError, match="h:6379/0: redis-py is not installed: pip install redis"
    ):
        open_cache("redis://:secret@h")
