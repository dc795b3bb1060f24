"""Rules for constructed questions, labels, overlap with test sets, and decisions of people."""

import asyncio
import dataclasses
import io
import itertools
import json

import numpy as np
import PIL.Image
import pytest

from mmsr1_jax.config import Construction
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data import Question, QuestionSource, write_parquet
from mmsr1_jax.data.construction import labels, reviews
from mmsr1_jax.data.construction.models import parse
from mmsr1_jax.data.construction.overlap import read_test_set
from mmsr1_jax.data.construction.questions import Calculation, Draft, find_problem, write_questions
from mmsr1_jax.data.construction.reviews import Decision, Review, decide, kappa
from mmsr1_jax.data.construction.sources import Source
from mmsr1_jax.processing.image_files import open_image
from mmsr1_jax.tools.index_builder import image_hash
from mmsr1_jax.utils.checked_json import FormatError
from tests.question_files import png, question

PAGE = (
    "The Harbour Bridge is a steel arch bridge. It was opened on 19 March 1932 after 8 years of "
    "work, which had begun in 1924. It is 1,149 metres long."
)
SOURCE = Source(
    concept="Harbour Bridge", names=("Harbour Bridge", "The Coathanger"), band="head", url="u",
    page=PAGE, image="images/x.jpg", image_hash="00" * 32, other_hashes=(), image_title="t",
    image_link="l", licence="",
)  # fmt: skip
OPENED = "It was opened on 19 March 1932 after 8 years of work, which had begun in 1924."


def draft(text="When was this opened?", answer="19 March 1932", evidence=OPENED, **fields):
    return Draft(source=SOURCE, question=text, answer=answer, evidence=evidence, **fields)


@pytest.mark.parametrize(
    "made, problem",
    [
        (draft(), None),
        (draft(answer="1932"), None),
        (draft(answer="193"), "answer not in the evidence"),
        (draft(answer="1,149 metres"), "answer not in the evidence"),  # of another sentence
        (draft(evidence="It opened on 19 March 1932."), "evidence not in the page"),
        (draft(evidence=""), "evidence not in the page"),
        (draft("When was the harbour  bridge opened?"), "question names the concept"),
        (draft("When was the Coathanger opened?"), "question names the concept"),
        (draft("Was this opened on 19 March 1932?"), "question contains the answer"),
        (draft("Tell me when this was opened."), "not a question"),
        (draft("?" * 400), "not a question"),
        (draft(answer=""), "answer empty or too long"),
        (draft(answer="opened on 19 March 1932 after 8 years of work"), "answer empty or too long"),
        (draft("这座桥何时开放？"), None),  # noqa: RUF001
    ],
)
def test_a_question_must_follow_from_the_page_without_naming_the_concept(made, problem):
    assert find_problem(made, max_words=8) == problem


@pytest.mark.parametrize(
    "answer, operation, numbers, problem",
    [
        ("8 years", "difference", ("1932", "1924"), None),
        ("9 years", "difference", ("1932", "1924"), "calculation is wrong"),
        ("2 years", "difference", ("1932", "1930"), "calculation from numbers that are not"),
        ("8 years", "guess", ("1932", "1924"), "calculation is wrong"),
        ("3856 years", "sum", ("1932", "1924"), None),
    ],
)
def test_a_calculated_answer_is_calculated_again(answer, operation, numbers, problem):
    made = draft(answer=answer, calculation=Calculation(operation=operation, numbers=numbers))
    found = find_problem(made, max_words=8, has_calculation=True)
    assert found is None if problem is None else found.startswith(problem)


class Replies:
    """A model with fixed replies, as dicts by the name of the prompt."""

    def __init__(self, **replies):
        self.replies, self.asked = replies, []

    async def ask(self, prompt, type, texts, **fields):
        self.asked.append((prompt, fields.get("sample", 0)))
        value = self.replies[prompt]
        if isinstance(value, list):
            value = value[min(fields.get("sample", 0), len(value) - 1)]
        return parse(value if isinstance(value, str) else json.dumps(value), type)


