"""Text normalisation and segmentation for full-text search in any script with SQLite's FTS5.

FTS5's built-in tokenizer splits text at spaces and punctuation and stems English words. Other text
is rewritten before indexing so that this tokenizer suffices:

    compatibility forms    full-width letters, ligatures and decomposed letters are unified
    diacritics             removed where writers omit them: Latin, Cyrillic, Arabic, Hebrew
    no spaces              Chinese, Japanese, Korean: every pair of letters is a term;
                           Thai, Lao, Khmer, Burmese and others: every three letters are a term

English text is unchanged. Indexed text and queries are rewritten by the same rules.
"""

import itertools
import re
import unicodedata

import regex

# Includes combining marks (M*), since vowels of Indian scripts are combining marks.
TOKENIZER = "porter unicode61 categories 'L* M* N* Co'"

# Korean uses spaces, but attaches particles to nouns.
_PAIRS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Bopomofo}\p{Yi}\u30fc\u3099\u309a"
_TRIPLES = (
    r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}"
    r"\p{Balinese}\p{Javanese}"
)
# U+200B to U+200D inside such a run only mark where a line may break.
_RUN = regex.compile(
    rf"([{_PAIRS}--\p{{P}}][{_PAIRS}\u200b-\u200d--\p{{P}}]*+)"
    rf"|([{_TRIPLES}--\p{{P}}][{_TRIPLES}\u200b-\u200d--\p{{P}}]*+)",
    regex.VERSION1,
)
_ZERO_WIDTH = re.compile("[\u200b-\u200d]+")
_WORD = regex.compile(r"\0?[\w\p{M}--[\u200c\u200d]]+", regex.VERSION1)
# Longer runs of marks than any script uses, which Python would sort in quadratic time.
_MANY_MARKS = regex.compile(r"(\p{M}{16})\p{M}++")
# Joiners only shape letters in Indian scripts. In Persian, the non-joiner separates words.
_INDIAN_JOINER = re.compile("(?<=[\u0900-\u0dff])[\u200c\u200d]")
# Text beyond plain English and its punctuation, with up to three ASCII characters in between.
_FOREIGN = re.compile(
    "[^\x01-\x7f\xa0\xa1\xa7\xa9\xab\xae\xb0\xb1\xb6\xbb\xbf\u2010-\u2015\u2018-\u2022\u2026\u20ac]"
    "(?:[\x01-\x7f]{0,3}[^\x01-\x7f])*"
)


def _ranges(*ranges: tuple[int, int]) -> list[int]:
    """Return the code points of ranges, both ends included."""
    return list(itertools.chain.from_iterable(range(first, last + 1) for first, last in ranges))


_INVISIBLE = _ranges(
    (0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x200E, 0x200F), (0x202A, 0x202E),
    (0x2060, 0x206F), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xE0100, 0xE01EF),
)  # fmt: skip
_OPTIONAL_MARKS = _ranges(
    (0x0300, 0x036F), (0x0483, 0x0487), (0x0591, 0x05BD), (0x05BF, 0x05BF), (0x05C1, 0x05C2),
    (0x05C4, 0x05C5), (0x05C7, 0x05C7), (0x0610, 0x061A), (0x064B, 0x065F), (0x0670, 0x0670),
    (0x06D6, 0x06DC), (0x06DF, 0x06E4), (0x06E7, 0x06E8), (0x06EA, 0x06ED), (0x0730, 0x074A),
    (0x08D3, 0x08E1), (0x08E3, 0x08FF), (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x20D0, 0x20FF),
    (0xFE20, 0xFE2F),
    *((nukta, nukta) for nukta in (0x093C, 0x09BC, 0x0A3C, 0x0ABC, 0x0B3C, 0x0CBC)),
)  # fmt: skip
_ZEROS = (
    0x0660, 0x06F0, 0x07C0, 0x0966, 0x09E6, 0x0A66, 0x0AE6, 0x0B66, 0x0BE6, 0x0C66, 0x0CE6, 0x0D66,
    0x0E50, 0x0ED0, 0x0F20, 0x1040, 0x17E0, 0x1810,
)  # fmt: skip
# Applied before decomposition, which would turn the two signs into letters.
_SIGNS = dict.fromkeys(_INVISIBLE) | dict.fromkeys(map(ord, "\0™℠"), " ")
# Applied after decomposition: Arabic yeh (three), kaf and heh (two); sharp s (two), dotless i,
# final sigma.
_FOLDING = (
    dict.fromkeys([*_OPTIONAL_MARKS, 0x0640])
    | {zero + digit: str(digit) for zero in _ZEROS for digit in range(10)}
    | {0x0649: "\u064a", 0x06CC: "\u064a", 0x06D2: "\u064a", 0x06A9: "\u0643", 0x0629: "\u0647"}
    | {0x06C1: "\u0647", 0x00DF: "ss", 0x1E9E: "ss", 0x0131: "i", 0x03C2: "\u03c3"}
)


def search_form(text: str) -> str:
    """Return a text rewritten for indexing by FTS5 with `TOKENIZER`; English text is unchanged."""
    return text if text.isascii() else _RUN.sub(_index_terms, _FOREIGN.sub(_fold, text))


def fts_query(text: str) -> str:
    """Return an FTS5 query that matches any word of a text; empty if the text has no words.

    Operators of the query language are treated as ordinary words.
    """
    text = _RUN.sub(_query_terms, _FOREIGN.sub(_fold, text))
    words = dict.fromkeys(_WORD.findall(text))
    return " OR ".join(f'"{word[1:]}" *' if word[0] == "\0" else f'"{word}"' for word in words)


def _fold(match: re.Match[str]) -> str:
    """Return the match with equivalent forms of letters unified."""
    text = _MANY_MARKS.sub(r"\1", match[0].translate(_SIGNS))
    decomposed = unicodedata.normalize("NFKD", text).translate(_FOLDING)
    return _INDIAN_JOINER.sub("", unicodedata.normalize("NFC", decomposed))


def _parse_run(match: regex.Match[str]) -> tuple[str, int]:
    """Return the letters of a run, and the number of letters per term."""
    return _ZERO_WIDTH.sub("", match[0]), 2 if match[1] else 3


def _index_terms(match: regex.Match[str]) -> str:
    """Return a run's terms for the index. A term starts at every letter, so that a query shorter
    than a term matches as a prefix."""
    run, length = _parse_run(match)
    return f" {' '.join(run[i : i + length] for i in range(len(run)))} "


def _query_terms(match: regex.Match[str]) -> str:
    """Return a run's terms for a query; a leading NUL marks a prefix query."""
    run, length = _parse_run(match)
    if len(run) < length:
        return f" \0{run} "
    return f" {' '.join(run[i : i + length] for i in range(len(run) - length + 1))} "
