"""Charset detection from text, for pages that do not declare their charset.

Text in Latin script is identified by language: in the right charset, its non-ASCII letters all
belong to the alphabet of one language. Other scripts are left to charset_normalizer.
"""

import re

import charset_normalizer

_EAST_ASIAN = ["gb18030", "big5hkscs", "cp932", "euc_jp", "cp949"]
_ALPHABETS = ["cp1251", "cp1253", "cp1255", "cp1256", "cp874", "koi8_u", "iso8859_5", "iso8859_7"]
# Non-ASCII letters, one string per language. On a tie, the first charset wins.
_LATIN = {
    "cp1252": (
        "àâæçèéêëîïôœùûüÿ", "äöüß", "áéíñóúü", "ãáâàçéêíóôõúü", "àèéìíîòóùú", "éèëïöüá", "åäöéàü",
        "æøåéèòô", "áéíóúýþðæö", "äõöüšž", "àçèéíïòóúü",
    ),
    "cp1250": (
        "áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž", "ąćęłńóśźż", "áéíóöőúüű", "čćđšž", "ăâîşţ",
    ),
    "cp1254": ("çğıöşüâîû",),
    "cp1257": ("ąčęėįšųūž", "āčēģīķļņšūž"),
}  # fmt: skip
_SAMPLE_BYTES = 8192
_LETTER = re.compile(b"[A-Za-z]")
_NON_ASCII = re.compile(b"[\x80-\xff]")
_RUN = re.compile(b"[\xc0-\xff]{4}")
_CONTROL = re.compile(b"[\x80-\x9f]")
_BETWEEN_TAGS = re.compile(b"[^<>]+")
_PUNCTUATION = re.compile(
    "[\0-\x7f\xa0\xa1\xa7\xa9\xab\xad\xae\xb0\xb7\xbb\xbf\u2013\u2014\u2018-\u2022\u2026\u20ac]+"
)


def detect_charset(body: bytes) -> str:
    """Return the codec of a page that is not UTF-8, detected on a sample of its text."""
    sample = _sample(body)
    # In Latin script, accented letters occur among ASCII letters, hardly ever four in a row.
    if len(_LETTER.findall(sample)) > len(_NON_ASCII.findall(sample)) and not _RUN.search(sample):
        return _latin_codec(sample)
    names = [*_EAST_ASIAN, *_ALPHABETS]
    if _CONTROL.search(sample):  # control characters in ISO 8859, which pages do not use
        names = [name for name in names if not name.startswith("iso8859")]
    matches = charset_normalizer.from_bytes(sample, cp_isolation=names, threshold=0.5)
    # Japanese decoded as Thai is as coherent as Japanese, so ties go to East Asian codecs. Russian
    # decoded as half-width Japanese is somewhat coherent, but less than Russian.
    best = min(
        matches,
        key=lambda m: (round(m.chaos, 2), -round(m.coherence, 1), m.encoding not in _EAST_ASIAN),
        default=None,
    )
    return best.encoding if best else "cp1252"


def _latin_codec(sample: bytes) -> str:
    """Return the codec that leaves the fewest letters outside the alphabet of a single language."""
    best, min_foreign = "cp1252", len(sample)
    for codec, languages in _LATIN.items():
        if codec == "cp1250" and not _CONTROL.search(sample):
            codec = "iso8859_2"  # cp1250 text nearly always has these bytes
        letters = _PUNCTUATION.sub("", sample.decode(codec, "replace").lower())
        for language in languages:
            foreign = len(letters.translate(dict.fromkeys(map(ord, language))))
            if foreign < min_foreign:
                best, min_foreign = codec, foreign
    return best


def _sample(body: bytes) -> bytes:
    """Return a sample of the non-ASCII text between tags, cut at character boundaries."""
    sample = bytearray()
    for match in _BETWEEN_TAGS.finditer(body):
        if match[0].isascii():
            continue
        text = match[0][:_SAMPLE_BYTES]
        if len(match[0]) > _SAMPLE_BYTES:
            # No charset has bytes below 0x30 inside a multibyte character.
            text = text[: max(text.rfind(byte) for byte in (b" ", b"\n", b".")) + 1] or text
        sample += text + b"\n"
        if len(sample) >= _SAMPLE_BYTES:
            break
    return bytes(sample)
