"""Extraction of a page's main text with trafilatura.

Pure functions for a worker process: nothing is fetched or decompressed, and the number of tags is
bounded because parts of the extraction take quadratic time in it.
"""

import re

import lxml.html
import regex
import trafilatura

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools.charsets import decode
from mmsr1_jax.utils.checked_json import utf8

PLAIN = ("text/plain", "text/markdown")
_MAX_OPENING_TAGS, _MAX_TAGS = 20_000, 40_000
_SIGNATURES = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip", b"%PDF-": "PDF", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF", b"\x7fELF": "ELF",
}  # fmt: skip
_TAG = re.compile("<(/?)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f\ufffe\uffff]")
_BROKEN = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\ufffd]")
# Python normalises long runs of combining marks in quadratic time.
_MANY_MARKS = regex.compile(r"(\p{M}{16})\p{M}++")


class PageError(UserError):
    """Bytes that are not a page; the message says why."""


def read_page(body: bytes, charset: str | None = None, media_type: str = "text/html") -> str:
    """Return the text of a page; for HTML, without menus, comments and scripts.

    Args:
      body: Decompressed bytes of the page, which may be truncated anywhere.
      charset: Charset label from the HTTP header.
      media_type: Media type in lower case, without parameters.

    Returns:
      The text; empty if the page has none or its main text cannot be identified.

    Raises:
      PageError: The bytes are compressed, another type of file, not text, or cannot be parsed.
      MemoryError: The parser ran out of memory.
    """
    for signature, kind in _SIGNATURES.items():
        if body.startswith(signature):
            raise PageError(f"the page is a {kind} file")
    text = decode(body, charset, markup=media_type not in PLAIN)
    if len(_BROKEN.findall(sample := text[:4096])) > len(sample) / 10:
        raise PageError("the page is not text")
    if media_type in PLAIN:
        return text
    try:
        tree = _parse(text)
        if tree is None:
            return ""
        return trafilatura.extract(tree, include_comments=False, include_tables=True) or ""
    except MemoryError:
        raise
    except Exception as error:  # parsers may raise anything on hostile input
        raise PageError(f"the page cannot be parsed ({type(error).__name__})") from None


def extract(html: bytes) -> str:
    """Return the text of an HTML page, or an empty text if `read_page` raises PageError."""
    try:
        return read_page(html)
    except PageError:
        return ""


def _parse(text: str) -> lxml.html.HtmlElement | None:
    """Return a page's element tree, or None if the text is not markup.

    trafilatura would decompress bytes, and repairs text with regular expressions that do not run in
    linear time. A tree skips both steps.
    """
    text = _truncate(_CONTROLS.sub("", text))
    is_html = "html" in text[:50].lower()
    if text.lstrip()[:2] == "<!":  # a doctype may be of any length
        text = text.partition(">")[2]
    if not text.strip():
        return None
    parser = lxml.html.HTMLParser(
        collect_ids=False, default_doctype=False, encoding="utf-8", remove_comments=True,
        remove_pis=True,
    )  # fmt: skip
    tree = lxml.html.fromstring(utf8(text), parser=parser)
    if not is_html and len(tree) < 2:
        return None
    for element in tree.iter():
        if element.text and not element.text.isascii():
            element.text = _MANY_MARKS.sub(r"\1", element.text)
        if element.tail and not element.tail.isascii():
            element.tail = _MANY_MARKS.sub(r"\1", element.tail)
    return tree


def _truncate(text: str) -> str:
    """Return the text up to the first tag beyond the limits."""
    if text.count("<") <= _MAX_OPENING_TAGS:
        return text
    num_opening = 0
    for index, tag in enumerate(_TAG.finditer(text)):
        num_opening += not tag[1]
        if num_opening > _MAX_OPENING_TAGS or index == _MAX_TAGS:
            return text[: tag.start()]
    return text
