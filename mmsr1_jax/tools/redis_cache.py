"""What tools found, and the services' rate limits, behind a Redis server that many hosts share.

A `RedisStore` has the modes and the methods of `store.Store`, and beside them `turn`: the calls of
all processes to a service take turns. What it keeps lies in the one database that its address
names:

    mmsr1:KIND:HASH OF KEY    a hash of the fields key, value, failed and made
    mmsr1-rate:SERVICE        a hash of the fields next and now: when the next turn is

What `use` puts is freed by the server after `days`; what `record` puts and `take` brings stays
until someone deletes it, as it is there to be replayed, and a `use` that writes it anew leaves that
so. The size is bounded by the server's own settings: `maxmemory` with `maxmemory-policy
volatile-lru` gives up the first kind and never the second.

Redis 5 or newer, or what speaks as it does; one server, not a cluster.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import hashlib
import math
import os
import pathlib
import re
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from mmsr1_jax.tools.tool_cache import MODES, Mode, Store, StoreError, entries_of, is_fresh
from mmsr1_jax.utils import outputs

_TIMEOUT = 2.0  # seconds for a connection, and for each wait for data
_PAUSE = 30.0  # seconds for which a server that failed is not asked
_THREADS = 16  # that may wait for the server at a time
_FOREVER = 2**52  # milliseconds

# Keeps an entry. What was to stay (PTTL -1: it is there and has no time limit) is to stay still.
_PUT = """
if ARGV[3] == '1' and ARGV[6] == 'use' and redis.call('HGET', KEYS[1], 'failed') == '0' then
  return 0
end
local stays = ARGV[5] == 'stays' or redis.call('PTTL', KEYS[1]) == -1
redis.call('HSET', KEYS[1], 'key', ARGV[1], 'value', ARGV[2], 'failed', ARGV[3], 'made', ARGV[4])
if stays then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[5]) end
return 1
"""
_TAKE = (
    """
if redis.call('EXISTS', KEYS[1]) == 1
  and (redis.call('HGET', KEYS[1], 'failed') == '0' or ARGV[3] == '1') then return 0 end
