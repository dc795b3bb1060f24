"""The tokenizer of the tiny policy: a byte-level BPE over the words of the world, with Qwen's
control tokens by name.

Each word of the world, with the space before it, becomes one token, and so does each tag of a turn.
"""

import itertools
import pathlib
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmsr1_jax.data.tiny_world import words
from mmsr1_jax.data.tiny_world.pages import ABOUT, LISTS, OF_A_YEAR, TITLES
from mmsr1_jax.data.tiny_world.questions import REASONS, WORDINGS
from mmsr1_jax.data.tiny_world.world import FACTS, LAST_YEAR, THIS_YEAR
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.turns import TAGS, WHOLE_IMAGE
from mmsr1_jax.processing.processor import CONTROL_TOKENS, DEFAULT_SYSTEM, ROLES
from mmsr1_jax.tools.tool import image_result, text_result

PROMPTS = pathlib.Path(__file__).parent / "prompts"  # short ones, for a policy that reads little
POLICY = pathlib.Path(__file__).parent / "policy"  # what `make warm_start` makes

_VOCABULARY = 4096  # at most; all of the corpus is merged before that
# A tag, a word or a number, each with the space before it, and whatever else there is.
_PIECES = r" ?</?[a-z_]+>| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}<]+| ?<|\s+"


def train_tokenizer() -> tokenizers.Tokenizer:
    """The tokenizer, control tokens first. It does not depend on the world that was drawn, only on
    the words that worlds are made of: so it has learnt no landmark's name."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    return bpe


def _corpus() -> Iterator[str]:
    """All texts that the policy meets, with all words that may stand in them."""
    yield from prompts.load().values()
    yield from prompts.load(PROMPTS).values()
    yield from (*ABOUT, *OF_A_YEAR, *LISTS.values(), *TITLES)
    yield from itertools.chain.from_iterable(WORDINGS.values())
    yield from (f" {reason}" for reason in REASONS.values())
    tags = [f"<{end}{tag}>" for tag in ("reason", *TAGS.values()) for end in ("", "/")]
    yield from (*tags, *(f" {tag}" for tag in tags), f"<{TAGS['image_search']}>{WHOLE_IMAGE}")
    yield from ROLES
    yield DEFAULT_SYSTEM
    for result in (text_result("tw/0", ""), image_result("", "")):
        yield from (f"1. {part.text}" for part in result if part.text)
    lists = (words.FIRST, words.SECOND, words.CITIES, words.PEOPLE, words.STONES, words.SHOWS)
    for word in itertools.chain(*lists, FACTS, ("this",)):
        yield f" {word}"
    for number in itertools.chain(words.PRICES, (LAST_YEAR, THIS_YEAR)):
        yield f" {number}"
