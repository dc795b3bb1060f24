"""What of a long page is about a question: its best paragraphs, by BM25."""

import re
import sqlite3


def words_of(text: str) -> str:
    """The words of a text as a query of SQLite's FTS5: any of them, and nothing else of its
    language; empty where there are none."""
    return " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", text)))


def best_passages(page: str, question: str, chars: int) -> str:
    """The paragraphs that are most about the question, in the page's order, at most `chars` long
    together; the beginning of the page where none is about it."""
    paragraphs = [p for p in (" ".join(p.split()) for p in re.split(r"\n+", page)) if p]
    if sum(map(len, paragraphs)) <= chars:
        return "\n".join(paragraphs)
    pieces = [p[i : i + chars] for p in paragraphs for i in range(0, len(p), chars)]
    query, order = words_of(question), []
    if query:
        with sqlite3.connect(":memory:") as table:
            table.execute("CREATE VIRTUAL TABLE piece USING fts5(text, tokenize='porter')")
            table.executemany("INSERT INTO piece VALUES (?)", [(piece,) for piece in pieces])
            rows = table.execute(
                "SELECT rowid - 1 FROM piece WHERE piece MATCH ? ORDER BY bm25(piece), rowid",
                (query,),
            )
            order = [row for (row,) in rows]
        table.close()
    chosen, left = [], chars
    for number in order or range(len(pieces)):
        if len(pieces[number]) <= left:
            chosen.append(number)
            left -= len(pieces[number]) + 1
        elif not chosen or not order:
            break
    return "\n".join(pieces[number] for number in sorted(chosen))
