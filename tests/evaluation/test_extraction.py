"""Grades of benchmarks, and short forms of answers about documents, in an evaluation."""

import dataclasses
import json

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from mmsr1_jax.config.settings import Config, Eval, Services
from mmsr1_jax.data import DataError
from mmsr1_jax.data.benchmarks import NAMES, BenchmarkQuestion, grader
from mmsr1_jax.data.benchmarks.grading import (
    document_grade,
)
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.extraction import extract_short_forms, score_documents
from mmsr1_jax.evaluation.run import to_line
from mmsr1_jax.evaluation.scoring import compute_results, rescore
from mmsr1_jax.evaluation.table import format_results, main_criterion
from mmsr1_jax.tools.build import make_judge
from tests import scripted_policy
from tests.benchmark_files import mmlongbench, write_pdf
from tests.evaluations import CONFIG, command, run
from tests.servers import serve

QUESTION = BenchmarkQuestion(id="", question="", images=(), answers=("Ann",),
                             references=("Ann",) * 10, answer_format="Str")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_benchmarks_without_a_grading_rule_are_judged(tmp_path, processor, name):
    grade = grader(name)
    assert (grade is not None) == (name in ("okvqa", "slidevqa", "mmlongbench"))
    if grade is not None:
        assert grade("ann", QUESTION) == 1 and grade(None, QUESTION) == 0
    assert dataclasses.replace(QUESTION, id="x").references == ("Ann",) * 10
    episode = Episode(example=QUESTION.example(), group=0, index=0, end="answer")
    episode.turns.append(Turn("answer", "Ms Ann", "r", None))
    config = Config(eval=Eval(benchmark=name))
    line = to_line(episode, QUESTION, "direct", config, processor, tmp_path)
    line["judge"] = {"correct": True, "reason": "", "by": "judge", "model": ""}
    assert not line["em"] and line.get("score") == (grade and grade("Ms Ann", QUESTION))
    results = compute_results({"direct": [records.to_outcome(line)]}, {})
    assert main_criterion(results) == ("judge" if grade is None else "score")


# Short forms of answers about documents

# (answer, its short form, an invalid reply or a status, gold answer, format of the gold answer)
CASES = [
    ("It was founded in 1987, as page 3 says.", "1987", "1987", "Int"),
    ("The document does not tell.", "Not answerable", "Not answerable", "None"),
    ("I cannot read it.", "Fail to answer", "12", "Int"),
    (None, "never asked", "13", "Int"),
    ("refused", 503, "14", "Int"),
    ("in another form", "'15'", "15", "Int"),
]


class Server:
    """Chat server that extracts short forms of answers, and judges every answer as wrong."""

    def __init__(self):
        self.fault, self.requests = True, []

    async def chat(self, request):
        user = json.loads(await request.body())["messages"][-1]["content"]
        reply = json.dumps({"correct": False, "reason": "no"})
        if "Reply:\n" in user:
            answer = "\n".join(user.rsplit("Reply:\n", 1)[1].split("\n")[1:-1])
            self.requests.append(answer)
            short = {a: short for a, short, _, _ in CASES}.get(answer, answer.split()[-1])
            if self.fault and short == 503:
                return PlainTextResponse("no", status_code=503)
            reply = f"Extracted answer: {short}\nAnswer format: String"
            if self.fault and short == "'15'":
                reply = "It is 15."
        return JSONResponse({"choices": [{"message": {"content": reply}}]})


@pytest.fixture
def server():
    running = Server()
    with serve(
        Starlette(routes=[Route("/v1/chat/completions", running.chat, methods=["POST"])])
    ) as url:
        running.url = url
        yield running


def with_judge(server, **fields):
    return Config(services=Services(judge_url=server.url, max_attempts=1, **fields))


def grade_lines(config, path):
    """Grade the episodes of a file; return the results and the new lines."""
    results = score_documents(config, path.parent, rescore(config, path, None))
    assert json.loads((path.parent / "results.json").read_text()) == results
    return results, [line for _, _, line in records.scan(path)]


@pytest.fixture
def answered(tmp_path, processor):
    """File of episodes that answer `CASES`, graded without short forms."""
    path = tmp_path / "episodes.jsonl"
    with open(path, "w") as file:
        for number, (answer, _, gold, answer_format) in enumerate(CASES):
            question = BenchmarkQuestion(
                id=f"q{number}", question="Which year?", images=(), answers=(gold,),
                answer_format=answer_format, omitted_pages=2 * (number > 3),
            )  # fmt: skip
            episode = Episode(example=question.example(), group=number, index=number, end="turns")
            if answer is not None:
                episode.turns.append(Turn("answer", answer, "r", None))
            config = Config(eval=Eval(benchmark="mmlongbench"))
            line = to_line(episode, question, "direct", config, processor, tmp_path)
            file.write(json.dumps(line) + "\n")
    return path


