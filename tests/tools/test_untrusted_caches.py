"""Cache files from untrusted sources: other schemas are rejected, invalid values are misses."""

import asyncio
import json
import sqlite3
import time

import pytest

from mmsr1_jax.tools import Query, checked_sqlite
from mmsr1_jax.tools.cached_tool import (
    VALUE_TYPES,
    CachedCalls,
    CachedFinder,
    CachedSearch,
    NotCachedError,
)
from mmsr1_jax.tools.services import Hit
from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import fallbacks

VALID = {
    "links": [["l", "t", "s"]], "page": "text", "summary": "text", "matches": [["l", "t", "u"]],
    "image": "AAAA", "upload": True, "search": ["ok", None, [["text"]]],
    "passages": [["t", "text"]], "verdict": [True, "why"], "short form": "",
    "pictures": [["l", "t", "p", "u", "c"]], "chat": "text",
}  # fmt: skip
# Values that are invalid for every kind. Each kind is also tested with the values of the others.
INVALID = [b"5", b"null", b"[[[1]]]", b'{"a": 1}', b"[" * 100_000, b"NaN", b"\xff", b"", b'[["a"]]',
       b'["yes", 5]', b"[true]", b"[1, 2]", b'["ok", null, [[5]]]', b'["failed", null, []]',
       b'[["a", "b", "c", "d"]]', b'"\\ud800"', b"false", b'[["a", "b", null]]']  # fmt: skip


def put(path, kind, key, value, failed=0, created=None):
    ToolCache(path).close()
    with sqlite3.connect(path) as connection:
        row = (kind, key, value, failed, time.time() if created is None else created)
        connection.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?)", row)
    connection.close()


async def must_not_be_called():
    raise AssertionError("requested")


@pytest.mark.parametrize("kind", VALUE_TYPES)
def test_value_of_wrong_type_is_treated_as_missing(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.setattr(fallbacks, "_logged", set())
    fallbacks.take_counts()
    path, valid = tmp_path / "cache.sqlite", json.dumps(VALID[kind]).encode()
    cache = ToolCache(path, "record")
    others = [json.dumps(value).encode() for value in VALID.values()]
    same_type = {"links", "matches"} if kind in ("links", "matches") else {kind}
    texts = {"page", "summary", "short form", "image", "chat"}
    others = [
        data for other, data in zip(VALID, others, strict=True)
        if other not in same_type and not (kind in texts and other in texts)
    ]  # fmt: skip
    invalid = [*others, *INVALID]
    for index, value in enumerate([valid, *invalid]):
        cache.put(kind, str(index), value)
    cache.put(kind, "failed", b"[1]", failed=True)
    cache.close()
    replaying = CachedCalls(ToolCache(path, "replay"))
    result = asyncio.run(replaying.get(kind, "0", must_not_be_called))
    assert json.loads(json.dumps(result)) == VALID[kind]  # JSON has lists only
    keys = [*map(str, range(1, 1 + len(invalid))), "failed"]
    for key in keys:
        with pytest.raises(NotCachedError):
            asyncio.run(replaying.get(kind, key, must_not_be_called))
    assert fallbacks.take_counts() == {"cache/malformed": len(keys)}
    assert capsys.readouterr().err.count(f"a malformed value of kind {kind!r}") == 1

    using = CachedCalls(ToolCache(path))

    async def call():
        return VALID[kind]

    for key in keys:
        assert asyncio.run(using.get(kind, key, call)) == VALID[kind]
    assert asyncio.run(CachedCalls(ToolCache(path, "replay")).look_up(kind, keys[0])) is not None


def test_image_that_is_not_base64_is_treated_as_missing(tmp_path):
    path = tmp_path / "cache.sqlite"
    for key, value in (("a", b'"%%%"'), ("b", b'"AAA"'), ("c", b'"A\\nAAA"')):
        put(path, "image", key, value)
        with pytest.raises(NotCachedError):
            asyncio.run(
                CachedCalls(ToolCache(path, "replay")).get("image", key, must_not_be_called)
            )


def test_entry_with_columns_of_wrong_type_is_treated_as_missing(tmp_path):
    path, now = tmp_path / "cache.sqlite", time.time()
    rows = [("text", 0, now), (None, 0, now), (5, 0, now), (b"1", None, now), (b"1", "x", now),
            (b"1", 7, now), (b"1", 0, None), (b"1", 0, "x"), (b"1", 0, float("inf"))]  # fmt: skip
    for index, (value, failed, created) in enumerate(rows):
        ToolCache(path).close()
        with sqlite3.connect(path) as connection:
            row = ("page", str(index), value, failed, created)
            connection.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?)", row)
        connection.close()
        for mode in ("replay", "use"):
            assert ToolCache(path, mode).get("page", str(index)) is None, (row, mode)
    put(path, "page", "later", b"1", created=now + 1e9)  # otherwise it would never become stale
    assert ToolCache(path).get("page", "later") is None
    assert ToolCache(path, "replay").get("page", "later") == (b"1", False)
    other = ToolCache(tmp_path / "other.sqlite")
    assert other.import_entries(path) == 2 and other.get("page", "later") == (b"1", False)
    cache = ToolCache(path)
    cache.put("page", "0", b"2")
    cache.put("page", "3", b"2")
    assert cache.get("page", "0") == cache.get("page", "3") == (b"2", False)


