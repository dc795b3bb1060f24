"""Formatting of search results for the policy, within a token budget.

result ──► block: fragments that are our own labels, external text, or images
blocks ──► selected: those whose images and links fit, in order
       ──► truncated: each gets an equal part of the tokens; tokens that short blocks do not need go
           to longer ones, whose text is cut at the end of a sentence or word
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

_MIN_TEXT_TOKENS = 64  # a result whose text would be truncated to fewer tokens is dropped
_MAX_WORD_CHARS = 160  # a longer run without a word boundary may be cut anywhere
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
    def can_be_truncated(self) -> bool:
        """Whether the text may be truncated to fit the token budget."""
        return self.field in ("title", "text")


Block = tuple[Fragment, ...]


def part_fragments(part: Part, is_first: bool, max_chars: int) -> list[Fragment]:
    """Return the fragments of a text part; text without labels is escaped later, by `make_block`.

    Args:
      part: Part of a result that holds text.
      is_first: Whether the part begins the result.
      max_chars: Maximum number of characters; the rest is cut off.
    """
    assert part.text is not None
    if not part.fields:
        return [Fragment(part.text[:max_chars], "text", True)]
    fragments = []
    for label, value in part.fields:
        prefix = f"{'' if is_first else chr(10)}{label}: "
        is_first, max_chars = False, max(max_chars - len(prefix), 0)
        clean = {"link": display_link, "summary": str}.get(label, one_line)
        value = clean(value[:max_chars])
        max_chars -= len(value)
        field = label if label in ("link", "title") else "text"
        fragments += [Fragment(prefix), Fragment(escape_tags(value, line_start=False), field)]
    return fragments


def make_block(fragments: Sequence[Fragment]) -> Block:
    """Return fragments as a block.

    Adjacent texts without labels are merged before escaping, so that no imitation can be assembled
    from two of them.
    """
    block: list[Fragment] = []
    for unlabelled, group in itertools.groupby(fragments, lambda fragment: fragment.line_start):
        if unlabelled:
            text = escape_tags("".join(str(fragment.value) for fragment in group))
            block.append(Fragment(text, "text", True))
        else:
            block += group
    return tuple(block)


def number_results(blocks: Sequence[Block]) -> list[str | Patches]:
    """Return the texts and images of a user turn with these results, numbered from 1."""
    items: list[str | Patches] = []
    for number, block in enumerate(blocks, start=1):
        items += [f"{number}. " if number == 1 else f"\n{number}. "]
        items += [fragment.value for fragment in block]
    return items


def shown_results(blocks: Sequence[Block]) -> tuple[ShownResult, ...]:
    """Return each result as shown, for the record; images are numbered across all results."""
    image_indices = itertools.count()
    results = []
    for block in blocks:
        texts = {"link": "", "title": "", "text": ""}
        for fragment in block:
            if fragment.field:
                separator = "\n" if texts[fragment.field] else ""
                texts[fragment.field] += f"{separator}{fragment.value}"
        images = tuple(next(image_indices) for f in block if isinstance(f.value, Patches))
        results.append(ShownResult(**texts, images=images))
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
        self._encode = functools.cache(processor.encode_text)
        self._normalize = functools.cache(lambda text: processor.decode(self._encode(text)))
        self._fixed = {number: self._fixed_tokens(block) for number, block in blocks.items()}
        self._text = {number: self._text_tokens(block) for number, block in blocks.items()}
        self._min_text = {number: self._min_text_tokens(number) for number in blocks}

    def __call__(self, budget: int) -> tuple[dict[int, Block], list[str]]:
        """Return the results that fit into `budget` tokens and a note for each truncated one."""
        selected, used = [], 0
        for number in self._blocks:
            required = self._fixed[number] + self._min_text[number]
            if used + required <= budget:
                selected.append(number)
                used += required
        text_budgets = _fair_shares(
            [self._text[number] for number in selected],
            [self._min_text[number] for number in selected],
            budget - sum(self._fixed[number] for number in selected),
        )
        blocks, notes = {}, []
        for number, text_budget in zip(selected, text_budgets, strict=True):
            blocks[number] = self._blocks[number]
            num_tokens = self._text[number]
            if text_budget < num_tokens:
                blocks[number] = self._truncate(self._blocks[number], text_budget)
                notes.append(
                    f"result {number}: text of {num_tokens} tokens truncated to {text_budget}"
                )
        return blocks, notes

    def _fixed_tokens(self, block: Block) -> int:
        """Return the number of tokens that are never cut: number, labels, links and images."""
        image_tokens, text = 0, "\n1. "
        merged = self._processor.images.merge_size**2
        for fragment in block:
            if isinstance(fragment.value, Patches):
                image_tokens += len(fragment.value.values) // merged + 2
            elif not fragment.can_be_truncated:
                text += fragment.value
        return image_tokens + len(self._encode(text))

    def _text_tokens(self, block: Block) -> int:
        return sum(len(self._encode(f.value)) for f in block if f.can_be_truncated)

    def _min_text_tokens(self, number: int) -> int:
        """Return the smallest budget at which some text survives truncation."""
        budget = _MIN_TEXT_TOKENS
        while budget < self._text[number]:
            truncated = self._truncate(self._blocks[number], budget)
            if any(fragment.can_be_truncated and fragment.value for fragment in truncated):
                return budget
            budget *= 2
        return self._text[number]

    def _truncate(self, block: Block, budget: int) -> Block:
        """Truncate the text of a block to `budget` tokens."""
        fragments = []
        for fragment in block:
            if fragment.can_be_truncated:
                tokens = self._encode(fragment.value)
                if len(tokens) > budget:
                    # A character split between tokens decodes to U+FFFD.
                    kept = self._processor.decode(tokens[:budget]).rstrip("\ufffd")
                    text = _truncate_text(self._normalize(fragment.value), len(kept))
                    text = escape_tags(text, line_start=fragment.line_start)
                    fragment = dataclasses.replace(fragment, value=text)
                budget = max(budget - len(tokens), 0)
            fragments.append(fragment)
        return tuple(fragments)


def _fair_shares(sizes: Sequence[int], minimums: Sequence[int], total: int) -> list[int]:
    """Return max-min fair shares of `total`, each between its minimum and its size.

    The sum of `minimums` must be at most `total`.
    """

    def shares(level: int) -> list[int]:
        return [
            max(minimum, min(size, level)) for size, minimum in zip(sizes, minimums, strict=True)
        ]

    low, high = 0, max(sizes, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(shares(middle)) <= total else (low, middle - 1)
    return shares(low)


def _truncate_text(text: str, max_chars: int) -> str:
    """Truncate a text to at most `max_chars` characters.

    The cut is at the end of a sentence in the last quarter of these characters, or otherwise at the
    end of a word.
    """
    end = max_chars
    if end >= len(text):
        return text
    sentences = list(_SENTENCE.finditer(text, end * 3 // 4, end + 1))
    if sentences and sentences[-1].end() <= end:
        return text[: sentences[-1].end()].rstrip()
    for index in range(end, max(end - _MAX_WORD_CHARS, 0), -1):
        if _is_word_boundary(text, index):
            return text[:index].rstrip()
    if end <= _MAX_WORD_CHARS:
        return ""
    while end and not _is_character_boundary(text, end):
        end -= 1
    return text[:end].rstrip()


def _is_word_boundary(text: str, index: int) -> bool:
    before, after = text[index - 1], text[index]
    if before.isspace() or after.isspace():
        return True
    unspaced = _UNSPACED.match(before) or _UNSPACED.match(after)
    return unspaced is not None and _is_character_boundary(text, index)


def _is_character_boundary(text: str, index: int) -> bool:
    """Return whether a text can be cut at an index without splitting a combined character."""
    if index == 0:
        return True
    before, after = text[index - 1], text[index]
    is_mark = unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf", "Sk")
    return not is_mark and before != "\u200d" and unicodedata.category(before) != "Cf"
