"""The store and the limits behind a real Redis server: shared, and never in a search's way."""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import os
import pathlib
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.parse

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from mmsr1_jax.tools import redis_cache
from mmsr1_jax.tools.build import make_tools
from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.redis_cache import RedisCache, is_redis, open_cache
from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from tests import test_stored
from tests.programs import run
from tests.servers import serve
from tests.test_make import ask, configured

PASSWORD = "very/secret#word@?%:"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.getcwd()}
PUTTER = """
import sys
from mmsr1_jax.tools.redis_cache import RedisCache
store = RedisCache(sys.argv[1])
print(store.get("page", "theirs"))
store.put("page", "mine", b"of the other process")
"""
# Calls a service for some seconds, 8 at a time, once it is told to.
CALLER = """
import asyncio, functools, sys, time
from mmsr1_jax.tools.redis_cache import RedisCache
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import Web
store, address, name, rate, seconds = *sys.argv[1:4], float(sys.argv[4]), float(sys.argv[5])
turn = functools.partial(RedisCache(store).turn, "engine", rate)
web = Web(allowed_hosts=[address.removeprefix("http://")])
service = Service("engine", web, per_second=rate, turn=turn)

async def call(number):
    params = {"n": f"{name} {number} {time.monotonic()}"}
    await service.call("GET", address, params=params, accept=("application/json",))

async def work(number, end):
    while time.monotonic() < end:
        await call(number)

async def main():
    await asyncio.gather(*map(call, range(8)))  # connections are made
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    end = time.monotonic() + seconds
    await asyncio.gather(*(work(number, end) for number in range(8)))

asyncio.run(main())
"""


def address_of(port: int, password: str = PASSWORD) -> str:
    return f"redis://:{urllib.parse.quote(password, safe='')}@127.0.0.1:{port}/1"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start(port: int, directory: pathlib.Path, *options: str) -> subprocess.Popen:
    """A server that keeps nothing on disk."""
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
    """Yields the process and its port."""
    port = free_port()
    process = start(port, directory, *options)
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with server(tmp_path_factory.mktemp("redis")) as (_, port):
        yield port


@pytest.fixture
def address(port):
    client(port).flushall()
    return address_of(port)


def client(port: int):
    import redis

    return redis.Redis(port=port, db=1, password=PASSWORD, single_connection_client=True)


@pytest.fixture(autouse=True)
def nothing_secret_is_logged(caplog):
    """In no test the password, or what it looks like in an address."""
    caplog.set_level(logging.DEBUG)
    yield
    assert "secret" not in caplog.text


def test_modes(address):
    with pytest.raises(ToolCacheError, match="no mode 'sometimes'"):
        RedisCache(address, "sometimes")
    recording = RedisCache(address, "record")
    recording.put("links", "q", b"one")
    recording.put("page", "p", b"404", failed=True)
    assert recording.get("links", "q") is None  # a fresh record asks for everything
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


def test_what_is_too_old(address, port):
    """`use` asks again and the server frees what it put; what was recorded stays for replays."""
    day = 86400
    recording, using = RedisCache(address, "record"), RedisCache(address, days=2 / day)
    replaying, impatient = RedisCache(address, "replay"), RedisCache(address, days=0.1 / day)
    recording.put("page", "recorded", b"old")
    using.put("page", "used", b"old")
    assert using.get("page", "used") == using.get("page", "recorded") == (b"old", False)
    time.sleep(0.15)
    assert impatient.get("page", "used") is None and impatient.get("page", "recorded") is None
    assert using.get("page", "used") == replaying.get("page", "recorded") == (b"old", False)
    impatient.put("page", "used", b"new")  # lives for another 0.1 s, the other one on
    impatient.put("page", "recorded", b"new")
    assert replaying.get("page", "used") == (b"new", False)
    lives = {name: client(port).pttl(name) for name in client(port).keys("mmsr1:page:*")}
    assert len(lives) == 2 and min(lives.values()) == -1 and 0 < max(lives.values()) <= 100
    time.sleep(0.15)
    assert replaying.get("page", "used") is None and using.info() == [("page", 1, 3)]
    assert replaying.get("page", "recorded") == (b"new", False)
    RedisCache(address, days=1e300).put("page", "used", b"for long")
    recording.put("page", "used", b"for ever")
    assert client(port).pttl(sorted(lives, key=lives.get)[1]) == -1


