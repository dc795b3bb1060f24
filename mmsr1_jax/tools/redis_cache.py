"""Cache of tool results and shared rate limits on a Redis server, for many hosts.

A `RedisCache` has the modes and methods of `tool_cache.ToolCache`, and a method `turn` that
enforces the rate limit of a service across all processes. Its data lies in the one database named
by its address:

    mmsr1:KIND:HASH OF KEY    hash with the fields key, value, failed and made
    mmsr1-rate:SERVICE        hash with the fields next (time of the next turn) and now

Entries written in mode `use` expire after `days`. Entries written by `record` or `take` never
expire, since they exist to be replayed, and rewriting one in mode `use` does not change that. The
size is bounded by the server's own settings: `maxmemory` with `maxmemory-policy volatile-lru`
evicts entries of the first kind and never of the second.

Requires Redis 5 or newer, or a compatible server. Clusters are not supported.
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

from mmsr1_jax.tools.tool_cache import MODES, Mode, ToolCache, ToolCacheError, entries_of, is_fresh
from mmsr1_jax.utils import outputs

_TIMEOUT = 2.0  # seconds; limit on connecting, and on each wait for data
_PAUSE = 30.0  # seconds for which a server that failed is not contacted
_THREADS = 16  # threads that may wait for the server concurrently
_FOREVER = 2**52  # milliseconds

# Writes an entry. An existing entry that never expires (PTTL is -1) keeps that property.
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
# Reserves the next turn, one per interval, and returns the time until then, in microseconds of the
# server's clock. If the clock was set back, the schedule restarts, so that callers do not wait for
# the clock to catch up.
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
    """Return whether `where` is the address of a Redis server rather than a file."""
    return re.match("rediss?://", str(where), re.IGNORECASE) is not None


def open_cache(
    where: str | None, mode: Mode = "use", *, days: float = 90.0, max_bytes: int = 20_000_000_000
) -> "ToolCache | RedisCache":
    """Open the store at `where`, a file or the address of a Redis server.

    `max_bytes` applies to a file only, since a Redis server has its own memory limit.

    Raises:
      ToolCacheError: See the constructors.
    """
    if where is not None and is_redis(where):
        return RedisCache(where, mode, days=days)
    return ToolCache(where, mode, days=days, max_bytes=max_bytes)


class RedisCache:
    """Cache of tool results on a Redis server, usable from any thread and any asyncio loop.

    All methods but `turn` block while they wait for the server, so call them in a thread.

    After a failure the server is not contacted for a while, so that not every call waits for its
    timeout; meanwhile all methods but `turn` raise ToolCacheError. In `replay` the server is always
    contacted, as no other source of values exists.

    Args:
      address: redis://[user:password@]host[:port][/database], or rediss:// for TLS, with `ssl_..`
        options of redis-py after a `?`. Messages show neither user, password nor options. Settings
        are written to files and logs, so pass a password in the environment variable
        STORE_PASSWORD instead.
      mode: Mode, as in `ToolCache`.
      days: Days after which an entry is stale in mode `use` and expires on the server.

    Attributes:
      threads: Executor in which to call the methods from an asyncio loop.
    """

    def __init__(self, address: str, mode: Mode = "use", *, days: float = 90.0):
        """Connect to the server.

        Raises:
          ToolCacheError: The mode or the address is invalid, redis-py is not installed, or the
            server cannot be used (not checked in mode `off`).
        """
        self._name = _without_secrets(address)
        if mode not in MODES:
            raise ToolCacheError(f"{self._name}: there is no mode {mode!r}")
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ToolCacheError(f"{self._name}: redis-py is missing: pip install redis") from None
        self.mode = mode
        self.threads = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="redis")
        self._redis, self._days = redis, days
        self._lock = threading.Lock()
        self._down: str | None = None  # why the server is not contacted
        self._asked_again = 0.0
        scheme, _, rest = address.partition("://")
        try:
            self._client = redis.Redis.from_url(
                f"{scheme.lower()}://{rest}",
                password=os.environ.get("STORE_PASSWORD") or None,  # one in the address wins
                protocol=2,
                socket_timeout=_TIMEOUT,
                socket_connect_timeout=_TIMEOUT,
                retry=Retry(NoBackoff(), 0),
            )
            scripts = (_PUT, _TAKE, _TURN)
            self._put, self._take, self._turn = map(self._client.register_script, scripts)
            if mode != "off":
                self._guarded(self._client.ping)
        except TypeError:  # an option unknown to redis-py
            raise ToolCacheError(f"{self._name}: an ssl_ option that does not exist") from None

    def get(self, kind: str, key: str) -> tuple[bytes, bool] | None:
        """Return (value, failed) or None, as `ToolCache.get` does."""
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
        """Store a value; the server has received it when this returns."""
        if self.mode in ("off", "replay"):
            return
        life = "stays"
        if self.mode == "use":
            life = max(1, int(min(self._days * 86_400_000, _FOREVER)))
        row = [_encode(key), value, int(failed), time.time(), life, self.mode]
        self._guarded(lambda: self._put([_entry(kind, key)], row))

    async def turn(self, service: str, per_second: float) -> None:
        """Wait for this call's turn under the rate limit that all processes share.

        Turns of one service are at least 1 / `per_second` seconds apart. If the server cannot be
        reached, return immediately. Turns reserved by a process that dies go unused.
        """
        ask = functools.partial(
            self._guarded,
            lambda: self._turn([f"mmsr1-rate:{service}"], [1e6 / per_second]),
        )
        with contextlib.suppress(ToolCacheError):  # the store's user gets it too, and reports it
            microseconds = await asyncio.get_running_loop().run_in_executor(self.threads, ask)
            await asyncio.sleep(microseconds / 1e6)

    def info(self) -> list[tuple[str, int, int]]:
        """Return (kind, number of entries, bytes of values) for each kind."""

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
        """Write all entries to a new file for `ToolCache`, atomically."""
        try:
            with outputs.new_file(target) as partial:
                ToolCache(partial).close()
                with contextlib.closing(sqlite3.connect(partial)) as connection, connection:
                    insert = "INSERT INTO entry VALUES (?, ?, ?, ?, ?)"
                    self._guarded(lambda: connection.executemany(insert, self._rows()))
        except sqlite3.Error as error:
            raise ToolCacheError(f"{target}: {error}") from None

    def take(self, source: str | pathlib.Path) -> int:
        """Import the entries of a `ToolCache` file that are missing or failures here.

        A failure is imported only if the server has no entry for its key. Imported entries never
        expire.

        Returns:
          Number of imported entries.

        Raises:
          ToolCacheError: `source` is missing, damaged or not a store, or the server cannot be used.
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
        """Return the unique names of all entries."""
        return list(set(self._client.scan_iter(match="mmsr1:*", count=1000)))

    def _rows(self) -> Iterator[tuple]:
        """Yield all entries as rows of `ToolCache`'s table."""
        for name in self._entries():
            found = self._client.hmget(name, "key", "value", "failed", "made")
            key, value, failed, made = found
            # Otherwise the entry has expired meanwhile, or another program wrote it.
            if key is not None and value is not None and failed in (b"0", b"1"):
                kind = name.split(b":")[1].decode("utf-8", "replace")
                at = _number(made)
                if at is not None:
                    yield kind, key.decode("utf-8", "replace"), value, int(failed), at

    def _guarded(self, act: Callable[[], Any]) -> Any:
        """Return `act()`; raise ToolCacheError if it fails or the server is being avoided."""
        pause = 0.0 if self.mode == "replay" else _PAUSE
        with self._lock:
            if self._down is not None:
                if time.monotonic() < self._asked_again:
                    raise ToolCacheError(self._down)
                # This call probes the server; others keep failing fast in the meantime.
                self._asked_again = time.monotonic() + pause
        down = None
        try:
            return act()
        except self._redis.RedisError as error:
            words = f"{self._name}: {self._cleaned(str(error))}"
            # A server that refuses one command (out of memory, read-only) is still up.
            if not isinstance(error, self._redis.ResponseError):
                down = words
            raise ToolCacheError(words) from None
        finally:
            with self._lock:
                self._down, self._asked_again = down, time.monotonic() + pause

    def _cleaned(self, words: str) -> str:
        """Remove secrets from a server's error message, as some servers echo their input."""
        words = words.partition(", with args beginning with")[0]
        told = self._client.connection_pool.connection_kwargs
        for secret in filter(None, map(told.get, ("password", "username", "ssl_password"))):
            words = words.replace(secret, "***")
        return words


def _without_secrets(address: str) -> str:
    """Return the address of a server without user, password and options.

    Raises:
      ToolCacheError: The address is invalid. The message shows no part of it, as any part may be
        of a password.
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
        raise ToolCacheError(
            "store: not an address of a Redis server: redis://[user:password@]host[:port]"
            "[/database] is, with / as %2F, # as %23, ? as %3F and @ as %40 in a password"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}/{parts.path.strip('/') or 0}"


def _entry(kind: str, key: str) -> str:
    return f"mmsr1:{kind}:{hashlib.blake2b(_encode(key), digest_size=16).hexdigest()}"


def _number(text: bytes | None) -> float | None:
    """Parse a finite number; return None for anything else."""
    try:
        number = float(text or b"")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _encode(key: str) -> bytes:
    return key.encode("utf-8", "replace")
