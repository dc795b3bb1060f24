"""Safe access to untrusted SQLite files: ordinary tables only, bounded time per statement.

A view that replaces a table, a trigger or a generated column is code that runs when the table is
used. Pages that are linked many times can turn a small file into an endless table.
"""

import os
import pathlib
import sqlite3
from typing import Any

_STEPS_PER_CHECK = 100_000  # of SQLite's virtual machine, between two checks of the budget
_MIN_BUDGET = 20_000_000  # steps per statement: about a second
_STEPS_PER_BYTE = 10  # per byte of the file; a row takes about 20 steps and a dozen bytes


class SchemaError(sqlite3.DatabaseError):
    """File with a schema that is not allowed; the message names the object."""


class Connection(sqlite3.Connection):
    """Connection that does not trust the schema and bounds the steps of a statement.

    A statement that takes more steps than a file of this size can need is interrupted with
    `sqlite3.OperationalError` (interrupted).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Invalid UTF-8 must not raise in the middle of a search.
        self.text_factory = lambda text: text.decode("utf-8", "replace")
        self._remaining = self._budget = _MIN_BUDGET
        super().execute("PRAGMA trusted_schema = OFF")
        super().execute("PRAGMA cell_size_check = ON")
        self.set_progress_handler(self._on_progress, _STEPS_PER_CHECK)

    def allow_for(self, path: str | os.PathLike) -> None:
        """Set the step budget of statements according to the size of a file."""
        self._budget = self._remaining = _MIN_BUDGET + _STEPS_PER_BYTE * os.stat(path).st_size

    def execute(self, *args: Any) -> sqlite3.Cursor:
        self._remaining = self._budget
        return super().execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        self._remaining = self._budget
        return super().executemany(*args)

    def _on_progress(self) -> bool:
        self._remaining -= _STEPS_PER_CHECK
        return self._remaining < 0


def connect(path: pathlib.Path, mode: str, **options: Any) -> Connection:
    """Open an SQLite file.

    Args:
      path: Path of the file.
      mode: `ro`, `rw` or `rwc`, as in SQLite's URIs, or `immutable`, which writes nothing, not even
        files next to the database.
      **options: Further arguments of `sqlite3.connect`.
    """
    suffix = "mode=ro&immutable=1" if mode == "immutable" else f"mode={mode}"
    uri = f"{path.resolve().as_uri()}?{suffix}"
    connection = sqlite3.connect(uri, uri=True, factory=Connection, **options)
    if path.is_file():
        connection.allow_for(path)
    return connection


def check_schema(connection: sqlite3.Connection, modules: tuple[str, ...] = ()) -> None:
    """Check that a file contains only ordinary tables with plain columns and their indexes.

    Args:
      connection: Connection to the file.
      modules: Names in lower case of the virtual table modules that are allowed as well.

    Raises:
      SchemaError: The file contains anything else, or more than 1000 tables and indexes.
    """
    objects = connection.execute(
        "SELECT type, name, coalesce(sql, '') FROM sqlite_master LIMIT 1001"
    ).fetchall()
    if len(objects) > 1000:
        raise SchemaError("more than 1000 tables and indexes")
    for kind, name, sql in objects:
        if kind not in ("table", "index"):
            raise SchemaError(f"{kind} {name!r}: only ordinary tables are allowed")
        tokens = sql.upper().split(None, 3)
        if kind == "table" and tokens[1:2] == ["VIRTUAL"]:
            module = sql.upper().partition(" USING ")[2].partition("(")[0].strip()
            if module.lower() not in modules:
                raise SchemaError(f"virtual table {name!r}: only ordinary tables are allowed")
        elif kind == "table":
            columns = connection.execute("SELECT hidden FROM pragma_table_xinfo(?)", (name,))
            if any(hidden for (hidden,) in columns):
                raise SchemaError(f"table {name!r}: generated columns are not allowed")
