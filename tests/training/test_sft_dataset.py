"""SFT dataset: searches of scripted rows, skipped lines, the prepared file, and the data order."""

import numpy as np
import pytest

from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools.index_builder import build_index
from mmsr1_jax.training import sft_dataset
from tests import sft_files
from tests.sft_files import MODEL, NUM_ROWS, make_config, write_lines

ANSWER = "<reason> r</reason> <answer> a</answer>"
ROW = {"question": "q", "turns": [ANSWER]}
EPISODE = {"segments": [{"kind": "prompt", "tokens": [6, 7]}, {"kind": "model", "tokens": [8]}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a policy, an index and scripted rows, see `sft_files.write`."""
    folder = tmp_path_factory.mktemp("sft")
    sft_files.write(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_directory(folder / "policy")


@pytest.fixture(scope="module")
def dataset(folder, processor, tmp_path_factory):
    """Prepared dataset of the rows in `folder`."""
    path = tmp_path_factory.mktemp("run") / "examples.jsonl"
    sft_dataset.prepare(path, make_config(folder), processor, MODEL)
    return path


def test_searches_of_scripted_turns_are_executed(folder, processor, dataset):
    examples, rows = sft_dataset.load(dataset, make_config(folder)), sft_files.read_rows(folder)
    assert len(examples) == NUM_ROWS
    for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
        text = processor.decode(example.tokens)
        assert f"Which year is {i}?" in text
        assert ("title: bridge" in text) == (i % 3 == 1)
        assert (f"Opened in {1900 + i}." in text) == (i % 3 == 2)
        assert processor.decode(example.tokens[example.mask]) == "".join(row["turns"])
        assert len(example.images) == (1, 2, 0)[i % 3]


def test_a_row_may_name_its_own_index(folder, processor, tmp_path):
    """The same search of two rows has different results if their indexes differ."""
    page = [{"url": "other", "title": "tower 2", "summary": "It fell."}]
    build_index(tmp_path / "other", [write_lines(tmp_path / "pages.jsonl", page)], [])
    row = sft_files.read_rows(folder)[2]
    rows = [row, row | {"index": "other"}, row, row | {"index": "none"}, row | {"index": 3}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    config = make_config(folder, data_train=(str(path),))
    sft_dataset.prepare(tmp_path / "examples.jsonl", config, processor, MODEL)
    examples = sft_dataset.load(tmp_path / "examples.jsonl", config)
    texts = [processor.decode(example.tokens) for example in examples]
    assert ["It fell." in text for text in texts] == [False, True, False]
    assert ["Opened in 1902." in text for text in texts] == [True, False, True]


# Lines that cannot be used


def with_segment(**fields) -> dict:
    """Return a saved episode whose model segment has other fields."""
    return {"segments": [EPISODE["segments"][0], {"kind": "model", "tokens": [8]} | fields]}


def invalid_lines(folder) -> dict[str, object]:
    """Return invalid lines, keyed by a part of the reason."""
    return {
        "must be an object": [1],
        "has no 'question'": {"turns": ["x"]},
        "'turns' must be a list of strings": ROW | {"turns": "x"},
        "'turns' must be a list of one or more": ROW | {"turns": []},
        "'turns' is not valid Unicode": ROW | {"turns": ["\ud800"]},
        "'question' must be a non-empty string": ROW | {"question": 5},
        "nowhere.png: no such file": ROW | {"image": "nowhere.png"},
        "rows.jsonl: not an image": ROW | {"images": [str(folder / "rows.jsonl")]},
        "has both 'image' and 'images'": ROW | {"image": "0.png", "images": ["0.png"]},
        "ends with turns[0] of 2: that turn answers": ROW | {"turns": [ANSWER] * 2},
        "config.turns.max_turns allows no more": ROW | {"turns": ["x", "x", "x", "x"]},
        "the image search failed": ROW | {"turns": ["<search><img></search>", ANSWER]},
        "update.pack_length=384": ROW | {"question": "long " * 300},
        "could not be run: ValueError": {"end": "error", "error": "ValueError", "segments": []},
        "must begin with a prompt": {"segments": []},
        "no tokens that the policy wrote": {"segments": EPISODE["segments"][:1]},
        "outside the policy's vocabulary of 512": with_segment(tokens=[512]),
        "whose 'kind' is one of": with_segment(kind="?"),
        "'tokens' must be a list of token ids": with_segment(tokens=[-1]),
        "'logprobs' must be a list of a number": with_segment(logprobs=[1.0, 2.0]),
        "lacks 'images'": EPISODE | {"image_grids": [[1, 8, 8]]},
        "placeholders for 1 image tokens": with_segment(tokens=[5, 8]),
        "named after": EPISODE | {"images": [str(folder / "0.png")]},
        "'turns' or 'calls'": EPISODE | {"turns": [{"nothing": 1}]},
    }


def test_invalid_lines_are_skipped_and_reported(folder, processor, tmp_path, capfd):
    lines = invalid_lines(folder)
    path = write_lines(tmp_path / "rows.jsonl", [*lines.values(), EPISODE, ROW])
    with open(path, "ab") as file:
        file.write(b"\xff\n{\n\n" + b"[" * 100_000 + b"\n")
    reasons = [*lines, "not UTF-8", "cannot be read (Expecting property name", "nested too deeply"]
    n = len(lines)
    # Two valid lines follow the invalid ones, and a blank line precedes the last one.
    line_numbers = [*range(1, n + 1), n + 3, n + 4, n + 6]
    config = make_config(
        folder, data_train=(str(path),), data_max_bad_rows=len(reasons),
        data_image_roots=(str(folder),),
    )  # fmt: skip
    sft_dataset.prepare(tmp_path / "examples.jsonl", config, processor, MODEL)
    assert len(sft_dataset.load(tmp_path / "examples.jsonl", config)) == 2
    stderr = capfd.readouterr().err
    messages = [line for line in stderr.splitlines() if line.endswith("; skipped")]
    for line_number, reason, message in zip(line_numbers, reasons, messages, strict=True):
        assert f"rows.jsonl, line {line_number}: " in message and reason in message


def test_too_many_invalid_lines_end_the_preparation(folder, processor, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [*invalid_lines(folder).values(), EPISODE, ROW])
    config = make_config(
        folder, data_train=(str(path),), data_max_bad_rows=5, data_image_roots=(str(folder),)
    )
    with pytest.raises(DataError, match="6 lines, more than .*max_bad_rows=5; .*line 6: "):
        sft_dataset.prepare(tmp_path / "examples.jsonl", config, processor, MODEL)
    assert not list(tmp_path.glob("*examples.jsonl*"))


def test_a_dataset_without_valid_lines_or_files_is_an_error(folder, processor, tmp_path, capfd):
    row = ROW | {"turns": ["<text_search> x</text_search>", ANSWER]}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    config = make_config(folder, data_train=(str(path),), tools_index=None)
    with pytest.raises(DataError, match="no line can be used"):
        sft_dataset.prepare(tmp_path / "examples.jsonl", config, processor, MODEL)
    assert "no tool for text_search" in capfd.readouterr().err
    config = make_config(folder, data_train=("nowhere",))
    with pytest.raises(DataError, match="nowhere matches no JSONL file"):
        sft_dataset.prepare(tmp_path / "examples.jsonl", config, processor, MODEL)


# The prepared file


def test_other_settings_and_damaged_files_are_rejected(folder, dataset, tmp_path):
    with pytest.raises(DataError, match="made with config.update.pack_length=384, but .* sets 400"):
        sft_dataset.load(dataset, make_config(folder, update_pack_length=400))
    truncated = tmp_path / "truncated.jsonl"
    truncated.write_bytes(dataset.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged"):
        sft_dataset.load(truncated, make_config(folder))


@pytest.mark.parametrize("count, size", [(10, 4), (3, 7), (5, 5)])
def test_every_epoch_contains_each_example_once(count, size):
    steps = [sft_dataset.step_indices(step, count, size, seed=3) for step in range(1, count + 1)]
    assert all(len(step) == size for step in steps)
    epochs = np.concatenate(steps).reshape(-1, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert sft_dataset.step_indices(1, 10, 10, seed=3) != sft_dataset.step_indices(
        1, 10, 10, seed=4
    )
