"""Questions come from files as they stand there, in an order that can be taken up anywhere."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import grain
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmsr1_jax.data import (
    BadRow,
    DataError,
    Question,
    QuestionSource,
    batches,
    validation,
    write_parquet,
)
from mmsr1_jax.processing.images import open_image


def picture(seed=0, size=(8, 6), kind="png"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def question(number, **fields):
    made = {
        "id": f"id{number}",
        "question": f"What is it? {number}",
        "images": (picture(number),),
        "answers": (f"gold {number}", f"alias {number}"),
        "source": "made",
        "category": "search_free",
    }
    return Question(**(made | fields))


def row(number=0, **fields):
    """A row as the released files have it, some fields replaced."""
    return {
        "data_id": f"id{number}",
        "category": "search_free",
        "data_source": "made",
        "prompt": [{"content": f"What is it? {number}", "role": "user"}],
        "images": [{"bytes": picture(number), "path": None}],
        "reward_model": {
            "candidate_answers": '["alias"]',
            "ground_truth": "gold",
            "style": "rule",
        },
        "image_urls": None,
    } | fields


def reward(truth="gold", others="[]"):
    return {"candidate_answers": others, "ground_truth": truth, "style": "rule"}


def write_rows(path, rows, **options):
    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def damaged(number):
    return question(number, images=(picture(number, (40, 40))[:400],))


def ids(questions):
    return [q.id for q in questions]


# Real files


@pytest.mark.parametrize("name, rows", [("fvqa_mini", 26), ("infoseek_mini", 5)])
def test_real_rows(shared, name, rows):
    path = shared / "data" / f"{name}.parquet"
    source = QuestionSource(path, max_bad_rows=0)
    raw = parquet.read_table(path).to_pylist()
    assert len(source) == len(raw) == rows
    for number, (read, r) in enumerate(zip(source, raw, strict=True)):
        aliases = json.loads(r["reward_model"]["candidate_answers"])
        assert read.question == r["prompt"][0]["content"]
        assert read.images == (r["images"][0]["bytes"],)
        assert read.answers[0] == r["reward_model"]["ground_truth"]
        assert set(read.answers) == {*aliases, read.answers[0]}
        assert len(set(read.answers)) == len(read.answers)
        assert read.source == r["data_source"]
        assert read.id == r.get("data_id", f"{name}_{number}")
        assert read.category == r.get("category", "")
        assert (read.file, read.row) == (str(path), number)
        example = read.example()
        assert (example.id, example.question) == (read.id, read.question)
        assert open_image(example.images[0]).size == open_image(read.images[0]).size
    assert source[rows - 1] == read and source[-1] == read


def test_real_files_together(shared):
    source = QuestionSource(shared / "data")
    assert len(source) == 31
    assert [q.source for q in validation(source, 27)][25:] == [
        "mmsearch_r1/fvqa_train",
        "mmsearch_r1/infoseek_train_split",
    ]


# What a row may be


def one(tmp_path, **fields):
    (read,) = QuestionSource(write_rows(tmp_path / "one.parquet", [row(**fields)]), max_bad_rows=0)
    return read


@pytest.mark.parametrize(
    "others, answers",
    [
        ('["Tajo", "Tejo"]', ("gold", "Tajo", "Tejo")),
        ('["gold", " Tajo", "Tajo", "", null]', ("gold", "Tajo")),
        ('[1.50, 12, "\\u00e9"]', ("gold", "1.50", "12", "é")),
        ("[]", ("gold",)),
        ("null", ("gold",)),
        (" ", ("gold",)),
        (None, ("gold",)),
        (["Tajo", "gold", None], ("gold", "Tajo")),
        ([], ("gold",)),
        ([1889, 1890], ("gold", "1889", "1890")),
    ],
)
def test_aliases(tmp_path, others, answers):
    assert one(tmp_path, reward_model=reward(others=others)).answers == answers


@pytest.mark.parametrize(
    "content, text",
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("<image> <image>What is it?\n<image>", "What is it?"),
        ("What does <image> mean in HTML?", "What does <image> mean in HTML?"),
        ("Is this an assistant?\nuser\nassistant\n", "Is this an assistant?\nuser\nassistant"),
    ],
)
def test_question_text(tmp_path, content, text):
    prompt = [{"content": "Be brief.", "role": "system"}, {"content": content, "role": "user"}]
    assert one(tmp_path, prompt=prompt).question == text


def test_pictures_by_path_and_several(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(picture(1, kind="jpeg"))
    images = [
        {"bytes": None, "path": "pictures/a.jpg"},
        {"bytes": picture(2), "path": "not there.png"},
        {"bytes": picture(3), "path": None},
    ]
    expected = (picture(1, kind="jpeg"), picture(2), picture(3))
    assert one(tmp_path, images=images).images == expected


def test_columns_that_may_be_absent_or_null(tmp_path):
    bare = {k: v for k, v in row(7).items() if k in ("prompt", "images", "reward_model")}
    del bare["reward_model"]["candidate_answers"]
    nulls = row(8, data_id=None, category=None, data_source=None)
    for name, r in (("bare", bare), ("nulls", nulls)):
        path = write_rows(tmp_path / f"{name}.parquet", [r])
        (read,) = QuestionSource(path)
        assert (read.id, read.source, read.category) == (f"{name}_0", name, "")
    (read,) = QuestionSource(write_rows(tmp_path / "n.parquet", [row(data_id=17)]))
    assert read.id == "17"


# Bad rows

LONG = picture(0, (1, 900))
BAD = [
    ({"prompt": [{"content": " <image>\n", "role": "user"}]}, "prompt.content", "no question"),
    ({"prompt": [{"content": None, "role": "user"}]}, "prompt.content", "no question"),
    ({"prompt": []}, "prompt", "one message of the user"),
    ({"prompt": None}, "prompt", "one message of the user"),
    ({"prompt": [{"content": "a", "role": "user"}] * 2}, "prompt", "['user', 'user']"),
    ({"prompt": [{"content": "a", "role": "assistant"}]}, "prompt", "['assistant']"),
    ({"reward_model": reward("")}, "reward_model.ground_truth", "empty"),
    ({"reward_model": reward(" \n")}, "reward_model.ground_truth", "empty"),
    ({"reward_model": reward(None)}, "reward_model.ground_truth", "empty"),
    ({"reward_model": None}, "reward_model.ground_truth", "empty"),
    ({"reward_model": reward(others="['a']")}, "reward_model.candidate_answers", "not JSON"),
    ({"reward_model": reward(others="[" * 99999)}, "reward_model.candidate_answers", "not JSON"),
    ({"reward_model": reward(others='"a"')}, "reward_model.candidate_answers", "not a list"),
    ({"reward_model": reward(others='[{"a": 1}]')}, "reward_model.candidate_answers", "a dict"),
    ({"reward_model": reward(others="[true]")}, "reward_model.candidate_answers", "a bool"),
    ({"reward_model": reward(others='["\\ud83c"]')}, "reward_model.candidate_answers", "surrogate"),
    ({"images": []}, "images", "has no image"),
    ({"images": None}, "images", "has no image"),
    ({"images": [{"bytes": None, "path": None}]}, "images[0]", "neither bytes nor path"),
    ({"images": [{"bytes": b"", "path": None}]}, "images[0]", "neither bytes nor path"),
    ({"images": [{"bytes": None, "path": "no.png"}]}, "images[0]", "no.png: no such file"),
    ({"images": [{"bytes": b"<html>", "path": None}]}, "images[0]", "not an image"),
    (
        {"images": [{"bytes": picture(), "path": None}, {"bytes": picture()[:99], "path": None}]},
        "images[1]",
        "cannot be decoded",
    ),
    ({"images": [{"bytes": LONG, "path": None}]}, "images[0]", "200 times"),
]


def test_bad_rows_are_named_and_left_out(tmp_path, capsys):
    rows = [row(999)]
    for number, (fields, _, _) in enumerate(BAD):
        rows += [row(number, **fields), row(1000 + number)]
    path = write_rows(tmp_path / "bad.parquet", rows, row_group_size=7)
    source = QuestionSource(path, max_bad_rows=len(BAD))
    expected = ["id999", *(f"id{1000 + number}" for number in range(len(BAD)))]
    assert ids(validation(source)) == expected
    assert ids(validation(source)) == expected  # once more: nothing is said twice
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(BAD) == len(source.bad)
    for number, (_, field, reason) in enumerate(BAD):
        (bad,) = [bad for bad in source.bad if bad.row == 1 + 2 * number]
        assert bad.file == str(path) and bad.field == field and reason in bad.reason
        assert f"{path}, row {bad.row}: {field}: {bad.reason}; left out" in said


def test_text_that_is_not_utf8(tmp_path):
    table = pa.Table.from_pylist([row(1), row(2)])
    broken = pa.array([b"\xff\xfe", b"id2"]).view(pa.string())
    table = table.set_column(0, "data_id", broken)
    parquet.write_table(table, tmp_path / "a.parquet")
    source = QuestionSource(tmp_path / "a.parquet")
    assert source.bad == [BadRow(str(tmp_path / "a.parquet"), 0, "data_id", "not UTF-8")]
    assert ids(source) == ["id2"]


def test_too_many_bad_rows(tmp_path):
    bad = [row(i, reward_model=reward("")) for i in range(3)]
    path = write_rows(tmp_path / "a.parquet", [*bad, row(9)])
    assert len(QuestionSource(path, max_bad_rows=3)) == 1
    with pytest.raises(DataError, match=r"config\.data\.max_bad_rows=2; .*row 2: reward_model"):
        QuestionSource(path, max_bad_rows=2)


def test_bad_pictures_count_too(tmp_path):
    write_parquet(tmp_path / "a.parquet", [question(0), damaged(1), damaged(2), question(3)])
    assert len(list(QuestionSource(tmp_path, max_bad_rows=2))) == 2
    with pytest.raises(DataError, match=r"max_bad_rows=1; .*row 2: images\[0\]"):
        list(QuestionSource(tmp_path, max_bad_rows=1))
    stream = batches(QuestionSource(tmp_path, max_bad_rows=1), 4, seed=0)
    with pytest.raises(DataError, match="max_bad_rows=1"):
        next(stream)
    stream.close()


def test_no_good_picture_at_all(tmp_path):
    write_parquet(tmp_path / "a.parquet", [damaged(1), damaged(2)])
    source = QuestionSource(tmp_path)
    with pytest.raises(DataError, match="no row has pictures"):
        source.read([1])
    assert list(validation(source)) == []


def test_max_file_pixels(tmp_path):
    write_parquet(
        tmp_path / "a.parquet", [question(0), question(1, images=(picture(1, (40, 40)),))]
    )
    assert ids(QuestionSource(tmp_path, max_file_pixels=1599)) == ["id0"]
    assert ids(QuestionSource(tmp_path, max_file_pixels=1600)) == ["id0", "id1"]


# Bad files


@pytest.mark.parametrize("column", ["prompt", "images", "reward_model"])
def test_a_missing_column_is_named_before_anything_is_read(tmp_path, capsys, column):
    write_rows(tmp_path / "a.parquet", [row(reward_model=reward(""))])
    rows = [{k: v for k, v in row().items() if k != column}]
    path = write_rows(tmp_path / "b.parquet", rows)
    with pytest.raises(DataError) as error:
        QuestionSource(tmp_path)
    assert str(error.value).startswith(f"{path}: no column '{column}'; it has data_id, ")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"reward_model": {"style": "rule"}},
            "'reward_model' must be {ground_truth}; it is struct<",
        ),
        ({"reward_model": "gold"}, "'reward_model' must be {ground_truth}; it is string"),
        ({"prompt": "What?"}, "'prompt' must be a list of {content, role}; it is string"),
        (
            {"prompt": {"content": "a", "role": "user"}},
            "'prompt' must be a list of {content, role}",
        ),
        ({"images": [b"bytes"]}, "'images' must be a list of {bytes}; it is list<"),
    ],
)
def test_columns_of_another_form(tmp_path, fields, message):
    write_rows(tmp_path / "a.parquet", [row(**fields)])
    with pytest.raises(DataError) as error:
        QuestionSource(tmp_path)
    assert message in str(error.value) and "a.parquet" in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="nowhere: no parquet file there"):
        QuestionSource(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no parquet file there"):
        QuestionSource(tmp_path)
    with pytest.raises(DataError, match="no parquet file was named"):
        QuestionSource([])
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="text.parquet: not a parquet file"):
        QuestionSource(tmp_path)
    (tmp_path / "text.parquet").unlink()
    write_parquet(tmp_path / "cut.parquet", [question(i) for i in range(3)])
    data = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-100])
    with pytest.raises(DataError, match="cut.parquet: not a parquet file"):
        QuestionSource(tmp_path)


def test_a_file_that_changes_while_in_use(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [question(0), question(1)])
    source = QuestionSource(path)
    write_parquet(path, [question(1), question(0), question(2)])
    with pytest.raises(DataError, match="a.parquet: was changed while in use"):
        source.read([0])
    path.unlink()
    with pytest.raises(DataError, match="a.parquet: cannot be read"):
        source.read([0])


def test_damage_in_the_middle_of_a_file(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [question(i) for i in range(4)])
    data, stat = bytearray(path.read_bytes()), path.stat()
    start = parquet.ParquetFile(path).metadata.row_group(0).column(5).data_page_offset
    data[start : start + 40] = b"\xff" * 40  # the header of the pictures' first page
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="a.parquet: cannot be read"):
        QuestionSource(path).read([0])


# Many files, written and read


def test_what_is_written_is_read(tmp_path):
    written = [
        question(0),
        question(1, answers=("only",), category="", images=(picture(1), picture(2))),
        question(2, question='"Où?" <b>\n' * 3, answers=("ß", "\U0001f1ea", "x\ty")),
    ]
    path = tmp_path / "a.parquet"
    assert write_parquet(path, iter(written)) == 3
    assert os.listdir(tmp_path) == ["a.parquet"]
    read = [dataclasses.replace(q, file="", row=0) for q in QuestionSource(path)]
    expected = [dataclasses.replace(q, question=q.question.strip()) for q in written]
    assert read == expected
    table, released = parquet.read_table(path), row()
    assert set(table.column_names) == set(released)
    assert set(table.to_pylist()[0]["reward_model"]) == set(released["reward_model"])


def test_a_failed_write_leaves_nothing(tmp_path):
    def questions():
        yield question(0)
        raise RuntimeError("curation failed")

    with pytest.raises(RuntimeError, match="curation failed"):
        write_parquet(tmp_path / "a.parquet", questions())
    assert os.listdir(tmp_path) == []


def test_several_files_and_row_groups(tmp_path):
    rows = [row(i) for i in range(30)]
    for name, part, size in (("b", rows[20:], 3), ("a", rows[:20], 6)):
        write_rows(tmp_path / f"{name}.parquet", part, row_group_size=size)
    expected = [f"id{i}" for i in range(30)]
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for where in (tmp_path, f"{tmp_path}/*.parquet", [a, str(b)], [a, tmp_path]):
        assert ids(QuestionSource(where)) == expected
    source = QuestionSource(str(tmp_path))
    assert ids(QuestionSource([b, a])) == expected[20:] + expected[:20]
    rng = np.random.default_rng(0)
    for _ in range(10):
        numbers = rng.integers(-30, 30, rng.integers(1, 12)).tolist()
        read = source.read(numbers)
        assert ids(read) == [expected[n] for n in numbers]
        assert [q.images for q in read] == [(picture(n % 30),) for n in numbers]
    for number in (-31, 30):
        with pytest.raises(IndexError):
            source[number]


# The order of training


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """23 rows in two files, one with a bad answer, four with bad pictures: two at the end, two in
    the middle."""
    folder = tmp_path_factory.mktemp("data")
    made = [damaged(i) if i in (9, 10, 21, 22) else question(i) for i in range(23)]
    made[4] = dataclasses.replace(made[4], answers=("",))
    write_parquet(folder / "a.parquet", made[:13])
    write_parquet(folder / "b.parquet", made[13:])
    return folder


def steps(source, count, prompts=6, seed=5, process=0, processes=1):
    stream = batches(source, prompts, seed, process, processes)
    taken = [ids(next(stream)) for _ in range(count)]
    stream.close()
    return taken


def flat(taken):
    return [number for step in taken for number in step]


def test_each_epoch_is_a_new_order_of_all(tmp_path):
    write_parquet(tmp_path / "a.parquet", [question(i) for i in range(12)])
    source = QuestionSource(tmp_path)
    taken = flat(steps(source, 9, prompts=4))
    epochs = [taken[:12], taken[12:24], taken[24:]]
    in_order = ids(source)
    for epoch in epochs:
        assert sorted(epoch) == sorted(in_order) and epoch != in_order
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert steps(source, 6, prompts=4) == steps(QuestionSource(tmp_path), 6, prompts=4)
    assert steps(source, 3, prompts=4) != steps(source, 3, prompts=4, seed=6)


def test_bad_pictures_give_way_to_the_next(files):
    source = QuestionSource(files)
    assert len(source) == 22 and len(source.bad) == 1
    numbers = [i for i in range(23) if i != 4]
    successor = {9: 11, 10: 11, 21: 0, 22: 0}
    assert ids(source.read(range(22))) == [f"id{successor.get(n, n)}" for n in numbers]
    epoch = flat(steps(source, 11, prompts=2))
    expected = sorted(f"id{successor.get(n, n)}" for n in numbers)
    assert sorted(epoch) == expected
    assert len(source.bad) == 5


def test_what_was_read_before_changes_nothing(files):
    fresh = steps(QuestionSource(files), 8)
    used = QuestionSource(files)
    list(validation(used))
    assert steps(used, 8) == fresh
    assert all(len(step) == 6 for step in fresh)


def test_steps_do_not_depend_on_the_number_of_processes(files):
    alone = steps(QuestionSource(files), 9, prompts=8)
    for processes in (2, 4, 8):
        shares = [
            steps(QuestionSource(files), 9, prompts=8, process=p, processes=processes)
            for p in range(processes)
        ]
        for step, whole in enumerate(alone):
            for p in range(processes):
                assert shares[p][step] == whole[p::processes]


def test_going_on_from_any_position(files):
    rng = np.random.default_rng(0)
    whole = steps(QuestionSource(files), 20)
    stream = batches(QuestionSource(files), 6, seed=5)
    states = [json.loads(json.dumps(stream.state()))]
    for step in range(12):
        assert ids(next(stream)) == whole[step]
        states.append(json.loads(json.dumps(stream.state())))
    for position in rng.permutation(13).tolist():
        if position % 2:  # in a new run; else in the one that goes on
            stream.close()
            stream = batches(QuestionSource(files), 6, seed=5)
            for _ in range(rng.integers(0, 3)):
                next(stream)
        stream.restore(states[position])
        assert stream.state() == states[position]
        for step in range(position, position + 3):
            assert ids(next(stream)) == whole[step]
    stream.close()


def test_going_on_with_other_processes(files):
    whole = steps(QuestionSource(files), 7)
    saved = batches(QuestionSource(files), 6, 5, process=1, processes=2)
    for _ in range(4):
        next(saved)
    for process in range(3):
        stream = batches(QuestionSource(files), 6, 5, process=process, processes=3)
        stream.restore(saved.state())
        assert [ids(next(stream)) for _ in range(3)] == [s[process::3] for s in whole[4:]]
        stream.close()
    saved.close()


def test_a_position_of_another_run_is_refused(files, tmp_path):
    source = QuestionSource(files)
    state = batches(source, 6, 5).state()
    with pytest.raises(DataError, match="saved with seed=5, this run has 6"):
        batches(source, 6, 6).restore(state)
    with pytest.raises(DataError, match="prompts_per_step=6, this run has 4"):
        batches(source, 4, 5).restore(state)
    with pytest.raises(DataError, match="questions=22, this run has 12"):
        batches(QuestionSource(files / "a.parquet"), 6, 5).restore(state)
    write_parquet(tmp_path / "a.parquet", [question(i, answers=("new",)) for i in range(22)])
    with pytest.raises(DataError, match="data="):
        batches(QuestionSource(tmp_path), 6, 5).restore(state)
    for broken in (None, {}, state | {"position": {}}, state | {"position": {"next_index": -1}}):
        with pytest.raises(DataError, match="not a position"):
            batches(source, 6, 5).restore(broken)


def test_steps_that_cannot_be_divided(files):
    source = QuestionSource(files)
    for prompts, process, processes in ((6, 0, 4), (0, 0, 1), (6, 2, 2), (6, -1, 2)):
        with pytest.raises(DataError, match="process"):
            batches(source, prompts, 0, process, processes)


def test_more_prompts_than_questions(tmp_path):
    write_parquet(tmp_path / "a.parquet", [question(0)])
    assert steps(QuestionSource(tmp_path), 2, prompts=3) == [["id0"] * 3] * 2


def test_grain_takes_a_source_as_it_is(files):
    source = QuestionSource(files)
    dataset = grain.MapDataset.source(source).seed(1).shuffle()
    assert sorted(ids(dataset)) == sorted(ids(source.read(range(22))))


# Memory

_PEAK = """
import sys, pyarrow
from mmsr1_jax.data import QuestionSource, batches
peaks = []
for path in sys.argv[1:]:
    source = QuestionSource(path)
    peaks.append(pyarrow.default_memory_pool().max_memory())
    stream = batches(source, 4, seed=0)
    seen = sum(len(image) for _ in range(5) for q in next(stream) for image in q.images)
    for q in source:
        seen += sum(map(len, q.images))
    stream.close()
    peaks.append(pyarrow.default_memory_pool().max_memory())
    assert seen == 220 * len(q.images[0])
