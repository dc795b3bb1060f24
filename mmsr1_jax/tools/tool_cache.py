"""On-disk cache of tool results: an SQLite file shared by processes and exchanged between labs.

    off       Reads and writes nothing.
    use       Returns cached values that are fresh enough; requests and caches the others.
    record    Requests and caches everything, ignoring existing values.
    replay    Returns cached values only, whatever their age; requests nothing.

A value is on disk when `put` returns, and survives the death of any process. A file may come from
an untrusted source: one whose tables are not those of a store is refused, and entries whose values
have the wrong types are treated as missing.
"""

import contextlib
import fcntl
import itertools
import math
import os
import pathlib
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import tenacity

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools import checked_sqlite
from mmsr1_jax.utils import checked_json, outputs
from mmsr1_jax.utils.checked_json import valid_text

Mode = Literal["off", "use", "record", "replay"]
MODES: tuple[str, ...] = ("off", "use", "record", "replay")
_AT_ONCE = 100  # entries imported per transaction
_WAIT = 60.0  # seconds to wait for another process's write
_TABLE = """CREATE TABLE entry (
  kind TEXT, key TEXT, value BLOB, failed INTEGER, made REAL, PRIMARY KEY (kind, key)
)"""
_INDEX = "CREATE INDEX entry_by_age ON entry (made)"
_SCHEMA = ";".join((_TABLE, _INDEX))
for _made in ("TABLE", "INDEX"):
    _SCHEMA = _SCHEMA.replace(f"{_made} entry", f"{_made} IF NOT EXISTS entry")
_UPSERT = """
INSERT INTO entry VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, key) DO UPDATE
SET value = excluded.value, failed = excluded.failed, made = excluded.made
"""
# A failure replaces only another failure.
_UNLESS_WORSE = _UPSERT + "WHERE excluded.failed <= (entry.failed IS NOT 0)"
_UNLESS_THERE = _UPSERT + "WHERE entry.failed IS NOT 0 AND NOT excluded.failed"
# Longer values are not read, since an entry of an untrusted file may have any length.
_VALUE = f"CASE WHEN length(value) <= {checked_json.MAX_BYTES} THEN value END"
# Bytes of an entry. Its key is stored twice: in the table and in the primary key's index.
_SIZE = "length(value) + 2 * length(CAST(kind || key AS BLOB)) + 20"
_MAX_AHEAD = 86400.0  # seconds by which another machine's clock may be ahead
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class ToolCacheError(UserError):
    """Unusable store; the message names it."""


def _busy(error: BaseException) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return isinstance(error, sqlite3.OperationalError) and code & 0xFF == sqlite3.SQLITE_BUSY


_patiently = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_busy),
    wait=tenacity.wait_random(0.01, 0.1),
    stop=tenacity.stop_after_delay(_WAIT),
    reraise=True,
)


