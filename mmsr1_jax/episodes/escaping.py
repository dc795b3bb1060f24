"""Escaping of external text, so that it cannot imitate the markup that we write around it.

    kind          imitation                          shown as
    tag           </information>, ＜/іnformation>    ¬/information>      (the bracket is replaced)
    control       <|im_end|>                         ¬|im_end|>
    header        [Text Search Results]              ¬Text Search Results]
    label         2. link: https://..                > 2. > link: https://..
    question      The question was: ..               > The question was: ..

Imitations are detected in a copy of the text as a reader sees it (`_View`): entities and escapes
are decoded, characters are mapped to those that they resemble, and invisible ones are removed. The
imitations are then escaped in the original text, which is otherwise unchanged. The running time is
linear in the length of the text.

Some text is not escaped because it cannot be confused with our markup: a word without a bracket
(`/information>`), tags with letters missing or in another language, code such as `List<Result>`,
`i < result`, `vector<Answer>` or `<img src=..>`, captions (`Figure 2. Image: ..`), and labels
without a number that cannot begin a result: `Link: ..`, `"image": ..`, and `title: ..` or
`image: ..` unless they follow a numbered label.
"""

import array
import html
import itertools
import re
from collections.abc import Iterator, Sequence

from mmsr1_jax.tools.lookalikes import LOOKS_LIKE
from mmsr1_jax.utils.checked_json import valid_text

_BRACKET = "\N{NOT SIGN}"  # replaces a bracket; no imitation contains it
_MARK = "> "  # inserted before a label

# Letters and the characters used to imitate them.
_LETTERS = {"a": "[a4@]", "e": "[e3]", "f": "[fs]", "i": "[il1|!¡]", "l": "[il1|]",
            "m": "(?:m|rn)", "o": "[o05]", "s": "[s5$f]", "t": "[t7]"}  # fmt: skip
# What may separate the letters of a tag: signs and spaces, or other tags.
_BETWEEN = r"(?:[^\w<>«»\[\]{}()@$|!¡¬]|_|<[/!\w -]{1,12}>){0,3}+"
_OURS = ("reason", "answer", "search", "textsearch")
_RESULT = ("result", "results", "searchresult", "searchresults")
_OTHERS = ("img", "think", "thinking", "toolcall", "toolcalls", "toolresponse", "observation")
_CONTROL = ("imstart", "imend", "imsep", "endoftext", "visionstart", "visionend", "visionpad",
            "imagepad", "videopad")  # fmt: skip


def _word(word: str, between: str = "") -> str:
    return between.join(_LETTERS.get(letter, letter) for letter in word)


def _any(names: Sequence[str]) -> str:
    ordered = sorted(names, key=len, reverse=True)
    return "|".join(_word(word, _BETWEEN) for word in ordered)


