"""What tools found, kept on disk: an SQLite file that processes share and labs hand on.

    off       nothing is read or written
    use       what is there, and not too old, is not asked for again; the rest is asked and kept
    record    everything is asked, and kept: a fresh record
    replay    only what is there; nothing is asked, whatever its age

A value that was put is on disk when `put` returns, and survives the death of any process.
"""

import contextlib
import fcntl
import os
import pathlib
import sqlite3
import sys
import threading
import time
from typing import Literal

import tenacity

from mmsr1_jax import outputs

Mode = Literal["off", "use", "record", "replay"]
MODES: tuple[str, ...] = ("off", "use", "record", "replay")
_WAIT = 60.0  # seconds for another process's write
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
  kind TEXT, key TEXT, value BLOB, failed INTEGER, made REAL, PRIMARY KEY (kind, key)
);
CREATE INDEX IF NOT EXISTS entry_by_age ON entry (made);
"""
_UPSERT = """
INSERT INTO entry VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, key) DO UPDATE
SET value = excluded.value, failed = excluded.failed, made = excluded.made
"""
# A failure takes the place of a failure only.
_UNLESS_WORSE = _UPSERT + "WHERE excluded.failed <= entry.failed"
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


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
        # Reading has a connection and a lock of its own: it never waits for another's writing.
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        # The files that they are connections to: another process may set one aside.
        self._file = self._reader_file = (0, 0)
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
        with self._reading:
            row = self._read(lambda c: c.execute(query, (kind, _valid(key))).fetchone())
        if row is None:
            return None
        value, failed, made = row
        if self.mode == "use" and (failed or time.time() - made > self._days * 86400):
            return None
        return value, bool(failed)

    def put(self, kind: str, key: str, value: bytes, *, failed: bool = False) -> None:
        """Keeps a value; it is on disk when this returns. In `use` a failure does not take the
        place of what was found before."""
        if self.mode in ("off", "replay"):
            return
        row = (kind, _valid(key), value, int(failed), time.time())
        command = _UPSERT if self.mode == "record" else _UNLESS_WORSE
        with self._lock:
            self._guarded(lambda connection: connection.execute(command, row))
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
        with outputs.new_file(target) as partial, self._lock:
            self._guarded(lambda connection: connection.execute("VACUUM INTO ?", (str(partial),)))

    def take(self, source: str | pathlib.Path) -> int:
        """Takes what another store has and this one has not, or only as a failure; returns how
        much that was.

        Raises:
          StoreError: no such store.
        """
        source = pathlib.Path(source).resolve()
        with self._lock:
            connection = self._connect()
            try:
                connection.execute("ATTACH ? AS other", (f"{source.as_uri()}?mode=ro",))
                done = connection.execute(
                    "INSERT INTO entry SELECT kind, key, value, failed, made FROM other.entry "
                    "WHERE true ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value, "
                    "failed = 0, made = excluded.made WHERE entry.failed AND NOT excluded.failed"
                )
                return done.rowcount
            except sqlite3.DatabaseError as error:
                raise StoreError(f"{source}: not a store ({error})") from None
            finally:
                with contextlib.suppress(sqlite3.DatabaseError):
                    connection.execute("DETACH other")

    def close(self) -> None:
        with self._lock, self._reading:
            for connection in (self._connection, self._reader):
                if connection is not None:
                    connection.close()
            self._connection = self._reader = None

    def _read(self, act):
        """`act(connection)` on a connection that only reads; where that fails, as `_guarded`."""
        if self.mode != "replay":
            with contextlib.suppress(sqlite3.Error):
                if self._reader is None or self._reader_file != self._place():
                    self._reader, self._reader_file = self._open("ro"), self._place()
                return act(self._reader)
        with self._lock:
            return self._guarded(act)

    def _guarded(self, act):
        """`act(connection)`; where the file is damaged it is set aside, and a new one begun."""
        try:
            # SQLite waits for another process's write by itself, but not while a file is made,
            # recovered or closed by another: then it is busy at once.
            return _patiently(lambda: act(self._connect()))
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:  # disk full, too large
                raise StoreError(f"{self._path}: {error}") from None
            if self.mode == "replay":
                raise StoreError(f"{self._path}: damaged, or no store ({error})") from None
            self._set_aside(error)
            return _patiently(lambda: act(self._connect()))

    def _place(self) -> tuple[int, int]:
        """What tells the file from another of the same name."""
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
                connection.execute("SELECT kind, key, value, failed, made FROM entry LIMIT 1")
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
        """`mode`: of SQLite's URIs; `immutable`: nothing is written, not even beside the file."""
        suffix = "mode=ro&immutable=1" if mode == "immutable" else f"mode={mode}"
        return sqlite3.connect(
            f"{self._path.resolve().as_uri()}?{suffix}",
            uri=True,
            timeout=_WAIT,
            isolation_level=None,  # every statement is its own transaction
            check_same_thread=False,
        )

    def _set_aside(self, error: sqlite3.Error) -> None:
        """Moves a damaged file away; one process does, and others that met the damage go on with
        the new file."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        with open(f"{self._path}.lock", "w") as lock:
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
        """Whether the file is a store in order."""
        if not self._path.is_file():
            return False
        try:
            with contextlib.closing(self._open("ro")) as connection:
                return connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
        except sqlite3.Error:
            return False

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


def _valid(key: str) -> str:
    """Without halves of surrogate pairs, which SQLite does not take."""
    return key.encode("utf-8", "replace").decode()
