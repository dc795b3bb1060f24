"""Benchmarks are read in their published formats, and document pages fit a token budget."""

import json
import sys

import numpy as np
import PIL.Image
import pytest
from pyarrow import parquet

from mmsr1_jax.data import DataError, write_parquet
from mmsr1_jax.data.benchmarks import files, fit_pages, grader, page_processor, read
from mmsr1_jax.processing.images import ImageProcessor, open_image
from tests.benchmark_files import (
    TEN,
    hf_image,
    livevqa,
    mmlongbench,
    mmsearch,
    okvqa,
    png,
    simplevqa,
    slidevqa,
    write_pdf,
    write_table,
)

TOKEN = 28 * 28  # pixels


def tokens(questions):
    """Return the number of tokens of the images after resizing by the policy's processor."""
    return sum(
        height * width // TOKEN
        for image in questions.images
        for height, width in [ImageProcessor().target_size(*open_image(image).size[::-1])]
    )


def test_mmsearch_skips_questions_without_an_image(tmp_path, capsys):
    write_table(tmp_path / "rerank.parquet", {"other": 1})
    write_table(
        tmp_path / "end2end.parquet", mmsearch(0), mmsearch(1, query_image=None), mmsearch(2)
    )
    first, second = read("mmsearch", tmp_path)
    assert (first.id, first.question, first.category) == ("s0", "Who won? 0", "news")
    assert first.answers == ("Ann", "Ann Lee") and first.images == (png(0),)
    assert (second.id, second.row, second.source) == ("s2", 2, "mmsearch")
    assert "skipped 1 rows: the question has no image" in capsys.readouterr().err


def test_simplevqa_reads_english_questions_with_base64_images(tmp_path):
    write_table(tmp_path / "SimpleVQA.parquet", simplevqa(0, language="CN"), simplevqa(1))
    (question,) = read("simplevqa", tmp_path)
    assert (question.id, question.images) == ("1", (png(1),))
    assert (question.answers, question.category) == (("a lighthouse",), "object")


def test_livevqa_is_read_in_both_published_formats(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "a.png").write_bytes(png(1))
    (tmp_path / "qa.json").write_text(json.dumps([livevqa(3)]))
    (question,) = read("livevqa", tmp_path)
    assert (question.id, question.answers, question.images) == ("3", ("Augusta",), (png(1),))

    folder = tmp_path / "benchmarks"
    first = {"question": "Which club?", "Ground_Truth_List": ["Augusta National", "Augusta"]}
    first |= {"options": ["A. Augusta"], "Ground_Truth": "A", "img_path": "b.png"}
    item = {"id": "9", "img_path": "b.png", "level1_qa": first, "source": "CNN"}
    second = first | {"question": "Why?", "Ground_Truth_List": ["a delay"]}
    (folder / "News" / "News_imgs").mkdir(parents=True)
    (folder / "News" / "News_imgs" / "b.png").write_bytes(png(2))
    (folder / "News" / "benchmark.json").write_text(json.dumps([item | {"level2_qa": second}]))
    one, two = read("livevqa", folder)
    assert (one.id, one.category, one.question) == ("9_level1", "level1", "Which club?")
    assert one.answers == ("Augusta National", "Augusta") and one.images == (png(2),)
    assert (two.id, two.answers, two.row) == ("9_level2", ("a delay",), 0)


def test_okvqa_keeps_all_ten_answers(tmp_path):
    write_table(tmp_path / "data" / "val2014-00001-of-00002.parquet", okvqa(2))
    write_table(tmp_path / "data" / "val2014-00000-of-00002.parquet", okvqa(0), okvqa(1))
    questions = list(read("okvqa", tmp_path))
    assert [q.id for q in questions] == ["0", "1", "2"]
    pattern = tmp_path / "data" / "*-00001-*.parquet"
    assert [q.id for q in read("okvqa", pattern)] == ["2"]
    assert files("okvqa", [pattern]) == [tmp_path / "data" / "val2014-00001-of-00002.parquet"]
    assert questions[0].references == tuple(TEN)
    assert questions[0].answers == ("surf", "surfing", "sea", "water")
    assert grader("okvqa")("Surf!", questions[0]) == 1
    assert grader("okvqa")("the sea", questions[0]) == pytest.approx(0.3)


