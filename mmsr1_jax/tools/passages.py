"""Selection of the paragraphs of a long page that are most relevant to a question, by BM25."""

import re
import sqlite3
import threading
from collections.abc import Iterator

from mmsr1_jax.tools.words import TOKENIZER, fts_query, search_form

# Ends of sentences; Western punctuation counts only before a space.
_SENTENCE_END = re.compile(
    "[.!?\u203d\u2026][\"')\\]\u00bb\u2019\u201d]*(?= )"
    "|[\u3002\uff01\uff1f\uff0e\uff61\u0589\u061f\u06d4\u0964\u0965\u104a\u104b\u1362\u17d4\u17d5]"
    "[\"')\\]\u300d\u300f\u3011\uff09\u00bb\u2019\u201d]*"
)

_local = threading.local()


def best_passages(page: str, question: str, max_chars: int) -> str:
    """Return the paragraphs most relevant to the question, in the page's order.

    A paragraph longer than `max_chars` is split into pieces, at ends of sentences if possible. The
    result has at most `max_chars` characters. It is the beginning of the page if nothing matches
    the question.
    """
    paragraphs = [p for p in (" ".join(p.split()) for p in page.splitlines()) if p]
    if sum(map(len, paragraphs)) <= max_chars:
        return "\n".join(paragraphs)
    pieces = [piece for paragraph in paragraphs for piece in _split(paragraph, max_chars)]
    order = _rank(pieces, fts_query(question))
    selected, remaining = [], max_chars
    for index in order or range(len(pieces)):
        if len(pieces[index]) <= remaining:
            selected.append(index)
            remaining -= len(pieces[index]) + 1
        elif not selected or not order:
            break
    return "\n".join(pieces[index] for index in sorted(selected))


def _rank(pieces: list[str], query: str) -> list[int]:
    """Return the indices of the pieces that match an FTS5 query, best first."""
    if not query:
        return []
    table = _table()
    table.execute("BEGIN")
    try:
        values = ((search_form(piece),) for piece in pieces)
        table.executemany("INSERT INTO piece VALUES (?)", values)
        rows = table.execute(
            "SELECT rowid - 1 FROM piece WHERE piece MATCH ? ORDER BY bm25(piece), rowid", (query,)
        )
        return [index for (index,) in rows]
    finally:
        table.execute("ROLLBACK")


def _table() -> sqlite3.Connection:
    """Return this thread's empty table, reused because creating one takes longer than ranking."""
    if not hasattr(_local, "table"):
        _local.table = sqlite3.connect(":memory:", isolation_level=None)
        _local.table.execute(
            f'CREATE VIRTUAL TABLE piece USING fts5(text, tokenize = "{TOKENIZER}")'
        )
    return _local.table


def _split(paragraph: str, max_chars: int) -> Iterator[str]:
    """Yield a paragraph, split into pieces if it is longer than `max_chars`."""
    # Several pieces fit into a result, since relevant sentences may be far apart.
    length = max(max_chars // 4, min(max_chars, 200)) if len(paragraph) > max_chars else max_chars
    start = 0
    while len(paragraph) - start > length:
        end = _find_end(paragraph, start, length, start + max_chars)
        yield paragraph[start:end].strip()
        start = end
    yield paragraph[start:].strip()


def _find_end(paragraph: str, start: int, length: int, limit: int) -> int:
    """Return where a piece of about `length` characters ends: after a sentence, else at a space,
    else at `limit`."""
    middle, end = start + length // 2, start + length
    sentences = list(_SENTENCE_END.finditer(paragraph, middle, end))
    if sentences:
        return sentences[-1].end()
    if sentence := _SENTENCE_END.search(paragraph, end, limit):
        return sentence.end()
    space = paragraph.rfind(" ", middle, end)
    if space < 0:
        space = paragraph.find(" ", end, limit)
    return min(limit, len(paragraph)) if space < 0 else space
