"""Stores, indexes and data sets that come from others: typed, ordinary, of bounded size."""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmsr1_jax.data import DataError
from mmsr1_jax.data.benchmarks import tables
from mmsr1_jax.data.questions import QuestionSource
from mmsr1_jax.tools import Query, local
from mmsr1_jax.tools.cached_tool import (
    SHAPES,
    CachedCalls,
    CachedFinder,
    CachedSearch,
    NotCachedError,
)
from mmsr1_jax.tools.local import LocalIndex, LocalIndexError
from mmsr1_jax.tools.services import Hit
from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import fallbacks

GOOD = {
    "links": [["l", "t", "s"]], "page": "text", "summary": "text", "matches": [["l", "t", "u"]],
    "picture": "AAAA", "published": True, "answer": ["ok", None, [["text"]]],
    "passages": [["t", "text"]], "verdict": [True, "why"], "short form": "",
}  # fmt: skip
# JSON that no kind has; beside it, each kind is tried with the values of the others.
ODD = [b"5", b"null", b"[[[1]]]", b'{"a": 1}', b"[" * 100_000, b"NaN", b"\xff", b"", b'[["a"]]',
       b'["yes", 5]', b"[true]", b"[1, 2]", b'["ok", null, [[5]]]', b'["failed", null, []]',
       b'[["a", "b", "c", "d"]]', b'"\\ud800"', b"false", b'[["a", "b", null]]']  # fmt: skip


def put(path, kind, key, value, failed=0, made=None):
    ToolCache(path).close()
    with sqlite3.connect(path) as connection:
        row = (kind, key, value, failed, time.time() if made is None else made)
        connection.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?)", row)
    connection.close()


async def nothing():
    raise AssertionError("asked")


@pytest.mark.parametrize("kind", SHAPES)
def test_a_value_of_another_type_is_treated_as_missing(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.setattr(fallbacks, "_logged", set())
    fallbacks.take_counts()
    path, good = tmp_path / "store.sqlite", json.dumps(GOOD[kind]).encode()
    store = ToolCache(path, "record")
    others = [json.dumps(value).encode() for value in GOOD.values()]
    alike = {"links", "matches"} if kind in ("links", "matches") else {kind}
    texts = {"page", "summary", "short form", "picture"}
    others = [
        data for other, data in zip(GOOD, others, strict=True)
        if other not in alike and not (kind in texts and other in texts)
    ]  # fmt: skip
    odd = [*others, *ODD]
    for number, value in enumerate([good, *odd]):
        store.put(kind, str(number), value)
    store.put(kind, "failed", b"[1]", failed=True)
    store.close()
    replayed = CachedCalls(ToolCache(path, "replay"))
    found = asyncio.run(replayed.get(kind, "0", nothing))
    assert json.loads(json.dumps(found)) == GOOD[kind]  # tuples are lists there
    keys = [*map(str, range(1, 1 + len(odd))), "failed"]
    for key in keys:
        with pytest.raises(NotCachedError):
            asyncio.run(replayed.get(kind, key, nothing))
    assert fallbacks.take_counts() == {"store/damaged": len(keys)}
    assert capsys.readouterr().err.count(f"a malformed value of kind {kind!r}") == 1

    using = CachedCalls(ToolCache(path))

    async def ask():
        return GOOD[kind]

    for key in keys:
        assert asyncio.run(using.get(kind, key, ask)) == GOOD[kind]
    assert asyncio.run(CachedCalls(ToolCache(path, "replay")).look(kind, keys[0])) is not None


def test_a_picture_that_is_no_base64_is_missing(tmp_path):
    path = tmp_path / "store.sqlite"
    for key, value in (("a", b'"%%%"'), ("b", b'"AAA"'), ("c", b'"A\\nAAA"')):
        put(path, "picture", key, value)
        with pytest.raises(NotCachedError):
            asyncio.run(CachedCalls(ToolCache(path, "replay")).get("picture", key, nothing))


def test_columns_of_other_types_are_missing(tmp_path):
    path, now = tmp_path / "store.sqlite", time.time()
    rows = [("text", 0, now), (None, 0, now), (5, 0, now), (b"1", None, now), (b"1", "x", now),
            (b"1", 7, now), (b"1", 0, None), (b"1", 0, "x"), (b"1", 0, float("inf"))]  # fmt: skip
    for number, (value, failed, made) in enumerate(rows):
        ToolCache(path).close()
        with sqlite3.connect(path) as connection:
            row = ("page", str(number), value, failed, made)
            connection.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?)", row)
        connection.close()
        for mode in ("replay", "use"):
            assert ToolCache(path, mode).get("page", str(number)) is None, (row, mode)
    put(path, "page", "later", b"1", made=now + 1e9)  # it would never be asked for again
    assert ToolCache(path).get("page", "later") is None
    assert ToolCache(path, "replay").get("page", "later") == (b"1", False)
    other = ToolCache(tmp_path / "other.sqlite")
    assert other.take(path) == 2 and other.get("page", "later") == (b"1", False)
    store = ToolCache(path)
    store.put("page", "0", b"2")
    store.put("page", "3", b"2")
    assert store.get("page", "0") == store.get("page", "3") == (b"2", False)