def test_slides_are_ordered_and_fit_the_token_budget(tmp_path):
    path = write_table(tmp_path / "test-00000-of-00001.parquet", slidevqa(5))
    (full,) = read("slidevqa", path, page_tokens=20 * 88)  # 8 x 11 tokens of a slide
    assert full.images == tuple(png(page, (225, 300)) for page in range(1, 21))
    assert (full.id, full.answers) == ("5", ("3 million users",))
    (small,) = read("slidevqa", path, page_tokens=1000)
    assert len(small.images) == 20 and 750 < tokens(small) <= 1000
    for page, image in enumerate(small.images, 1):  # the same image, resized
        resized = open_image(image)
        expected = open_image(png(page, (225, 300))).resize(resized.size, PIL.Image.BICUBIC)
        assert np.array_equal(np.asarray(resized), np.asarray(expected))


def test_pages_are_omitted_only_if_their_minimum_size_exceeds_the_budget(tmp_path, capsys):
    path = write_table(tmp_path / "a.parquet", slidevqa(5, pages=7))
    (question,) = read("slidevqa", path, page_tokens=7 * 4)
    assert len(question.images) == 7 and capsys.readouterr().err == ""
    assert question.omitted_pages == 0
    (question,) = read("slidevqa", path, page_tokens=6 * 4 + 3)
    assert len(question.images) == 6 and question.omitted_pages == 1
    assert "question 5: omitted the last 1 pages" in capsys.readouterr().err
    with pytest.raises(DataError, match="the first page needs at least 4 tokens"):
        list(read("slidevqa", path, page_tokens=3))


