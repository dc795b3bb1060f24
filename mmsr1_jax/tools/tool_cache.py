"""On-disk cache of tool results: an SQLite file shared by processes and exchanged between labs.

    off       Reads and writes nothing.
    use       Returns cached values that are fresh enough; requests and caches the others.
    resume    Returns cached values and failures, whatever their age; requests and caches the
              others. Failures of a service that is down are not cached. A batch that is interrupted
              and resumed in this mode repeats no finished request.
    record    Requests and caches everything, ignoring existing values.
    replay    Returns cached values only, whatever their age; requests nothing.

A value is on disk when `put` returns, and survives the death of any process. The format of the
file, and what is checked in files from others, is in `cache_file.py`.
"""

import contextlib
import fcntl
import itertools
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import tenacity

from mmsr1_jax.tools import cache_file
from mmsr1_jax.tools.cache_file import ToolCacheError, is_fresh, is_valid, read_entries
from mmsr1_jax.utils import outputs
from mmsr1_jax.utils.checked_json import valid_text
from mmsr1_jax.utils.files import network_file_system
from mmsr1_jax.utils.logs import log

__all__ = ["MODES", "ToolCache", "ToolCacheError"]

T = TypeVar("T")
MODES = ("off", "use", "resume", "record", "replay")
_IMPORT_BATCH = 100  # entries imported per transaction
_UPSERT = """
INSERT INTO entry VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, key) DO UPDATE
SET value = excluded.value, failed = excluded.failed, created = excluded.created
"""
# A failure replaces only another failure.
_UPSERT_UNLESS_WORSE = _UPSERT + "WHERE excluded.failed <= (entry.failed IS NOT 0)"
_UPSERT_UNLESS_EXISTING = _UPSERT + "WHERE entry.failed IS NOT 0 AND NOT excluded.failed"
# Bytes of an entry. Its key is stored twice: in the table and in the primary key's index.
_SIZE = "length(value) + 2 * length(CAST(kind || key AS BLOB)) + 20"
_DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _is_busy(error: BaseException) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return isinstance(error, sqlite3.OperationalError) and code & 0xFF == sqlite3.SQLITE_BUSY


_retry_if_busy = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_busy),
    wait=tenacity.wait_random(0.01, 0.1),
    stop=tenacity.stop_after_delay(cache_file.BUSY_TIMEOUT),
    reraise=True,
)


