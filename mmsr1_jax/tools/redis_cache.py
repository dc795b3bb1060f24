"""Cache of tool results and shared rate limits on a Redis server, for many hosts.

A `RedisCache` has the modes and methods of `tool_cache.ToolCache`, and a method `wait_for_slot`
that enforces the rate limit of a service across all processes. Its data lies in the one database
named by its address:

    mmsr1:KIND:HASH OF KEY    hash with the fields key, value, failed and created
    mmsr1-rate:SERVICE        hash with the fields next (time of the next slot) and now

Entries written in mode `use` expire after `ttl_days`. Entries written by `record` or imported never
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

from mmsr1_jax.tools.cache_file import ToolCacheError, is_fresh, read_entries
from mmsr1_jax.tools.tool_cache import MODES, ToolCache
from mmsr1_jax.utils import outputs
from mmsr1_jax.utils.checked_json import utf8

_TIMEOUT = 2.0  # seconds; limit on connecting, and on each wait for data
_RETRY_AFTER = 30.0  # seconds for which a server that failed is not contacted
_MAX_THREADS = 16  # threads that may wait for the server concurrently
_MAX_TTL_MS = 2**52  # as good as unlimited

# Writes an entry. An existing entry that never expires (PTTL is -1) keeps that property.
_PUT = """
if ARGV[3] == '1' and ARGV[6] == 'use' and redis.call('HGET', KEYS[1], 'failed') == '0' then
  return 0
end
local persistent = ARGV[5] == 'persistent' or redis.call('PTTL', KEYS[1]) == -1
redis.call('HSET', KEYS[1], 'key', ARGV[1], 'value', ARGV[2], 'failed', ARGV[3], 'created', ARGV[4])
if persistent then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[5]) end
return 1
"""
_IMPORT = (
    """
if redis.call('EXISTS', KEYS[1]) == 1
  and (redis.call('HGET', KEYS[1], 'failed') == '0' or ARGV[3] == '1') then return 0 end
