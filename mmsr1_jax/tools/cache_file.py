"""File format of a `ToolCache`: an SQLite file with one table of entries.

A file may come from an untrusted source. A file with another schema is refused, and entries whose
values have the wrong types are treated as missing.
"""

import contextlib
import math
import pathlib
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools import checked_sqlite
from mmsr1_jax.utils import checked_json
from mmsr1_jax.utils.checked_json import utf8
from mmsr1_jax.utils.logs import log

BUSY_TIMEOUT = 60.0  # seconds to wait for another process's write
_TABLE = """CREATE TABLE entry (
  kind TEXT, key TEXT, value BLOB, failed INTEGER, created REAL, PRIMARY KEY (kind, key)
)"""
_INDEX = "CREATE INDEX entry_by_age ON entry (created)"
SCHEMA = ";".join(
    statement.replace(f"CREATE {kind}", f"CREATE {kind} IF NOT EXISTS", 1)
    for kind, statement in (("TABLE", _TABLE), ("INDEX", _INDEX))
)
_ALLOWED_SQL = [" ".join(statement.split()) for statement in (_TABLE, _INDEX)]
# Longer values are not read, since an entry of an untrusted file may have any length.
VALUE = f"CASE WHEN length(value) <= {checked_json.MAX_BYTES} THEN value END"
MAX_CLOCK_SKEW = 86400.0  # seconds by which another machine's clock may be ahead


class ToolCacheError(UserError):
    """Unusable cache; the message names it."""


def open_file(path: pathlib.Path, mode: str) -> sqlite3.Connection:
    """Open a cache file in a mode of `checked_sqlite.connect`.

    Raises:
      sqlite3.Error: The file cannot be opened, or its schema is not that of a cache.
    """
    connection = checked_sqlite.connect(
        path,
        mode,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,  # autocommit
        check_same_thread=False,
    )
    try:
        checked_sqlite.check_schema(connection)
        query = "SELECT name, sql FROM sqlite_master WHERE tbl_name = 'entry' COLLATE NOCASE"
        for name, sql in connection.execute(query):
            if sql is not None and " ".join(sql.split()) not in _ALLOWED_SQL:
                raise checked_sqlite.SchemaError(f"{name!r} does not have the schema of a cache")
    except BaseException:
        connection.close()
        raise
    return connection


def check_table(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.Error if the table of entries is missing."""
    connection.execute("SELECT kind, key, value, failed, created FROM entry LIMIT 1")


def is_intact(path: pathlib.Path) -> bool:
    """Return whether a file is an undamaged cache."""
    if not path.is_file():
        return False
    try:
        with contextlib.closing(open_file(path, "ro")) as connection:
            return _passes_check(connection)
    except sqlite3.Error:
        return False


def read_entries(path: str | pathlib.Path) -> Iterator[tuple[str, str, bytes, int, float]]:
    """Yield (kind, key, value, failed, created) of each entry in a cache file.

    Malformed entries are skipped, and their number is logged.

    Raises:
      ToolCacheError: The file is damaged or not a cache.
    """
    path, num_skipped, now = pathlib.Path(path), 0, time.time()
    query = f"SELECT kind, key, {VALUE}, failed, created FROM entry"
    try:
        with contextlib.closing(open_file(path, "ro")) as connection:
            check_table(connection)
            # Pages that are linked many times could turn a small file into an endless table.
            if not _passes_check(connection):
                raise ToolCacheError(f"{path}: the file is damaged")
            for kind, key, value, failed, created in connection.execute(query):
                has_name = isinstance(kind, str) and isinstance(key, str) and ":" not in kind
                value = utf8(value) if isinstance(value, str) else value
                if has_name and is_valid(value, failed, created):
                    yield kind, key, value, failed, min(created, now)
                else:
                    num_skipped += 1
    except sqlite3.DatabaseError as error:
        raise ToolCacheError(f"{path}: not a cache file ({describe(error)})") from None
    if num_skipped:
        log.warning("%s: skipped %d malformed entries", path, num_skipped)


def _passes_check(connection: sqlite3.Connection) -> bool:
    return connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)


def is_fresh(created: float, ttl_days: float) -> bool:
    """Return whether an entry created at a time is at most `ttl_days` old by the local clock."""
    return -MAX_CLOCK_SKEW <= time.time() - created <= ttl_days * 86400


def is_valid(value: Any, failed: Any, created: Any) -> bool:
    """Return whether the columns of an entry have the right types."""
    return (
        isinstance(value, bytes)
        and failed in (0, 1)
        and isinstance(created, (int, float))
        and math.isfinite(created)
    )


def describe(error: sqlite3.Error) -> str:
    """Return a message for an error of SQLite."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_INTERRUPT:
        return "a query took more steps than a file of its size can need"
    return str(error)
