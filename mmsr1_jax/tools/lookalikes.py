"""Mapping of characters to the ASCII characters that they resemble.

    ＜/іnf\u200bоrmation＞  ->  </information>

Only checks read the mapped text; the policy sees the original.
"""

import functools
import re
import unicodedata

from confusable_homoglyphs import confusables

# Invisible characters that Unicode classifies as letters or symbols.
_INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0\ufffc\U0001d159")
# Additions to Unicode's list of confusables: Cyrillic and Greek letters that resemble Latin ones,
# and symbols that resemble `<`, `>` and `|`. « and » represent all brackets that are legitimate
# quotation marks in some language, or mathematical symbols.
_EXTRA = (
    ("кκ", "k"), ("пηԥ", "n"), ("гᴦ", "r"), ("тτ", "t"), ("м", "m"), ("вβ", "b"), ("ε", "e"),
    ("ѡω", "w"), ("ςѕ", "s"), ("υ", "u"), ("хχ", "x"), ("ɢ", "g"), ("ʜ", "h"), ("ꜰ", "f"),
    ("∣⏽ǀ׀│┃❘｜丨￨", "|"), ("‖║", "|"), ("＼﹨∖⧵", "\\"), ("∕⁄╱⧸⟋⫽", "/"),
    ("〔❲〘〚", "["), ("〕❳〙〛", "]"),
    ("‹❮˂ᐸᚲ𝈶", "<"), ("›❯˃ᐳ𝈷", ">"),
    ("«≪≺⋖⪡⋜くㄑ〱ᑉ◁◀◂◃◄⊲←⇐⟵⟸", "«"), ("»≫≻⋗⪢⋝ᑐ▷▶▸▹►⊳→⇒⟶⟹", "»"),
)  # fmt: skip
_LATIN = re.compile(
    r"(?:LATIN|MODIFIER|REGIONAL INDICATOR SYMBOL|(?:NEGATIVE )?(?:CIRCLED|SQUARED) LATIN)"
    r"(?: LETTER| SMALL| CAPITAL| DOTLESS)* ([A-Z])(?: WITH .+)?"
)


class _Table(dict):
    """Lazily filled translation table for `str.translate`."""

    def __missing__(self, code: int) -> str:
        decomposed = unicodedata.normalize("NFKD", chr(code))
        sign = len(decomposed) == 1 and decomposed.isascii() and not decomposed.isalnum()
        if chr(code) in _confusables() and not sign and unicodedata.digit(chr(code), None) is None:
            decomposed = chr(code)
        self[code] = "".join(_resemblance(character) for character in decomposed).casefold()
        return self[code]


LOOKS_LIKE = _Table()
"""Text by code point: lower-case ASCII for a character that resembles it, "" for an invisible
character or a combining mark, and a space or a newline for white space."""


def is_lookalike(character: str) -> bool:
    """Return whether a non-ASCII character is invisible or resembles an ASCII one. Accented Latin
    letters (ü, ß) do not count."""
    if character.isascii():
        return False
    if LOOKS_LIKE[ord(character)] == "":
        return True
    form = _confusables().get(character) or unicodedata.normalize("NFKC", character)
    return form.isascii()


def _resemblance(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace() or category in ("Zl", "Zp"):
        return "\n" if character in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029" else " "
    if category in ("Cc", "Cf", "Mn", "Me", "Cn", "Co", "Cs") or character in _INVISIBLE:
        return ""
    if character.isascii():
        return character
    digit = unicodedata.digit(character, None)
    if digit is not None:
        return str(digit)
    confusable = _confusables().get(character)
    if confusable is not None:
        return confusable
    name = unicodedata.name(character, "")
    if category in ("Ps", "Pi", "Pe", "Pf") and "QUOTATION MARK" not in name:
        opening = category in ("Ps", "Pi")
        if "ANGLE" in name:
            return "«" if opening else "»"
        return "[" if opening else "]"
    latin = _LATIN.fullmatch(name)
    return latin[1] if latin else character


@functools.cache
def _confusables() -> dict[str, str]:
    """Return the ASCII lookalikes in Unicode's list of confusables (UTS 39), plus `_EXTRA`."""
    lookalikes: dict[str, str] = {}
    for character, others in confusables.confusables_data.items():
        character = character.strip("\u200e")  # surrounds letters of right-to-left scripts
        for other in others:
            text = other["c"].strip("\u200e")
            if len(character) == 1 and not character.isascii() and text.isascii():
                lookalikes.setdefault(character, text)
    return lookalikes | {character: text for characters, text in _EXTRA for character in characters}
