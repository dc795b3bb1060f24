"""What tools found, kept on disk: an SQLite file that processes share and labs hand on.

    off       nothing is read or written
    use       what is there, and not too old, is not asked for again; the rest is asked and kept
    record    everything is asked, and kept: a fresh record
    replay    only what is there; nothing is asked, whatever its age

A value that was put is on disk when `put` returns, and survives the death of any process.
"""

import contextlib
import os
import pathlib
import sqlite3
import sys
import threading
import time
from typing import Literal

import tenacity

Mode = Literal["off", "use", "record", "replay"]
MODES: tuple[str, ...] = ("off", "use", "record", "replay")
_WAIT = 60.0  # seconds for another process's write
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
  kind TEXT, key TEXT, value BLOB, failed INTEGER, made REAL, PRIMARY KEY (kind, key)
);
CREATE INDEX IF NOT EXISTS entry_by_age ON entry (made);
"""
_UPSERT = "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?)"


class StoreError(ValueError):
    """A store that cannot be used; the message names it."""


def _busy(error: BaseException) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return isinstance(error, sqlite3.OperationalError) and code & 0xFF == sqlite3.SQLITE_BUSY


_patiently = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_busy),
    wait=tenacity.wait_random(0.01, 0.1),
    stop=tenacity.stop_after_delay(_WAIT),
    reraise=True,
)


class Store:
    """Args of the constructor:
    path: the file; made if need be. None with mode `off`.
    mode: see above.
    days: after which `use` asks again.
    max_bytes: of all values; the oldest make room.
    """

    def __init__(
        self,
        path: str | pathlib.Path | None,
        mode: Mode = "use",
        *,
        days: float = 90.0,
        max_bytes: int = 20_000_000_000,
    ):
        """Raises StoreError for a mode that does not exist, and for `replay` without a file."""
        if mode not in MODES or (path is None) != (mode == "off"):
            raise StoreError(f"store: mode {mode!r} with file {path!r}")
        self.mode = mode
        self._path = None if path is None else pathlib.Path(path)
        self._days, self._max_bytes = days, max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._since_sweep = 0
        if self._path is not None:
            if mode == "replay" and not self._path.is_file():
                raise StoreError(f"{self._path}: no such store, and replay makes none")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._guarded(lambda connection: None)

    def get(self, kind: str, key: str) -> tuple[bytes, bool] | None:
        """(value, whether it is a failure) as `put`, or None where it is to be asked for.

        Failures come back in `replay` only: else they are worth another try.
        """
        if self.mode in ("off", "record"):
            return None
        query = "SELECT value, failed, made FROM entry WHERE kind = ? AND key = ?"
        with self._lock:
            row = self._guarded(lambda c: c.execute(query, (kind, key)).fetchone())
        if row is None:
            return None
        value, failed, made = row
        if self.mode == "use" and (failed or time.time() - made > self._days * 86400):
            return None
        return value, bool(failed)

    def put(self, kind: str, key: str, value: bytes, *, failed: bool = False) -> None:
        """Keeps a value; it is on disk when this returns."""
        if self.mode in ("off", "replay"):
            return
        row = (kind, key, value, int(failed), time.time())
        with self._lock:
            self._guarded(lambda connection: connection.execute(_UPSERT, row))
            self._since_sweep += len(value)
            if self._since_sweep > self._max_bytes / 20:
                self._since_sweep = 0
                self._guarded(self._sweep)

    def info(self) -> list[tuple[str, int, int]]:
        """(kind, entries, bytes) of each kind."""
        query = "SELECT kind, count(*), sum(length(value)) FROM entry GROUP BY kind ORDER BY kind"
        with self._lock:
            return self._guarded(lambda connection: connection.execute(query).fetchall())

    def export(self, target: str | pathlib.Path) -> None:
        """Writes all of it as one file, which appears when it is complete."""
        target = pathlib.Path(target)
        partial = target.with_name(f".{target.name}.partial")
        partial.unlink(missing_ok=True)
        with self._lock:
            self._guarded(lambda connection: connection.execute("VACUUM INTO ?", (str(partial),)))
        os.replace(partial, target)

    def take(self, source: str | pathlib.Path) -> int:
        """Takes what another store has and this one has not; returns how much that was.

        Raises:
          StoreError: no such store.
        """
        source = pathlib.Path(source).resolve()
        with self._lock:
            connection = self._connect()
            try:
                connection.execute("ATTACH ? AS other", (f"{source.as_uri()}?mode=ro",))
                done = connection.execute(
                    "INSERT OR IGNORE INTO entry SELECT kind, key, value, failed, made "
                    "FROM other.entry"
                )
                return done.rowcount
            except sqlite3.DatabaseError as error:
                raise StoreError(f"{source}: not a store ({error})") from None
            finally:
                with contextlib.suppress(sqlite3.DatabaseError):
                    connection.execute("DETACH other")

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _guarded(self, act):
        """`act(connection)`; where the file is damaged it is set aside, and a new one begun."""
        try:
            # SQLite waits for another process's write by itself, but not while a file is made,
            # recovered or closed by another: then it is busy at once.
            return _patiently(lambda: act(self._connect()))
        except sqlite3.OperationalError as error:  # locked, disk full: not damage
            raise StoreError(f"{self._path}: {error}") from None
        except sqlite3.DatabaseError as error:
            if self.mode == "replay":
                raise StoreError(f"{self._path}: damaged ({error})") from None
            self._set_aside(error)
            return _patiently(lambda: act(self._connect()))

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(
                self._path.resolve().as_uri(),
                uri=True,
                timeout=_WAIT,
                isolation_level=None,  # every statement is its own transaction
                check_same_thread=False,
            )
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(_SCHEMA)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
        os.replace(self._path, aside)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self._path}{suffix}", f"{aside}{suffix}")
        print(f"{self._path}: damaged ({error}); kept as {aside.name}, a new one is begun",
              file=sys.stderr)  # fmt: skip

    def _sweep(self, connection: sqlite3.Connection) -> None:
        """Deletes the oldest values until a tenth of the room is free."""
        (total,) = connection.execute("SELECT sum(length(value)) FROM entry").fetchone()
        if total <= self._max_bytes:
            return
        left, oldest = total - 0.9 * self._max_bytes, None
        for made, size in connection.execute("SELECT made, length(value) FROM entry ORDER BY made"):
            left, oldest = left - size, made
            if left <= 0:
                break
        connection.execute("DELETE FROM entry WHERE made <= ?", (oldest,))