"""
    + _PUT
)
# Reserves the next slot, one per interval, and returns the time until then, in microseconds of the
# server's clock. If the clock was set back, the schedule restarts, so that callers do not wait for
# the clock to catch up.
_RESERVE_SLOT = """
local time = redis.call('TIME')
local now, interval = time[1] * 1000000 + time[2], tonumber(ARGV[1])
local known = redis.call('HMGET', KEYS[1], 'next', 'now')
local slot = now
if known[1] and tonumber(known[2]) <= now then slot = math.max(now, tonumber(known[1])) end
local next_slot = string.format('%.0f', slot + interval)
redis.call('HSET', KEYS[1], 'next', next_slot, 'now', string.format('%.0f', now))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', (slot + interval - now) / 1000 + 1000))
return math.floor(slot - now)
"""


def is_redis(location: str | os.PathLike) -> bool:
    """Return whether a location is the address of a Redis server rather than a file."""
    return re.match("rediss?://", str(location), re.IGNORECASE) is not None


def open_cache(
    location: str | None,
    mode: str = "use",
    *,
    ttl_days: float = 90.0,
    max_bytes: int = 20_000_000_000,
) -> "ToolCache | RedisCache":
    """Open the cache at a location, a file or the address of a Redis server.

    `max_bytes` applies to a file only, since a Redis server has its own memory limit.

    Raises:
      ToolCacheError: See the constructors.
    """
    if location is not None and is_redis(location):
        return RedisCache(location, mode, ttl_days=ttl_days)
    return ToolCache(location, mode, ttl_days=ttl_days, max_bytes=max_bytes)


class RedisCache:
    """Cache of tool results on a Redis server, usable from any thread and any asyncio loop.

    All methods but `wait_for_slot` block while they wait for the server, so call them in a thread.

    After a failure the server is not contacted for a while, so that not every call waits for its
    timeout; meanwhile all methods but `wait_for_slot` raise ToolCacheError. In `replay` the server
    is always contacted, as no other source of values exists.

    Args:
      address: redis://[user:password@]host[:port][/database], or rediss:// for TLS, with `ssl_..`
        options of redis-py after a `?`. Messages show neither user, password nor options. Settings
        are written to files and logs, so pass a password in the environment variable
        CACHE_PASSWORD instead.
      mode: Mode, as in `ToolCache`.
      ttl_days: Days after which an entry is stale in mode `use` and expires on the server.

    Attributes:
      threads: Executor in which to call the methods from an asyncio loop.
    """

    def __init__(self, address: str, mode: str = "use", *, ttl_days: float = 90.0):
        """Connect to the server.

        Raises:
          ToolCacheError: The mode or the address is invalid, redis-py is not installed, or the
            server cannot be used (not checked in mode `off`).
        """
        self._name = _public_address(address)
        if mode not in MODES:
            raise ToolCacheError(f"{self._name}: mode {mode!r} is not one of {', '.join(MODES)}")
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ToolCacheError(
                f"{self._name}: redis-py is not installed: pip install redis"
            ) from None
        self.mode = mode
        self.threads = concurrent.futures.ThreadPoolExecutor(
            _MAX_THREADS, thread_name_prefix="redis"
        )
        self._redis: Any = redis
        self._ttl_days = ttl_days
        self._lock = threading.Lock()
        self._failure: str | None = None  # why the server is not contacted
        self._retry_time = 0.0
        scheme, _, rest = address.partition("://")
        try:
            self._client: Any = redis.Redis.from_url(
                f"{scheme.lower()}://{rest}",
                password=os.environ.get("CACHE_PASSWORD") or None,  # one in the address wins
                protocol=2,
                socket_timeout=_TIMEOUT,
                socket_connect_timeout=_TIMEOUT,
                retry=Retry(NoBackoff(), 0),
            )
            self._put = self._client.register_script(_PUT)
            self._import = self._client.register_script(_IMPORT)
            self._reserve_slot = self._client.register_script(_RESERVE_SLOT)
            if mode != "off":
                self._guarded(self._client.ping)
        except TypeError:  # an option unknown to redis-py
            raise ToolCacheError(f"{self._name}: unknown ssl_ option") from None

    def get(self, kind: str, key: str) -> tuple[bytes, bool] | None:
        """Return (value, failed) or None, as `ToolCache.get` does."""
        if self.mode in ("off", "record"):
            return None
        name = _entry_name(kind, key)
        value, flag, created = self._guarded(
            lambda: self._client.hmget(name, "value", "failed", "created")
        )
        created = _parse_number(created)
        if value is None or flag not in (b"0", b"1") or created is None:
            return None
        failed = flag == b"1"
        if self.mode == "use" and (failed or not is_fresh(created, self._ttl_days)):
            return None
        return value, failed

    def put(self, kind: str, key: str, value: bytes, *, failed: bool = False) -> None:
        """Store a value; the server has received it when this returns."""
        if self.mode in ("off", "replay"):
            return
        ttl_ms: int | str = "persistent"
        if self.mode == "use":
            ttl_ms = max(1, int(min(self._ttl_days * 86_400_000, _MAX_TTL_MS)))
        row = [_encode(key), value, int(failed), time.time(), ttl_ms, self.mode]
        self._guarded(lambda: self._put([_entry_name(kind, key)], row))

    async def wait_for_slot(self, service: str, max_qps: float) -> None:
        """Wait until this call is allowed by the rate limit that all processes share.

        The slots of one service are at least 1 / `max_qps` seconds apart. If the server cannot be
        reached, return immediately. Slots reserved by a process that dies go unused.
        """
        reserve = functools.partial(
            self._guarded,
            lambda: self._reserve_slot([f"mmsr1-rate:{service}"], [1e6 / max_qps]),
        )
        with contextlib.suppress(ToolCacheError):  # `CachedCalls` gets the same error and logs it
            microseconds = await asyncio.get_running_loop().run_in_executor(self.threads, reserve)
            await asyncio.sleep(microseconds / 1e6)

    def info(self) -> list[tuple[str, int, int]]:
        """Return (kind, number of entries, bytes of values) for each kind."""

        def count() -> list[tuple[str, int, int]]:
            totals: dict[str, tuple[int, int]] = {}
            names = self._entry_names()
            for start in range(0, len(names), 1000):
                batch = names[start : start + 1000]
                pipeline = self._client.pipeline(transaction=False)
                for name in batch:
                    pipeline.hstrlen(name, "value")
                for name, size in zip(batch, pipeline.execute(), strict=True):
                    kind = name.split(b":")[1].decode("utf-8", "replace")
                    num_entries, num_bytes = totals.get(kind, (0, 0))
                    totals[kind] = num_entries + 1, num_bytes + size
            return [(kind, *totals[kind]) for kind in sorted(totals)]

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

    def import_entries(self, source: str | pathlib.Path) -> int:
        """Import the entries of a `ToolCache` file that are missing or failures here.

        A failure is imported only if the server has no entry for its key. Imported entries never
        expire.

        Returns:
          Number of imported entries.

        Raises:
          ToolCacheError: `source` is missing, damaged or not a cache, or the server cannot be used.
        """
        num_imported = 0
        for kind, key, value, failed, created in read_entries(source):
            row = [_encode(key), value, failed, created, "persistent", "import"]
            name = _entry_name(kind, key)
            num_imported += self._guarded(lambda name=name, row=row: self._import([name], row))
        return num_imported

    def close(self) -> None:
        self._client.close()
        self.threads.shutdown(wait=False)

    def _entry_names(self) -> list[bytes]:
        """Return the unique names of all entries."""
        return list(set(self._client.scan_iter(match="mmsr1:*", count=1000)))

    def _rows(self) -> Iterator[tuple[str, str, bytes, int, float]]:
        """Yield all entries as rows of `ToolCache`'s table."""
        for name in self._entry_names():
            key, value, failed, created = self._client.hmget(
                name, "key", "value", "failed", "created"
            )
            created = _parse_number(created)
            if key is None or value is None or created is None or failed not in (b"0", b"1"):
                continue  # the entry has expired meanwhile, or another program wrote it
            kind = name.split(b":")[1].decode("utf-8", "replace")
            yield kind, key.decode("utf-8", "replace"), value, int(failed), created

    def _guarded(self, query: Callable[[], Any]) -> Any:
        """Return `query()`; raise ToolCacheError if it fails or the server is being avoided."""
        retry_after = 0.0 if self.mode == "replay" else _RETRY_AFTER
        with self._lock:
            if self._failure is not None:
                if time.monotonic() < self._retry_time:
                    raise ToolCacheError(self._failure)
                # This call probes the server; others keep failing fast in the meantime.
                self._retry_time = time.monotonic() + retry_after
        failure = None
        try:
            return query()
        except self._redis.RedisError as error:
            message = f"{self._name}: {self._without_secrets(str(error))}"
            # A server that refuses one command (out of memory, read-only) is still up.
            if not isinstance(error, self._redis.ResponseError):
                failure = message
            raise ToolCacheError(message) from None
        finally:
            with self._lock:
                self._failure, self._retry_time = failure, time.monotonic() + retry_after

    def _without_secrets(self, message: str) -> str:
        """Remove secrets from a server's error message, as some servers echo their input."""
        message = message.partition(", with args beginning with")[0]
        options = self._client.connection_pool.connection_kwargs
        for secret in filter(None, map(options.get, ("password", "username", "ssl_password"))):
            message = message.replace(secret, "***")
        return message


def _public_address(address: str) -> str:
    """Return the address of a server without user, password and options.

    Raises:
      ToolCacheError: The address is invalid. The message shows no part of it, as any part may be
        of a password.
    """
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname or "", parts.port or 6379
        options = dict(urllib.parse.parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        is_valid = (
            bool(host)
            and re.fullmatch(r"/?\d*", parts.path)
            and not parts.fragment
            and all(name.startswith("ssl_") for name in options)
        )
        if not is_valid:
            raise ValueError
    except ValueError:
        raise ToolCacheError(
            "cache: not an address of a Redis server; it has the form "
            "redis://[user:password@]host[:port][/database], with / as %2F, # as %23, ? as %3F and "
            "@ as %40 in a password"
        ) from None
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{port}/{parts.path.strip('/') or 0}"


def _entry_name(kind: str, key: str) -> str:
    return f"mmsr1:{kind}:{hashlib.blake2b(_encode(key), digest_size=16).hexdigest()}"


def _parse_number(text: bytes | None) -> float | None:
    """Parse a finite number; return None for anything else."""
    try:
        number = float(text or b"")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _encode(key: str) -> bytes:
    return utf8(key)
