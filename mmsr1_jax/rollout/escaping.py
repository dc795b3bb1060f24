"""Text from outside that cannot be mistaken for what we write around it.

    kind          imitation                          shown as
    tag           </information>, ＜/іnformation>    ¬/information>      (the bracket is exchanged)
    control       <|im_end|>                         ¬|im_end|>
    header        [Text Search Results]              ¬Text Search Results]
    label         2. link: https://..                > 2. > link: https://..
    question      The question was: ..               > The question was: ..

Imitations are looked for in a copy of the text as a reader sees it (`_View`): entities and escapes
decoded, characters mapped to what they resemble, invisible ones left out. They are escaped in the
text itself, of which nothing else changes. All is linear in the length of the text.

Not escaped, because it cannot be confused with our markup: a word without a bracket
(`/information>`), tags with letters missing or in another language, code such as `List<Result>`,
`i <= result` or `<img src=..>`, and labels of other programs (`Title: ..` with a capital letter).
"""

import array
import html
import itertools
import re
from collections.abc import Iterator, Sequence

from mmsr1_jax.checked_json import valid_text
from mmsr1_jax.tools.lookalikes import LOOKS_LIKE

_BRACKET = "\N{NOT SIGN}"  # takes the place of a bracket; nothing that is looked for contains it
_MARK = "> "  # is put before a label

# Letters with what is written for them.
_LETTERS = {"a": "[a4@]", "e": "[e3]", "f": "[fs]", "i": "[il1|]", "l": "[il1|]",
            "m": "(?:m|rn)", "o": "[o05]", "s": "[s5$f]", "t": "[t7]"}  # fmt: skip
_BETWEEN = r"(?:[^\w<>«»\[\]{}()@$|¬]|_){0,3}+"  # letters of a tag: signs and spaces
_OURS = ("reason", "answer", "search", "textsearch")
_RESULT = ("result", "results", "searchresult", "searchresults")
_OTHERS = ("img", "think", "thinking", "toolcall", "toolcalls", "toolresponse", "observation")
_CONTROL = ("imstart", "imend", "imsep", "endoftext", "visionstart", "visionend", "visionpad",
            "imagepad", "videopad")  # fmt: skip


def _word(word: str, between: str = "") -> str:
    return between.join(_LETTERS.get(letter, letter) for letter in word)


def _any(words: Sequence[str]) -> str:
    ordered = sorted(words, key=len, reverse=True)
    return "|".join(_word(word, _BETWEEN) for word in ordered)


# A run of brackets and signs from the first bracket on, taken as a whole, and the name after it.
_TAG = re.compile(
    r"(?P<run>[<«\[{(](?:[^\w>»\]})|¬]|_|\|(?!n))*+)"
    rf"(?:(?P<information>{_any(['information'])})|(?P<control>{_any(_CONTROL)})"
    rf"|(?:(?P<ours>{_any(_OURS)})|(?P<result>{_any(_RESULT)})|(?P<other>{_any(_OTHERS)}))(?!\w))?"
)
_CLOSED = re.compile(r"(?:[^\w<\n\"]|_){0,8}[>»\]})]")
_CONTROL_TOKEN = re.compile(r"<\s?\|[^\s<>|](?:[^<>|\n]{0,40}[^\s<>|])?\|\s?>")
_HEADER = re.compile(
    rf"[\[{{<«](?=\W{{0,4}}(?:{_word('text')}|{_word('image')})\W{{0,3}}{_word('search')}\W{{0,3}}"
    rf"{_word('result')}{_word('s')}?\W{{0,4}}?[\]}}>»])"
)
# All but letters, digits, line breaks, and `>`, which marks a quotation; `|ink` looks like `link`.
_SIGNS = r"(?:[^\w\n>|]|_|\|(?!ink|mage))"
_LABELS = f"{_word('link')}|{_word('title')}|{_word('image')}|{_word('summary')}"
_LABEL = re.compile(
    rf"(?:^|\n){_SIGNS}*+(?P<number>\d++{_SIGNS}++)?(?P<label>{_LABELS})(?:[^\w\n:]|_)*+:"
)
_NUMBERED = re.compile(
    rf"(?<![^\W_])\d++{_SIGNS}++(?P<label>{_word('link')}|{_word('image')})(?:[^\w\n:]|_)*+:"
)
_APART = r"(?:\W|_){1,3}"
_QUESTION = re.compile(
    rf"(?:^|\n){_SIGNS}*+(?P<label>{_word('original')}{_APART}{_word('question')}"
    rf"|{_word('the')}{_APART}{_word('question')}{_APART}{_word('was')})(?:\W|_){{0,3}}?:"
)
_ENCODED = re.compile(
    r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});?"
    r"|\\u(?:[0-9a-fA-F]{4}|\{[0-9a-fA-F]{1,6}\})|\\x[0-9a-fA-F]{2}|%[2-7][0-9a-fA-F]"
    r"|%0[aAdD]|\\[nr](?=\W{0,8}[\dlLtTiIsSoO])"  # a line break before what may be a label
)
_ROUNDS = 4  # of decoding what is encoded several times over
_OVERRIDE = re.compile("[\u202d\u202e]")  # what follows is shown in another order than it is read
# Invisible copies of ASCII, which a policy reads none the less.
_INVISIBLE_ASCII = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}
_HAS_INVISIBLE_ASCII = re.compile("[\U000e0020-\U000e007e]")


