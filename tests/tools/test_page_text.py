"""Extraction of the main text of a page, in its charset and in bounded time."""

import bz2
import gzip
import lzma
import pickle
import subprocess
import sys
import zlib

import pytest
import trafilatura

from mmsr1_jax.tools import page_text
from mmsr1_jax.tools.page_text import PageError, extract, read_page
from tests.timing import assert_linear

ARTICLE = """<!DOCTYPE html><html lang="en"><head><title>T</title>
<script>var evil = 1;</script></head>
<body><nav><a href="/">menu</a></nav><article><h1>The bridge</h1><p>The Dom Luis bridge crosses the
Douro river and was opened in the year 1886, after five years of work.</p>
<table><tr><th>height</th><td>45 m</td></tr></table>
<ul><li>It carries a metro line on its upper deck.</li></ul></article></body></html>"""


def test_text_equals_that_of_trafilatura():
    plain = trafilatura.extract(ARTICLE, include_comments=False, include_tables=True)
    assert "opened in the year 1886" in plain and "evil" not in plain
    assert read_page(ARTICLE.encode()) == plain
    assert read_page(ARTICLE.encode("utf-16")) == plain
    assert read_page(b"<?xml version='1.0' encoding='utf-8'?>" + ARTICLE.encode()) == plain


def test_plain_text_is_unchanged():
    text = "<p>Nur ein Beispiel für Text.\n</p>"
    assert read_page(text.encode("latin-1"), "latin1", "text/plain") == text
    assert read_page(text.encode(), None, "text/markdown") == text


OTHER_FILES = {
    "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zlib": zlib.compress,
    "zlib, fast": lambda data: zlib.compress(data, 1),
    "deflate": lambda data: zlib.compress(data, wbits=-15),
    "zip": lambda data: b"PK\x03\x04" + data,
    "zstd": lambda data: b"\x28\xb5\x2f\xfd" + data[:50], "PDF": lambda data: b"%PDF-1.7\n" + data,
    "PNG": lambda data: b"\x89PNG\r\n" + data, "zeros": lambda data: b"\0" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_file_types_are_rejected(kind):
    import random

    words = random.Random(0).choices(
        range(10**6), k=3000
    )  # so that compressed bytes never look like text
    body = OTHER_FILES[kind](b"<html><body><article><p>" + repr(words).encode() + b"</p></html>")
    for media_type in ("text/html", "text/plain"):
        with pytest.raises(PageError, match="the page is"):
            read_page(body, None, media_type)
    assert extract(body) == ""


def test_page_error_can_be_pickled():
    with pytest.raises(PageError) as raised:
        read_page(b"\x1f\x8b\x08" + bytes(20))
    copy = pickle.loads(pickle.dumps(raised.value))
    assert type(copy) is PageError and str(copy) == str(raised.value)


def test_module_does_not_import_jax():
    code = "import sys, mmsr1_jax.tools.page_text; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


HOSTILE = {
    "headings": lambda n: "<h1>x</h1>" * (n // 10),
    "open paragraphs": lambda n: "<p a b c>x" * (n // 10),
    "closing tags": lambda n: "</p>x" * (n // 5),
    "rows": lambda n: "<tr><td>x" * (n // 9),
    "breaks": lambda n: "x<br>" * (n // 5),
    "nested": lambda n: "<div>x" * (n // 6),
    "definitions": lambda n: "<dl><dt>x<dd>y" * (n // 14),
    "doctype": lambda n: "<!DOCTYPE " + "/" * n,
    "doctypes": lambda n: "<!DOCTYPE html /" * (n // 16),
    "html tags": lambda n: "<html " * (n // 6),
    "spaces": lambda n: "<html><body><p>x" + " \n" * (n // 2) + "y",
    "marks": lambda n: "<html><body><p>a" + "\u0301\u0327" * (n // 2),
    "marks as entities": lambda n: "<html><body><p>a" + "&#x301;&#x327;" * (n // 14),
    "json": lambda n: "<script type='application/ld+json'>" + "{" * n + "</script><p>x",
    "titles": lambda n: "<title>" + "-|" * (n // 2) + "</title><p>x",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_extraction_takes_linear_time(name):
    """The parts of the extractor that take more than linear time are not reached."""

    def extraction(length):
        text = HOSTILE[name](length)
        text = text if text[:2].lower() in ("<!", "<h") else f"<html><body><article>{text}"
        return lambda: extract(text.encode())

    assert_linear(extraction, 6_000, slack=0.1)


def test_number_of_tags_is_bounded(monkeypatch):
    """Parts of the extractor take quadratic time in the number of tags."""
    monkeypatch.setattr(page_text, "_MAX_OPENING_TAGS", 200)
    monkeypatch.setattr(page_text, "_MAX_TAGS", 400)
    for tag in ("<p>", "</p>", "<br>"):
        text = extract(b"<html><body><article>" + f"{tag}word ".encode() * 1000)
        assert text.count("word") <= 400
    honest = "".join(f"<p>Paragraph {i} of <b>many</b>.</p>" for i in range(90))
    assert "Paragraph 89" in extract(f"<html><body><article>{honest}".encode())