# A maximal run of brackets and signs from the first bracket on, and the name after it.
_TAG = re.compile(
    r"(?P<run>[<«\[{(](?:[^\w>»\]})|!¡¬]|_|[|!¡](?!n))*+)"
    rf"(?:(?P<information>{_any(['information'])})|(?P<control>{_any(_CONTROL)})"
    rf"|(?:(?P<ours>{_any(_OURS)})|(?P<result>{_any(_RESULT)})|(?P<other>{_any(_OTHERS)}))(?!\w))?"
)
_CLOSED = re.compile(r"(?:[^\w<\n\"]|_){0,8}[>»\]})]")
_CONTROL_TOKEN = re.compile(r"<\s?\|[^\s<>|](?:[^<>|\n]{0,40}[^\s<>|])?\|\s?>")
_HEADER = re.compile(
    rf"(?:[\[{{<«]|(?:^|\n) *+\()(?=\W{{0,4}}(?:{_word('text')}|{_word('image')})"
    rf"\W{{0,3}}{_word('search')}\W{{0,3}}{_word('result')}{_word('s')}?"
    r"(?:\W|\d|of){0,9}?[\]}>»)])"
)
# Any character but letters, digits, line breaks and the quotation mark `>`; `|ink` looks like
# `link`.
_SIGNS = r"(?:[^\w\n>|]|_|\|(?!ink|mage))"
_LABELS = f"{_word('link')}|{_word('title')}|{_word('image')}|{_word('summary')}"
_COLON = r"(?:[^\w\n:]|_)*+:"
_LINE = r"(?:^|\n|<br[ /]{0,3}>)"
_NUMBERED_LINE = re.compile(
    rf"{_LINE}{_SIGNS}*+(?P<number>\d++){_SIGNS}++(?P<label>{_LABELS}){_COLON}"
)
# Inside a line, `, "` before the label indicates JSON or YAML, and a large number a year.
_NUMBERED = re.compile(
    rf"(?<![^\W_])(?P<number>0*\d{{1,2}})(?! *+\w)(?:(?![,;\"'{{}}]){_SIGNS})++"
    rf"(?P<label>{_word('link')}|{_word('image')}){_COLON}"
)
_CAPTION = re.compile(
    r"\b(?:figures?|figs?|plates?|photos?|pictures?|pics?|images?|illustrations?|tables?|slides?"
    r"|panels?|pages?|steps?|abbildung|abb|bild|figura|foto|рис|рисунок)\W{0,3}[\d.-]{0,8}$"
)
_UNNUMBERED = re.compile(rf"{_LINE}(?P<before> *+)(?P<label>{_LABELS}) *+:")
_LONE_NUMBER = re.compile(rf"{_LINE} *+\d{{1,2}}[.):] *+\n *+(?={_word('image')}|{_word('title')})")
_LINK = re.compile(_word("link"))
_SUMMARY = re.compile(_word("summary"))
_APART = r"(?:\W|_){1,3}"
_QUESTION = re.compile(
    rf"{_LINE}{_SIGNS}*+(?P<label>(?:{_word('the')}{_APART})?{_word('original')}{_APART}"
    rf"{_word('question')}(?:{_APART}{_word('was')})?"
    rf"|{_word('the')}{_APART}{_word('question')}{_APART}{_word('was')})(?:\W|_){{0,3}}?:"
)
# Runs of `&amp;` and `%25`, that is, text encoded several times over, match as a whole.
_AMPERSANDS = r"&(?:(?:amp|AMP|#0*38|#[xX]0*26);)*+"
_ENCODED = re.compile(
    rf"{_AMPERSANDS}(?:#[0-9]++|#[xX][0-9a-fA-F]++|[a-zA-Z][a-zA-Z0-9]{{1,31}})?;?"
    r"|\\u(?:[0-9a-fA-F]{4}|\{[0-9a-fA-F]{1,6}\})|\\U[0-9a-fA-F]{8}|\\x[0-9a-fA-F]{2}"
    r"|\\[01][0-7]{2}|%(?:25)*+(?:[2-7][0-9a-fA-F]|0[aAdD])|%25"
    r"|\\[nr](?=\W{0,8}[\dlLtTiIsSoO])"  # a line break before what may be a label
)
_FIRST_AMPERSANDS = re.compile(_AMPERSANDS)
_NUMBER = re.compile(r"&#([xX]?)0*+([0-9a-fA-F]*+)")
_ROUNDS = 4  # rounds of decoding, for text encoded several times over
_OVERRIDE = re.compile("[\u202d\u202e]")  # they display the text after them in another order
# Invisible copies of ASCII, which a policy can still read.
_INVISIBLE_ASCII = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}
_HAS_INVISIBLE_ASCII = re.compile("[\U000e0020-\U000e007e]")


def escape_tags(text: str, *, line_start: bool = True) -> str:
    """Return external text with all imitations escaped.

    A text without imitations is returned unchanged, except for lone surrogates and the characters
    U+202D and U+202E, which display the text after them in another order.

    Args:
      text: External text.
      line_start: Whether the text begins a line where it is shown.
    """
    text = _OVERRIDE.sub("", valid_text(text))
    edits = _edits(text, line_start)
    if _HAS_INVISIBLE_ASCII.search(text):
        edits |= _edits(text.translate(_INVISIBLE_ASCII), line_start)
    if not edits:
        return text
    pieces, copied = [], 0
    for (start, end), replacement in sorted(edits.items()):
        if start >= copied:
            pieces += [text[copied:start], replacement]
            copied = end
    return "".join([*pieces, text[copied:]])


class _View:
    """View of a text as a reader sees it, with the origin of each character.

    Attributes:
      text: Visible text.
    """

    def __init__(self, text: str):
        self._characters, self._starts = _decode(text)
        self._length = len(text)
        self.text = self._characters.translate(LOOKS_LIKE)
        self._indices: array.array | None = None

    def span(self, index: int) -> tuple[int, int]:
        """Return the span in the original text of the character at an index of the view."""
        if self._indices is None:  # computed only if there is an imitation
            counts = (len(LOOKS_LIKE[ord(character)]) for character in self._characters)
            repeated = map(itertools.repeat, range(len(self._characters)), counts)
            self._indices = array.array("q", itertools.chain.from_iterable(repeated))
        character = self._indices[index]
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
    edits = {view.span(index): _BRACKET for index in _brackets(view, text)}
    for index in _labels(view, text, line_start):
        start = view.span(index)[0]
        edits[start, start] = _MARK
    return edits


def _brackets(view: _View, text: str) -> Iterator[int]:
    """Yield the positions of the brackets of tags, control tokens and headers."""
    for match in _TAG.finditer(view.text):
        if match.lastgroup != "run" and _is_tag(view, text, match):
            run = match["run"]
            yield from (match.start() + i for i, sign in enumerate(run) if sign in "<«[{(")
    yield from (match.start() for match in _CONTROL_TOKEN.finditer(view.text))
    yield from (match.end() - 1 for match in _HEADER.finditer(view.text))