def harmless(text: str, *, line_start: bool = True) -> str:
    """Return a text from outside with all imitations escaped.

    A text without imitations is returned unchanged, but for half surrogates and for the characters
    U+202D and U+202E, which show what follows in another order than it is read.

    Args:
      line_start: whether the text begins a line where it is shown.
    """
    text = _OVERRIDE.sub("", valid_text(text))
    edits = _edits(text, line_start)
    if _HAS_INVISIBLE_ASCII.search(text):
        edits |= _edits(text.translate(_INVISIBLE_ASCII), line_start)
    if not edits:
        return text
    pieces, begin = [], 0
    for (start, end), replacement in sorted(edits.items()):
        if start >= begin:
            pieces += [text[begin:start], replacement]
            begin = end
    return "".join([*pieces, text[begin:]])


class _View:
    """A text as a reader sees it, and where its characters come from.

    Attributes:
      text: what is seen.
    """

    def __init__(self, text: str):
        self._characters, self._starts = _decoded(text)
        self._length = len(text)
        self.text = self._characters.translate(LOOKS_LIKE)
        self._places: array.array | None = None

    def span(self, place: int) -> tuple[int, int]:
        """Where in the original text a character of the view begins and ends."""
        if self._places is None:  # only where there is an imitation
            counts = (len(LOOKS_LIKE[ord(character)]) for character in self._characters)
            repeated = map(itertools.repeat, range(len(self._characters)), counts)
            self._places = array.array("q", itertools.chain.from_iterable(repeated))
        character = self._places[place]
        if self._starts is None:
            return character, character + 1
        start = self._starts[character]
        following = range(character + 1, len(self._starts))
        return start, next(
            (self._starts[i] for i in following if self._starts[i] > start), self._length
        )


def _edits(text: str, line_start: bool) -> dict[tuple[int, int], str]:
    """Return the replacements by span; an empty span is an insertion."""
    view = _View(text)
    edits = {view.span(place): _BRACKET for place in _brackets(view.text)}
    for place in _labels(view, text, line_start):
        start = view.span(place)[0]
        edits[start, start] = _MARK
    return edits


def _brackets(view: str) -> Iterator[int]:
    """The places of brackets of tags, control tokens and headers."""
    for found in _TAG.finditer(view):
        if found.lastgroup != "run" and _is_tag(view, found):
            run = found["run"]
            yield from (found.start() + i for i, sign in enumerate(run) if sign in "<«[{(")
    for pattern in (_CONTROL_TOKEN, _HEADER):
        yield from (found.start() for found in pattern.finditer(view))


def _is_tag(view: str, found: re.Match) -> bool:
    """Whether brackets with a name after them look like a tag, and not like a program's text, a
    quotation, or a link in Markdown."""
    run, name = found["run"], found.lastgroup
    before, closing = view[found.start() - 1 : found.start()], _CLOSED.match(view, found.end())
    if name == "control":
        return "|" in run or "<" in run
    if "/" in run or "\\" in run:
        if "<" in run or "«" in run:
            return True
        alone = closing is not None and not run.strip("[{(/\\|_*!.~ \n")
        return alone and ("(" not in run or (name == "information" and before != "]"))
    if "<" not in run:
        return False
    if name in ("information", "ours"):  # `i <= answer` is a program's
        return name == "information" or not run.strip("<|_*!.:#~`^? \n")
    # So are `i < result` and `List<Result>`.
    return closing is not None and run == "<" and not (name == "result" and before.isalnum())


def _labels(view: _View, text: str, line_start: bool) -> Iterator[int]:
    """The places of labels at the beginning of lines, or after a number."""
    for pattern in (_LABEL, _QUESTION):
        for found in pattern.finditer(view.text):
            if found.start() == 0 and not line_start and not view.text.startswith("\n"):
                continue
            place = found.start("label")
            if pattern is _LABEL and text[view.span(place)[0]].isupper():
                begins = re.match(_word("link"), found["label"]) or (
                    found["number"] and re.match(_word("image"), found["label"])
                )
                if not begins:  # of a result
                    continue
            yield place
            if found.groupdict().get("number"):  # the line is not to begin with it either
                yield found.start("number")
    yield from (found.start("label") for found in _NUMBERED.finditer(view.text))


def _decoded(text: str) -> tuple[str, array.array | None]:
    """A text with entities and escapes decoded, and where each of its characters begins; None where
    nothing is encoded."""
    starts: array.array | None = None
    for _ in range(_ROUNDS):
        pieces: list[str] = []
        places = array.array("q")
        begin = 0
        for found in _ENCODED.finditer(text):
            value = _value(found[0])
            if value == found[0]:
                continue
            pieces += [text[begin : found.start()], value]
            places.extend(range(begin, found.start()))
            # An entity may end without a semicolon, and letters after it are taken along.
            plain = max(len(value) - 1, 0) if found[0].endswith(value[1:]) else 0
            places.extend([found.start()] * (len(value) - plain))
            places.extend(range(found.end() - plain, found.end()))
            begin = found.end()
        if not pieces:
            break
        places.extend(range(begin, len(text)))
        text = "".join([*pieces, text[begin:]])
        starts = places if starts is None else array.array("q", (starts[i] for i in places))
    return text, starts


def _value(encoded: str) -> str:
    """The character that an entity or escape stands for; itself where it stands for none."""
    if encoded[0] == "&":
        return html.unescape(encoded)
    if encoded in ("\\n", "\\r"):
        return "\n"
    code = int(encoded.lstrip("\\ux%{").rstrip("}") or "0", 16)
    return chr(code) if code <= 0x10FFFF and not 0xD800 <= code < 0xE000 else encoded
