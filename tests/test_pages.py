"""The small text search over a file of pages."""

import asyncio
import json

import pytest

from mmsr1_jax.tools import Query
from mmsr1_jax.tools.pages import PageSearch, PagesError


def ask(search, text):
    return asyncio.run(search(Query(action="text_search", text=text, question="?")))


def texts(observation):
    return [result[0].text for result in observation.results]


def test_finds_the_page_of_the_words(tmp_path):
    pages = [
        {"url": "http://a", "title": "Bridges of Porto", "snippet": "s", "summary": "The Dom Luis"},
        {"url": "http://b", "title": "Towers", "snippet": "The Clerigos tower is tall"},
        {"url": "http://c", "title": "Porto wine", "summary": ""},
    ]
    path = tmp_path / "pages.jsonl"
    path.write_text("\n".join(map(json.dumps, pages)))
    for source in (path, tmp_path):
        search = PageSearch(source)
        assert texts(ask(search, "Which bridges has Porto?"))[0] == (
            "link: http://a\nsummary: The Dom Luis"
        )
        assert len(ask(search, "porto").results) == 2
    found = ask(search, 'clerigos" OR tower*)')  # no query language, only words
    assert texts(found) == ["link: http://b\nsummary: The Clerigos tower is tall"]
    assert ask(search, "unheard").status == "empty"
    assert ask(search, "http").status == "empty"  # addresses are not searched
    assert ask(search, "?!").status == "empty"
    assert len(ask(PageSearch(path, results=1), "porto").results) == 1
    image = Query(action="image_search", text=None, question="?")
    assert asyncio.run(search(image)).status == "failed"


def test_odd_lines_are_named_and_left_out(tmp_path, capsys):
    path = tmp_path / "pages.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"title": "one"}\n\nnot json\n[1]\n{"title": 5}\n{}\n'
        b'{"title": "\\ud800 two", "extra": 1}\n\xff\n'
    )
    search = PageSearch(path)
    told = capsys.readouterr().err
    assert [f"line {n}: left out" in told for n in range(1, 9)] == [
        False, False, True, True, True, True, False, True,
    ]  # fmt: skip
    assert len(ask(search, "one").results) == len(ask(search, "two").results) == 1


def test_no_pages(tmp_path):
    with pytest.raises(PagesError, match="No such file"):
        PageSearch(tmp_path / "none.jsonl")
    (tmp_path / "pages.jsonl").write_text("\n")
    with pytest.raises(PagesError, match="no pages"):
        PageSearch(tmp_path)


def test_real_pages(shared):
    search = PageSearch(shared / "data" / "web_pages.jsonl")
    lines = (shared / "data" / "web_pages.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [json.loads(line) for line in lines]
    found = ask(search, pages[0]["query"])
    assert found.status == "ok" and len(found.results) == 5
    of_query = {page["url"] for page in pages if page["query"] == pages[0]["query"]}
    links = [text.split("\n")[0].removeprefix("link: ") for text in texts(found)]
    assert len(of_query & set(links)) >= 3