def test_two_processes(address):
    mine = RedisCache(address)
    mine.put("page", "theirs", b"of this process")
    other = subprocess.run([sys.executable, "-c", PUTTER, address], env=ENVIRONMENT,
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert other.stdout == "(b'of this process', False)\n"
    assert mine.get("page", "mine") == (b"of the other process", False)


def test_recorded_and_replayed(address, monkeypatch):
    """As `test_stored.test_recorded_and_replayed`."""
    monkeypatch.setenv("SERPER_API_KEY", "k")
    ask_both, tools, asked = test_stored.ask_both, test_stored.tools, test_stored.ASKED
    with serve(test_stored.app()) as service:
        recorded = asyncio.run(ask_both(*tools(service, RedisCache(address, "record"))[:2]))
        asked.clear()
        used = asyncio.run(ask_both(*tools(service, RedisCache(address, "use"))[:2]))
        assert sorted(asked) == ["/page/1", "/page/3"]  # what failed is worth another try
    *both, backend = tools(service, RedisCache(address, "replay"))
    assert asyncio.run(ask_both(*both)) == recorded == used
    assert [len(found.results) for found in recorded] == [3, 3] and backend.tried == []


@pytest.fixture
def engine():
    """A search engine, and when it was asked."""
    asked: list[float] = []

    async def search(request):
        asked.append(time.monotonic())
        found = [{"url": f"http://p/{len(asked)}", "title": "t", "content": "c"}]
        return JSONResponse({"results": found})

    with serve(Starlette(routes=[Route("/", search), Route("/search", search)])) as url:
        yield url, asked


def searxng(url: str, store: str | None, **services):
    own = {"searxng_url": url, "allowed_hosts": (url.removeprefix("http://"),), "max_attempts": 1,
           "reader": "none", "cache": store} | services  # fmt: skip
    return make_tools(configured(text="searxng", services=own))


def test_as_it_is_set(address, port, engine):
    url, asked = engine
    first = ask(searxng(url, address))
    assert ask(searxng(url, address)) == first and first.status == "ok" and len(asked) == 1
    assert ask(searxng(url, address, cache_mode="replay")) == first
    names = {name.rpartition(b":")[0] for name in client(port).keys("*")}
    assert names == {b"mmsr1:links", b"mmsr1:answer", b"mmsr1-rate"}
    ask(searxng(url, address, cache_mode="record"))
    assert len(asked) == 2


def test_three_processes_share_a_rate(address, engine):
    """Calls of all together in any second, and over all the time, against 40 a second."""
    url, asked = engine
    rate, seconds = 40, 2.0
    callers = [
        subprocess.Popen(
            [sys.executable, "-c", CALLER, address, url, str(i), str(rate), str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        ) for i in range(3)
    ]  # fmt: skip
    for caller in callers:
        assert caller.stdout.readline() == "ready\n"
    asked.clear()
    for caller in callers:
        caller.stdin.write("go\n")
        caller.stdin.flush()
    assert [caller.wait() for caller in callers] == [0, 0, 0]
    within = [t for t in asked if t < asked[0] + seconds]
    # A call may come late, and the next in time.
    assert 0.8 * rate * seconds <= len(within) <= 1.1 * rate * seconds
    most = max(sum(begin <= t < begin + 1 for t in asked) for begin in asked)
    assert most <= 1.2 * rate


def test_turns(address, port):
    """One an interval, whoever asks, also when the server's clock was set back."""
    stores = [RedisCache(address) for _ in range(3)]

    async def turns():
        begin = time.monotonic()

        async def taken(number):
            await stores[number % 3].turn("s", 20.0)
            return time.monotonic() - begin

        return sorted(await asyncio.gather(*(taken(number) for number in range(10))))

    for number, moment in enumerate(asyncio.run(turns())):
        assert number / 20 - 0.01 < moment < number / 20 + 0.2
    hour = 3_600_000_000
    known = {k: int(v) + hour for k, v in client(port).hgetall("mmsr1-rate:s").items()}
    client(port).hset("mmsr1-rate:s", mapping=known)
    assert asyncio.run(asyncio.wait_for(turns(), 5.0))[-1] < 1.0
    assert client(port).pttl("mmsr1-rate:s") < 3000  # leaves nothing behind


async def with_lag(work):
    """(result, longest time in seconds that the loop was blocked for)."""
    longest, before = 0.0, time.monotonic()

    async def beat():
        nonlocal longest, before
        while True:
            await asyncio.sleep(0.01)
            longest, before = max(longest, time.monotonic() - before - 0.01), time.monotonic()

    heart = asyncio.ensure_future(beat())
    result = await work
    heart.cancel()
    return result, longest


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_server_dies_in_the_middle(tmp_path, engine, how, capfd):
    """Searches go on: killed it refuses connections, stopped it says nothing."""
    url, asked = engine

    async def searches(tools):
        found = []
        for number in range(60):
            if number == 20:
                process.send_signal(how)
            begin = time.monotonic()
            found += await asyncio.gather(*(
                tools["text_search"](test_stored.Query(
                    action="text_search", text=f"{number} {part}", question="?"
                )) for part in range(4)
            ))  # fmt: skip
            assert time.monotonic() - begin < 2 * redis_cache._TIMEOUT
        return found

    with server(tmp_path) as (process, port):
        tools = searxng(url, address_of(port), max_qps=2000.0)
        found, lag = asyncio.run(with_lag(searches(tools)))
        process.send_signal(signal.SIGKILL)
    assert [observation.status for observation in found] == ["ok"] * 240 and len(asked) == 240
    assert lag < 0.2
    said = capfd.readouterr().err
    assert said.count("searches go on without it") == 1 == said.count("store: ")
    assert f"redis://127.0.0.1:{port}/1: " in said and "secret" not in said


def test_a_server_that_comes_back(tmp_path, monkeypatch):
    """It is not asked for a while, and then by one call; in a replay always."""
    monkeypatch.setattr(redis_cache, "_PAUSE", 0.4)
    with server(tmp_path) as (process, port):
        store, replaying = RedisCache(address_of(port)), RedisCache(address_of(port), "replay")
        store.put("page", "p", b"x")
        process.kill()
        process.wait()
        for one in (store, replaying):
            with pytest.raises(ToolCacheError, match="127.0.0.1"):
                one.get("page", "p")
        again = start(port, tmp_path)
        try:
            assert replaying.get("page", "p") is None
            with pytest.raises(ToolCacheError, match="127.0.0.1"):
                store.put("page", "p", b"y")
            time.sleep(0.4)
            store.put("page", "p", b"y")
            assert store.get("page", "p") == replaying.get("page", "p") == (b"y", False)
        finally:
            again.kill()
            again.wait()


def test_one_call_finds_out(tmp_path, monkeypatch):
    """Not every one waits for a server that says nothing."""
    monkeypatch.setattr(redis_cache, "_TIMEOUT", 0.5)
    monkeypatch.setattr(redis_cache, "_PAUSE", 0.2)
    with server(tmp_path) as (process, port):
        store = RedisCache(address_of(port))
        process.send_signal(signal.SIGSTOP)

        def taken(_):
            begin = time.monotonic()
            with pytest.raises(ToolCacheError, match="127.0.0.1"):
                store.get("page", "p")
            return time.monotonic() - begin

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            taken(0)
            time.sleep(0.25)
            seconds = list(threads.map(taken, range(8)))
        assert sum(s > 0.4 for s in seconds) == 1, seconds


def test_a_command_that_is_refused_closes_nothing(address, port, capfd):
    """A full server still says what it has."""
    store = RedisCache(address)
    store.put("page", "p", b"x")
    client(port).config_set("maxmemory", 1)
    try:
        with pytest.raises(ToolCacheError, match="maxmemory"):
            store.put("page", "q", b"y")
        assert store.get("page", "p") == (b"x", False)
        asyncio.run(CachedCalls(store).put("page", "q", "y"))
    finally:
        client(port).config_set("maxmemory", 0)
    assert capfd.readouterr().err.count("searches go on without it") == 1
    store.put("page", "q", b"y")


def test_a_password_from_the_environment(port, monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", PASSWORD)
    RedisCache(f"redis://127.0.0.1:{port}/1").put("page", "p", b"x")
    with pytest.raises(ToolCacheError, match="invalid username-password pair"):
        RedisCache(address_of(port, "wrong"))
    monkeypatch.delenv("STORE_PASSWORD")
    with pytest.raises(ToolCacheError, match="Authentication required"):
        RedisCache(f"redis://127.0.0.1:{port}/1")


def test_a_password_that_is_wrong(port, capfd):
    for password in ("secret too", "", "secret@/?#:[%"):
        with pytest.raises(ToolCacheError, match=f"redis://127.0.0.1:{port}/1: ") as error:
            RedisCache(address_of(port, password))
        assert "secret" not in str(error.value)
    store = RedisCache(address_of(port))
    admin = client(port)
    admin.config_set("requirepass", "another")
    try:
        admin.client_kill_filter(_type="normal", skipme=True)
        assert asyncio.run(CachedCalls(store).look("page", "p")) is None
    finally:
        admin.config_set("requirepass", PASSWORD)
    said = capfd.readouterr().err
    assert "invalid username-password pair" in said and "secret" not in said


def test_a_server_that_repeats_what_it_was_told(tmp_path):
    """As one does that does not know the command: the password, or the beginning of a long one."""
    with server(tmp_path, "--rename-command", "AUTH", "") as (_, port):
        for password in (PASSWORD, "secret" * 50):
            with pytest.raises(
                ToolCacheError, match=f"127.0.0.1:{port}/1: unknown command"
            ) as error:
                RedisCache(address_of(port, password))
            assert "secret" not in str(error.value)


@pytest.mark.parametrize("wrong", [
    "redis://", "redis://:12@", "redis://:secret/1@h/0", "redis://u:1#secret@h", "redis://u:1?secret@h",
    "redis://:secret@h:port", "redis://:secret@h/one", "rediss://h?password=secret",
    "redis://:se[cret@h", "REDIS://h/0?db=secret",
])  # fmt: skip
def test_no_address(wrong):
    assert is_redis(wrong)
    with pytest.raises(ToolCacheError, match="not an address of a Redis server") as error:
        open_cache(wrong)
    assert "secret" not in str(error.value) and "se[" not in str(error.value)


def test_nobody_is_there():
    pytest.importorskip("redis", reason="no redis-py (pip install redis)")
    with pytest.raises(ToolCacheError, match=r"redis://\[::1\]:\d+/0: "):
        open_cache(f"redis://u:secret@[::1]:{free_port()}")
    with pytest.raises(ToolCacheError, match="h:6379/0: an ssl_ option that does not exist"):
        open_cache("rediss://u:secret@h?ssl_secret=1")


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    assert not is_redis(tmp_path / "redis.sqlite") and not is_redis("redis")
    assert isinstance(open_cache(str(tmp_path / "store.sqlite")), ToolCache)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ToolCacheError, match="h:6379/0: redis-py is missing: pip install redis"):
        open_cache("redis://:secret@h")


def test_the_command(address, tmp_path):
    command = functools.partial(run, module="mmsr1_jax.scripts.cache")
    store, file = RedisCache(address), tmp_path / "copy.sqlite"
    store.put("links", "q", b"one")
    store.put("page", "Überall", b"x" * 2_000_000)
    store.put("page", "p", b"404", failed=True)
    told = "links: 1 entries, 0.0 MB\npage: 2 entries, 2.0 MB\n"
    assert command("info", address).stdout == told
    assert command("export", address, file).stdout == told
    replaying = ToolCache(file, "replay")
    assert replaying.get("page", "Überall") == (b"x" * 2_000_000, False)
    assert replaying.get("page", "p") == (b"404", True)
    with sqlite3.connect(file) as copy:
        copy.execute("UPDATE entry SET made = 0 WHERE kind = 'page'")
        copy.execute("DELETE FROM entry WHERE failed")
        copy.execute("INSERT INTO entry VALUES ('page', 'new', X'00FF', 0, 5)")
        copy.execute("INSERT INTO entry VALUES ('page', 'bad', 'e', 1, 5)")
    done = command("import", address, file)
    assert done.stdout.startswith(f"2 entries imported from {file}\n"), done
    assert store.get("page", "Überall") == (b"x" * 2_000_000, False)  # its own, not that of 1970
    assert store.get("page", "new") is None  # too old
    assert RedisCache(address, "replay").get("page", "new") == (b"\x00\xff", False)
    assert RedisCache(address, "replay").get("page", "bad") == (b"e", True)
    (tmp_path / "no").write_bytes(b"rubbish" * 1000)
    for arguments, message in (
        (["info", address.replace("very", "")], "127.0.0.1"), (["info", address + "?x"], "not an"),
        (["import", address, tmp_path / "no"], "not a store"),
        (["import", file, address], "must be a file"),
        (["export", file, address], "must be a file"),
        (["export", address, tmp_path / "no" / "f"], "Not a directory"),
        (["import", address, tmp_path / "none"], "no such cache"),
    ):  # fmt: skip
        done = command(*arguments)
        assert done.returncode == 1 and message in done.stderr.strip().splitlines()[-1], done
        assert "secret" not in done.stderr and "Traceback" not in done.stderr
