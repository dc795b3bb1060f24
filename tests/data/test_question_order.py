"""Training batches depend only on data, seed and step, and resume from any saved position."""

import dataclasses
import json

import grain
import numpy as np
import pytest

from mmsr1_jax.data import (
    DataError,
    QuestionSource,
    batches,
    validation,
    write_parquet,
)
from tests.question_files import damaged, ids, question


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """23 rows in two files: one without an answer, and four with invalid images, two of them at
    the end and two in the middle."""
    folder = tmp_path_factory.mktemp("data")
    questions = [damaged(i) if i in (9, 10, 21, 22) else question(i) for i in range(23)]
    questions[4] = dataclasses.replace(questions[4], answers=("",))
    write_parquet(folder / "a.parquet", questions[:13])
    write_parquet(folder / "b.parquet", questions[13:])
    return folder


def steps(source, count, prompts=6, seed=5, process=0, processes=1):
    stream = batches(source, prompts, seed, process, processes)
    step_ids = [ids(next(stream)) for _ in range(count)]
    stream.close()
    return step_ids


def flat(steps):
    return [name for step in steps for name in step]


def test_each_epoch_is_a_new_permutation_of_all_questions(tmp_path):
    write_parquet(tmp_path / "a.parquet", [question(i) for i in range(12)])
    source = QuestionSource(tmp_path)
    sequence = flat(steps(source, 9, prompts=4))
    epochs = [sequence[:12], sequence[12:24], sequence[24:]]
    in_order = ids(source)
    for epoch in epochs:
        assert sorted(epoch) == sorted(in_order) and epoch != in_order
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert steps(source, 6, prompts=4) == steps(QuestionSource(tmp_path), 6, prompts=4)
    assert steps(source, 3, prompts=4) != steps(source, 3, prompts=4, seed=6)


def test_a_question_with_invalid_images_is_replaced_by_the_next(files):
    source = QuestionSource(files)
    assert len(source) == 22 and len(source.bad_rows) == 1
    numbers = [i for i in range(23) if i != 4]
    successor = {9: 11, 10: 11, 21: 0, 22: 0}
    assert ids(source.read(range(22))) == [f"id{successor.get(n, n)}" for n in numbers]
    epoch = flat(steps(source, 11, prompts=2))
    expected = sorted(f"id{successor.get(n, n)}" for n in numbers)
    assert sorted(epoch) == expected
    assert len(source.bad_rows) == 5


def test_steps_do_not_depend_on_earlier_reads(files):
    fresh = steps(QuestionSource(files), 8)
    used = QuestionSource(files)
    list(validation(used))
    assert steps(used, 8) == fresh
    assert all(len(step) == 6 for step in fresh)


def test_steps_do_not_depend_on_the_number_of_processes(files):
    single = steps(QuestionSource(files), 9, prompts=8)
    for processes in (2, 4, 8):
        slices = [
            steps(QuestionSource(files), 9, prompts=8, process=p, processes=processes)
            for p in range(processes)
        ]
        for step, expected in enumerate(single):
            for p in range(processes):
                assert slices[p][step] == expected[p::processes]


def test_a_restored_position_continues_with_the_same_steps(files):
    rng = np.random.default_rng(0)
    uninterrupted = steps(QuestionSource(files), 20)
    stream = batches(QuestionSource(files), 6, seed=5)
    states = [json.loads(json.dumps(stream.state()))]
    for step in range(12):
        assert ids(next(stream)) == uninterrupted[step]
        states.append(json.loads(json.dumps(stream.state())))
    for position in rng.permutation(13).tolist():
        if position % 2:  # restore into a new iterator, else into the same one
            stream.close()
            stream = batches(QuestionSource(files), 6, seed=5)
            for _ in range(rng.integers(0, 3)):
                next(stream)
        stream.restore(states[position])
        assert stream.state() == states[position]
        for step in range(position, position + 3):
            assert ids(next(stream)) == uninterrupted[step]
    stream.close()


def test_a_position_may_be_restored_with_another_number_of_processes(files):
    uninterrupted = steps(QuestionSource(files), 7)
    saved = batches(QuestionSource(files), 6, 5, process=1, processes=2)
    for _ in range(4):
        next(saved)
    for process in range(3):
        stream = batches(QuestionSource(files), 6, 5, process=process, processes=3)
        stream.restore(saved.state())
        assert [ids(next(stream)) for _ in range(3)] == [s[process::3] for s in uninterrupted[4:]]
        stream.close()
    saved.close()


def test_a_position_saved_with_other_settings_is_an_error(files, tmp_path):
    source = QuestionSource(files)
    state = batches(source, 6, 5).state()
    with pytest.raises(DataError, match="has seed=5, but this run has 6"):
        batches(source, 6, 6).restore(state)
    with pytest.raises(DataError, match="prompts_per_step=6, but this run has 4"):
        batches(source, 4, 5).restore(state)
    with pytest.raises(DataError, match="questions=22, but this run has 12"):
        batches(QuestionSource(files / "a.parquet"), 6, 5).restore(state)
    write_parquet(tmp_path / "a.parquet", [question(i, answers=("new",)) for i in range(22)])
    with pytest.raises(DataError, match="data="):
        batches(QuestionSource(tmp_path), 6, 5).restore(state)
    for broken in (None, {}, state | {"position": {}}, state | {"position": {"next_index": -1}}):
        with pytest.raises(DataError, match="not a saved data position"):
            batches(source, 6, 5).restore(broken)


def test_prompts_must_be_divisible_among_processes(files):
    source = QuestionSource(files)
    for prompts, process, processes in ((6, 0, 4), (0, 0, 1), (6, 2, 2), (6, -1, 2)):
        with pytest.raises(DataError, match="process"):
            batches(source, prompts, 0, process, processes)


def test_questions_repeat_within_a_step_that_needs_more(tmp_path):
    write_parquet(tmp_path / "a.parquet", [question(0)])
    assert steps(QuestionSource(tmp_path), 2, prompts=3) == [["id0"] * 3] * 2


def test_a_question_source_is_a_grain_data_source(files):
    source = QuestionSource(files)
    dataset = grain.MapDataset.source(source).seed(1).shuffle()
    assert sorted(ids(dataset)) == sorted(ids(source.read(range(22))))