def test_a_replayed_search_of_another_type_fails_in_words(tmp_path):
    path = tmp_path / "store.sqlite"
    put(path, "answer", json.dumps(["n", "q", "q"]), b'["ok", null, [[5]]]')
    put(path, "links", json.dumps(["n", "q", 5]), b"[[1, 2, 3]]")
    stored = CachedCalls(ToolCache(path, "replay"))
    found = asyncio.run(CachedSearch(None, stored, "n")(Query(action="text_search", text="q",
                        question="q")))  # fmt: skip
    assert found.status == "failed" and "malformed" in found.error
    with pytest.raises(WebError):
        asyncio.run(CachedFinder(None, stored, "n").search("q", 5))
    put(path, "links", json.dumps(["n", "q", 5]), b'[["l", "t", "s"]]')
    again = CachedFinder(None, CachedCalls(ToolCache(path, "replay")), "n")
    assert asyncio.run(again.search("q", 5)) == [Hit("l", "t", "s")]


ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT "
ENTRY = "kind TEXT, key TEXT, value BLOB, failed INTEGER, made REAL, PRIMARY KEY (kind, key)"
FOREIGN = {
    "a view": f"CREATE VIEW entry AS {ENDLESS} 'page' kind, n key, x'22' value, 0 failed, 0 made "
    "FROM r",
    "a virtual table": "CREATE VIRTUAL TABLE entry USING fts5(kind, key, value, failed, made)",
    "a trigger": f"CREATE TABLE entry (\n  {ENTRY}\n); CREATE TRIGGER t AFTER INSERT ON entry "
    "BEGIN DELETE FROM entry; END",
    "a view elsewhere": f"CREATE TABLE entry (\n  {ENTRY}\n); CREATE VIEW v AS SELECT 1",
    "a generated column": "CREATE TABLE entry (kind, key, value AS (zeroblob(1000000000)), "
    "failed, made)",
    "a check": f"CREATE TABLE entry ({ENTRY}, CHECK (length(randomblob(1000000000)) > 0))",
    "a default": "CREATE TABLE entry (kind, key, value, failed, made DEFAULT (randomblob(1)))",
    "an index of an expression": f"CREATE TABLE entry (\n  {ENTRY}\n); "
    "CREATE INDEX i ON entry (hex(zeroblob(length(value) * 1000)))",
    "another index of that name": f"CREATE TABLE entry (\n  {ENTRY}\n); "
    "CREATE INDEX entry_by_age ON entry (made) WHERE failed",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_store_with_other_tables_is_refused_at_once(tmp_path, name):
    path = tmp_path / "evil.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(FOREIGN[name])
    connection.close()
    before = time.process_time()
    for mode in ("use", "record", "replay"):
        with pytest.raises(ToolCacheError, match="evil.sqlite: ") as caught:
            ToolCache(path, mode).get("page", "x")
        assert "\n" not in str(caught.value)
    other = ToolCache(tmp_path / "other.sqlite")
    with pytest.raises(ToolCacheError, match="evil.sqlite: not a store"):
        other.take(path)
    assert other.info() == [] and time.process_time() - before < 5
    assert path.is_file()  # it is no damage: nothing is set aside


def test_pages_that_are_linked_many_times_are_no_table_without_end(tmp_path):
    """A file of some kilobytes in which each interior page has the same child 200 times."""
    path = tmp_path / "dag.sqlite"
    store = ToolCache(path)
    store.put("page", "a", b"x")
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.executemany(
            "INSERT INTO entry VALUES ('page', ?, ?, 0, 0.0)",
            ((f"n{number:06}", b"x" * 200) for number in range(60_000)),
        )
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        root = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'entry' AND type = 'table'"
        ).fetchone()[0]
    connection.close()
    data = bytearray(path.read_bytes())

    def cells(number):
        begin = (number - 1) * size + (100 if number == 1 else 0)
        count = int.from_bytes(data[begin + 3 : begin + 5], "big")
        at = [int.from_bytes(data[begin + 12 + 2 * i : begin + 14 + 2 * i], "big")
              for i in range(count)]  # fmt: skip
        return begin, [(number - 1) * size + place for place in at]

    begin, places = cells(root)
    assert data[begin] == 5  # an interior page of a table
    child = bytes(data[places[0] : places[0] + 4])
    for place in places:
        data[place : place + 4] = child
    path.write_bytes(data)
    with pytest.raises(ToolCacheError, match="dag.sqlite: damaged"):
        ToolCache(tmp_path / "other.sqlite").take(path)


