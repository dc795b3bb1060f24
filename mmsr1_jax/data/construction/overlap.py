"""Overlap with test sets: similar pictures by perceptual hash, equal texts by n-grams.

A question of a test set must not come back in training, and for sets of concepts that are held out
neither must its concept. Pictures are compared by Hamming distance; a landmark or product that a
test set shows from another side is recognised by its name only.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mmsr1_jax.data.construction.matching import fold, names_any
from mmsr1_jax.data.parquet import Question
from mmsr1_jax.data.questions import QuestionSource
from mmsr1_jax.processing.image_files import ImageError, process_image
from mmsr1_jax.rewards.reward_function import normalise
from mmsr1_jax.tools.index_builder import image_hash
from mmsr1_jax.utils.logs import log

_N_GRAM = 13  # words, as in the decontamination of GPT-3 (arXiv 2005.14165, appendix C)
_SIMILAR_WORDS = 0.6  # Jaccard similarity of the words of two questions about similar pictures


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Questions of one or more test sets.

    Attributes:
      bits: Maximum Hamming distance of similar pictures.
      questions: Text of each question.
      answers: Answers to each question.
      hashes: uint64[n, 4], perceptual hash of each picture.
      owners: int64[n], index of the question that shows each picture.
      n_grams: Sequences of words that occur in the questions.
    """

    __test__ = False  # not a test, whatever pytest thinks of its name

    bits: int
    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    hashes: np.ndarray
    owners: np.ndarray
    n_grams: frozenset[tuple[str, ...]]

    def similar(self, picture: bytes) -> list[int]:
        """Return the indices of the questions that show a picture similar to that of a hash."""
        query = np.frombuffer(picture, np.uint64)
        distance = np.bitwise_count(self.hashes ^ query).sum(axis=1, dtype=np.int64)
        return sorted(set(self.owners[distance <= self.bits].tolist()))

    def concept_overlap(self, names: Sequence[str], pictures: Sequence[bytes]) -> str | None:
        """Return why a concept is in the test set, or None.

        Args:
          names: Names of the concept.
          pictures: Perceptual hashes of pictures that show it.
        """
        if any(self.similar(picture) for picture in pictures):
            return "held-out set: similar picture"
        folded = {fold(name) for name in names}
        if any(fold(answer) in folded for answers in self.answers for answer in answers):
            return "held-out set: is an answer"
        if any(names_any(question, names) for question in self.questions):
            return "held-out set: named in a question"
        return None

    def question_overlap(self, question: str, answer: str, pictures: Sequence[bytes]) -> str | None:
        """Return why a question is in the test set, or None.

        Args:
          question: Text of the question.
          answer: Answer to it.
          pictures: Perceptual hashes of pictures that show what it asks about.
        """
        words = fold(question).split()
        if any(n_gram in self.n_grams for n_gram in _n_grams(words)):
            return "test set: same words"
        similar = {index for picture in pictures for index in self.similar(picture)}
        for index in sorted(similar):
            if normalise(answer) in map(normalise, self.answers[index]):
                return "test set: similar picture, same answer"
            other = set(fold(self.questions[index]).split())
            common = len(other & set(words)) / max(1, len(other | set(words)))
            if common >= _SIMILAR_WORDS:
                return "test set: similar picture and question"
        return None

    def overlaps(self, question: Question) -> bool:
        """Return whether a question of another data set is in the test set."""
        hashes = [process_image(image, image_hash) for image in question.images]
        return any(
            self.question_overlap(question.question, answer, hashes) for answer in question.answers
        )


def read_test_set(files: Sequence[str], bits: int, image_roots: Sequence[str] = ()) -> TestSet:
    """Return the questions of parquet files as a test set. A picture that cannot be read is logged.

    Raises:
      DataError: A file is not one of questions.
    """
    questions, answers, hashes, owners = [], [], [], []
    n_grams: set[tuple[str, ...]] = set()
    source = QuestionSource(files, image_roots=image_roots) if files else ()
    for question in source:
        for image in question.images:
            try:
                hashes.append(process_image(image, image_hash))
                owners.append(len(questions))
            except ImageError as error:
                log.warning("%s, row %d: %s; not compared", question.file, question.row, error)
        questions.append(question.question)
        answers.append(question.answers)
        n_grams.update(_n_grams(fold(question.question).split()))
    return TestSet(
        bits,
        tuple(questions),
        tuple(answers),
        np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 4),
        np.array(owners, np.int64),
        frozenset(n_grams),
    )


def _n_grams(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + _N_GRAM]) for i in range(len(words) - _N_GRAM + 1)]
