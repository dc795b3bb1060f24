"""Benchmarks are read as they are published; pages fit into their tokens."""

import base64
import functools
import io
import json
import sys

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmsr1_jax.config.settings import Config, Eval
from mmsr1_jax.data import DataError, write_parquet
from mmsr1_jax.data.benchmarks import files, fit_pages, page_processor, read, score
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.evaluation.run import evaluate, to_line
from mmsr1_jax.processing.images import ImageProcessor, open_image

TOKEN = 28 * 28  # pixels


@functools.cache
def picture(seed=0, size=(60, 80)):
    """A PNG of random blocks; `size` is (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()


def stored(data):
    """A picture as HF stores it in parquet."""
    return {"bytes": data, "path": None}


def mmsearch(number=0, **fields):
    return {
        "sample_id": f"s{number}",
        "query": f" Who won? {number} ",
        "query_image": stored(picture(number)),
        "image_search_result": stored(picture(99)),
        "area": "news",
        "subfield": "sports",
        "timestamp": "2024-08",
        "gt_requery": "winner",
        "gt_answer": "Ann",
        "alternative_gt_answers": ["Ann Lee", "Ann", ""],
    } | fields


def simplevqa(number=0, **fields):
    return {
        "data_id": number,
        "image": base64.b64encode(picture(number)).decode(),
        "image_description": "",
        "language": "EN",
        "question": "What is it?",
        "answer": "a lighthouse",
        "original_category": "x",
        "source": "x",
        "atomic_question": "",
        "atomic_fact": "",
        "vqa_category": "object",
    } | fields


TEN = ["surf"] * 4 + ["surfing"] * 3 + ["sea", "", "water"]


def okvqa(number=0, **fields):
    return {
        "question_id": f"{number}",
        "image": stored(picture(number)),
        "question": "What sport is this?",
        "answers": TEN,
        "question_type": "four",
        "answer_type": "other",
    } | fields


def slidevqa(number=0, pages=20, **fields):
    slides = {
        f"page_{page}": stored(picture(page, (225, 300))) if page <= pages else None
        for page in reversed(range(1, 21))  # columns in no good order
    }
    return {
        "qa_id": number,
        "question": "How many users?",
        "answer": "3 million users",
        "arithmetic_expression": "None",
        "evidence_pages": [1],
        "reasoning_type": "Single-Hop",
        **slides,
    } | fields


def mmlongbench(**fields):
    return {
        "doc_id": "report.pdf",
        "doc_type": "Research report / Introduction",
        "question": "Which year?",
        "answer": "2015",
        "evidence_pages": "[5]",
        "evidence_sources": "['Chart']",
        "answer_format": "Int",
    } | fields


def livevqa(number=0, **fields):
    return {
        "sample_id": f"{number}",
        "query": "Where is it?",
        "query_image": "/image/a.png",
        "gt_answer": "Augusta",
    } | fields


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def pdf(path, sizes):
    """A PDF with pages of these (height, width) in points, each of its own colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = [
        PIL.Image.new("RGB", (width, height), (40 * number, 0, 200))
        for number, (height, width) in enumerate(sizes)
    ]
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=72)
    return path


def tokens(questions):
    """Tokens that the pictures take when the policy's processor has resized them."""
    return sum(
        height * width // TOKEN
        for image in questions.images
        for height, width in [ImageProcessor().target_size(*open_image(image).size[::-1])]
    )


def test_mmsearch_is_the_questions_with_a_picture(tmp_path, capsys):
    table(tmp_path / "rerank.parquet", {"other": 1})
    table(tmp_path / "end2end.parquet", mmsearch(0), mmsearch(1, query_image=None), mmsearch(2))
    first, second = read("mmsearch", tmp_path)
    assert (first.id, first.question, first.category) == ("s0", "Who won? 0", "news")
    assert first.answers == ("Ann", "Ann Lee") and first.images == (picture(0),)
    assert (second.id, second.row, second.source) == ("s2", 2, "mmsearch")
    assert "1 rows left out, whose question has no picture" in capsys.readouterr().err


def test_simplevqa_is_its_english_questions_with_pictures_in_base64(tmp_path):
    table(tmp_path / "SimpleVQA.parquet", simplevqa(0, language="CN"), simplevqa(1))
    (question,) = read("simplevqa", tmp_path)
    assert (question.id, question.images) == ("1", (picture(1),))
    assert (question.answers, question.category) == (("a lighthouse",), "object")