def test_the_minimum_size_of_a_page_is_below_that_of_a_photograph(tmp_path):
    path = write_table(tmp_path / "a.parquet", slidevqa(5))
    policy = ImageProcessor(min_pixels=512 * 512, max_pixels=2 * 672 * 672)
    (question,) = read("slidevqa", path, page_tokens=400, processor=policy)
    assert len(question.images) == 20 and question.omitted_pages == 0
    processor = page_processor(policy)
    sizes = [open_image(image).size[::-1] for image in question.images]
    assert [processor.target_size(*size) for size in sizes] == sizes
    assert 300 < sum(height * width // TOKEN for height, width in sizes) <= 400
    assert (processor.min_pixels, processor.max_pixels) == (56 * 56, policy.max_pixels)
    assert page_processor(ImageProcessor(min_pixels=TOKEN)).min_pixels == TOKEN


def test_documents_are_rendered_as_page_images(tmp_path):
    pytest.importorskip("pypdfium2")
    rows = [mmlongbench(), mmlongbench(question="Who?", answer="Not answerable",
                                       answer_format="None")]  # fmt: skip
    write_table(tmp_path / "data" / "train-00000-of-00001.parquet", *rows)
    write_pdf(tmp_path / "documents" / "report.pdf", [(280, 140), (140, 280), (280, 280)])
    one, two = read("mmlongbench", tmp_path)
    shapes = [open_image(image).size for image in one.images]
    assert shapes == [(280, 560), (560, 280), (560, 560)]  # 144 dpi
    colours = [open_image(image).getpixel((100, 100)) for image in one.images]
    assert np.abs(np.array(colours) - [(0, 0, 200), (40, 0, 200), (80, 0, 200)]).max() < 8
    assert two.images is one.images and two.id != one.id  # rendered once
    assert (one.answer_format, one.answers) == ("Int", ("2015",))
    assert grader("mmlongbench")("not answerable", two) == 1
    assert grader("mmlongbench")("2015.0", one) == 1 and grader("mmlongbench")("2016", one) == 0
    (small, _) = read("mmlongbench", tmp_path, page_tokens=120)
    assert len(small.images) == 3 and 90 < tokens(small) <= 120
    omitted = [q.omitted_pages for q in read("mmlongbench", tmp_path, page_tokens=7)]
    assert omitted == [2, 2]  # two pages need at least eight tokens

    (tmp_path / "samples.json").write_text(json.dumps(rows[:1]))  # as on GitHub
    (again,) = read("mmlongbench", tmp_path / "samples.json")
    assert (again.id, again.images) == (one.id, one.images)


def test_invalid_documents_are_reported_and_skipped(tmp_path, capsys):
    pytest.importorskip("pypdfium2")
    rows = [mmlongbench(doc_id="none.pdf"), mmlongbench(doc_id="bad.pdf"), mmlongbench()]
    rows += [mmlongbench(answer_format="Text"), mmlongbench(doc_id="../documents/report.pdf")]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    write_pdf(tmp_path / "documents" / "report.pdf", [(100, 100)])
    (tmp_path / "documents" / "bad.pdf").write_bytes(b"%PDF-1.4 and nothing else")
    (question,) = read("mmlongbench", tmp_path)
    assert question.row == 2
    lines = capsys.readouterr().err.splitlines()
    assert "row 0: doc_id" in lines[0] and "none.pdf: no such file" in lines[0]
    assert "row 1: pages" in lines[1] and "bad.pdf: not a readable PDF" in lines[1]
    assert "row 3: answer_format: 'Text' is not one of Str, Int" in lines[2]
    assert "row 4: doc_id" in lines[3]


def test_a_missing_pdf_library_is_an_error_that_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    (tmp_path / "samples.json").write_text(json.dumps([mmlongbench()]))
    with pytest.raises(DataError, match="pip install pypdfium2"):
        read("mmlongbench", tmp_path)


@pytest.mark.parametrize("name, file", [("fvqa-test", "fvqa"), ("infoseek", "infoseek")])
def test_benchmarks_in_verl_format_are_read_like_training_files(tmp_path, name, file, shared):
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
REQUIRED = {
    "mmsearch": "sample_id query query_image gt_answer alternative_gt_answers",
    "simplevqa": "data_id image language question answer",
    "okvqa": "question_id image question answers",
    "slidevqa": "qa_id question answer page_1",
    "mmlongbench": "doc_id question answer answer_format",
    "livevqa": "sample_id query query_image gt_answer",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_missing_benchmark_column_is_an_error(tmp_path, name):
    if name == "mmlongbench":
        pytest.importorskip("pypdfium2")
    for column in REQUIRED[name].split():
        row = {key: value for key, value in ROWS[name]().items() if key != column}
        if name == "livevqa":
            path = tmp_path / "qa.json"
            path.write_text(json.dumps([row]))
        else:
            path = write_table(tmp_path / "a.parquet", row)
        with pytest.raises(DataError, match=f"(no column|a field) '{column}'"):
            read(name, path)


def test_a_benchmark_column_of_the_wrong_type_is_an_error(tmp_path):
    with pytest.raises(DataError, match="column 'answers' must be a list of texts; it is string"):
        read("okvqa", write_table(tmp_path / "a.parquet", okvqa(answers="surf")))
    with pytest.raises(DataError, match="column 'page_1' must be an image: .*it is int64"):
        read("slidevqa", write_table(tmp_path / "b.parquet", slidevqa(page_1=3)))


def test_unknown_benchmarks_and_unreadable_files_are_errors(tmp_path):
    with pytest.raises(
        DataError, match="unknown benchmark 'vqa'; it must be one of fvqa-test, infoseek"
    ):
        read("vqa", tmp_path)
    with pytest.raises(DataError, match="unknown benchmark 'vqa'"):
        grader("vqa")
    with pytest.raises(DataError, match="contains none of end2end"):
        read("mmsearch", tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read("mmsearch", tmp_path / "x.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read("mmsearch", tmp_path)
    for text, reason in (("[1", "not JSON"), ('{"a": 1}', "must be a list of objects")):
        (tmp_path / "qa.json").write_text(text)
        with pytest.raises(DataError, match=reason):
            read("livevqa", tmp_path)
    only = write_table(
        tmp_path / "b.parquet", mmsearch(query_image=None), mmsearch(query_image=None)
    )
    with pytest.raises(DataError, match="it is null|no usable question"):
        list(read("mmsearch", only))


def test_bad_benchmark_rows_are_reported_and_counted(tmp_path, capsys):
    rows = [
        okvqa(0),
        okvqa(1, answers=TEN[:9]),
        okvqa(2, image=hf_image(png(2)[:200])),
        okvqa(3, question=" "),
        okvqa(4, image=None),
        okvqa(5),
    ]
    path = write_table(tmp_path / "a.parquet", *rows)
    assert [q.id for q in read("okvqa", path, max_bad_rows=4)] == ["0", "5"]
    stderr = capsys.readouterr().err
    for row, reason in (
        ("1: answers", "9 answers; must be 10"),
        ("2: image", "cannot be decoded"),
        ("3: question", "empty"),
        ("4: image", "has no image"),
    ):
        assert f"{path}, row {row}: " in stderr and reason in stderr
    with pytest.raises(
        DataError, match="4 unusable rows, more than config.data.max_bad_rows=3.*row 4"
    ):
        list(read("okvqa", path, max_bad_rows=3))


def test_images_outside_the_data_folder_are_not_read(tmp_path, capsys):
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "qa.json"
    path.write_text(json.dumps([livevqa(query_image="../secret.png")]))
    with pytest.raises(DataError, match="no usable question"):
        list(read("livevqa", path))
    assert "row 0: query_image" in capsys.readouterr().err


def test_fitted_pages_use_the_token_budget():
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