def test_hostile_replies_of_the_writer_are_dropped_one_by_one():
    right = {"question": "When was this opened?", "answer": "1932", "evidence": OPENED}
    written = [
        right,
        {"question": "How long was the work?", "answer": "8 years", "evidence": OPENED,
         "calculation": {"operation": "difference", "numbers": [1932, 1924]}},
        right | {"calculation": {"operation": "difference", "numbers": "1932"}},
        right | {"question": "Since when\nis this\u2028open?", "answer": "19 March\n1932"},
        right | {"question": "In which year was this opened?"},
        right | {"question": "One more than asked for?"},
    ]  # fmt: skip
    writer = Replies(write={"questions": written})
    settings = Construction(questions_per_page=5)
    result = asyncio.run(write_questions(SOURCE, b"", writer, settings))
    assert [(d.question, d.answer) for d in result.kept] == [
        ("When was this opened?", "1932"), ("How long was the work?", "8 years"),
        ("Since when is this open?", "19 March 1932"),
    ]  # fmt: skip
    assert sorted(dropped.reason for dropped in result.dropped) == [
        "calculation from numbers that are not in the page",
        "same answer as another question about the page",
    ]


def test_an_unreadable_reply_is_asked_for_once_more():
    right = {"question": "When was this opened?", "answer": "1932", "evidence": OPENED}
    writer = Replies(write=["no", {"questions": [right]}])
    result = asyncio.run(write_questions(SOURCE, b"", writer, Construction()))
    assert len(result.kept) == 1 and writer.asked == [("write", 0), ("write", 1)]
    writer = Replies(write="no")
    result = asyncio.run(write_questions(SOURCE, b"", writer, Construction()))
    assert [d.reason for d in result.dropped] == ["reply unreadable"]


def test_other_answers_come_from_table_and_writer_and_need_votes(tmp_path, caplog):
    table = tmp_path / "aliases.jsonl"
    table.write_text(
        '{"label": "19 March 1932", "aliases": ["1932-03-19"]}\n{"label": 3}\n{"aliases": []}\n'
    )
    known = labels.read_alias_table(str(table))
    assert "line 2" in caplog.text and "line 3: no field 'label'" in caplog.text
    writer = Replies(
        aliases={"aliases": ["March 19, 1932", "1932", "19 march 1932!", " ", "x" * 999]}
    )
    votes = [{"same": [1, 2]}, {"same": [1, 2, 3, 99, -1]}, {"same": [2]}]
    checker = Replies(same=votes, category=["nonsense", {"category": "History"}])
    result = asyncio.run(
        labels.label_question(
            draft(), writer, checker, known, labels.read_taxonomy(None), Construction()
        )
    )
    (item,) = result.kept
    assert item.aliases == ("1932-03-19", "March 19, 1932") and item.category == "history"


def test_the_taxonomy_is_a_file_of_names_and_descriptions(tmp_path):
    assert labels.OTHER in labels.read_taxonomy(None) and len(labels.read_taxonomy(None)) > 15
    path = tmp_path / "taxonomy.txt"
    path.write_text("art: paintings\n\nhistory\n")
    with pytest.raises(UserError, match="line 3: must be `name: description`"):
        labels.read_taxonomy(str(path))