def test_a_query_without_end_is_interrupted(tmp_path, monkeypatch):
    from mmsr1_jax.tools import checked_sqlite

    monkeypatch.setattr(checked_sqlite, "_LEAST_BUDGET", 1_000_000)
    connection = checked_sqlite.connect(tmp_path / "a.sqlite", "rwc")
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            connection.execute(f"{ENDLESS} count(*) FROM r").fetchall()
        assert connection.execute("SELECT 1").fetchone() == (1,)  # the budget is a statement's


def test_keys_count_as_values_do(tmp_path):
    path = tmp_path / "store.sqlite"
    store = ToolCache(path, max_bytes=1_000_000)
    for number in range(600):
        store.put("verdict", json.dumps(["m", "q" * 10_000, number]), b'[true, "x"]')
    last = json.dumps(["m", "q" * 10_000, 599])
    assert store.get("verdict", last) is not None
    store.close()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2_000_000


def index_with(folder, *statements):
    folder.mkdir()
    with sqlite3.connect(folder / local.FILE) as connection:
        connection.executescript(local._SCHEMA)
        for statement in statements:
            connection.executescript(statement)
    connection.close()
    return folder


HASH = "zeroblob(32)"


@pytest.mark.parametrize(
    "values",
    [
        "x'00', 't', 'l', x'00', NULL", "'abc', 't', 'l', x'00', NULL",
        "NULL, 't', 'l', x'00', NULL", "zeroblob(33), 't', 'l', x'00', NULL",
        "zeroblob(100000000), 't', 'l', x'00', NULL", "7, 't', 'l', x'00', NULL",
        f"'{'a' * 32}', 't', 'l', x'00', NULL", f"{HASH}, NULL, 'l', x'00', NULL",
        f"{HASH}, x'00', 'l', x'00', NULL", f"{HASH}, 't', 'l', NULL, NULL",
        f"{HASH}, 't', 'l', 'text', NULL",
    ],
)  # fmt: skip
def test_an_index_with_an_odd_picture_is_refused_by_row(tmp_path, values):
    good = f"INSERT INTO picture VALUES ({HASH}, 't', 'l', x'00', NULL);"
    folder = index_with(tmp_path / "i", good, f"INSERT INTO picture VALUES ({values});")
    with pytest.raises(LocalIndexError, match=r"table picture, row 2: '") as caught:
        LocalIndex(folder)
    assert "\n" not in str(caught.value)