class ToolCache:
    """Cache of tool results in an SQLite file.

    Args:
      path: Path of the file, which is created if missing. None if and only if `mode` is `off`.
      mode: One of the modes listed in the module docstring.
      days: Days after which an entry is stale in mode `use`.
      max_bytes: Maximum total size of keys and values. The oldest entries are evicted.
    """

    def __init__(
        self,
        path: str | pathlib.Path | None,
        mode: Mode = "use",
        *,
        days: float = 90.0,
        max_bytes: int = 20_000_000_000,
    ):
        """Open the file; raise ToolCacheError for an unknown mode, or `replay` without a file."""
        if mode not in MODES or (path is None) != (mode == "off"):
            raise ToolCacheError(f"store: mode {mode!r} with file {path!r}")
        self.mode = mode
        self._path = None if path is None else pathlib.Path(path)
        self._days, self._max_bytes = days, max_bytes
        # Reads have their own connection and lock, so that they never wait for writes.
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        # Identities of the open files, since another process may move a damaged file away.
        self._file = self._reader_file = (0, 0)
        self._since_sweep = 0
        if self._path is not None:
            if mode == "replay" and not self._path.is_file():
                raise ToolCacheError(f"{self._path}: no such store, and replay makes none")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._guarded(lambda connection: None)

    def get(self, kind: str, key: str) -> tuple[bytes, bool] | None:
        """Return (value, failed) as passed to `put`, or None on a miss or a malformed entry.

        Failures are returned in `replay` only. In `use` they count as misses, so that they are
        retried.
        """
        if self.mode in ("off", "record"):
            return None
        query = f"SELECT {_VALUE}, failed, made FROM entry WHERE kind = ? AND key = ?"
        with self._reading:
            row = self._read(lambda c: c.execute(query, (kind, valid_text(key))).fetchone())
        if row is None:
            return None
        value, failed, made = row
        if not _well_formed(*row) or (
            self.mode == "use" and (failed or not is_fresh(made, self._days))
        ):
            return None
        return value, bool(failed)

    def put(self, kind: str, key: str, value: bytes, *, failed: bool = False) -> None:
        """Write a value to disk. In mode `use`, a failure never replaces a success."""
        if self.mode in ("off", "replay"):
            return
        row = (kind, valid_text(key), value, int(failed), time.time())
        command = _UPSERT if self.mode == "record" else _UNLESS_WORSE
        with self._lock:
            self._guarded(lambda connection: connection.execute(command, row))
            self._sweep_after(len(value) + 2 * len(key))

    def info(self) -> list[tuple[str, int, int]]:
        """Return (kind, number of entries, bytes of values) for each kind."""
        query = "SELECT kind, count(*), sum(length(value)) FROM entry GROUP BY kind ORDER BY kind"
        with self._lock:
            return self._guarded(lambda connection: connection.execute(query).fetchall())

    def export(self, target: str | pathlib.Path) -> None:
        """Write the store to a new file, atomically."""
        with outputs.new_file(target) as partial, self._lock:
            self._guarded(lambda connection: connection.execute("VACUUM INTO ?", (str(partial),)))

    def take(self, source: str | pathlib.Path) -> int:
        """Import the entries of another store that are missing or failures here.

        A failure is imported only if this store has no entry for its key.

        Returns:
          Number of imported entries.

        Raises:
          ToolCacheError: `source` is missing, damaged or not a store.
        """
        rows, taken = entries_of(source), 0

        def insert(connection: sqlite3.Connection) -> int:
            with _transaction(connection):
                return connection.executemany(_UNLESS_THERE, some).rowcount

        with self._lock:
            while some := list(itertools.islice(rows, _AT_ONCE)):
                taken += self._guarded(insert)
                self._sweep_after(sum(len(row[2]) + 2 * len(row[1]) for row in some))
        return taken

    def _sweep_after(self, size: int) -> None:
        """Delete old entries if a twentieth of `max_bytes` was written since the last time."""
        self._since_sweep += size
        if self._since_sweep > self._max_bytes / 20:
            self._since_sweep = 0
            self._guarded(self._sweep)

    def close(self) -> None:
        with self._lock, self._reading:
            # The writing connection is closed last, as closing it removes the write-ahead log.
            for connection in (self._reader, self._connection):
                if connection is not None:
                    connection.close()
            self._connection = self._reader = None

    def _read(self, act):
        """Call `act` with a read-only connection; in `replay` or on failure, use `_guarded`."""
        if self.mode != "replay":
            with contextlib.suppress(sqlite3.Error):
                if self._reader is None or self._reader_file != self._place():
                    self._reader, self._reader_file = self._open("ro"), self._place()
                return act(self._reader)
        with self._lock:
            return self._guarded(act)

    def _guarded(self, act):
        """Call `act` with the connection. A damaged file is moved away and a new one created."""
        try:
            # SQLite itself waits for another process's write, but fails with SQLITE_BUSY at once
            # while another process creates, recovers or closes the file.
            return _patiently(lambda: act(self._connect()))
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:  # disk full, too large
                raise ToolCacheError(f"{self._path}: {_said(error)}") from None
            if self.mode == "replay":
                raise ToolCacheError(f"{self._path}: damaged, or no store ({error})") from None
            self._set_aside(error)
            return _patiently(lambda: act(self._connect()))

    def _place(self) -> tuple[int, int]:
        """Return (device, inode) of the file, or (0, 0) if it is missing."""
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return 0, 0
        return found.st_dev, found.st_ino

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._file != self._place():
            self._connection.close()
            self._connection = None
        if self._connection is None and self.mode == "replay":
            connection = self._open("ro" if os.access(self._path.parent, os.W_OK) else "immutable")
            try:
                _check_table(connection)
            except BaseException:
                connection.close()
                raise
            self._keep(connection)
        elif self._connection is None:
            connection = self._open("rwc")
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(_SCHEMA)
            except BaseException:
                connection.close()
                raise
            self._keep(connection)
        return self._connection

    def _keep(self, connection: sqlite3.Connection) -> None:
        self._connection, self._file = connection, self._place()

    def _open(self, mode: str) -> sqlite3.Connection:
        """Open the file in a mode of `checked_sqlite.connect`."""
        return _open(self._path, mode)

    def _set_aside(self, error: sqlite3.Error) -> None:
        """Move a damaged file away and create a new one.

        Only one process does so. Others that found the damage continue with the new file.
        """
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        with open(f"{self._path}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._sound():
                return
            aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self._path}{suffix}", f"{aside}{suffix}")
            self._connect()
        print(f"{self._path}: damaged ({error}); kept as {aside.name}, a new one is begun",
              file=sys.stderr)  # fmt: skip

    def _sound(self) -> bool:
        """Return whether the file is an intact store."""
        if not self._path.is_file():
            return False
        try:
            with contextlib.closing(self._open("ro")) as connection:
                return connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
        except sqlite3.Error:
            return False

    def _sweep(self, connection: sqlite3.Connection) -> None:
        """If `max_bytes` is exceeded, delete the oldest entries until a tenth of it is free."""
        # An imported entry could otherwise claim a time in the future and never be evicted.
        connection.execute(
            "DELETE FROM entry WHERE typeof(made) NOT IN ('real', 'integer') OR made > ?",
            (time.time() + _MAX_AHEAD,),
        )
        (total,) = connection.execute(f"SELECT coalesce(sum({_SIZE}), 0) FROM entry").fetchone()
        if total <= self._max_bytes:
            return
        left, oldest = total - 0.9 * self._max_bytes, None
        for made, size in connection.execute(f"SELECT made, {_SIZE} FROM entry ORDER BY made"):
            left, oldest = left - (size or 0), made
            if left <= 0:
                break
        connection.execute("DELETE FROM entry WHERE made <= ?", (oldest,))


