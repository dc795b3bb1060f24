"""Settings of `construct`: questions from visual concepts."""

import dataclasses

from mmsr1_jax.config.bounds import ConfigError, setting
from mmsr1_jax.config.choices import PICTURE_SEARCHES, QUESTION_CHECKS


@dataclasses.dataclass(kw_only=True, slots=True)
class Construction:
    """Construction of questions (`data/construction/`).

    Attributes:
      concepts: Files of visual concepts. A line is a name, a name and a count separated by a tab,
        or, in a `.jsonl` file, an object with `concept` and optionally `count` and `aliases`.
      exclude: Files in the same form, of concepts that are left out.
      num_concepts: Number of concepts to sample; 0 takes all.
      head_fraction: Share of the sample that is drawn from frequent concepts, if they have counts.
      head_count: Count from which a concept is frequent (20,000 in MetaCLIP, arXiv 2309.16671).
      seed: Seed of all samples.
      pictures: Backend of the picture search: `local` (the index), `searxng`, `serpapi` or
        `serper`. `auto` is that of `tools.text`, or else `local`.
      licences: Words of allowed licences, such as `creative commons`. A picture is used if its
        licence contains one of them; with an empty tuple, all are.
      min_side: Minimum size of a picture's shorter side, in pixels.
      max_side: Maximum size of its longer side, in pixels, to which it is shrunk.
      max_ratio: Maximum ratio of the longer to the shorter side.
      pictures_per_concept: Maximum number of pictures that are fetched for a concept.
      pages_per_concept: Maximum number of pages of a concept that questions are written about.
      min_page_chars: Minimum number of characters of a page's text.
      page_chars: Maximum number of characters of a page that the models read: the paragraphs most
        relevant to the concept.
      questions_per_page: Maximum number of questions written about one page.
      max_answer_words: Maximum number of words of an answer.
      checks: Checks of a question: `title` (a model cannot answer it from the question and the
        picture's title), `blind` (nor from the question alone), `shown` (the picture shows the
        concept), `answerable` (from picture and page), `sound` (one answer only, and one that does
        not change unless the question is dated).
      votes: Maximum number of replies that a check asks for.
      agreement: Number of replies that must agree.
      test_sets: Parquet files of questions. A question is dropped if one of them shows a similar
        picture and has the same answer or a similar text.
      heldout_sets: Parquet files of questions whose concepts are not used at all. A concept is
        dropped if one of them shows a similar picture, or names it in a question or answer.
      duplicate_text: Estimated Jaccard similarity, over words of three, from which two pages are
        duplicates.
      duplicate_bits: Maximum Hamming distance of the perceptual hashes (256 bits) of two pictures
        that are duplicates.
      overlap_bits: Maximum distance of a picture that is similar to one of a test set.
      aliases: JSONL file of other names of answers, with the fields `label` and `aliases`, as
        exported from Wikidata.
      taxonomy: File of knowledge categories, one `name: description` a line. None is that of the
        package.
      also: Questions to add, as `FILE=COUNT`: parquet files, and the number of questions sampled
        from each.
      max_questions: Maximum number of constructed questions, balanced over categories; 0 keeps all.
      max_calls: Maximum numbers of requests, each as `SERVICE=COUNT`. The command ends before it
        exceeds one.
      prices: Prices in dollars, each as `SERVICE=PRICE` of one request, or
        `SERVICE=PROMPT/COMPLETION` of a million tokens.
      max_concurrency: Maximum number of concepts that are worked on at a time.
    """

    concepts: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    num_concepts: int = setting(0, at_least=0, at_most=10**8)
    head_fraction: float = setting(0.5, at_least=0, at_most=1)
    head_count: int = setting(20_000, at_least=1, at_most=2**62)
    seed: int = setting(0, at_least=0, at_most=2**31 - 1)
    pictures: str = setting("auto", one_of=PICTURE_SEARCHES)
    licences: tuple[str, ...] = ()
    min_side: int = setting(224, at_least=1, at_most=2**15)
    max_side: int = setting(1024, at_least=1, at_most=2**15)
    max_ratio: float = setting(3.0, at_least=1, at_most=200)
    pictures_per_concept: int = setting(4, at_least=1, at_most=100)
    pages_per_concept: int = setting(1, at_least=1, at_most=100)
    min_page_chars: int = setting(200, at_least=1, at_most=10**6)
    page_chars: int = setting(12_000, at_least=1, at_most=10**6)
    questions_per_page: int = setting(3, at_least=1, at_most=20)
    max_answer_words: int = setting(8, at_least=1, at_most=100)
    checks: tuple[str, ...] = setting(
        ("title", "shown", "answerable", "sound"), one_of=QUESTION_CHECKS
    )
    votes: int = setting(3, at_least=1, at_most=99)
    agreement: int = setting(2, at_least=1, at_most=99)
    test_sets: tuple[str, ...] = ()
    heldout_sets: tuple[str, ...] = ()
    duplicate_text: float = setting(0.8, over=0, at_most=1)
    duplicate_bits: int = setting(24, at_least=0, at_most=128)
    overlap_bits: int = setting(48, at_least=0, at_most=128)
    aliases: str | None = None
    taxonomy: str | None = None
    also: tuple[str, ...] = ()
    max_questions: int = setting(0, at_least=0, at_most=10**8)
    max_calls: tuple[str, ...] = ()
    prices: tuple[str, ...] = ()
    max_concurrency: int = setting(64, at_least=1, at_most=4096)


def check(construction: Construction) -> None:
    """Raise ConfigError if the settings contradict each other."""
    if construction.agreement > construction.votes:
        raise ConfigError(
            f"config.construction.agreement={construction.agreement} must be at most "
            f"votes={construction.votes}"
        )
    if construction.min_side > construction.max_side:
        raise ConfigError(
            f"config.construction.min_side={construction.min_side} must be at most "
            f"max_side={construction.max_side}"
        )