class Embed:
    fingerprint = "f"

    def __call__(self, image):
        return np.ones(4, np.float32)


@pytest.mark.parametrize(
    "embedding",
    ["NULL", "x''", "x'003C'", "zeroblob(8)", "x'003C003C003C00'", "'text'", "5",
     "x'007E007E007E007E'", "x'007C007C007C007C'", "zeroblob(100000000)"],
)  # fmt: skip
def test_an_index_with_an_odd_embedding_is_refused_by_row(tmp_path, embedding):
    rows = [f"INSERT INTO picture VALUES ({HASH}, 't', 'l', x'00', {value});"
            for value in ("x'003C003C003C003C'", embedding)]  # fmt: skip
    folder = index_with(tmp_path / "i", "INSERT INTO embedded VALUES ('f');", *rows)
    with pytest.raises(LocalIndexError, match="table picture, row 2: 'embedding' must be"):
        LocalIndex(folder, embed=Embed())
    assert LocalIndex(folder)  # by hash it can be used


@pytest.mark.parametrize(
    "statement",
    [
        f"DROP TABLE picture; CREATE VIEW picture AS {ENDLESS} x'00' hash, 't' title, 'l' link, "
        "x'00' thumbnail, NULL embedding FROM r",
        f"DROP TABLE page; CREATE VIEW page AS {ENDLESS} 'u' url, 't' title, 's' snippet, 't' text "
        "FROM r",
        "DROP TABLE picture; CREATE TABLE picture (hash AS (zeroblob(1000000000)), title, link, "
        "thumbnail, embedding)",
        "CREATE TRIGGER t AFTER INSERT ON picture BEGIN DELETE FROM picture; END",
        "CREATE VIRTUAL TABLE other USING rtree(a, b, c)",
        "DROP TABLE picture",
        "DROP TABLE page",
    ],
)
def test_an_index_with_other_tables_is_refused(tmp_path, statement):
    with pytest.raises(LocalIndexError, match="i: "):
        LocalIndex(index_with(tmp_path / "i", statement))


QUERY = Query(action="text_search", text="good", question="good")


def test_pages_in_json_lines_are_checked(tmp_path, capsys):
    path = tmp_path / "pages.jsonl"
    path.write_text("[" * 100_000 + '\n{"title": NaN}\n5\n{"title": ["a"]}\n{"title": "good"}\n')
    found = asyncio.run(LocalIndex(tmp_path).text_search(QUERY))
    assert len(found.results) == 1
    said = capsys.readouterr().err
    assert all(f"pages.jsonl, line {number}: left out" in said for number in (1, 2, 3, 4))


PICTURES = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
PNG = [{"bytes": b"x", "path": None}]


def questions(path, prompts, images=None, answers=None, **options):
    count = len(prompts)
    columns = {
        "prompt": pa.array([[{"content": text, "role": "user"}] for text in prompts]),
        "images": images or pa.array([PNG] * count, PICTURES),
        "reward_model": pa.array(answers or [{"ground_truth": "x"}] * count),
    }
    parquet.write_table(pa.table(columns), path, compression="zstd", **options)
    return path


def one_picture_named(count, size):
    """Rows whose picture is the same one, stored once."""
    data = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [b"\0" * size])
    rows = pa.StructArray.from_arrays([data, pa.nulls(count, pa.string())], ["bytes", "path"])
    return pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), rows)