def test_short_forms_of_answers_are_graded(answered, server):
    results, lines = grade_lines(Config(), answered)
    assert results["scored"] == "unchanged answers" and results["no_extraction"] == 0
    assert [line["score"] for line in lines] == [document_grade(a, g, f) for a, _, g, f in CASES]
    assert results["f1"] == {"direct": 0}
    assert results["omitted_pages"] == {"pages": 4, "questions": 2}
    assert "4 pages of 2 questions were dropped" in format_results(results)

    results, lines = grade_lines(with_judge(server), answered)
    assert [line["score"] for line in lines] == [1, 1, 0, 0, None, None]
    shorts = [line["extracted"]["answer"] for line in lines]
    assert shorts == ["1987", "Not answerable", None, None, None, None]
    errors = [line["extracted"]["error"] for line in lines]
    assert errors[:4] == [None] * 4 and "503" in errors[4] and "two lines" in errors[5]
    assert results["scored"] == "short forms of the answers" and results["no_extraction"] == 2
    assert results["workflows"]["direct"]["accuracy"]["score"]["mean"] == 2 / 4
    assert results["f1"] == {"direct": pytest.approx(2 * 1 / (3 + 3))}  # 3 answered, 3 answerable
    assert "2 answers have no score" in format_results(results)
    assert sorted(server.requests) == sorted(answer for answer, *_ in CASES if answer)

    server.fault, server.requests = False, []
    results, lines = grade_lines(with_judge(server), answered)
    assert sorted(server.requests) == ["in another form", "refused"]
    assert [line["score"] for line in lines] == [1, 1, 0, 0, 0, 0] and results["no_extraction"] == 0
    assert results["omitted_pages"] == {"pages": 4, "questions": 2}
    # Known short forms are reused, unless another model is named.
    server.requests = []
    assert grade_lines(with_judge(server), answered) == (results, lines) and not server.requests
    assert grade_lines(Config(), answered) == (results, lines)
    grade_lines(with_judge(server, judge_model="other"), answered)
    assert len(server.requests) == 5
    answered.write_text(json.dumps(lines[0] | {"extracted": {"answer": "1987"}}) + "\n")
    with pytest.raises(DataError, match="line 1: 'extracted' must have exactly the fields answer"):
        grade_lines(Config(), answered)


def test_short_forms_are_cached_as_they_arrive(server, tmp_path):
    """In a file, as after a kill, and in a tool cache; failures and other models' are not."""
    questions = {"a": ("Which year?", CASES[0][0]), "b": ("Which year?", "refused")}
    questions["c"] = ("Which year?", CASES[2][0])
    config = with_judge(server, cache=str(tmp_path / "store.sqlite"))
    path, model = tmp_path / "extractions.jsonl", config.services.judge_model
    first = extract_short_forms(questions, make_judge(config), model, path)
    assert [first[key]["answer"] for key in questions] == ["1987", None, None]
    with open(path, "a") as file:
        file.write('["b", {"ans')
    server.requests = []
    assert extract_short_forms(questions, make_judge(with_judge(server)), model, path) == first
    assert server.requests == ["refused"]
    path.unlink()
    assert extract_short_forms(questions, make_judge(config), model, path) == first
    assert server.requests == ["refused"] * 2


def test_a_document_fits_its_token_budget_and_its_answers_are_graded(server, tmp_path):
    """The lower bound on photographs, which no page would fit, does not apply to pages."""
    pytest.importorskip("pypdfium2")
    scripted_policy.write(tmp_path / "policy")
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "samples.json").write_text(json.dumps([mmlongbench(answer="7")]))
    write_pdf(
        tmp_path / "documents" / "report.pdf", [(280, 140), (140, 280), (280, 280), (280, 280)]
    )
    arguments = [
        f"--config={tmp_path / 'config.py'}", "--config.eval.benchmark=mmlongbench",
        f"--config.eval.data=('{tmp_path}',)", "--config.eval.workflows=('direct',)",
        f"--config.images.min_pixels={512 * 512}", f"--config.images.max_pixels={2 * 672 * 672}",
        "--config.eval.page_tokens=17", f"--config.services.judge_url={server.url}",
    ]  # fmt: skip
    run(command(*arguments, f"--model={tmp_path / 'policy'}", f"--out={tmp_path / 'out'}"))
    path = tmp_path / "out" / "episodes.jsonl"
    ((_, _, line),) = records.scan(path)
    assert line["omitted_pages"] == 1 and len(line["image_grids"]) == 3
    assert sum(h * w // 4 for _, h, w in line["image_grids"]) <= 17
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["omitted_pages"] == {"pages": 1, "questions": 1}
    assert results["scored"] == "short forms of the answers"
    assert server.requests == [line["answer"]] and line["answer"]
    assert line["extracted"]["answer"] == line["answer"].split()[-1]
    assert line["score"] == document_grade(line["extracted"]["answer"], "7", "Int")
    # `--rescore` with another model queries it again.
    other = ["--config.services.judge_model=other", f"--config.services.judge_url={server.url}"]
    printed = run(command(f"--rescore={path}", *other))
    assert (
        len(server.requests) == 2 and "score is computed from short forms of the answers" in printed
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["scored"]