class ToolCache:
    """Cache of tool results in an SQLite file.

    Args:
      path: Path of the file, which is created if missing. None if and only if `mode` is `off`.
      mode: One of the modes listed in the module docstring.
      ttl_days: Days after which an entry is stale in mode `use`.
      max_bytes: Maximum total size of keys and values. The oldest entries are evicted.
    """

    def __init__(
        self,
        path: str | pathlib.Path | None,
        mode: str = "use",
        *,
        ttl_days: float = 90.0,
        max_bytes: int = 20_000_000_000,
    ):
        """Open the file. Raises ToolCacheError if it cannot be used in this mode."""
        if mode not in MODES:
            raise ToolCacheError(f"cache: mode {mode!r} is not one of {', '.join(MODES)}")
        if (path is None) != (mode == "off"):
            raise ToolCacheError(f"cache: mode {mode!r} with file {path!r}")
        self.mode = mode
        self._path = pathlib.Path(path or "")
        self._ttl_days, self._max_bytes = ttl_days, max_bytes
        # Reads have their own connection and lock, so that they never wait for writes.
        self._lock, self._read_lock = threading.Lock(), threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        # Identities of the open files, since another process may move a damaged file away.
        self._file_id = self._reader_file_id = (0, 0)
        self._bytes_since_eviction = 0
        if path is not None:
            if mode == "replay" and not self._path.is_file():
                raise ToolCacheError(f"{self._path}: no such cache file; replay mode needs one")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if (kind := network_file_system(self._path)) and mode != "replay":
                raise ToolCacheError(
                    f"{self._path}: is on a network file system ({kind}), where several hosts "
                    "would damage an SQLite file. Set config.services.cache=redis://HOST:6379/0, "
                    "or use a file on a local disk"
                )
            with self._lock:
                self._guarded(lambda connection: None)

    def get(self, kind: str, key: str) -> tuple[bytes, bool] | None:
        """Return (value, failed) as passed to `put`, or None on a miss or a malformed entry.

        Failures are returned in `replay` and `resume`. In `use` they count as misses, so that they
        are retried.
        """
        if self.mode in ("off", "record"):
            return None
        query = f"SELECT {cache_file.VALUE}, failed, created FROM entry WHERE kind = ? AND key = ?"
        with self._read_lock:
            row = self._read(lambda c: c.execute(query, (kind, valid_text(key))).fetchone())
        if row is None:
            return None
        value, failed, created = row
        if not is_valid(*row) or (
            self.mode == "use" and (failed or not is_fresh(created, self._ttl_days))
        ):
            return None
        return value, bool(failed)

    def put(self, kind: str, key: str, value: bytes, *, failed: bool = False) -> None:
        """Write a value to disk. A failure replaces a success in mode `record` only."""
        if self.mode in ("off", "replay"):
            return
        row = (kind, valid_text(key), value, int(failed), time.time())
        statement = _UPSERT if self.mode == "record" else _UPSERT_UNLESS_WORSE
        with self._lock:
            self._guarded(lambda connection: connection.execute(statement, row))
            self._evict_after(len(value) + 2 * len(key))

    def info(self) -> list[tuple[str, int, int]]:
        """Return (kind, number of entries, bytes of values) for each kind."""
        query = "SELECT kind, count(*), sum(length(value)) FROM entry GROUP BY kind ORDER BY kind"
        with self._lock:
            return self._guarded(lambda connection: connection.execute(query).fetchall())

    def export(self, target: str | pathlib.Path) -> None:
        """Write the cache to a new file, atomically."""
        with outputs.new_file(target) as partial, self._lock:
            self._guarded(lambda connection: connection.execute("VACUUM INTO ?", (str(partial),)))

    def import_entries(self, source: str | pathlib.Path) -> int:
        """Import the entries of another cache file that are missing or failures here.

        A failure is imported only if this cache has no entry for its key.

        Returns:
          Number of imported entries.

        Raises:
          ToolCacheError: `source` is missing, damaged or not a cache.
        """
        rows, num_imported = read_entries(source), 0

        def insert(connection: sqlite3.Connection) -> int:
            with _transaction(connection):
                return connection.executemany(_UPSERT_UNLESS_EXISTING, batch).rowcount

        with self._lock:
            while batch := list(itertools.islice(rows, _IMPORT_BATCH)):
                num_imported += self._guarded(insert)
                self._evict_after(sum(len(row[2]) + 2 * len(row[1]) for row in batch))
        return num_imported

    def _evict_after(self, num_bytes: int) -> None:
        """Evict old entries if a twentieth of `max_bytes` was written since the last time."""
        self._bytes_since_eviction += num_bytes
        if self._bytes_since_eviction > self._max_bytes / 20:
            self._bytes_since_eviction = 0
            self._guarded(self._evict)

    def close(self) -> None:
        with self._lock, self._read_lock:
            # The writing connection is closed last, as closing it removes the write-ahead log.
            for connection in (self._reader, self._connection):
                if connection is not None:
                    connection.close()
            self._connection = self._reader = None

    def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Call `query` with a read-only connection; in `replay` or on failure, use `_guarded`."""
        if self.mode != "replay":
            with contextlib.suppress(sqlite3.Error):
                if self._reader is None or self._reader_file_id != self._stat_id():
                    self._reader = cache_file.open_file(self._path, "ro")
                    self._reader_file_id = self._stat_id()
                return query(self._reader)
        with self._lock:
            return self._guarded(query)

    def _guarded(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Call `query` with the connection. A damaged file is moved away and a new one created."""
        try:
            # SQLite itself waits for another process's write, but fails with SQLITE_BUSY at once
            # while another process creates, recovers or closes the file.
            return _retry_if_busy(lambda: query(self._connect()))
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE_CODES:
                # For instance, the disk is full or the value too large.
                raise ToolCacheError(f"{self._path}: {cache_file.describe(error)}") from None
            if self.mode == "replay":
                raise ToolCacheError(
                    f"{self._path}: the file is damaged or not a cache ({error})"
                ) from None
            self._set_aside(error)
            return _retry_if_busy(lambda: query(self._connect()))

    def _stat_id(self) -> tuple[int, int]:
        """Return (device, inode) of the file, or (0, 0) if it is missing."""
        try:
            stat = os.stat(self._path)
        except FileNotFoundError:
            return 0, 0
        return stat.st_dev, stat.st_ino

    def _connect(self) -> sqlite3.Connection:
        """Return the connection, opening the file or a new one in its place if necessary."""
        if self._connection is not None:
            if self._file_id == self._stat_id():
                return self._connection
            self._connection.close()
            self._connection = None
        if self.mode == "replay":
            mode = "ro" if os.access(self._path.parent, os.W_OK) else "immutable"
        else:
            mode = "rwc"
        connection = cache_file.open_file(self._path, mode)
        try:
            if self.mode == "replay":
                cache_file.check_table(connection)
            else:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(cache_file.SCHEMA)
        except BaseException:
            connection.close()
            raise
        self._connection, self._file_id = connection, self._stat_id()
        return connection

    def _set_aside(self, error: sqlite3.Error) -> None:
        """Move a damaged file away and create a new one.

        Only one process does so. Others that detect the damage use the new file.
        """
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        with open(f"{self._path}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if cache_file.is_intact(self._path):
                return
            aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self._path}{suffix}", f"{aside}{suffix}")
            self._connect()
        log.warning(
            "%s: damaged (%s); moved it to %s and created a new file",
            self._path, error, aside.name,
        )  # fmt: skip

    def _evict(self, connection: sqlite3.Connection) -> None:
        """If `max_bytes` is exceeded, delete the oldest entries until a tenth of it is free."""
        # An imported entry could otherwise claim a time in the future and never be evicted.
        connection.execute(
            "DELETE FROM entry WHERE typeof(created) NOT IN ('real', 'integer') OR created > ?",
            (time.time() + cache_file.MAX_CLOCK_SKEW,),
        )
        (total,) = connection.execute(f"SELECT coalesce(sum({_SIZE}), 0) FROM entry").fetchone()
        if total <= self._max_bytes:
            return
        excess, last_evicted = total - 0.9 * self._max_bytes, None
        query = f"SELECT created, {_SIZE} FROM entry ORDER BY created"
        for created, size in connection.execute(query):
            excess, last_evicted = excess - (size or 0), created
            if excess <= 0:
                break
        connection.execute("DELETE FROM entry WHERE created <= ?", (last_evicted,))


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
