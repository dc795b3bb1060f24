"""Decoding of pages in any charset.

The sources of the charset, in order; each is used only if the bytes are consistent with it:

    byte order mark, zero bytes of UTF-16, escape sequences of ISO-2022-JP
    HTTP header ─► declaration in the page ─► UTF-8 ─► detection on a sample
"""

import codecs
import re
from collections.abc import Iterator

import webencodings

from mmsr1_jax.tools.charset_detection import detect_charset

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is a prefix of this one
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MULTIBYTE = ("gb18030", "big5hkscs", "cp932", "euc_jp", "euc_jis_2004", "iso2022_jp_2", "cp949")
_MAX_ELEMENTS = 1000  # maximum number of elements searched for a declaration
_DECLARED = re.compile(rb"""charset\s{0,9}=[\s"']{0,9}([\w.:+-]{1,40})""", re.IGNORECASE)
_XML_DECLARED = re.compile(rb"""<\?xml\b[^>]{0,200}?\bencoding\s{0,9}=\s{0,9}["']([\w.:-]{1,40})""")
_ASCII = bytes(range(0x80))


def decode(body: bytes, charset: str | None = None, *, markup: bool = True) -> str:
    """Return the text of a page.

    Args:
      body: Decompressed bytes of the page, which may be truncated anywhere.
      charset: Charset label from the HTTP header.
      markup: Whether the page may declare a charset (HTML, XML).
    """
    for mark, codec in _BOMS:
        if body.startswith(mark):
            return body[len(mark) :].decode(codec, "replace")
    if codec := _utf_16_codec(body) or _escape_codec(body):
        return body.decode(codec, "replace")
    labels = [charset] if charset else []
    if markup:
        labels += _declared_labels(body)
    for label in labels:
        if (text := _decode_as(label, body)) is not None:
            return text
    if _is_mostly(text := body.decode("utf-8", "replace"), body):
        return text
    return body.decode(detect_charset(body), "replace")


def _decode_as(label: str, body: bytes) -> str | None:
    """Return the body decoded in the labelled charset, or None if the label is not a charset of the
    web or does not fit the bytes."""
    encoding = webencodings.lookup(label.strip())
    if encoding is None or encoding.name == "replacement":
        return None
    codec = {"gbk": "gb18030", "iso2022_jp": "iso2022_jp_2"}.get(encoding.codec_info.name)
    codec = codec or encoding.codec_info.name
    # Text in another charset can be valid UTF-8 by chance. This is likelier in multibyte charsets,
    # which therefore require more non-ASCII characters as evidence of UTF-8.
    if codec != "utf-8" and _is_utf_8(body, 8 if codec in _MULTIBYTE else 2):
        return None
    if codec == "x-user-defined":  # not a codec of Python
        return encoding.codec_info.decode(body, "replace")[0]
    for wider in (codec, "euc_jis_2004") if codec == "euc_jp" else (codec,):
        text = body.decode(wider, "replace")
        if _is_mostly(text, body):
            return text
    return None


def _is_mostly(text: str, body: bytes) -> bool:
    """Return whether damaged characters number at most a tenth of the body's non-ASCII bytes."""
    num_other = len(body.translate(None, _ASCII))
    if not num_other and not text.count("\ufffd"):
        return True
    num_damaged = text.count("\ufffd") + sum(text.count(control) for control in _CONTROLS)
    return num_damaged <= num_other / 10


# Decoded bytes 0x80 to 0x9F, in charsets without letters in that range.
_CONTROLS = [chr(code) for code in range(0x80, 0xA0) if code != 0x85]


def _is_utf_8(body: bytes, min_characters: int) -> bool:
    """Return whether a body is valid UTF-8 with at least `min_characters` non-ASCII characters."""
    if body.isascii() or b"\0" in body:
        return False
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        text = decoder.decode(body)
    except UnicodeDecodeError:
        return False
    return len(text) - len(text.encode("ascii", "ignore")) >= min_characters


def _utf_16_codec(body: bytes) -> str | None:
    """Return the UTF-16 codec whose byte order the positions of zero bytes indicate, if any."""
    sample = body[:4096]
    even, odd, threshold = sample[0::2].count(0), sample[1::2].count(0), len(sample) / 50
    if odd > threshold and even * 10 < odd:
        return "utf-16-le"
    if even > threshold and odd * 10 < even:
        return "utf-16-be"
    return None


def _escape_codec(body: bytes) -> str | None:
    """Return the codec of ISO-2022-JP, an all-ASCII encoding, if its escape sequences occur."""
    return "iso2022_jp_2" if b"\x1b$B" in body or b"\x1b$@" in body else None


def _declared_labels(body: bytes) -> Iterator[str]:
    """Yield the charset labels declared anywhere in a page, except in comments."""
    if xml := _XML_DECLARED.match(body.lstrip()[:300]):
        yield xml[1].decode("ascii", "ignore")
    lower = body.lower()
    comment, meta = lower.find(b"<!--"), lower.find(b"<meta")
    for _ in range(_MAX_ELEMENTS):
        if meta < 0:
            return
        if 0 <= comment < meta:
            end = lower.find(b"-->", comment)
            if end < 0:
                return
            comment = lower.find(b"<!--", end)
            meta = meta if meta > end else lower.find(b"<meta", end)
            continue
        end = lower.find(b">", meta, meta + 1000)
        if match := _DECLARED.search(body, meta, end if end > 0 else meta + 1000):
            label = match[1].decode("ascii", "ignore")
            # A declaration that is readable as ASCII is not in UTF-16.
            yield "utf-8" if label.lower().startswith("utf-16") else label
        meta = lower.find(b"<meta", meta + 5)