"""
    + _PUT
)
# Gives out turns, one an interval, in microseconds of the server's clock; returns how long it is
# till this one. A clock that was set back begins anew, lest all wait for it to catch up.
_TURN = """
local time = redis.call('TIME')
local now, interval = time[1] * 1000000 + time[2], tonumber(ARGV[1])
local known = redis.call('HMGET', KEYS[1], 'next', 'now')
local turn = now
if known[1] and tonumber(known[2]) <= now then turn = math.max(now, tonumber(known[1])) end
local written = string.format('%.0f', turn + interval)
redis.call('HSET', KEYS[1], 'next', written, 'now', string.format('%.0f', now))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', (turn + interval - now) / 1000 + 1000))
return math.floor(turn - now)
"""


def is_redis(where: str | os.PathLike) -> bool:
    """Whether a store is the address of a server, and not a file."""
    return re.match("rediss?://", str(where), re.IGNORECASE) is not None


def open_store(
    where: str | None, mode: Mode = "use", *, days: float = 90.0, max_bytes: int = 20_000_000_000
) -> "Store | RedisStore":
    """The store at `where`, a file or the address of a server, which has its own `max_bytes`.

    Raises:
      StoreError: as the constructors.
    """
    if where is not None and is_redis(where):
        return RedisStore(where, mode, days=days)
    return Store(where, mode, days=days, max_bytes=max_bytes)


class RedisStore:
    """May be used from any thread and any asyncio loop; its methods wait for the server, but for
    `turn` they are to be called in a thread.

    A server that fails is not asked for a while, so that not every call waits for its time-out;
    all raise StoreError meanwhile. In a replay it is always asked: nobody else can be.

    Args of the constructor:
    address: redis://[user:password@]host[:port][/database], rediss:// with TLS and `ssl_..` options
      of redis-py after a `?`. User, password and options are in no message. Settings are written
      to files and logs: the place for a password is STORE_PASSWORD in the environment.
    mode: as of `Store`.
    days: after which `use` asks again, and the server frees what it put.

    Attributes:
      threads: in which the methods are to be called from an asyncio loop.
    """

    def __init__(self, address: str, mode: Mode = "use", *, days: float = 90.0):
        """Raises StoreError: a mode or an address that cannot be, no redis-py, or (but with `off`)
        a server that cannot be used."""
        self._name = _without_secrets(address)
        if mode not in MODES:
            raise StoreError(f"{self._name}: there is no mode {mode!r}")
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise StoreError(f"{self._name}: redis-py is missing: pip install redis") from None
        self.mode = mode
        self.threads = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="redis")
        self._redis, self._days = redis, days
        self._lock = threading.Lock()
        self._down: str | None = None  # why the server is not asked
        self._asked_again = 0.0
        scheme, _, rest = address.partition("://")
        try:
            self._client = redis.Redis.from_url(
                f"{scheme.lower()}://{rest}",
                password=os.environ.get("STORE_PASSWORD") or None,  # one in the address goes first
                protocol=2,
                socket_timeout=_TIMEOUT,
                socket_connect_timeout=_TIMEOUT,
                retry=Retry(NoBackoff(), 0),
            )
            scripts = (_PUT, _TAKE, _TURN)
            self._put, self._take, self._turn = map(self._client.register_script, scripts)
            if mode != "off":
                self._guarded(self._client.ping)
        except TypeError:  # an option that redis-py has not
            raise StoreError(f"{self._name}: an ssl_ option that does not exist") from None

    def get(self, kind: str, key: str) -> tuple[bytes, bool] | None:
        """As `Store.get`."""
        if self.mode in ("off", "record"):
            return None
        name = _entry(kind, key)
        found = self._guarded(lambda: self._client.hmget(name, "value", "failed", "made"))
        made = _number(found[2])
        if found[0] is None or found[1] not in (b"0", b"1") or made is None:
            return None
        value, failed = found[0], found[1] == b"1"
        if self.mode == "use" and (failed or not is_fresh(made, self._days)):
            return None
        return value, failed

    def put(self, kind: str, key: str, value: bytes, *, failed: bool = False) -> None:
        """Keeps a value; the server has it when this returns."""
        if self.mode in ("off", "replay"):
            return
        life = "stays"
        if self.mode == "use":
            life = max(1, int(min(self._days * 86_400_000, _FOREVER)))
        row = [_encode(key), value, int(failed), time.time(), life, self.mode]
        self._guarded(lambda: self._put([_entry(kind, key)], row))

    async def turn(self, service: str, per_second: float) -> None:
        """Waits until it is this call's turn: no two of one service, by whatever process, have
        theirs within 1 / `per_second` s. Where the server cannot be asked there is no waiting.

        A process that dies takes the turns that it waits for with it.
        """
        ask = functools.partial(
            self._guarded,
            lambda: self._turn([f"mmsr1-rate:{service}"], [1e6 / per_second]),
        )
        with contextlib.suppress(StoreError):  # the store's user meets the same, and says so
            microseconds = await asyncio.get_running_loop().run_in_executor(self.threads, ask)
            await asyncio.sleep(microseconds / 1e6)

    def info(self) -> list[tuple[str, int, int]]:
        """(kind, entries, bytes) of each kind."""

        def count():
            of_kind: dict[str, tuple[int, int]] = {}
            names = self._entries()
            for begin in range(0, len(names), 1000):
                some = names[begin : begin + 1000]
                pipeline = self._client.pipeline(transaction=False)
                for name in some:
                    pipeline.hstrlen(name, "value")
                for name, size in zip(some, pipeline.execute(), strict=True):
                    kind = name.split(b":")[1].decode("utf-8", "replace")
                    entries, total = of_kind.get(kind, (0, 0))
                    of_kind[kind] = entries + 1, total + size
            return [(kind, *of_kind[kind]) for kind in sorted(of_kind)]

        return self._guarded(count)

    def export(self, target: str | pathlib.Path) -> None:
        """Writes all of it as one file for `Store`, which appears when it is complete."""
        try:
            with outputs.new_file(target) as partial:
                Store(partial).close()
                with contextlib.closing(sqlite3.connect(partial)) as connection, connection:
                    insert = "INSERT INTO entry VALUES (?, ?, ?, ?, ?)"
                    self._guarded(lambda: connection.executemany(insert, self._rows()))
        except sqlite3.Error as error:
            raise StoreError(f"{target}: {error}") from None

    def take(self, source: str | pathlib.Path) -> int:
        """Takes what a file of `Store` has and this one has not, or only as a failure, to stay;
        returns how much that was.

        Raises:
          StoreError: no such store.
        """
        taken = 0
        for kind, key, value, failed, made in entries_of(source):
            row = [_encode(key), value, failed, made, "stays", "take"]
            name = _entry(kind, key)
            taken += self._guarded(lambda name=name, row=row: self._take([name], row))
        return taken

    def close(self) -> None:
        self._client.close()
        self.threads.shutdown(wait=False)

    def _entries(self) -> list[bytes]:
        """The names of all entries, each once."""
        return list(set(self._client.scan_iter(match="mmsr1:*", count=1000)))

    def _rows(self) -> Iterator[tuple]:
        """All entries as rows of `Store`'s table."""
        for name in self._entries():
            found = self._client.hmget(name, "key", "value", "failed", "made")
            key, value, failed, made = found
            # Else it was freed meanwhile, or another program wrote it.
            if key is not None and value is not None and failed in (b"0", b"1"):
                kind = name.split(b":")[1].decode("utf-8", "replace")
                at = _number(made)
                if at is not None:
                    yield kind, key.decode("utf-8", "replace"), value, int(failed), at

    def _guarded(self, act: Callable[[], Any]) -> Any:
        """`act()`, where the server can be asked. Raises StoreError."""
        pause = 0.0 if self.mode == "replay" else _PAUSE
        with self._lock:
            if self._down is not None:
                if time.monotonic() < self._asked_again:
                    raise StoreError(self._down)
                # This call finds out how the server is; the others do not wait for that.
                self._asked_again = time.monotonic() + pause
        down = None
        try:
            return act()
        except self._redis.RedisError as error:
            words = f"{self._name}: {self._cleaned(str(error))}"
            # The server answered where it refused one command (no memory left, read only).
            if not isinstance(error, self._redis.ResponseError):
                down = words
            raise StoreError(words) from None
        finally:
            with self._lock:
                self._down, self._asked_again = down, time.monotonic() + pause

    def _cleaned(self, words: str) -> str:
        """What a server said, without secrets: some repeat what they were told, or part of it."""
        words = words.partition(", with args beginning with")[0]
        told = self._client.connection_pool.connection_kwargs
        for secret in filter(None, map(told.get, ("password", "username", "ssl_password"))):
            words = words.replace(secret, "***")
        return words


def _without_secrets(address: str) -> str:
    """The address of a server, without user, password and options.

    Raises:
      StoreError: it is none. The message shows nothing of it, as any part may be of a password.
    """
    try:
        parts = urllib.parse.urlsplit(address)
        port = parts.port or 6379
        options = dict(urllib.parse.parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        good = (
            parts.hostname
            and re.fullmatch(r"/?\d*", parts.path)
            and not parts.fragment
            and all(name.startswith("ssl_") for name in options)
        )
    except ValueError:
        good = False
    if not good:
        raise StoreError(
            "store: not an address of a Redis server: redis://[user:password@]host[:port]"
            "[/database] is, with / as %2F, # as %23, ? as %3F and @ as %40 in a password"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}/{parts.path.strip('/') or 0}"


def _entry(kind: str, key: str) -> str:
    return f"mmsr1:{kind}:{hashlib.blake2b(_encode(key), digest_size=16).hexdigest()}"


def _number(text: bytes | None) -> float | None:
    """A finite number, or None."""
    try:
        number = float(text or b"")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _encode(key: str) -> bytes:
    return key.encode("utf-8", "replace")
