"""Answers to benchmarks are graded by the rules of their papers."""

import numpy as np
import pytest

from mmsr1_jax.data.benchmarks import accuracy_and_f1
from mmsr1_jax.data.benchmarks.grading import (
    document_grade,
    extraction_messages,
    parse_extraction,
    token_f1,
    vqa_accuracy,
    vqa_normalise,
)

TEN = ["surf"] * 4 + ["surfing"] * 3 + ["sea", "", "water"]


def test_vqa_accuracy_is_the_mean_over_leave_one_out_subsets():
    rng = np.random.default_rng(1)
    for _ in range(200):
        people = [f"w{number}" for number in rng.integers(0, 4, rng.integers(2, 12))]
        answer = f"w{rng.integers(0, 4)}"
        sets = [people[:i] + people[i + 1 :] for i in range(len(people))]
        expected = np.mean([min(1.0, rest.count(answer) / 3) for rest in sets])
        assert vqa_accuracy(answer, people) == pytest.approx(expected, abs=1e-12)
    assert vqa_accuracy(None, TEN) == vqa_accuracy(" ", TEN) == 0
    with pytest.raises(ValueError, match="at least two"):
        vqa_accuracy("a", ["a"])


def test_vqa_normalisation_follows_the_vqa_challenge():
    for text, expected in {
        "The  Two dogs.": "2 dogs",
        "1,000 people": "1000 people",
        "red/white": "red white",
        "red, white": "red white",
        "dont know": "don't know",
        "Don't": "don't",
        "3.5 m.": "3.5 m",
        "a.m.": "am",
        "were well": "were well",
        "yall": "y'all",
    }.items():
        assert vqa_normalise(text) == expected


def anls(gold, answer):
    """Return 1 - edit distance / longer length, or 0 if that is at most 0.5, by the full table."""
    cells = np.zeros((len(gold) + 1, len(answer) + 1))
    cells[:, 0], cells[0] = np.arange(len(gold) + 1), np.arange(len(answer) + 1)
    for i in range(len(gold)):
        for j in range(len(answer)):
            swap = cells[i, j] + (gold[i] != answer[j])
            cells[i + 1, j + 1] = min(swap, cells[i, j + 1] + 1, cells[i + 1, j] + 1)
    value = 1 - cells[-1, -1] / max(len(gold), len(answer))
    return value if value > 0.5 else 0.0


def test_document_texts_are_graded_by_anls():
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(400):
        gold = "x" + "".join(rng.choice(list("abc"), rng.integers(0, 9)))
        answer = "x" + "".join(rng.choice(list("abc"), rng.integers(0, 9)))
        expected = anls(gold, answer)
        assert document_grade(answer.upper(), gold, "Str") == pytest.approx(expected, abs=1e-12)
        seen.add(expected == 0)
    assert seen == {True, False}


@pytest.mark.parametrize("kind, gold, answer, expected", [
    ("Int", "8", "8.0", 1), ("Int", "8", "8 people", 0), ("Int", "21%", "21%", 0),
    ("Int", "8", "inf", 0), ("Float", "18.29%", "18.4", 1), ("Float", "18.29%", "0.1829", 1),
    ("Float", "18.29%", "18.6", 0), ("Float", "$49.99", "49.99 (USD)", 1),
    ("Float", "0.5", "50%", 1), ("Float", "0", "0.004", 1), ("Float", "5", "five", 0),
    ("Str", "Less well-off", '"less well-off"', 1), ("Str", "page 3", "page 4", 0),
    ("Str", "https://a.org/b", "https://a.org/c", 0), ("Str", "2015-06-08", "2015-06-09", 0),
    ("Str", "eval.py", "eval.pyc", 0), ("Str", "10 a.m.", "11 a.m.", 0),
    ("Str", "me@a.org", "me@b.org", 0), ("None", "Not answerable", "Not answerable.", 14 / 15),
    ("None", "Not answerable", "2015", 0), ("List", "['White', '10%']", "['10%', 'white']", 1),
    ("List", "['White', '10%']", "['White']", 0), ("List", "[16, 19]", "[19, 16]", 1),
    ("List", "[16, 19]", "[19, 17]", 0), ("List", "92", "['92']", 1),
    ("List", "['abcd', 'wxyz']", "['abcx', 'wxyz']", 0.75), ("List", "['a']", "[a", 0),
    ("List", "['true']", '["true"]', 1), ("List", "['a']", "[" * 10_000, 0),
])  # fmt: skip
def test_document_answers_are_graded_by_their_format(kind, gold, answer, expected):
    assert document_grade(answer, gold, kind) == pytest.approx(expected)
    assert document_grade(None, gold, kind) == 0


def test_document_f1_accounts_for_unanswerable_questions():
    none = "Not answerable"
    graded = [(1.0, "a", "a"), (0.6, "b", "bb"), (0.0, "c", none), (1.0, none, none),
              (0.0, none, "d"), (0.0, "e", None)]  # fmt: skip
    recall, precision = 1.6 / 4, 1.6 / 4  # of a, b, c, e; of a, bb, d and no answer
    accuracy, f1 = accuracy_and_f1(graded)
    assert accuracy == pytest.approx(2.6 / 6)
    assert f1 == pytest.approx(2 * recall * precision / (recall + precision))
    recall, precision = 1.6 / 4, 1.6 / 5
    assert accuracy_and_f1([*graded, (0.0, none, "x")])[1] == pytest.approx(
        2 * recall * precision / (recall + precision)
    )
    assert accuracy_and_f1([]) == (0, 0) and accuracy_and_f1([(0.0, "a", none)]) == (0, 0)
    assert accuracy_and_f1([(None, "a", "a"), *graded, (None, none, none)]) == (accuracy, f1)


def test_a_short_answer_is_parsed_from_a_reply():
    system, user = extraction_messages("How many?", "Ten.\n========")
    fence = system["content"].split("that read ")[1].split(".")[0]
    assert user["content"].count(fence) == 4 and "Ten." in user["content"]
    assert parse_extraction("Extracted answer: ['a', 'b']\nAnswer format: List\n") == "['a', 'b']"
    assert parse_extraction("Extracted answer: Fail to answer\nAnswer format: String") is None
    for text in ("10", "Extracted answer:\nAnswer format: Integer", "Answer format: Integer"):
        with pytest.raises(ValueError, match="must be the two lines"):
            parse_extraction(text)


def test_token_f1_is_the_harmonic_mean_of_word_precision_and_recall():
    assert token_f1("The users: 3 million", "3 million users") == 1
    assert token_f1("3 users", "3 million users") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert token_f1(None, "a b") == token_f1("", "b") == token_f1("c", "b") == 0
    # If a gold answer consists of articles only, so must the answer, as in SQuAD 2.0.
    assert token_f1("A", "A") == token_f1("An", "The The") == 1
    assert token_f1("", "A") == token_f1(None, "A") == token_f1("b", "A") == token_f1("A", "b") == 0
