"""A cache on a real Redis server: modes, expiry, replays, several processes, and the command."""

import asyncio
import functools
import sqlite3
import subprocess
import sys
import time

import pytest

from mmsr1_jax.tools.redis_cache import RedisCache
from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from tests.programs import run_module as run
from tests.servers import serve
from tests.tools import cached_searches
from tests.tools.configured_tools import ask
from tests.tools.redis_server import ENVIRONMENT, client, searxng

PUTTER = """
import sys
from mmsr1_jax.tools.redis_cache import RedisCache
cache = RedisCache(sys.argv[1])
print(cache.get("page", "theirs"))
cache.put("page", "mine", b"of the other process")
"""


def test_modes(address):
    with pytest.raises(ToolCacheError, match="mode 'sometimes' is not one of"):
        RedisCache(address, "sometimes")
    recording = RedisCache(address, "record")
    recording.put("links", "q", b"one")
    recording.put("page", "p", b"404", failed=True)
    assert recording.get("links", "q") is None  # mode `record` has no hits
    using, replaying, off = (RedisCache(address, mode) for mode in ("use", "replay", "off"))
    assert using.get("links", "q") == replaying.get("links", "q") == (b"one", False)
    assert using.get("page", "p") is None and replaying.get("page", "p") == (b"404", True)
    assert using.get("page", "q") is None and using.get("links", "p") is None
    replaying.put("links", "q", b"two")
    off.put("links", "q", b"three")
    assert using.get("links", "q") == (b"one", False) and off.get("links", "q") is None
    using.put("links", "q", bytes(range(256)))
    assert replaying.get("links", "q") == (bytes(range(256)), False)
    assert using.info() == [("links", 1, 256), ("page", 1, 3)]
    using.close()


def test_entries_of_mode_use_expire_and_recorded_ones_do_not(address, port):
    """Stale entries are misses in mode `use`, but recorded ones remain for replays."""
    day = 86400
    recording, using = RedisCache(address, "record"), RedisCache(address, ttl_days=2 / day)
    replaying, impatient = RedisCache(address, "replay"), RedisCache(address, ttl_days=0.1 / day)
    recording.put("page", "recorded", b"old")
    using.put("page", "used", b"old")
    assert using.get("page", "used") == using.get("page", "recorded") == (b"old", False)
    time.sleep(0.15)
    assert impatient.get("page", "used") is None and impatient.get("page", "recorded") is None
    assert using.get("page", "used") == replaying.get("page", "recorded") == (b"old", False)
    impatient.put("page", "used", b"new")  # expires after 0.1 s; the recorded one does not
    impatient.put("page", "recorded", b"new")
    assert replaying.get("page", "used") == (b"new", False)
    lives = {name: client(port).pttl(name) for name in client(port).keys("mmsr1:page:*")}
    assert len(lives) == 2 and min(lives.values()) == -1 and 0 < max(lives.values()) <= 100
    time.sleep(0.15)
    assert replaying.get("page", "used") is None and using.info() == [("page", 1, 3)]
    assert replaying.get("page", "recorded") == (b"new", False)
    RedisCache(address, ttl_days=1e300).put("page", "used", b"for long")
    recording.put("page", "used", b"for ever")
    assert client(port).pttl(sorted(lives, key=lives.get)[1]) == -1


def test_two_processes_share_a_cache(address):
    cache = RedisCache(address)
    cache.put("page", "theirs", b"of this process")
    process = subprocess.run([sys.executable, "-c", PUTTER, address], env=ENVIRONMENT,
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert process.stdout == "(b'of this process', False)\n"
    assert cache.get("page", "mine") == (b"of the other process", False)


def test_recorded_searches_are_replayed(address, monkeypatch):
    """Like the test of this name for `ToolCache`."""
    monkeypatch.setenv("SERPER_API_KEY", "k")
    ask_both, tools = cached_searches.ask_both, cached_searches.tools
    requests = cached_searches.REQUESTS
    with serve(cached_searches.app()) as service:
        recorded = asyncio.run(ask_both(*tools(service, RedisCache(address, "record"))[:2]))
        requests.clear()
        used = asyncio.run(ask_both(*tools(service, RedisCache(address, "use"))[:2]))
        assert sorted(requests) == ["/page/1", "/page/3"]  # failures are requested again
    *both, backend = tools(service, RedisCache(address, "replay"))
    assert asyncio.run(ask_both(*both)) == recorded == used
    assert [len(results.results) for results in recorded] == [3, 3] and backend.connections == []


def test_make_tools_uses_the_configured_cache_mode(address, port, engine):
    url, requests = engine
    first = ask(searxng(url, address))
    assert ask(searxng(url, address)) == first and first.status == "ok" and len(requests) == 1
    assert ask(searxng(url, address, cache_mode="replay")) == first
    names = {name.rpartition(b":")[0] for name in client(port).keys("*")}
    assert names == {b"mmsr1:links", b"mmsr1:search", b"mmsr1-rate"}
    ask(searxng(url, address, cache_mode="record"))
    assert len(requests) == 2


def test_cache_command(address, tmp_path):
    command = functools.partial(run, module="mmsr1_jax.scripts.cache")
    cache, file = RedisCache(address), tmp_path / "copy.sqlite"
    cache.put("links", "q", b"one")
    cache.put("page", "Überall", b"x" * 2_000_000)
    cache.put("page", "p", b"404", failed=True)
    info = "links: 1 entries, 0.0 MB\npage: 2 entries, 2.0 MB\n"
    assert command("info", address).stdout == info
    assert command("export", address, file).stdout == info
    replaying = ToolCache(file, "replay")
    assert replaying.get("page", "Überall") == (b"x" * 2_000_000, False)
    assert replaying.get("page", "p") == (b"404", True)
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE entry SET created = 0 WHERE kind = 'page'")
        connection.execute("DELETE FROM entry WHERE failed")
        connection.execute("INSERT INTO entry VALUES ('page', 'new', X'00FF', 0, 5)")
        connection.execute("INSERT INTO entry VALUES ('page', 'bad', 'e', 1, 5)")
    process = command("import", address, file)
    assert process.stdout.startswith(f"2 entries imported from {file}\n"), process
    assert cache.get("page", "Überall") == (
        b"x" * 2_000_000,
        False,
    )  # not replaced by the older one
    assert cache.get("page", "new") is None  # stale
    assert RedisCache(address, "replay").get("page", "new") == (b"\x00\xff", False)
    assert RedisCache(address, "replay").get("page", "bad") == (b"e", True)
    (tmp_path / "no").write_bytes(b"rubbish" * 1000)
    for arguments, message in (
        (["info", address.replace("very", "")], "127.0.0.1"), (["info", address + "?x"], "not an"),
        (["import", address, tmp_path / "no"], "not a cache file"),
        (["import", file, address], "must be a file"),
        (["export", file, address], "must be a file"),
        (["export", address, tmp_path / "no" / "f"], "Not a directory"),
        (["import", address, tmp_path / "none"], "no such cache"),
    ):  # fmt: skip
        process = command(*arguments)
        assert process.returncode == 2 and message in process.stderr.strip().splitlines()[-1], (
            process
        )
        assert "secret" not in process.stderr and "Traceback" not in process.stderr
