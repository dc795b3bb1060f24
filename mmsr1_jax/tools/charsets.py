"""Bytes of a page to text, whatever charset they are in.

In this order, each only where the bytes bear it out:

    byte order mark, zeros of UTF-16, escapes of ISO-2022-JP
    HTTP header ─► the page's own declaration ─► UTF-8 ─► detection on a sample
"""

import codecs
import re
from collections.abc import Iterator

import webencodings

from mmsr1_jax.tools.charset_detection import detected

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MULTIBYTE = ("gb18030", "big5hkscs", "cp932", "euc_jp", "euc_jis_2004", "iso2022_jp_2", "cp949")
_DECLARATIONS = 1000  # elements that are looked at for a declaration
_DECLARED = re.compile(rb"""charset\s{0,9}=[\s"']{0,9}([\w.:+-]{1,40})""", re.IGNORECASE)
_XML_DECLARED = re.compile(rb"""<\?xml\b[^>]{0,200}?\bencoding\s{0,9}=\s{0,9}["']([\w.:-]{1,40})""")
_ASCII = bytes(range(0x80))


def decode(body: bytes, charset: str | None = None, *, markup: bool = True) -> str:
    """Return the text of a page.

    Args:
      body: the bytes, decompressed; they may be cut off anywhere.
      charset: label in the HTTP header.
      markup: whether the page may declare a charset (HTML, XML).
    """
    for mark, codec in _BOMS:
        if body.startswith(mark):
            return body[len(mark) :].decode(codec, "replace")
    if codec := _utf_16_codec(body) or _escape_codec(body):
        return body.decode(codec, "replace")
    labels = [charset] if charset else []
    if markup:
        labels += _declared(body)
    for label in labels:
        if (text := _decoded_as(label, body)) is not None:
            return text
    if _is_mostly(text := body.decode("utf-8", "replace"), body):
        return text
    return body.decode(detected(body), "replace")


def _decoded_as(label: str, body: bytes) -> str | None:
    """Return the body in the charset of a label, or None if it is none of the web's charsets or the
    bytes are of another."""
    found = webencodings.lookup(label.strip())
    if found is None or found.name == "replacement":
        return None
    codec = {"gbk": "gb18030", "iso2022_jp": "iso2022_jp_2"}.get(found.codec_info.name)
    codec = codec or found.codec_info.name
    # By chance, eight characters in a row are UTF-8 where two bytes make one; elsewhere, two are.
    if codec != "utf-8" and _is_utf_8(body, 8 if codec in _MULTIBYTE else 2):
        return None
    if codec == "x-user-defined":  # no codec of Python's
        return found.codec_info.decode(body, "replace")[0]
    for wider in (codec, "euc_jis_2004") if codec == "euc_jp" else (codec,):
        text = body.decode(wider, "replace")
        if _is_mostly(text, body):
            return text
    return None


def _is_mostly(text: str, body: bytes) -> bool:
    """Whether hardly any of a body's other bytes than ASCII's are damage in its decoded text."""
    other = len(body.translate(None, _ASCII))
    if not other and not text.count("\ufffd"):
        return True
    bad = text.count("\ufffd") + sum(text.count(control) for control in _CONTROLS)
    return bad <= other / 10


# Bytes 0x80 to 0x9F in charsets that have no letters there.
_CONTROLS = [chr(code) for code in range(0x80, 0xA0) if code != 0x85]


def _is_utf_8(body: bytes, characters: int) -> bool:
    """Whether a body is UTF-8 with at least so many characters that are not ASCII."""
    if body.isascii() or b"\0" in body:
        return False
    text = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        decoded = text.decode(body)
    except UnicodeDecodeError:
        return False
    return len(decoded) - len(decoded.encode("ascii", "ignore")) >= characters


def _utf_16_codec(body: bytes) -> str | None:
    """Return UTF-16 of either byte order if the zeros of its ASCII characters lie that way."""
    sample = body[:4096]
    even, odd, many = sample[0::2].count(0), sample[1::2].count(0), len(sample) / 50
    if odd > many and even * 10 < odd:
        return "utf-16-le"
    if even > many and odd * 10 < even:
        return "utf-16-be"
    return None


def _escape_codec(body: bytes) -> str | None:
    """Return ISO-2022-JP, all of whose bytes are ASCII, if its escapes occur."""
    return "iso2022_jp_2" if b"\x1b$B" in body or b"\x1b$@" in body else None


def _declared(body: bytes) -> Iterator[str]:
    """Yield labels that a page declares itself, wherever in it; not those in comments."""
    if xml := _XML_DECLARED.match(body.lstrip()[:300]):
        yield xml[1].decode("ascii", "ignore")
    lower, place = body.lower(), 0
    comment, meta = lower.find(b"<!--"), lower.find(b"<meta")
    for _ in range(_DECLARATIONS):
        if meta < 0:
            return
        if 0 <= comment < meta:
            place = lower.find(b"-->", comment)
            if place < 0:
                return
            comment = lower.find(b"<!--", place)
            meta = meta if meta > place else lower.find(b"<meta", place)
            continue
        end = lower.find(b">", meta, meta + 1000)
        if found := _DECLARED.search(body, meta, end if end > 0 else meta + 1000):
            label = found[1].decode("ascii", "ignore")
            # A declaration that could be read as ASCII is not in UTF-16.
            yield "utf-8" if label.lower().startswith("utf-16") else label
        meta = lower.find(b"<meta", meta + 5)