def test_livevqa_is_read_in_both_published_forms(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "a.png").write_bytes(picture(1))
    (tmp_path / "qa.json").write_text(json.dumps([livevqa(3)]))
    (question,) = read("livevqa", tmp_path)
    assert (question.id, question.answers, question.images) == ("3", ("Augusta",), (picture(1),))

    folder = tmp_path / "benchmarks"
    asked = {"question": "Which club?", "Ground_Truth_List": ["Augusta National", "Augusta"]}
    asked |= {"options": ["A. Augusta"], "Ground_Truth": "A", "img_path": "b.png"}
    item = {"id": "9", "img_path": "b.png", "level1_qa": asked, "source": "CNN"}
    other = asked | {"question": "Why?", "Ground_Truth_List": ["a delay"]}
    (folder / "News" / "News_imgs").mkdir(parents=True)
    (folder / "News" / "News_imgs" / "b.png").write_bytes(picture(2))
    (folder / "News" / "benchmark.json").write_text(json.dumps([item | {"level2_qa": other}]))
    one, two = read("livevqa", folder)
    assert (one.id, one.category, one.question) == ("9_level1", "level1", "Which club?")
    assert one.answers == ("Augusta National", "Augusta") and one.images == (picture(2),)
    assert (two.id, two.answers, two.row) == ("9_level2", ("a delay",), 0)


def test_okvqa_keeps_all_ten_answers(tmp_path):
    table(tmp_path / "data" / "val2014-00001-of-00002.parquet", okvqa(2))
    table(tmp_path / "data" / "val2014-00000-of-00002.parquet", okvqa(0), okvqa(1))
    questions = list(read("okvqa", tmp_path))
    assert [q.id for q in questions] == ["0", "1", "2"]
    wild = tmp_path / "data" / "*-00001-*.parquet"
    assert [q.id for q in read("okvqa", wild)] == ["2"]
    assert files("okvqa", [wild]) == [tmp_path / "data" / "val2014-00001-of-00002.parquet"]
    assert questions[0].references == tuple(TEN)
    assert questions[0].answers == ("surf", "surfing", "sea", "water")
    assert score("okvqa")("Surf!", questions[0]) == 1
    assert score("okvqa")("the sea", questions[0]) == pytest.approx(0.3)


def test_slides_come_in_order_and_within_the_tokens(tmp_path):
    path = table(tmp_path / "test-00000-of-00001.parquet", slidevqa(5))
    (whole,) = read("slidevqa", path, page_tokens=20 * 88)  # 8 x 11 tokens of a slide
    assert whole.images == tuple(picture(page, (225, 300)) for page in range(1, 21))
    assert (whole.id, whole.answers) == ("5", ("3 million users",))
    (small,) = read("slidevqa", path, page_tokens=1000)
    assert len(small.images) == 20 and 750 < tokens(small) <= 1000
    for page, image in enumerate(small.images, 1):  # the same picture, smaller
        shown = open_image(image)
        wanted = open_image(picture(page, (225, 300))).resize(shown.size, PIL.Image.BICUBIC)
        assert np.array_equal(np.asarray(shown), np.asarray(wanted))


def test_pages_are_left_out_only_where_the_least_size_does_not_fit(tmp_path, capsys):
    path = table(tmp_path / "a.parquet", slidevqa(5, pages=7))
    (question,) = read("slidevqa", path, page_tokens=7 * 4)
    assert len(question.images) == 7 and capsys.readouterr().err == ""
    assert question.pages_left_out == 0
    (question,) = read("slidevqa", path, page_tokens=6 * 4 + 3)
    assert len(question.images) == 6 and question.pages_left_out == 1
    assert "question 5: the last 1 pages left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="the first page needs 4 tokens at the least"):
        list(read("slidevqa", path, page_tokens=3))