def entries_of(source: str | pathlib.Path) -> Iterator[tuple[str, str, bytes, int, float]]:
    """Yield (kind, key, value, failed, made) of each entry in a store's file.

    Malformed entries are skipped, and their number is printed.

    Raises:
      ToolCacheError: The file is damaged or not a store.
    """
    source, skipped, now = pathlib.Path(source), 0, time.time()
    query = f"SELECT kind, key, {_VALUE}, failed, made FROM entry"
    try:
        with contextlib.closing(_open(source, "ro")) as connection:
            _check_table(connection)
            # Pages that are linked many times could turn a small file into an endless table.
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise ToolCacheError(f"{source}: damaged")
            for kind, key, value, failed, made in connection.execute(query):
                named = isinstance(kind, str) and isinstance(key, str) and ":" not in kind
                value = value.encode("utf-8", "replace") if isinstance(value, str) else value
                if named and _well_formed(value, failed, made):
                    yield kind, key, value, failed, min(made, now)
                else:
                    skipped += 1
    except sqlite3.DatabaseError as error:
        raise ToolCacheError(f"{source}: not a store ({_said(error)})") from None
    if skipped:
        print(f"{source}: skipped {skipped} malformed entries", file=sys.stderr)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def is_fresh(made: float, days: float) -> bool:
    """Return whether a value made at time `made` is at most `days` old by the local clock."""
    return -_MAX_AHEAD <= time.time() - made <= days * 86400


def _open(path: pathlib.Path, mode: str) -> sqlite3.Connection:
    """Open a store's file in a mode of `checked_sqlite.connect`.

    Raises:
      sqlite3.Error: The file cannot be opened, or its tables are not those of a store.
    """
    connection = checked_sqlite.connect(
        path,
        mode,
        timeout=_WAIT,
        isolation_level=None,  # autocommit
        check_same_thread=False,
    )
    try:
        checked_sqlite.check_schema(connection)
        query = "SELECT name, sql FROM sqlite_master WHERE tbl_name = 'entry' COLLATE NOCASE"
        for name, sql in connection.execute(query):
            if sql is not None and " ".join(sql.split()) not in _OURS:
                raise checked_sqlite.SchemaError(f"{name!r} is not as a store has it")
    except BaseException:
        connection.close()
        raise
    return connection


_OURS = [" ".join(sql.split()) for sql in (_TABLE, _INDEX)]


def _check_table(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.Error if the table of entries is missing."""
    connection.execute("SELECT kind, key, value, failed, made FROM entry LIMIT 1")


def _well_formed(value: Any, failed: Any, made: Any) -> bool:
    return (
        isinstance(value, bytes)
        and failed in (0, 1)
        and isinstance(made, (int, float))
        and math.isfinite(made)
    )


def _said(error: sqlite3.Error) -> str:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_INTERRUPT:
        return "a query took more steps than a file of its size can need"
    return str(error)
