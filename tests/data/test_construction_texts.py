"""Comparison of texts in the construction of questions, and sampling of concepts."""

import collections
import fractions
import itertools

import numpy as np
import pytest

from mmsr1_jax.config import Construction
from mmsr1_jax.data.construction import concepts
from mmsr1_jax.data.construction.concepts import Concept, ConceptError
from mmsr1_jax.data.construction.matching import (
    NearDuplicates,
    calculate,
    is_result,
    names_any,
    occurs,
    same_answer,
    sketch,
)


@pytest.mark.parametrize(
    "part, text, expected",
    [
        ("1932", "It opened in 1932.", True),
        ("193", "It opened in 1932.", False),
        ("32", "It opened in 1932.", False),
        ("Tagus  river", "over the TAGUS River, twice", True),
        ("Rossi", "The Rossis built it", False),
        ("Rossi", "Rossis and Rossi built it", True),
        ("é", "café", False),
        ("東京", "駅は東京都にある", True),  # no spaces between words
        ("\uff46\uff55\uff4c\uff4c", "full width", True),
        ("(1932)", "opened (1932)", True),
        ("", "anything", False),
    ],
)
def test_a_part_occurs_as_whole_words(part, text, expected):
    assert occurs(part, text) is expected


def test_a_name_in_a_question_is_found():
    names = ("Golden Gate Bridge", "GGB")
    assert names_any("Who built the golden gate bridge?", names) == "Golden Gate Bridge"
    assert names_any("Is GGB long?", names) == "GGB"
    assert names_any("Who built this bridge at the Golden Gate?", names) is None


@pytest.mark.parametrize(
    "answer, gold, expected",
    [
        ("Tagus River", "the Tagus river", True),
        ("It crosses the Tagus River.", "Tagus River", True),
        ("Tagus", "Tagus River", False),  # less exact
        ("12", "112", False),
        ("I do not know, but perhaps it could be 12 or 13", "12", False),
        ("", "12", False),
        ("", "", False),
        ("+", "+", True),  # nothing is left after normalisation
    ],
)
def test_answers_of_a_model_are_compared(answer, gold, expected):
    assert same_answer(answer, [gold]) is expected


def test_calculations_agree_with_fractions():
    rng = np.random.default_rng(0)
    steps = {
        "sum": lambda a, b: a + b, "difference": lambda a, b: a - b,
        "product": lambda a, b: a * b, "quotient": lambda a, b: a / b,
    }  # fmt: skip
    for operation, _ in itertools.product(steps, range(50)):
        texts = [f"{n / 100:,.2f}" for n in rng.integers(1, 10**7, rng.integers(2, 4))]
        expected = None
        for text in texts:
            value = fractions.Fraction(text.replace(",", ""))
            expected = value if expected is None else steps[operation](expected, value)
        assert float(calculate(operation, texts)) == pytest.approx(float(expected), rel=1e-20)


@pytest.mark.parametrize(
    "operation, numbers",
    [("sum", ["1"]), ("power", ["2", "3"]), ("quotient", ["1", "0"]), ("sum", ["1", "two"]),
     ("sum", ["1", "9" * 40]), ("sum", ["1e999", "1"]), ("sum", ["nan", "1"])],
)  # fmt: skip
def test_invalid_calculations_have_no_result(operation, numbers):
    assert calculate(operation, numbers) is None


@pytest.mark.parametrize(
    "answer, numbers, expected",
    [("8 years", ["1932", "1924"], True), ("9 years", ["1932", "1924"], False),
     ("about $1,234", ["2,234", "1000"], True), ("years", ["1932", "1924"], False)],
)  # fmt: skip
def test_the_number_in_an_answer_is_compared_with_the_result(answer, numbers, expected):
    assert is_result(answer, calculate("difference", numbers)) is expected


def test_a_rounded_quotient_is_accepted_to_three_digits():
    result = calculate("quotient", ["22", "7"])
    assert is_result("3.14", result) and is_result("3.1429 m", result)
    assert not is_result("3.1", result) and not is_result("3.15", result)