def test_the_least_size_of_a_page_is_not_that_of_a_photograph(tmp_path):
    path = table(tmp_path / "a.parquet", slidevqa(5))
    policy = ImageProcessor(min_pixels=512 * 512, max_pixels=2 * 672 * 672)
    (question,) = read("slidevqa", path, page_tokens=400, processor=policy)
    assert len(question.images) == 20 and question.pages_left_out == 0
    shown = page_processor(policy)
    sizes = [open_image(image).size[::-1] for image in question.images]
    assert [shown.target_size(*size) for size in sizes] == sizes
    assert 300 < sum(height * width // TOKEN for height, width in sizes) <= 400
    assert (shown.min_pixels, shown.max_pixels) == (56 * 56, policy.max_pixels)
    assert page_processor(ImageProcessor(min_pixels=TOKEN)).min_pixels == TOKEN


def test_documents_become_pictures_of_their_pages(tmp_path):
    pytest.importorskip("pypdfium2")
    rows = [mmlongbench(), mmlongbench(question="Who?", answer="Not answerable",
                                       answer_format="None")]  # fmt: skip
    table(tmp_path / "data" / "train-00000-of-00001.parquet", *rows)
    pdf(tmp_path / "documents" / "report.pdf", [(280, 140), (140, 280), (280, 280)])
    one, two = read("mmlongbench", tmp_path)
    shapes = [open_image(image).size for image in one.images]
    assert shapes == [(280, 560), (560, 280), (560, 560)]  # 144 dots an inch
    middles = [open_image(image).getpixel((100, 100)) for image in one.images]
    assert np.abs(np.array(middles) - [(0, 0, 200), (40, 0, 200), (80, 0, 200)]).max() < 8
    assert two.images is one.images and two.id != one.id  # rendered once
    assert (one.answer_format, one.answers) == ("Int", ("2015",))
    assert score("mmlongbench")("not answerable", two) == 1
    assert score("mmlongbench")("2015.0", one) == 1 and score("mmlongbench")("2016", one) == 0
    (small, _) = read("mmlongbench", tmp_path, page_tokens=120)
    assert len(small.images) == 3 and 90 < tokens(small) <= 120
    left_out = [q.pages_left_out for q in read("mmlongbench", tmp_path, page_tokens=7)]
    assert left_out == [2, 2]  # two pages need eight tokens at the least

    (tmp_path / "samples.json").write_text(json.dumps(rows[:1]))  # as on GitHub
    (again,) = read("mmlongbench", tmp_path / "samples.json")
    assert (again.id, again.images) == (one.id, one.images)


def test_what_is_wrong_with_a_document_is_said(tmp_path, capsys):
    pytest.importorskip("pypdfium2")
    rows = [mmlongbench(doc_id="none.pdf"), mmlongbench(doc_id="bad.pdf"), mmlongbench()]
    rows += [mmlongbench(answer_format="Text"), mmlongbench(doc_id="../documents/report.pdf")]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    pdf(tmp_path / "documents" / "report.pdf", [(100, 100)])
    (tmp_path / "documents" / "bad.pdf").write_bytes(b"%PDF-1.4 and nothing else")
    (question,) = read("mmlongbench", tmp_path)
    assert question.row == 2
    said = capsys.readouterr().err.splitlines()
    assert "row 0: doc_id" in said[0] and "none.pdf: no such file" in said[0]
    assert "row 1: pages" in said[1] and "bad.pdf: not a PDF" in said[1]
    assert "row 3: answer_format: 'Text' is not one of Str, Int" in said[2]
    assert "row 4: doc_id" in said[3]


def test_the_package_for_documents_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    (tmp_path / "samples.json").write_text(json.dumps([mmlongbench()]))
    with pytest.raises(DataError, match="pip install pypdfium2"):
        read("mmlongbench", tmp_path)


@pytest.mark.parametrize("name, file", [("fvqa-test", "fvqa"), ("infoseek", "infoseek")])
def test_verl_files_are_read_as_for_training(tmp_path, name, file, shared):
    questions = list(read(name, shared / "data" / f"{file}_mini.parquet"))
    assert len(questions) == parquet.read_metadata(shared / f"data/{file}_mini.parquet").num_rows
    assert write_parquet(tmp_path / f"{file}_test.parquet", questions) == len(questions)
    again = read(name, tmp_path)
    assert [q.answers for q in again] == [q.answers for q in questions]


ROWS = {
    "mmsearch": mmsearch,
    "simplevqa": simplevqa,
    "okvqa": okvqa,
    "slidevqa": slidevqa,
    "mmlongbench": mmlongbench,
    "livevqa": livevqa,
}
NEEDED = {
    "mmsearch": "sample_id query query_image gt_answer alternative_gt_answers",
    "simplevqa": "data_id image language question answer",
    "okvqa": "question_id image question answers",
    "slidevqa": "qa_id question answer page_1",
    "mmlongbench": "doc_id question answer answer_format",
    "livevqa": "sample_id query query_image gt_answer",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_missing_column_is_named(tmp_path, name):
    if name == "mmlongbench":
        pytest.importorskip("pypdfium2")
    for column in NEEDED[name].split():
        row = {key: value for key, value in ROWS[name]().items() if key != column}
        if name == "livevqa":
            path = tmp_path / "qa.json"
            path.write_text(json.dumps([row]))
        else:
            path = table(tmp_path / "a.parquet", row)
        with pytest.raises(DataError, match=f"(no column|a field) '{column}'"):
            read(name, path)


def test_a_column_of_another_type_is_named(tmp_path):
    with pytest.raises(DataError, match="column 'answers' must be a list of texts; it is string"):
        read("okvqa", table(tmp_path / "a.parquet", okvqa(answers="surf")))
    with pytest.raises(DataError, match="column 'page_1' must be a picture: .*it is int64"):
        read("slidevqa", table(tmp_path / "b.parquet", slidevqa(page_1=3)))


def test_files_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(DataError, match="no benchmark 'vqa'; there are fvqa-test, infoseek"):
        read("vqa", tmp_path)
    with pytest.raises(DataError, match="no benchmark 'vqa'"):
        score("vqa")
    with pytest.raises(DataError, match="has none of the files end2end"):
        read("mmsearch", tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read("mmsearch", tmp_path / "x.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a parquet file"):
        read("mmsearch", tmp_path)
    for text, reason in (("[1", "not JSON"), ('{"a": 1}', "must be a list of objects")):
        (tmp_path / "qa.json").write_text(text)
        with pytest.raises(DataError, match=reason):
            read("livevqa", tmp_path)
    only = table(tmp_path / "b.parquet", mmsearch(query_image=None), mmsearch(query_image=None))
    with pytest.raises(DataError, match="it is null|no question that can be used"):
        list(read("mmsearch", only))


def test_bad_rows_are_named_and_counted(tmp_path, capsys):
    rows = [
        okvqa(0),
        okvqa(1, answers=TEN[:9]),
        okvqa(2, image=stored(picture(2)[:200])),
        okvqa(3, question=" "),
        okvqa(4, image=None),
        okvqa(5),
    ]
    path = table(tmp_path / "a.parquet", *rows)
    assert [q.id for q in read("okvqa", path, max_bad_rows=4)] == ["0", "5"]
    said = capsys.readouterr().err
    for row, reason in (
        ("1: answers", "9; they must be those of 10 people"),
        ("2: image", "cannot be decoded"),
        ("3: question", "empty"),
        ("4: image", "no picture"),
    ):
        assert f"{path}, row {row}: " in said and reason in said
    with pytest.raises(DataError, match="4, more than config.data.max_bad_rows=3.*row 4"):
        list(read("okvqa", path, max_bad_rows=3))


def test_pictures_outside_the_folder_are_not_read(tmp_path, capsys):
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "qa.json"
    path.write_text(json.dumps([livevqa(query_image="../secret.png")]))
    with pytest.raises(DataError, match="no question"):
        list(read("livevqa", path))
    assert "row 0: query_image" in capsys.readouterr().err


def test_an_evaluation_does_not_go_on_with_other_questions(tmp_path, tiny_dir, processor):
    """The first row's picture comes after the second question was answered, as number 0."""
    policy, out = tmp_path / "policy", tmp_path / "out"
    policy.mkdir()  # without parameters, so that nothing is answered
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (policy / name).write_bytes((tiny_dir / name).read_bytes())
    (tmp_path / "a.png").write_bytes(picture(1))
    rows = [livevqa(3, query_image="late.png"), livevqa(4, query_image="a.png")]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    config = Config(eval=Eval(data=(str(tmp_path),), benchmark="livevqa"))
    (question,) = read("livevqa", tmp_path)
    out.mkdir()
    made = Episode(example=question.example(), group=0, index=0, end="turns")
    line = json.dumps(to_line(made, question, "direct", config, processor, out)) + "\n"
    (out / "episodes.jsonl").write_text(line + line[:40])  # as a kill leaves it
    with pytest.raises(ValueError, match=f"{policy}.*config.json"):
        evaluate(config, policy, out)
    (tmp_path / "late.png").write_bytes(picture(2))
    with pytest.raises(
        DataError,
        match="question 0 is '4', but the data now has '3' .*qa.json, row 0",
    ):
        evaluate(config, policy, out)
    assert (out / "episodes.jsonl").read_text() == line


def test_pages_take_as_many_tokens_as_they_may():
    rng = np.random.default_rng(0)
    processor, dropped = ImageProcessor(), 0
    for _ in range(60):
        sizes = [
            tuple(int(x) for x in rng.integers(20, 1500, 2)) for _ in range(rng.integers(1, 9))
        ]
        allowed = int(rng.integers(20, 6000))
        fit = fit_pages(sizes, allowed, processor)
        cost = sum(h * w for h, w in fit.sizes) / TOKEN
        assert cost <= allowed and len(fit.sizes) == fit.pages
        assert [processor.target_size(*size) for size in fit.sizes] == list(fit.sizes)
        if fit.pages < len(sizes):  # four tokens a page, more for long ones
            assert 4 * len(sizes) > allowed or cost + 4 > allowed
            dropped += 1
        elif 2 * processor.min_pixels < fit.max_pixels < processor.max_pixels:
            larger = processor.with_limits(None, fit.max_pixels + 1)
            assert sum(h * w for h, w in (larger.target_size(*x) for x in sizes)) / TOKEN > allowed
    assert dropped < 10
    assert fit_pages([(100, 100)] * 9, 35, processor).pages == 8
    assert fit_pages([(100, 100)] * 9, 36, processor).pages == 9
