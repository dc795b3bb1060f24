"""Formatting of search results for the policy, within a token budget.

result ──► block: pieces that are our own labels, external text, or images
blocks ──► chosen: those whose images and links fit, in order
       ──► shortened: each gets an equal share of the tokens; what short blocks leave unused
           goes to longer ones, whose text is cut at the end of a sentence or word
"""

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence

from mmsr1_jax.episodes.episode import ShownResult
from mmsr1_jax.episodes.escaping import escape_tags
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools.links import display_link, one_line
from mmsr1_jax.tools.tool import Part

_LEAST = 64  # tokens of text; a result cut to fewer is left out
_WORD = 160  # characters; a longer run without a word boundary may be cut anywhere
_SENTENCE = re.compile(
    r"[.!?\u2026\u061f\u06d4\u0964\u0965\u104b\u17d4\u0589]['\")\]\u201d\u2019\u00bb]{0,3}(?=\s)"
    r"|[\u3002\uff01\uff1f\uff0e][\u300d\u300f\u201d\u2019\uff09]{0,3}|\n"
)
# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\ua4cf\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]"
)


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A piece of a block.

    Attributes:
      value: Text, escaped if it is external, or an image.
      field: Field of external text, `link`, `title` or `text`; "" for our own labels and images.
      line_start: Whether external text begins a line.
    """

    value: str | Patches
    field: str = ""
    line_start: bool = False

    @property
    def can_be_cut(self) -> bool:
        return self.field in ("title", "text")


Block = tuple[Fragment, ...]


def fragments_of(part: Part, begins: bool, limit: int) -> list[Fragment]:
    """Return the pieces of a text part; text without labels is escaped later, by `joined`.

    Args:
      part: Part of a result that holds text.
      begins: Whether the part begins the result.
      limit: Maximum number of characters; the rest is cut off.
    """
    if not part.fields:
        return [Fragment(part.text[:limit], "text", True)]
    pieces = []
    for label, value in part.fields:
        own = f"{'' if begins else chr(10)}{label}: "
        begins, limit = False, max(limit - len(own), 0)
        shown_as = {"link": display_link, "summary": str}.get(label, one_line)
        value = shown_as(value[:limit])
        limit -= len(value)
        field = label if label in ("link", "title") else "text"
        pieces += [Fragment(own), Fragment(escape_tags(value, line_start=False), field)]
    return pieces


def joined(pieces: Sequence[Fragment]) -> Block:
    """Return pieces as a block.

    Adjacent texts without labels are merged before escaping, so that no imitation can be assembled
    from two of them.
    """
    block: list[Fragment] = []
    for plain, group in itertools.groupby(pieces, lambda piece: piece.line_start):
        if plain:
            text = escape_tags("".join(piece.value for piece in group))
            block.append(Fragment(text, "text", True))
        else:
            block += group
    return tuple(block)


def written(blocks: Sequence[Block]) -> list[str | Patches]:
    """Return the texts and images of a user turn with these results, numbered from 1."""
    items: list[str | Patches] = []
    for number, block in enumerate(blocks, start=1):
        items += [f"{number}. " if number == 1 else f"\n{number}. "]
        items += [piece.value for piece in block]
    return items


def shown(blocks: Sequence[Block]) -> tuple[ShownResult, ...]:
    """Return each result as shown, for the record; images are numbered across all results."""
    images = itertools.count()
    results = []
    for block in blocks:
        texts = {"link": "", "title": "", "text": ""}
        for piece in block:
            if piece.field:
                between = "\n" if texts[piece.field] else ""
                texts[piece.field] += f"{between}{piece.value}"
        own = tuple(next(images) for piece in block if isinstance(piece.value, Patches))
        results.append(ShownResult(**texts, images=own))
    return tuple(results)


class Shortener:
    """Truncation of blocks to a token budget.

    Args:
      processor: Processor whose tokenizer counts the tokens.
      blocks: Blocks by the number of their result, from 1.
    """

    def __init__(self, processor: Processor, blocks: dict[int, Block]):
        self._processor = processor
        self._blocks = blocks
        self._tokens = functools.cache(processor.encode_text)
        self._decoded = functools.cache(lambda text: processor.decode(self._tokens(text)))
        self._fixed = {number: self._fixed_tokens(block) for number, block in blocks.items()}
        self._text = {number: self._text_tokens(block) for number, block in blocks.items()}
        self._least = {number: self._least_tokens(number) for number in blocks}

    def __call__(self, budget: int) -> tuple[dict[int, Block], list[str]]:
        """Return the results that fit into `budget` tokens and a note for each truncated one."""
        chosen, used = [], 0
        for number in self._blocks:
            need = self._fixed[number] + self._least[number]
            if used + need <= budget:
                chosen.append(number)
                used += need
        room = budget - sum(self._fixed[number] for number in chosen)
        shares = _shares(
            [self._text[number] for number in chosen],
            [self._least[number] for number in chosen],
            room,
        )
        blocks, notes = {}, []
        for number, share in zip(chosen, shares, strict=True):
            blocks[number] = self._blocks[number]
            if share < self._text[number]:
                blocks[number] = self._cut(self._blocks[number], share)
                text = self._text[number]
                notes.append(f"result {number}: text of {text} tokens cut to {share}")
        return blocks, notes

    def _fixed_tokens(self, block: Block) -> int:
        """Return the number of tokens that are never cut: number, labels, links and images."""
        count, text = 0, "\n1. "
        merged = self._processor.images.merge_size**2
        for piece in block:
            if isinstance(piece.value, Patches):
                count += len(piece.value.values) // merged + 2
            elif not piece.can_be_cut:
                text += piece.value
        return count + len(self._tokens(text))

    def _text_tokens(self, block: Block) -> int:
        return sum(len(self._tokens(piece.value)) for piece in block if piece.can_be_cut)

    def _least_tokens(self, number: int) -> int:
        """Return the smallest budget at which some text survives truncation."""
        tokens = _LEAST
        while tokens < self._text[number]:
            cut = self._cut(self._blocks[number], tokens)
            if any(piece.can_be_cut and piece.value for piece in cut):
                return tokens
            tokens *= 2
        return self._text[number]

    def _cut(self, block: Block, tokens: int) -> Block:
        pieces = []
        for piece in block:
            if piece.can_be_cut:
                ids = self._tokens(piece.value)
                if len(ids) > tokens:
                    # A character split between tokens decodes to U+FFFD.
                    begin = self._processor.decode(ids[:tokens]).rstrip("\ufffd")
                    text = _up_to_border(self._decoded(piece.value), len(begin))
                    text = escape_tags(text, line_start=piece.line_start)
                    piece = dataclasses.replace(piece, value=text)
                tokens = max(tokens - len(ids), 0)
            pieces.append(piece)
        return tuple(pieces)


def _shares(wanted: Sequence[int], least: Sequence[int], total: int) -> list[int]:
    """Return max-min fair shares of `total`, each between its `least` and its `wanted`.

    The sum of `least` must be at most `total`.
    """

    def at(level: int) -> list[int]:
        return [max(low, min(want, level)) for want, low in zip(wanted, least, strict=True)]

    low, high = 0, max(wanted, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle - 1)
    return at(low)


def _up_to_border(text: str, end: int) -> str:
    """Truncate a text to at most `end` characters.

    The cut is at the end of a sentence in the last quarter of these characters, or otherwise at the
    end of a word.
    """
    if end >= len(text):
        return text
    sentences = list(_SENTENCE.finditer(text, end * 3 // 4, end + 1))
    if sentences and sentences[-1].end() <= end:
        return text[: sentences[-1].end()].rstrip()
    for place in range(end, max(end - _WORD, 0), -1):
        if _between_words(text, place):
            return text[:place].rstrip()
    if end <= _WORD:
        return ""
    while end and not _between_characters(text, end):
        end -= 1
    return text[:end].rstrip()


def _between_words(text: str, place: int) -> bool:
    before, after = text[place - 1], text[place]
    if before.isspace() or after.isspace():
        return True
    unspaced = _UNSPACED.match(before) or _UNSPACED.match(after)
    return unspaced is not None and _between_characters(text, place)


def _between_characters(text: str, place: int) -> bool:
    """Return whether a text can be cut at an index without splitting a combined character."""
    if place == 0:
        return True
    before, after = text[place - 1], text[place]
    marks = unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf", "Sk")
    return not marks and before != "\u200d" and unicodedata.category(before) != "Cf"