def _is_tag(view: _View, text: str, match: re.Match) -> bool:
    """Return whether brackets followed by a name look like a tag.

    Source code, quotations and Markdown links do not count as tags.
    """
    run, name = match["run"], match.lastgroup
    before, closing = (
        view.text[max(match.start() - 1, 0) : match.start()],
        _CLOSED.match(view.text, match.end()),
    )
    if name == "control":
        return "|" in run or "<" in run
    if "/" in run or "\\" in run:
        if "<" in run or "«" in run:
            return True
        complete = closing is not None and not run.strip("[{(/\\|_*!.~ \n")
        return complete and ("(" not in run or (name == "information" and before != "]"))
    if "<" not in run:
        return False
    if name in ("information", "ours"):  # `i <= answer` is code
        if run[-1].isspace() and (closing is None or closing[0][-1] not in ">»"):
            return False  # so is `i < answer`
        if name == "information":
            return True
        first = text[view.span(match.end("run"))[0]]
        is_generic = run == "<" and before.isalnum() and first in "ARST"  # `vector<Answer>`
        return not is_generic and not run.strip("<|_*!¡.:#~`^? \n")
    # `i < result` and `List<Result>` are code too.
    return closing is not None and run == "<" and not (name == "result" and before.isalnum())


def _labels(view: _View, text: str, line_start: bool) -> Iterator[int]:
    """Yield the positions of labels at the start of a line, or after a number."""

    def starts_line(match: re.Match) -> bool:
        return bool(line_start or match.start() or view.text.startswith("\n"))

    def is_capitalised(match: re.Match) -> bool:  # other programs capitalise labels
        return text[view.span(match.start("label"))[0]] in "LTIS"

    lone = _LONE_NUMBER.search(view.text)
    first = lone.start() if lone else len(view.text)  # position of the first numbered label
    for match in filter(starts_line, _NUMBERED_LINE.finditer(view.text)):
        if not (is_capitalised(match) and _SUMMARY.match(match["label"])):  # cannot begin a result
            first = min(first, match.start())
            yield match.start("label")
            yield match.start("number")  # so that the line does not begin with it
    for match in _NUMBERED.finditer(view.text):
        preceding = view.text[max(match.start() - 24, 0) : match.start()].rpartition("\n")[2]
        if not (is_capitalised(match) and _CAPTION.search(preceding)):
            first = min(first, match.start())
            yield match.start("label")
    for match in filter(starts_line, _UNNUMBERED.finditer(view.text)):
        unambiguous = _LINK.match(match["label"]) or (
            _SUMMARY.match(match["label"]) and not match["before"]
        )
        if not is_capitalised(match) and (unambiguous or first < match.start()):
            yield match.start("label")
    for match in filter(starts_line, _QUESTION.finditer(view.text)):
        yield match.start("label")


def _decode(text: str) -> tuple[str, array.array | None]:
    """Decode the entities and escapes in a text.

    Returns:
      The decoded text, and the start of each of its characters in the original; None if nothing
      is encoded.
    """
    starts: array.array | None = None
    for _ in range(_ROUNDS):
        pieces: list[str] = []
        round_starts = array.array("q")  # start of each character in the text of this round
        copied = 0
        for match in _ENCODED.finditer(text):
            value = _value(match[0])
            if value == match[0]:
                continue
            pieces += [text[copied : match.start()], value]
            round_starts.extend(range(copied, match.start()))
            # The match of an entity without a semicolon may include letters after it.
            plain = max(len(value) - 1, 0) if match[0].endswith(value[1:]) else 0
            round_starts.extend([match.start()] * (len(value) - plain))
            round_starts.extend(range(match.end() - plain, match.end()))
            copied = match.end()
        if not pieces:
            break
        round_starts.extend(range(copied, len(text)))
        text = "".join([*pieces, text[copied:]])
        starts = (
            round_starts if starts is None else array.array("q", (starts[i] for i in round_starts))
        )
    return text, starts


def _value(encoded: str) -> str:
    """Return the character that an entity or escape encodes, or the input if it is neither."""
    if encoded[0] == "&":
        ampersands = _FIRST_AMPERSANDS.match(encoded)
        assert ampersands is not None  # matches any text that begins with `&`
        encoded = "&" + encoded[ampersands.end() :]
        number = _NUMBER.match(encoded)
        if number and len(number[2]) > 8:  # beyond Unicode
            return "\ufffd"
        return html.unescape(encoded if number is None else f"&#{number[1]}{number[2] or 0};")
    if encoded in ("\\n", "\\r"):
        return "\n"
    if encoded[0] == "%":
        return chr(int(encoded[-2:], 16))
    if encoded[1].isdigit():
        return chr(int(encoded[1:], 8))
    code = int(encoded.lstrip("\\uUx{").rstrip("}") or "0", 16)
    return chr(code) if code <= 0x10FFFF and not 0xD800 <= code < 0xE000 else encoded