print(*peaks)
"""


def test_files_are_never_in_memory_as_a_whole(tmp_path):
    # 200 rows of 200 kB: 40 MB, in small row groups, or in one with small pages.
    image = picture(0, (258, 258), "bmp")
    rows = [row(i, images=[{"bytes": image, "path": None}]) for i in range(200)]
    paths = []
    for name, options in (("groups", {"row_group_size": 10}), ("pages", {"write_batch_size": 4})):
        paths.append(tmp_path / f"{name}.parquet")
        write_rows(paths[-1], rows, use_dictionary=False, compression="none", **options)
        assert paths[-1].stat().st_size > 39e6
    assert parquet.ParquetFile(paths[0]).metadata.num_row_groups == 20
    assert parquet.ParquetFile(paths[1]).metadata.num_row_groups == 1
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *paths], capture_output=True, text=True, check=True
    )
    opened, *peaks = map(int, done.stdout.split())
    assert opened < 2e6  # no picture is read when a file is opened
    assert max(peaks) < 20e6


def test_what_is_written_is_in_small_groups_and_pages(tmp_path):
    image = picture(0, (258, 258), "bmp")
    questions = (question(i, images=(image,)) for i in range(200))
    write_parquet(tmp_path / "a.parquet", questions)
    metadata = parquet.ParquetFile(tmp_path / "a.parquet").metadata
    assert metadata.num_row_groups == 3
    assert sum(metadata.row_group(i).num_rows for i in range(3)) == 200