def bombs(folder):
    """Files of some kilobytes, what they would take, and the column that the error names."""
    q = "What?"
    yield "prompt", questions(folder / "cell", ["a" * (80 << 20)])
    yield "prompt", questions(folder / "plain", ["a" * (80 << 20)], use_dictionary=False)
    yield "prompt", questions(folder / "same", ["a" * 900_000] * 100)
    yield "images", questions(folder / "image", [q], pa.array([[{"bytes": b"\0" * (80 << 20),
                              "path": None}]], PICTURES), use_dictionary=False)  # fmt: skip
    yield "images", questions(folder / "named", [q] * 64, one_picture_named(64, 4_000_000),
                              dictionary_pagesize_limit=1 << 30)  # fmt: skip
    yield "reward_model", questions(folder / "answers", [q], answers=[
        {"ground_truth": "x", "candidate_answers": ["a"] * 1_200_000}])  # fmt: skip
    nulls = pa.nulls(10_000_000)
    parquet.write_table(
        pa.table({"prompt": nulls, "images": nulls, "reward_model": nulls}), folder / "rows"
    )
    yield "rows", folder / "rows"


MEASURE = """
import resource, sys
from mmsr1_jax.data.questions import DataError, QuestionSource
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
QuestionSource(sys.argv[1], max_bad_rows=9)
for path in sys.argv[2:]:
    before = peak()
    try: list(QuestionSource(path))
    except DataError as error: print((peak() - before) // 1024, error)
"""


def test_data_sets_of_kilobytes_do_not_take_gigabytes(tmp_path):
    small = questions(tmp_path / "small", ["What?"])
    paths = dict((path, column) for column, path in bombs(tmp_path))
    assert all(path.stat().st_size < 100_000 for path in paths)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, *paths], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths), done.stdout + done.stderr
    for (path, column), line in zip(paths.items(), lines, strict=True):
        taken, error = line.split(" ", 1)
        assert int(taken) < 200 and str(path) in error and column in error, line


def test_a_row_with_a_long_cell_is_named_and_left_out(tmp_path):
    image = tmp_path / "a.png"
    PIL.Image.new("RGB", (40, 40)).save(image)
    images = [[{"bytes": image.read_bytes(), "path": None}]] * 6
    images[4] = images[0] * 1001
    answers = [{"ground_truth": "x", "candidate_answers": answer}
               for answer in (None, None, ["a"] * 1001, ["a" * 600_000] * 2, [], [])]  # fmt: skip
    prompts = ["a" * 300_000, "a" * 1_000_001, "b", "c", "d", "e"]
    path = questions(tmp_path / "a.parquet", prompts, pa.array(images, PICTURES), answers,
                     use_dictionary=False)  # fmt: skip
    source = QuestionSource(path)
    assert [question.row for question in source] == [0, 5]
    assert [(bad.row, bad.field) for bad in source.bad_rows] == [
        (1, "prompt"), (2, "reward_model"), (3, "reward_model"), (4, "images")
    ]  # fmt: skip
    assert all("more than 1000 items" in bad.reason for bad in source.bad_rows)


def test_texts_are_read_alike_with_and_without_dictionaries_and_over_row_groups(tmp_path):
    texts = [f"question {number % 7} " + "x" * (number % 50) for number in range(3000)]
    answers = [{"ground_truth": str(number % 3), "candidate_answers": ["a", str(number)]}
               for number in range(3000)]  # fmt: skip
    found = []
    for number, options in enumerate((
        {"use_dictionary": False}, {"row_group_size": 700},
        {"dictionary_pagesize_limit": 500, "data_page_size": 1000, "row_group_size": 1300},
    )):  # fmt: skip
        path = questions(tmp_path / f"{number}.parquet", texts, answers=answers, **options)
        read = QuestionSource(path, max_bad_rows=3000)._questions
        found.append([(question.question, question.answers) for question in read])
    assert found[0] == found[1] == found[2]
    assert [question for question, _ in found[0]] == [text.strip() for text in texts]


def test_tables_of_benchmarks_are_bounded_too(tmp_path):
    path = tmp_path / "a.parquet"
    data = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), [b"\0" * 30_000_000])
    for column in (data, pa.array([b"\0" * (80 << 20)])):
        table = pa.table({"question": pa.array(["q"] * len(column)), "image": column})
        parquet.write_table(
            table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30
        )
        with pytest.raises(DataError, match="a.parquet: row group 0, column 'image'"):
            list(tables.open_rows(path, {"question": "text", "image": "image"}))