def test_estimated_similarity_is_close_to_the_exact_one():
    rng = np.random.default_rng(1)
    vocabulary = [f"word{i}" for i in range(50)]
    for share in (0.1, 0.5, 0.9):
        words = list(rng.choice(vocabulary, 300))
        other = [w if rng.random() < share else str(rng.choice(vocabulary)) for w in words]
        sets = [set(zip(t, t[1:], t[2:], strict=False)) for t in (words, other)]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        estimate = sketch(" ".join(words)).jaccard(sketch(" ".join(other)))
        assert abs(estimate - exact) < 0.15  # 128 permutations: a standard error of at most 0.045


def test_near_duplicates_are_found_among_many_pages():
    rng = np.random.default_rng(2)
    index = NearDuplicates(0.8)
    pages = [" ".join(f"w{n}" for n in rng.integers(0, 5000, 200)) for _ in range(100)]
    assert all(index.add(str(i), page) is None for i, page in enumerate(pages))
    changed = pages[7].split()
    changed[100] = "changed"
    assert index.add("new", " ".join(changed)) == "7"
    assert index.add("short", "word") is None and index.add("shorter", "word") == "short"


def vocabulary(counts):
    return [Concept(name=f"c{i}", count=int(n)) for i, n in enumerate(counts)]


def test_a_sample_covers_head_and_tail_and_all_bands():
    counts = [10**6 + i for i in range(30)] + [30_000 + i for i in range(300)]
    counts += [500 + i for i in range(400)] + [20 + i for i in range(70)] + [1] * 2000
    chosen = concepts.sample(vocabulary(counts), 400, head_fraction=0.5, head_count=20_000, seed=0)
    assert len({c.name for c in chosen}) == 400
    digits = collections.Counter(len(str(c.count)) for c in chosen)
    # The bands of 7 and 2 digits have only 30 and 70 concepts; the others of their side fill in.
    assert digits == {7: 30, 5: 170, 3: 67, 2: 67, 1: 66}
    assert {c.band for c in chosen if c.count >= 20_000} == {"head"}
    head = [sum(c.band == "head" for c in chosen[:n]) / n for n in (50, 100, 200)]
    assert all(abs(share - 0.5) < 0.2 for share in head)  # the beginning can serve as a pilot


def test_a_side_that_is_too_small_is_filled_from_the_other():
    chosen = concepts.sample(
        vocabulary([50_000] * 3 + [7] * 100), 50, head_fraction=0.5, head_count=20_000, seed=1
    )
    assert collections.Counter(c.band for c in chosen) == {"head": 3, "tail": 47}


def test_files_of_concepts_are_read_and_bad_lines_reported(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(
        b"Golden  Gate Bridge\t31\n\nTower\tmany\ngolden gate bridge\t9\n\xff\xfe\n"
    )
    (tmp_path / "b.jsonl").write_text(
        '{"concept": "Taj Mahal", "aliases": ["Crown of the Palace"], "count": 8}\n'
        '{"concept": 7}\n{"concept": "Fuji", "count": 0}\n[]\n{"concept": "x", "aliases": "y"}\n'
    )
    files = (str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    assert [(c.name, c.count) for c in concepts.read(files)] == [
        ("Golden Gate Bridge", 31), ("Taj Mahal", 8)
    ]  # fmt: skip
    for line in (
        "a.txt, line 3: the part after the tab must be a count", "a.txt, line 5: not UTF-8",
        "b.jsonl, line 2: 'concept' must be a name", "b.jsonl, line 3: 'count' must be",
        "b.jsonl, line 4: not a JSON object", "b.jsonl, line 5: 'aliases' must be",
    ):  # fmt: skip
        assert line in caplog.text
    (tmp_path / "no.txt").write_text("taj mahal\n")
    chosen = concepts.select(Construction(concepts=files, exclude=(str(tmp_path / "no.txt"),)))
    assert [c.name for c in chosen] == ["Golden Gate Bridge"]
    with pytest.raises(ConceptError, match="no concept to work on"):
        concepts.select(Construction(concepts=files, exclude=files))
    with pytest.raises(ConceptError, match="none.txt: cannot be read"):
        concepts.read((str(tmp_path / "none.txt"),))