def photo(seed, noise=0):
    """A random picture of few large patches, with noise."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (8, 8, 3), np.uint8)
    image = PIL.Image.fromarray(patches).resize((160, 160), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.int64)
    pixels = pixels + np.random.default_rng(99).integers(-noise, noise + 1, pixels.shape)
    return PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def test_overlap_is_found_by_picture_name_and_words(tmp_path):
    file = io.BytesIO()
    photo(1).save(file, "png")
    long = "Which of the two rivers that meet here gave its name to the oldest bridge?"
    rows = [
        question(
            0, question="Who built this bridge?", answers=("Rossi",), images=(file.getvalue(),)
        ),
        question(1, question=long, answers=("Douro",)),
        question(2, question="Is it near the Taj Mahal?", answers=("Mount Fuji",)),
    ]  # fmt: skip
    write_parquet(tmp_path / "test.parquet", rows)
    tests = read_test_set((str(tmp_path / "test.parquet"),), bits=48)
    same, other = image_hash(photo(1, noise=8)), image_hash(photo(2))
    assert tests.concept_overlap(["x"], [other, same]) == "held-out set: similar picture"
    assert tests.concept_overlap(["mount fuji"], [other]) == "held-out set: is an answer"
    assert tests.concept_overlap(["Taj Mahal"], [other]) == "held-out set: named in a question"
    assert tests.concept_overlap(["Taj"], [other]) == "held-out set: named in a question"
    assert tests.concept_overlap(["Fuji"], [other]) is None
    overlap = tests.question_overlap
    assert overlap("When?", "rossi", [same]) == "test set: similar picture, same answer"
    assert overlap("Who built this big bridge?", "x", [same]).endswith(
        "similar picture and question"
    )
    assert overlap("Who built this bridge?", "Rossi", [other]) is None
    assert overlap("When was it built?", "1932", [same]) is None
    assert overlap(f"Well: {long}", "x", [other]) == "test set: same words"
    assert tests.overlaps(rows[0]) and not tests.overlaps(question(9))
    assert read_test_set((), 48).concept_overlap(["x"], [same]) is None


def test_kappa_agrees_with_its_definition_and_a_published_table():
    # Two readers of 50 proposals: both yes 20, both no 15, only one of them yes 5 and 10.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert kappa(first, second) == pytest.approx(0.4)
    rng = np.random.default_rng(0)
    verdicts = ["accept", "edit", "reject"]
    for _ in range(20):
        a, b = rng.integers(0, 3, (2, 60))
        matrix = np.zeros((3, 3))
        np.add.at(matrix, (a, b), 1 / 60)
        expected = (matrix.sum(0) * matrix.sum(1)).sum()
        reference = (np.trace(matrix) - expected) / (1 - expected)
        assert kappa([verdicts[i] for i in a], [verdicts[i] for i in b]) == pytest.approx(reference)
    assert kappa([], []) is None and kappa(["a"], ["a"]) is None
    assert kappa(["a", "b"], ["a", "b"]) == 1


ACCEPT, REJECT = Decision(verdict="accept"), Decision(verdict="reject")
EDIT = Decision(verdict="edit", question="Who?", answer="gold 0")
OTHER = Decision(verdict="edit", question="Who?", answer="another")


@pytest.mark.parametrize(
    "decisions, expected",
    [
        ([ACCEPT], "original"), ([REJECT], None), ([EDIT], "Who?"),
        ([ACCEPT, ACCEPT], "original"), ([REJECT, REJECT], None), ([ACCEPT, REJECT], "tied"),
        ([ACCEPT, EDIT], "Who?"), ([EDIT, EDIT], "Who?"), ([EDIT, OTHER], "tied"),
        ([EDIT, REJECT], "tied"), ([ACCEPT, REJECT, EDIT], "Who?"),
        ([ACCEPT, ACCEPT, EDIT], "original"),
        ([REJECT, REJECT, ACCEPT], None),
    ],
)  # fmt: skip
def test_the_majority_decides_and_ties_are_open(decisions, expected):
    for order in itertools.permutations(decisions):
        result = decide(question(0, question="original"), order)
        if isinstance(result, Question):
            assert result.question == expected
            answers = ("gold 0", "alias 0") if result.answers[0] == "gold 0" else ("another",)
            assert result.answers == answers
        else:
            assert result == expected


def test_reviews_of_unknown_questions_or_of_one_person_are_refused(tmp_path):
    path, target = tmp_path / "q.parquet", tmp_path / "r.parquet"
    write_parquet(path, [question(i) for i in range(3)])
    ann = Review(reviewer="Ann", decisions={"id0": ACCEPT, "id1": REJECT})
    outcome = reviews.apply(path, [ann], target)
    assert (outcome.num_accepted, outcome.num_rejected, outcome.num_open) == (1, 1, 1)
    assert [q.id for q in QuestionSource(str(target))] == ["id0"]
    with pytest.raises(UserError, match="two files of the same reviewer: Ann, Ann"):
        reviews.apply(path, [ann, ann], target)
    strange = dataclasses.replace(ann, reviewer="Bob", decisions={"id7": ACCEPT})
    with pytest.raises(UserError, match="Bob decided on 1 questions that .* such as id7"):
        reviews.apply(path, [ann, strange], target)
    nobody = dataclasses.replace(ann, decisions={"id0": REJECT})
    assert reviews.apply(path, [nobody], target).num_accepted == 0 and not target.exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", "expected `?object"),
        ('{"reviewer": "A", "decisions": {"x": {"verdict": "maybe"}}}', "verdict"),
        ('{"reviewer": "A", "decisions": {"x": {"verdict": "edit"}}}', "decisions.x: an edit must"),
        ('{"decisions": {}}', "reviewer"),
    ],
)
def test_invalid_files_of_decisions_are_named(tmp_path, text, words):
    path = tmp_path / "ann.json"
    path.write_text(text)
    with pytest.raises((UserError, FormatError), match=words) as caught:
        reviews.read(path)
    assert str(path) in str(caught.value)


def test_random_pictures_are_not_similar():
    hashes = [np.frombuffer(image_hash(open_image(png(i, (64, 64)))), np.uint64) for i in range(20)]
    distances = [int(np.bitwise_count(a ^ b).sum()) for a, b in itertools.combinations(hashes, 2)]
    assert min(distances) > Construction().overlap_bits
