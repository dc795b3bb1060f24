"""Selection of the paragraphs of a long page that are most relevant to a question, by BM25."""

import re
import sqlite3
import threading
from collections.abc import Iterator

from mmsr1_jax.tools.words import TOKENIZER, search_form, words_of

# Ends of sentences; Western punctuation counts only before a space.
_SENTENCE_END = re.compile(
    "[.!?\u203d\u2026][\"')\\]\u00bb\u2019\u201d]*(?= )"
    "|[\u3002\uff01\uff1f\uff0e\uff61\u0589\u061f\u06d4\u0964\u0965\u104a\u104b\u1362\u17d4\u17d5]"
    "[\"')\\]\u300d\u300f\u3011\uff09\u00bb\u2019\u201d]*"
)

_OF_THREAD = threading.local()


def best_passages(page: str, question: str, chars: int) -> str:
    """Return the paragraphs most relevant to the question, in the page's order.

    A paragraph longer than `chars` is split into pieces, at ends of sentences if possible. The
    result has at most `chars` characters. It is the beginning of the page if nothing matches the
    question.
    """
    paragraphs = [p for p in (" ".join(p.split()) for p in page.splitlines()) if p]
    if sum(map(len, paragraphs)) <= chars:
        return "\n".join(paragraphs)
    pieces = [piece for paragraph in paragraphs for piece in _pieces(paragraph, chars)]
    order = _ranked(pieces, words_of(question))
    chosen, left = [], chars
    for number in order or range(len(pieces)):
        if len(pieces[number]) <= left:
            chosen.append(number)
            left -= len(pieces[number]) + 1
        elif not chosen or not order:
            break
    return "\n".join(pieces[number] for number in sorted(chosen))


def _ranked(pieces: list[str], query: str) -> list[int]:
    """Return the indices of the pieces that match an FTS5 query, best first."""
    if not query:
        return []
    table = _table()
    table.execute("BEGIN")
    try:
        rows = ((search_form(piece),) for piece in pieces)
        table.executemany("INSERT INTO piece VALUES (?)", rows)
        found = table.execute(
            "SELECT rowid - 1 FROM piece WHERE piece MATCH ? ORDER BY bm25(piece), rowid", (query,)
        )
        return [index for (index,) in found]
    finally:
        table.execute("ROLLBACK")


def _table() -> sqlite3.Connection:
    """Return this thread's empty table, reused because creating one takes longer than ranking."""
    if not hasattr(_OF_THREAD, "table"):
        _OF_THREAD.table = sqlite3.connect(":memory:", isolation_level=None)
        _OF_THREAD.table.execute(
            f'CREATE VIRTUAL TABLE piece USING fts5(text, tokenize = "{TOKENIZER}")'
        )
    return _OF_THREAD.table


def _pieces(paragraph: str, chars: int) -> Iterator[str]:
    """Yield a paragraph, split into pieces if it is longer than `chars`."""
    # Several pieces fit into a result, since relevant sentences may be far apart.
    length = max(chars // 4, min(chars, 200)) if len(paragraph) > chars else chars
    begin = 0
    while len(paragraph) - begin > length:
        end = _end_of_piece(paragraph, begin, length, begin + chars)
        yield paragraph[begin:end].strip()
        begin = end
    yield paragraph[begin:].strip()


def _end_of_piece(paragraph: str, begin: int, length: int, limit: int) -> int:
    """Return where a piece of about `length` characters ends: after a sentence, else at a space,
    else at `limit`."""
    middle, end = begin + length // 2, begin + length
    sentences = list(_SENTENCE_END.finditer(paragraph, middle, end))
    if sentences:
        return sentences[-1].end()
    if sentence := _SENTENCE_END.search(paragraph, end, limit):
        return sentence.end()
    space = paragraph.rfind(" ", middle, end)
    if space < 0:
        space = paragraph.find(" ", end, limit)
    return min(limit, len(paragraph)) if space < 0 else space
