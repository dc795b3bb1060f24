"""Answers to benchmarks are scored by the rules of their papers."""

import dataclasses
import json

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from mmsr1_jax.config.settings import Config, Eval, Services
from mmsr1_jax.data import DataError
from mmsr1_jax.data.benchmarks import NAMES, BenchmarkQuestion, accuracy_and_f1, score
from mmsr1_jax.data.benchmarks.scores import (
    document_score,
    extraction,
    read_extraction,
    token_f1,
    vqa_accuracy,
    vqa_normalise,
)
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.extraction import finish_documents, short_forms
from mmsr1_jax.evaluation.run import line_of
from mmsr1_jax.evaluation.scoring import rescore, results_of
from mmsr1_jax.evaluation.table import main_match, table
from mmsr1_jax.tools.build import make_judge
from tests import scripted_policy
from tests.servers import serve
from tests.test_benchmarks import mmlongbench, pdf
from tests.test_evaluate import CONFIG, command, run

TEN = ["surf"] * 4 + ["surfing"] * 3 + ["sea", "", "water"]


def test_soft_accuracy_is_the_mean_over_sets_without_one():
    rng = np.random.default_rng(1)
    for _ in range(200):
        people = [f"w{number}" for number in rng.integers(0, 4, rng.integers(2, 12))]
        answer = f"w{rng.integers(0, 4)}"
        sets = [people[:i] + people[i + 1 :] for i in range(len(people))]
        wanted = np.mean([min(1.0, rest.count(answer) / 3) for rest in sets])
        assert vqa_accuracy(answer, people) == pytest.approx(wanted, abs=1e-12)
    assert vqa_accuracy(None, TEN) == vqa_accuracy(" ", TEN) == 0
    with pytest.raises(ValueError, match="at least two"):
        vqa_accuracy("a", ["a"])


