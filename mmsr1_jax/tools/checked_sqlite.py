"""SQLite files from outside: ordinary tables only, and no statement without end.

A view in place of a table, a trigger or a generated column is code that runs when the table is
used; pages that are linked many times make a small file a table without end.
"""

import os
import pathlib
import sqlite3

_STEPS = 100_000  # of SQLite's virtual machine, between two looks at the budget
_LEAST_BUDGET = 20_000_000  # of such steps for a statement: about a second
_STEPS_PER_BYTE = 10  # of the file; a row takes some 20 steps and a dozen bytes


class SchemaError(sqlite3.DatabaseError):
    """A file whose tables are not ordinary ones; the message names the object."""


class Connection(sqlite3.Connection):
    """A connection that trusts nothing in the schema; a statement that takes more steps than a file
    of its size can need is interrupted (`sqlite3.OperationalError`: interrupted)."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        # Text that is not UTF-8 must not raise in the middle of a search.
        self.text_factory = lambda text: text.decode("utf-8", "replace")
        self._left = self._budget = _LEAST_BUDGET
        super().execute("PRAGMA trusted_schema = OFF")
        super().execute("PRAGMA cell_size_check = ON")
        self.set_progress_handler(self._progress, _STEPS)

    def allow_for(self, path: str | os.PathLike) -> None:
        """Fit the budget of statements to the size of a file."""
        self._budget = self._left = _LEAST_BUDGET + _STEPS_PER_BYTE * os.stat(path).st_size

    def execute(self, *arguments):
        self._left = self._budget
        return super().execute(*arguments)

    def executemany(self, *arguments):
        self._left = self._budget
        return super().executemany(*arguments)

    def _progress(self) -> bool:
        self._left -= _STEPS
        return self._left < 0


def connect(path: pathlib.Path, mode: str, **options) -> Connection:
    """Open a file.

    Args:
      path: of the file.
      mode: `ro`, `rw` or `rwc` of SQLite's URIs; `immutable`: nothing is written, not even beside
        the file.
      options: of `sqlite3.connect`.
    """
    suffix = "mode=ro&immutable=1" if mode == "immutable" else f"mode={mode}"
    uri = f"{path.resolve().as_uri()}?{suffix}"
    connection = sqlite3.connect(uri, uri=True, factory=Connection, **options)
    if path.is_file():
        connection.allow_for(path)
    return connection


def check_schema(connection: sqlite3.Connection, modules: tuple[str, ...] = ()) -> None:
    """Raise SchemaError unless the file has nothing but ordinary tables with plain columns, their
    indexes, and virtual tables of `modules`."""
    found = connection.execute(
        "SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master LIMIT 1001"
    ).fetchall()
    if len(found) > 1000:
        raise SchemaError("more than 1000 tables")
    for kind, name, _, sql in found:
        if kind not in ("table", "index"):
            raise SchemaError(f"{kind} {name!r}: only ordinary tables are allowed")
        words = sql.upper().split(None, 3)
        if kind == "table" and words[1:2] == ["VIRTUAL"]:
            used = sql.upper().partition(" USING ")[2].partition("(")[0].strip()
            if used.lower() not in modules:
                raise SchemaError(f"virtual table {name!r}: only ordinary tables are allowed")
        elif kind == "table":
            columns = connection.execute("SELECT hidden FROM pragma_table_xinfo(?)", (name,))
            if any(hidden for (hidden,) in columns):
                raise SchemaError(f"table {name!r}: has generated columns")
