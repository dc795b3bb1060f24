"""Indexes from untrusted sources: only ordinary tables with values of the right types are read."""

import asyncio
import sqlite3

import numpy as np
import pytest

from mmsr1_jax.tools import Query, index_builder
from mmsr1_jax.tools.index_builder import LocalIndexError
from mmsr1_jax.tools.local_index import LocalIndex

ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT "


def write_index(folder, *statements):
    folder.mkdir()
    with sqlite3.connect(folder / index_builder.INDEX_FILE) as connection:
        connection.executescript(index_builder.SCHEMA)
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
def test_invalid_image_row_is_reported_by_number(tmp_path, values):
    valid = f"INSERT INTO image VALUES ({HASH}, 't', 'l', x'00', NULL);"
    folder = write_index(tmp_path / "i", valid, f"INSERT INTO image VALUES ({values});")
    with pytest.raises(LocalIndexError, match=r"table image, row 2: '") as raised:
        LocalIndex(folder)
    assert "\n" not in str(raised.value)


class ConstantEmbedder:
    fingerprint = "f"

    def __call__(self, image):
        return np.ones(4, np.float32)


@pytest.mark.parametrize(
    "embedding",
    ["NULL", "x''", "x'003C'", "zeroblob(8)", "x'003C003C003C00'", "'text'", "5",
     "x'007E007E007E007E'", "x'007C007C007C007C'", "zeroblob(100000000)"],
)  # fmt: skip
def test_invalid_embedding_is_reported_by_row(tmp_path, embedding):
    rows = [f"INSERT INTO image VALUES ({HASH}, 't', 'l', x'00', {value});"
            for value in ("x'003C003C003C003C'", embedding)]  # fmt: skip
    folder = write_index(tmp_path / "i", "INSERT INTO embedding_model VALUES ('f');", *rows)
    with pytest.raises(LocalIndexError, match="table image, row 2: 'embedding' must be"):
        LocalIndex(folder, embed=ConstantEmbedder())
    assert LocalIndex(folder)  # the hashes are valid


@pytest.mark.parametrize(
    "statement",
    [
        f"DROP TABLE image; CREATE VIEW image AS {ENDLESS} x'00' hash, 't' title, 'l' link, "
        "x'00' thumbnail, NULL embedding FROM r",
        f"DROP TABLE page; CREATE VIEW page AS {ENDLESS} 'u' url, 't' title, 's' snippet, 't' text "
        "FROM r",
        "DROP TABLE image; CREATE TABLE image (hash AS (zeroblob(1000000000)), title, link, "
        "thumbnail, embedding)",
        "CREATE TRIGGER t AFTER INSERT ON image BEGIN DELETE FROM picture; END",
        "CREATE VIRTUAL TABLE other USING rtree(a, b, c)",
        "DROP TABLE image",
        "DROP TABLE page",
    ],
)
def test_index_with_another_schema_is_rejected(tmp_path, statement):
    with pytest.raises(LocalIndexError, match="i: "):
        LocalIndex(write_index(tmp_path / "i", statement))


QUERY = Query(action="text_search", text="good", question="good")


def test_invalid_lines_of_pages_are_skipped_and_logged(tmp_path, capsys):
    path = tmp_path / "pages.jsonl"
    path.write_text("[" * 100_000 + '\n{"title": NaN}\n5\n{"title": ["a"]}\n{"title": "good"}\n')
    observation = asyncio.run(LocalIndex(tmp_path).text_search(QUERY))
    assert len(observation.results) == 1
    stderr = capsys.readouterr().err
    assert all(
        f"pages.jsonl, line {line_number}: skipped: " in stderr for line_number in (1, 2, 3, 4)
    )