def test_words_are_compared_as_the_vqa_challenge_does():
    for text, wanted in {
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
        assert vqa_normalise(text) == wanted


def anls(gold, said):
    """1 - edit distance / longer length, 0 up to 0.5, by the full table."""
    cells = np.zeros((len(gold) + 1, len(said) + 1))
    cells[:, 0], cells[0] = np.arange(len(gold) + 1), np.arange(len(said) + 1)
    for i in range(len(gold)):
        for j in range(len(said)):
            swap = cells[i, j] + (gold[i] != said[j])
            cells[i + 1, j + 1] = min(swap, cells[i, j + 1] + 1, cells[i + 1, j] + 1)
    value = 1 - cells[-1, -1] / max(len(gold), len(said))
    return value if value > 0.5 else 0.0


def test_texts_of_documents_are_compared_by_edit_distance():
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(400):
        gold = "x" + "".join(rng.choice(list("abc"), rng.integers(0, 9)))
        said = "x" + "".join(rng.choice(list("abc"), rng.integers(0, 9)))
        wanted = anls(gold, said)
        assert document_score(said.upper(), gold, "Str") == pytest.approx(wanted, abs=1e-12)
        seen.add(wanted == 0)
    assert seen == {True, False}


@pytest.mark.parametrize("kind, gold, answer, wanted", [
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
def test_answers_about_documents_are_scored_by_their_form(kind, gold, answer, wanted):
    assert document_score(answer, gold, kind) == pytest.approx(wanted)
    assert document_score(None, gold, kind) == 0


def test_f1_of_documents_weighs_what_cannot_be_answered():
    none = "Not answerable"
    scored = [(1.0, "a", "a"), (0.6, "b", "bb"), (0.0, "c", none), (1.0, none, none),
              (0.0, none, "d"), (0.0, "e", None)]  # fmt: skip
    recall, precision = 1.6 / 4, 1.6 / 4  # of a, b, c, e; of a, bb, d and no answer
    accuracy, f1 = accuracy_and_f1(scored)
    assert accuracy == pytest.approx(2.6 / 6)
    assert f1 == pytest.approx(2 * recall * precision / (recall + precision))
    recall, precision = 1.6 / 4, 1.6 / 5
    assert accuracy_and_f1([*scored, (0.0, none, "x")])[1] == pytest.approx(
        2 * recall * precision / (recall + precision)
    )
    assert accuracy_and_f1([]) == (0, 0) and accuracy_and_f1([(0.0, "a", none)]) == (0, 0)
    assert accuracy_and_f1([(None, "a", "a"), *scored, (None, none, none)]) == (accuracy, f1)


def test_a_short_answer_is_taken_out_of_a_reply():
    system, user = extraction("How many?", "Ten.\n========")
    fence = system["content"].split("that read ")[1].split(".")[0]
    assert user["content"].count(fence) == 4 and "Ten." in user["content"]
    assert read_extraction("Extracted answer: ['a', 'b']\nAnswer format: List\n") == "['a', 'b']"
    assert read_extraction("Extracted answer: Fail to answer\nAnswer format: String") is None
    for text in ("10", "Extracted answer:\nAnswer format: Integer", "Answer format: Integer"):
        with pytest.raises(ValueError, match="not the two lines"):
            read_extraction(text)


def test_words_in_common_are_weighed():
    assert token_f1("The users: 3 million", "3 million users") == 1
    assert token_f1("3 users", "3 million users") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert token_f1(None, "a b") == token_f1("", "b") == token_f1("c", "b") == 0
    # Nothing is left of a gold but articles: as SQuAD 2.0 has it, of the answer neither.
    assert token_f1("A", "A") == token_f1("An", "The The") == 1
    assert token_f1("", "A") == token_f1(None, "A") == token_f1("b", "A") == token_f1("A", "b") == 0


QUESTION = BenchmarkQuestion(id="", question="", images=(), answers=("Ann",),
                             references=("Ann",) * 10, answer_format="Str")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_judge_decides_where_a_benchmark_has_no_rule_of_its_own(tmp_path, processor, name):
    own = score(name)
    assert (own is not None) == (name in ("okvqa", "slidevqa", "mmlongbench"))
    if own is not None:
        assert own("ann", QUESTION) == 1 and own(None, QUESTION) == 0
    assert dataclasses.replace(QUESTION, id="x").references == ("Ann",) * 10
    episode = Episode(example=QUESTION.example(), group=0, index=0, end="answer")
    episode.turns.append(Turn("answer", "Ms Ann", "r", None))
    config = Config(eval=Eval(benchmark=name))
    made = line_of(episode, QUESTION, "direct", config, processor, tmp_path)
    made["judge"] = {"correct": True, "reason": "", "by": "judge", "model": ""}
    assert not made["em"] and made.get("score") == (own and own("Ms Ann", QUESTION))
    results = results_of({"direct": [records.outcome_of(made)]}, {})
    assert main_match(results) == ("judge" if own is None else "score")


# Short forms of answers about documents

# Answers, their short forms (a reply in another form, or a status), gold answers and their formats.
ASKED = [
    ("It was founded in 1987, as page 3 says.", "1987", "1987", "Int"),
    ("The document does not tell.", "Not answerable", "Not answerable", "None"),
    ("I cannot read it.", "Fail to answer", "12", "Int"),
    (None, "never asked", "13", "Int"),
    ("refused", 503, "14", "Int"),
    ("in another form", "'15'", "15", "Int"),
]


class Server:
    """Takes short forms out of answers, and says of all that they are wrong."""

    def __init__(self):
        self.fault, self.asked = True, []

    async def chat(self, request):
        user = json.loads(await request.body())["messages"][-1]["content"]
        said = json.dumps({"correct": False, "reason": "no"})
        if "Reply:\n" in user:
            answer = "\n".join(user.rsplit("Reply:\n", 1)[1].split("\n")[1:-1])
            self.asked.append(answer)
            short = {a: short for a, short, _, _ in ASKED}.get(answer, answer.split()[-1])
            if self.fault and short == 503:
                return PlainTextResponse("no", status_code=503)
            said = f"Extracted answer: {short}\nAnswer format: String"
            if self.fault and short == "'15'":
                said = "It is 15."
        return JSONResponse({"choices": [{"message": {"content": said}}]})


@pytest.fixture
def server():
    made = Server()
    with serve(
        Starlette(routes=[Route("/v1/chat/completions", made.chat, methods=["POST"])])
    ) as url:
        made.url = url
        yield made


def with_judge(server, **fields):
    return Config(services=Services(judge_url=server.url, max_attempts=1, **fields))


def scored(config, path):
    """The results, and what is in the lines then."""
    results = finish_documents(config, path.parent, rescore(config, path, None))
    assert json.loads((path.parent / "results.json").read_text()) == results
    return results, [line for _, _, line in records.scan(path)]


@pytest.fixture
def answered(tmp_path, processor):
    """Answers to `ASKED`, scored as they are."""
    path = tmp_path / "episodes.jsonl"
    with open(path, "w") as file:
        for number, (answer, _, gold, answer_format) in enumerate(ASKED):
            question = BenchmarkQuestion(
                id=f"q{number}", question="Which year?", images=(), answers=(gold,),
                answer_format=answer_format, pages_left_out=2 * (number > 3),
            )  # fmt: skip
            episode = Episode(example=question.example(), group=number, index=number, end="turns")
            if answer is not None:
                episode.turns.append(Turn("answer", answer, "r", None))
            config = Config(eval=Eval(benchmark="mmlongbench"))
            line = line_of(episode, question, "direct", config, processor, tmp_path)
            file.write(json.dumps(line) + "\n")
    return path


def test_short_forms_of_answers_are_scored(answered, server):
    found, known = scored(Config(), answered)
    assert found["scored"] == "answers as they are" and found["no_extraction"] == 0
    assert [line["score"] for line in known] == [document_score(a, g, f) for a, _, g, f in ASKED]
    assert found["f1"] == {"direct": 0}
    assert found["pages_left_out"] == {"pages": 4, "questions": 2}
    assert "4 pages of 2 questions were left out" in table(found)

    found, known = scored(with_judge(server), answered)
    assert [line["score"] for line in known] == [1, 1, 0, 0, None, None]
    shorts = [line["extracted"]["answer"] for line in known]
    assert shorts == ["1987", "Not answerable", None, None, None, None]
    errors = [line["extracted"]["error"] for line in known]
    assert errors[:4] == [None] * 4 and "503" in errors[4] and "two lines" in errors[5]
    assert found["scored"] == "short forms of the answers" and found["no_extraction"] == 2
    assert found["workflows"]["direct"]["accuracy"]["score"]["mean"] == 2 / 4
    assert found["f1"] == {"direct": pytest.approx(2 * 1 / (3 + 3))}  # 3 tried, 3 to be answered
    assert "2 answers have no score" in table(found)
    assert sorted(server.asked) == sorted(answer for answer, *_ in ASKED if answer)

    server.fault, server.asked = False, []
    found, known = scored(with_judge(server), answered)
    assert sorted(server.asked) == ["in another form", "refused"]
    assert [line["score"] for line in known] == [1, 1, 0, 0, 0, 0] and found["no_extraction"] == 0
    assert found["pages_left_out"] == {"pages": 4, "questions": 2}
    # All is known; another model is asked anew; without one, all stays.
    server.asked = []
    assert scored(with_judge(server), answered) == (found, known) and not server.asked
    assert scored(Config(), answered) == (found, known)
    scored(with_judge(server, judge_model="other"), answered)
    assert len(server.asked) == 5
    answered.write_text(json.dumps(known[0] | {"extracted": {"answer": "1987"}}) + "\n")
    with pytest.raises(DataError, match="line 1: 'extracted' must have answer, error, model"):
        scored(Config(), answered)


def test_short_forms_are_kept_as_they_come(server, tmp_path):
    """As a kill leaves them, and in a store; not those that failed, nor another model's."""
    asked = {"a": ("Which year?", ASKED[0][0]), "b": ("Which year?", "refused")}
    asked["c"] = ("Which year?", ASKED[2][0])
    config = with_judge(server, cache=str(tmp_path / "store.sqlite"))
    path, model = tmp_path / "extractions.jsonl", config.services.judge_model
    first = short_forms(asked, make_judge(config), model, path)
    assert [first[key]["answer"] for key in asked] == ["1987", None, None]
    with open(path, "a") as file:
        file.write('["b", {"ans')
    server.asked = []
    assert short_forms(asked, make_judge(with_judge(server)), model, path) == first
    assert server.asked == ["refused"]
    path.unlink()
    assert short_forms(asked, make_judge(config), model, path) == first
    assert server.asked == ["refused"] * 2


def test_a_document_is_shown_within_its_tokens_and_its_answers_scored(server, tmp_path):
    """With a lower bound for photographs, at which no page would fit."""
    pytest.importorskip("pypdfium2")
    scripted_policy.write(tmp_path / "policy")
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "samples.json").write_text(json.dumps([mmlongbench(answer="7")]))
    pdf(tmp_path / "documents" / "report.pdf", [(280, 140), (140, 280), (280, 280), (280, 280)])
    arguments = [
        f"--config={tmp_path / 'config.py'}", "--config.eval.benchmark=mmlongbench",
        f"--config.eval.data=('{tmp_path}',)", "--config.eval.workflows=('direct',)",
        f"--config.images.min_pixels={512 * 512}", f"--config.images.max_pixels={2 * 672 * 672}",
        "--config.eval.page_tokens=17", f"--config.services.judge_url={server.url}",
    ]  # fmt: skip
    run(command(*arguments, f"--model={tmp_path / 'policy'}", f"--out={tmp_path / 'out'}"))
    path = tmp_path / "out" / "episodes.jsonl"
    ((_, _, line),) = records.scan(path)
    assert line["pages_left_out"] == 1 and len(line["image_grids"]) == 3
    assert sum(h * w // 4 for _, h, w in line["image_grids"]) <= 17
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["pages_left_out"] == {"pages": 1, "questions": 1}
    assert results["scored"] == "short forms of the answers"
    assert server.asked == [line["answer"]] and line["answer"]
    assert line["extracted"]["answer"] == line["answer"].split()[-1]
    assert line["score"] == document_score(line["extracted"]["answer"], "7", "Int")
    # The command that scores anew asks another model.
    other = ["--config.services.judge_model=other", f"--config.services.judge_url={server.url}"]
    printed = run(command(f"--rescore={path}", *other))
    assert len(server.asked) == 2 and "its score is of: short forms of the answers" in printed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["scored"]