def test_replayed_search_of_wrong_type_fails_with_a_message(tmp_path):
    path = tmp_path / "cache.sqlite"
    put(path, "search", json.dumps(["n", "q", "q"]), b'["ok", null, [[5]]]')
    put(path, "links", json.dumps(["n", "q", 5]), b"[[1, 2, 3]]")
    cached_calls = CachedCalls(ToolCache(path, "replay"))
    search = CachedSearch(None, cached_calls, "n")
    query = Query(action="text_search", text="q", question="q")
    observation = asyncio.run(search(query))
    assert observation.status == "failed" and "malformed" in observation.error
    with pytest.raises(WebError):
        asyncio.run(CachedFinder(None, cached_calls, "n").search("q", 5))
    put(path, "links", json.dumps(["n", "q", 5]), b'[["l", "t", "s"]]')
    again = CachedFinder(None, CachedCalls(ToolCache(path, "replay")), "n")
    assert asyncio.run(again.search("q", 5)) == [Hit("l", "t", "s")]


ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT "
ENTRY = "kind TEXT, key TEXT, value BLOB, failed INTEGER, created REAL, PRIMARY KEY (kind, key)"
OTHER_SCHEMAS = {
    "a view": f"CREATE VIEW entry AS {ENDLESS} 'page' kind, n key, x'22' value, 0 failed, "
    "0 created FROM r",
    "a virtual table": "CREATE VIRTUAL TABLE entry USING fts5(kind, key, value, failed, created)",
    "a trigger": f"CREATE TABLE entry (\n  {ENTRY}\n); CREATE TRIGGER t AFTER INSERT ON entry "
    "BEGIN DELETE FROM entry; END",
    "a view elsewhere": f"CREATE TABLE entry (\n  {ENTRY}\n); CREATE VIEW v AS SELECT 1",
    "a generated column": "CREATE TABLE entry (kind, key, value AS (zeroblob(1000000000)), "
    "failed, created)",
    "a check": f"CREATE TABLE entry ({ENTRY}, CHECK (length(randomblob(1000000000)) > 0))",
    "a default": "CREATE TABLE entry (kind, key, value, failed, created DEFAULT (randomblob(1)))",
    "an index of an expression": f"CREATE TABLE entry (\n  {ENTRY}\n); "
    "CREATE INDEX i ON entry (hex(zeroblob(length(value) * 1000)))",
    "another index of that name": f"CREATE TABLE entry (\n  {ENTRY}\n); "
    "CREATE INDEX entry_by_age ON entry (created) WHERE failed",
}


@pytest.mark.parametrize("name", OTHER_SCHEMAS)
def test_cache_file_with_another_schema_is_rejected_quickly(tmp_path, name):
    path = tmp_path / "evil.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(OTHER_SCHEMAS[name])
    connection.close()
    before = time.process_time()
    for mode in ("use", "record", "replay"):
        with pytest.raises(ToolCacheError, match="evil.sqlite: ") as raised:
            ToolCache(path, mode).get("page", "x")
        assert "\n" not in str(raised.value)
    other = ToolCache(tmp_path / "other.sqlite")
    with pytest.raises(ToolCacheError, match="evil.sqlite: not a cache file"):
        other.import_entries(path)
    assert other.info() == [] and time.process_time() - before < 5
    assert path.is_file()  # the file is not moved away


def test_database_pages_linked_many_times_are_detected(tmp_path):
    """A small file in which each interior page links the same child 200 times."""
    path = tmp_path / "dag.sqlite"
    cache = ToolCache(path)
    cache.put("page", "a", b"x")
    cache.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.executemany(
            "INSERT INTO entry VALUES ('page', ?, ?, 0, 0.0)",
            ((f"n{index:06}", b"x" * 200) for index in range(60_000)),
        )
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        root = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'entry' AND type = 'table'"
        ).fetchone()[0]
    connection.close()
    data = bytearray(path.read_bytes())

    def cells(index):
        start = (index - 1) * size + (100 if index == 1 else 0)
        count = int.from_bytes(data[start + 3 : start + 5], "big")
        offsets = [int.from_bytes(data[start + 12 + 2 * i : start + 14 + 2 * i], "big")
              for i in range(count)]  # fmt: skip
        return start, [(index - 1) * size + offset for offset in offsets]

    start, offsets = cells(root)
    assert data[start] == 5  # interior page of a table
    child = bytes(data[offsets[0] : offsets[0] + 4])
    for offset in offsets:
        data[offset : offset + 4] = child
    path.write_bytes(data)
    with pytest.raises(ToolCacheError, match="dag.sqlite: the file is damaged"):
        ToolCache(tmp_path / "other.sqlite").import_entries(path)


def test_endless_query_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(checked_sqlite, "_MIN_BUDGET", 1_000_000)
    connection = checked_sqlite.connect(tmp_path / "a.sqlite", "rwc")
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            connection.execute(f"{ENDLESS} count(*) FROM r").fetchall()
        assert connection.execute("SELECT 1").fetchone() == (1,)  # the budget is per statement


def test_keys_count_towards_the_size_limit(tmp_path):
    path = tmp_path / "cache.sqlite"
    cache = ToolCache(path, max_bytes=1_000_000)
    for index in range(600):
        cache.put("verdict", json.dumps(["m", "q" * 10_000, index]), b'[true, "x"]')
    last = json.dumps(["m", "q" * 10_000, 599])
    assert cache.get("verdict", last) is not None
    cache.close()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2_000_000
