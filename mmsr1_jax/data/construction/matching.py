"""Comparison of texts: occurrences in a page, names in a question, equal answers, duplicates."""

import decimal
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import datasketch

from mmsr1_jax.rewards.reward_function import normalise
from mmsr1_jax.tools.words import search_form
from mmsr1_jax.utils.checked_json import utf8

_SHINGLE = 3  # words
_NUM_PERMUTATIONS = 128
_MAX_EXTRA_WORDS = 4  # that an answer of a model may have besides the expected answer
_MAX_DIGITS = 30  # of a number in a calculation
_SIGNIFICANT = 6  # digits to which a quotient must agree


def fold(text: str) -> str:
    """Return a text for comparison: compatibility forms unified, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def occurs(part: str, text: str) -> bool:
    """Return whether a part occurs in a text verbatim, up to `fold`, and not within a word.

    In scripts without spaces, a part may occur anywhere.
    """
    return _occurs(fold(part), fold(text))


def _occurs(part: str, text: str) -> bool:
    if not part:
        return False
    start = text.find(part)
    while start >= 0:
        end = start + len(part)
        before = start > 0 and _is_joined(text[start - 1], part[0])
        if not before and not (end < len(text) and _is_joined(part[-1], text[end])):
            return True
        start = text.find(part, start + 1)
    return False


def _is_joined(left: str, right: str) -> bool:
    """Return whether two neighbouring characters belong to one word."""
    # The search form of a character of a script without spaces begins with a space.
    return all(c.isalnum() and not search_form(c).startswith(" ") for c in (left, right))


def names_any(text: str, names: Iterable[str]) -> str | None:
    """Return the first of several names that occurs in a text, or None."""
    folded = fold(text)
    return next((name for name in names if _occurs(fold(name), folded)), None)


def same_answer(answer: str, golds: Sequence[str]) -> bool:
    """Return whether a model's answer agrees with one of the gold answers.

    They agree if they are equal after `normalise`, or if a gold answer occurs in the answer with
    at most a few words around it.
    """
    short = normalise(answer)
    if not short:
        return any(fold(answer) == fold(gold) for gold in golds if gold.strip())
    for gold in map(normalise, golds):
        extra = len(short.split()) - len(gold.split())
        if gold and (short == gold or (extra <= _MAX_EXTRA_WORDS and _occurs(gold, short))):
            return True
    return False


def calculate(operation: str, numbers: Sequence[str]) -> decimal.Decimal | None:
    """Return the result of a calculation on numbers as pages write them, or None.

    Args:
      operation: `sum`, `difference`, `product` or `quotient`, from left to right.
      numbers: Two or more numbers, in which commas separate thousands.
    """
    values = [parse_number(text) for text in numbers]
    if len(values) < 2 or None in values:
        return None
    total = values[0]
    for value in values[1:]:
        match operation:
            case "sum":
                total += value
            case "difference":
                total -= value
            case "product":
                total *= value
            case "quotient" if value:
                total /= value
            case _:
                return None
    return total


def parse_number(text: str) -> Any:
    """Return a number as a Decimal, or None if the text is not a number of bounded length."""
    text = text.strip().replace(",", "")
    if len(text) > _MAX_DIGITS or not text.removeprefix("-").replace(".", "", 1).isdecimal():
        return None
    return decimal.Decimal(text)


def is_result(answer: str, result: decimal.Decimal) -> bool:
    """Return whether the first number in an answer is the result of a calculation.

    The answer may be rounded, but not to fewer than three digits.
    """
    for word in answer.split():
        value = parse_number(word.strip("()[].;:%$€£¥"))
        if value is None:
            continue
        if value == result:
            return True
        digits = len(value.as_tuple().digits)
        context = decimal.Context(prec=max(3, min(digits, _SIGNIFICANT)))
        return digits >= 3 and context.plus(result) == context.plus(value)
    return False


def sketch(text: str) -> datasketch.MinHash:
    """Return the MinHash of a text's shingles of words."""
    words = fold(search_form(text)).split()
    shingles = {" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))}
    minhash = datasketch.MinHash(num_perm=_NUM_PERMUTATIONS)
    minhash.update_batch([utf8(shingle) for shingle in sorted(shingles)])
    return minhash


class NearDuplicates:
    """Index of texts that finds near-duplicates by MinHash.

    Args:
      threshold: Estimated Jaccard similarity of the shingles of two duplicates.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._index = datasketch.MinHashLSH(threshold=threshold, num_perm=_NUM_PERMUTATIONS)
        self._sketches: dict[str, datasketch.MinHash] = {}

    def add(self, key: str, text: str) -> str | None:
        """Add a text, unless a duplicate of it is in the index.

        Args:
          key: Unique name of the text.
          text: The text.

        Returns:
          The name of the duplicate, or None if the text was added.
        """
        minhash = sketch(text)
        candidates = sorted(map(str, self._index.query(minhash)))
        for other in candidates:
            if self._sketches[other].jaccard(minhash) >= self._threshold:
                return other
        self._index.insert(key, minhash)
        self._sketches[key] = minhash
        return None
