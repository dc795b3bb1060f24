"""Tokenizer of the tiny policy: a byte-level BPE over the words of the world.

Control tokens have the same names as Qwen's. Each word of the world, with the space before it,
becomes one token, and so does each tag of a turn.
"""

import itertools
import pathlib
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmsr1_jax.data.tiny_world import words
from mmsr1_jax.data.tiny_world.pages import FACT_PAGES, LIST_PAGES, TITLES, YEAR_PAGES
from mmsr1_jax.data.tiny_world.questions import REASONS, WORDINGS
from mmsr1_jax.data.tiny_world.world import FACTS, LAST_YEAR, THIS_YEAR
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.turns import TAGS, WHOLE_IMAGE
from mmsr1_jax.models.families import FAMILIES
from mmsr1_jax.processing.processor import CONTROL_TOKENS, ROLES
from mmsr1_jax.tools.tool import image_result, text_result

PROMPTS = pathlib.Path(__file__).parent / "prompts"  # short, to suit the tiny policy
POLICY = pathlib.Path(__file__).parent / "policy"  # output of `make warm_start`

_MAX_VOCABULARY = 4096  # upper bound; the corpus is fully merged before it is reached
# A tag, word or number with the space before it, or a run of any other characters.
_PRETOKENS = r" ?</?[a-z_]+>| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}<]+| ?<|\s+"


def train_tokenizer() -> tokenizers.Tokenizer:
    """Train and return the tokenizer, with the control tokens first.

    It depends only on the words that worlds are made of, not on the world that was drawn, so it has
    not learnt any landmark's name.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PRETOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    return bpe


def _corpus() -> Iterator[str]:
    """Yield all texts that the policy may encounter, with all words that may occur in them."""
    yield from prompts.load().values()
    yield from prompts.load(PROMPTS).values()
    yield from (*FACT_PAGES, *YEAR_PAGES, *LIST_PAGES.values(), *TITLES)
    yield from itertools.chain.from_iterable(WORDINGS.values())
    yield from (f" {reason}" for reason in REASONS.values())
    tags = [f"<{slash}{tag}>" for tag in ("reason", *TAGS.values()) for slash in ("", "/")]
    yield from (*tags, *(f" {tag}" for tag in tags), f"<{TAGS['image_search']}>{WHOLE_IMAGE}")
    yield from ROLES
    yield from (family.default_system for family in FAMILIES.values() if family.default_system)
    for result in (text_result("tw/0", ""), image_result("", "")):
        yield from (f"1. {part.text}" for part in result if part.text)
    word_lists = (words.FIRST, words.SECOND, words.CITIES, words.PEOPLE, words.STONES, words.SHOWS)
    for word in itertools.chain(*word_lists, FACTS, ("this",)):
        yield f" {word}"
    for number in itertools.chain(words.PRICES, (LAST_YEAR, THIS_YEAR)):
        yield f" {number}"
