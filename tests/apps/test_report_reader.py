"""Reading of runs and episodes for the report."""

import json
import os
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest

from mmsr1_jax.apps.report import images, reader, records
from tests.reports import image_reply, make_episode, make_line, patches, run_report


def test_an_episode_is_converted_to_a_record(processor, tmp_path):
    rng = np.random.default_rng(1)
    texts = ["<reason>über 日本 ✓</reason> <search><img></search>", "<answer>x</answer>"]
    replies = [image_reply(processor, 3, "A title")]
    question_images = [patches(processor, 1), patches(processor, 2)]
    episode = make_episode(
        processor, 7, texts=texts, replies=replies, question="Q?", images=question_images, rng=rng
    )
    folder = tmp_path / "episodes"
    line = make_line(episode, processor, folder, ["x"], category="c")
    known = images.ImageRegistry(tmp_path)
    record = records.to_record(line, folder, known, processor.token_bytes(), step=4)
    assert record["images"] == [0, 1] and record["prompt"].count(0) == 1
    assert record["actions"] == "image,answer" and record["correct"] == 1.0
    assert record["reward"] == pytest.approx(
        {"reward": 0.81, "correct": 1, "format": 0, "searches": 1, "penalty": 0.9}
    )
    first, last = record["turns"]
    sampled, forced = first["pieces"]
    assert "".join(sampled["tokens"]) == texts[0] and len(sampled["tokens"]) > 10
    model = episode.segments[1]
    np.testing.assert_allclose(sampled["logprobs"], model.logprobs, atol=5e-5)
    # Each token equals the tokenizer's own decoding, if it has whole characters.
    for token, text in zip(model.tokens, sampled["tokens"], strict=True):
        alone = processor.decode([token])
        assert text == alone or "\ufffd" in alone
    assert forced == {"kind": "forced", "text": "<|im_end|>\n"}
    assert [part for part in first["reply"] if isinstance(part, int)] == [2, 3]
    assert "im_start" not in "".join(p for p in first["reply"] if isinstance(p, str))
    assert first["calls"][0]["seconds"] == 0.25 and last["reply"] is None
    assert last["problem"] == "does not begin with <reason>..</reason>"
    encoded, messages = known.encode()
    assert len(encoded["url_indices"]) == 4 and not messages


def test_tokens_of_another_tokenizer_are_shown_by_number(processor, tmp_path):
    episode = make_episode(processor, 0, texts=["<answer>abc</answer>"])
    line = make_line(episode, processor, tmp_path / "e", ["x"])
    table = processor.token_bytes()
    for other in (None, table[:10], [b"x"] * len(table)):
        record = records.to_record(line, tmp_path, images.ImageRegistry(), other)
        (piece,) = record["turns"][0]["pieces"]
        assert "tokens" not in piece and piece["text"] == "<answer>abc</answer>"
        assert piece["ids"] == episode.segments[1].tokens.tolist()


def test_a_placeholder_in_a_web_page_is_text(processor, tmp_path):
    fake = "<|vision_start|><|image_pad|><|vision_end|>"
    replies = [([f"1. {fake} ", patches(processor, 3, 56), " end"], ())]
    episode = make_episode(
        processor, 0, texts=["<search><img></search>", "<answer>x</answer>"], replies=replies,
        question=f"{fake}?", images=[patches(processor, 1)], rng=np.random.default_rng(0),
    )  # fmt: skip
    line = make_line(episode, processor, tmp_path / "e", ["x"])
    record = records.to_record(line, tmp_path / "e", images.ImageRegistry(), None)
    assert record["images"] == [0]
    assert record["turns"][0]["reply"] == [f"1. {fake} ", 1, " end"]


def test_verdicts_of_an_evaluation_are_shown(processor, tmp_path):
    episode = make_episode(processor, 0, texts=["<answer>abc</answer>"])
    line = make_line(
        episode, processor, tmp_path / "e", ["x"], workflow="rag", em=False, subem=True
    )
    judged = line | {"judge": {"correct": True, "reason": "the same", "by": "judge", "model": "m"}}

    def read(line):
        return records.to_record(line, tmp_path, images.ImageRegistry(), None)

    assert read(judged)["correct"] == 1.0 and read(judged)["workflow"] == "rag"
    assert read(judged)["verdicts"] == [
        ["judge", "correct"], ["EM", "wrong"], ["SubEM", "correct"], ["reason", "the same"]
    ]  # fmt: skip
    scored = read(judged | {"score": 0.25})
    assert scored["correct"] == 0.25 and scored["verdicts"][0] == ["score", "0.25"]
    silent = read(line | {"judge": {"correct": None, "reason": "timed out"}})
    assert silent["reward"]["correct"] == 0.0 and silent["correct"] is None  # no verdict
    assert ["reason", "timed out"] in silent["verdicts"]
    assert "judge" not in dict(silent["verdicts"])
    assert read(line | {"judge": None})["correct"] == 0.0  # the judge was not queried
    assert read(line | {"judge": {"correct": None}, "score": 0.5})["correct"] == 0.5
    bare = read({"segments": [], "turns": line["turns"]})  # recorded answers without tokens
    assert bare["correct"] is None and bare["turns"][0]["pieces"] == []


def test_curves_are_means_over_several_steps():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1203)
    values[rng.integers(0, 1203, 300)] = np.nan
    lines = [{"step": i + 1, "x": float(v), "infinite": float("inf")} for i, v in enumerate(values)]
    curves = reader.read_curves(
        [*lines[:600], ["other"], *lines[600:], {"x": 1.0}, {"step": 10**400}]
    )
    assert curves["steps_per_point"] == 3 and list(curves["metrics"]) == ["x"]
    assert curves["steps"] == list(range(3, 1204, 3))
    expected = [b[~np.isnan(b)].mean() if (~np.isnan(b)).any() else None
                for b in values.reshape(-1, 3)]  # fmt: skip
    for value, expected_value in zip(curves["metrics"]["x"], expected, strict=True):
        assert value == (None if expected_value is None else pytest.approx(expected_value))
    assert reader.read_curves([]) == {}


def test_images_are_stored_once_and_bounded_in_size(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in "abc":
        PIL.Image.fromarray(rng.integers(0, 256, (300, 600, 3), np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")

    def encode():
        known = images.ImageRegistry(tmp_path)
        for name in ("copy", "b", "bad", "none", "c"):
            known.register(tmp_path / f"{name}.png", images.RESULT)
        assert known.register(tmp_path / "copy.png", images.QUESTION) == 0
        assert known.register(tmp_path / "a.png", images.QUESTION) == 5
        return known.encode()

    encoded, messages = encode()
    assert encoded["url_indices"] == [0, 1, None, None, 2, 0]
    assert len(messages) == 2 and "bad.png" in messages[0] and "none.png" in messages[1]
    assert all(url.startswith("data:image/webp;base64,") for url in encoded["urls"])
    monkeypatch.setattr(images, "_MAX_CHARS", len(encoded["urls"][0]) + 10)
    encoded, messages = encode()
    assert encoded["url_indices"] == [0, None, None, None, None, 0]  # those of questions first
    assert messages[-1].startswith("2 images: ")


@pytest.fixture
def private(tmp_path):
    """The parent folder of a run, with an image that is outside of the run."""
    (tmp_path / "run" / "episodes").mkdir(parents=True)
    (tmp_path / "run" / "images").mkdir()
    PIL.Image.new("RGB", (56, 56), (200, 10, 10)).save(tmp_path / "private.png")
    PIL.Image.new("RGB", (56, 56), (10, 200, 10)).save(tmp_path / "run" / "images" / "own.png")
    return tmp_path


def read_images(run, names, source=None, image_dir=None):
    """Return whether each named image is shown, and the messages about the others."""
    text = "<|vision_start|><|image_pad|><|vision_end|>"
    line = {"segments": [{"kind": "prompt", "text": text, "tokens": [1]}], "turns": [],
            "image_grids": [[1, 2, 2]], "question": "Q"}  # fmt: skip
    path = run / "episodes" / "000001.jsonl"
    path.write_text("".join(json.dumps(line | {"images": [name]}) + "\n" for name in names))
    data = reader.read(source or run, 100, image_dir=image_dir)
    assert len(data.episodes) == len(names) and not data.skipped
    encoded, messages = data.images.encode()
    indices = [encoded["url_indices"][episode["images"][0]] for episode in data.episodes]
    return [index is not None for index in indices], messages


def test_images_outside_the_run_are_not_shown(private):
    run = private / "run"
    (run / "images" / "link.png").symlink_to(private / "private.png")
    names = ["../images/own.png", str(run / "images" / "own.png"), str(private / "private.png"),
             "../../private.png", "../images/../../private.png", "../images/link.png",
             "../../run/images/own.png", "../../nowhere.png"]  # fmt: skip
    shown, messages = read_images(run, names)
    assert shown == [True, True, False, False, False, False, True, False]
    assert len(messages) == 5
    assert all("not in the directory of the report; --image_dir=DIR" in text for text in messages)
    step = run / "episodes" / "000001.jsonl"
    assert read_images(run, names, source=step)[0] == shown
    assert read_images(run, names, image_dir=private)[0] == [True] * 7 + [False]


def test_invalid_image_paths_are_reported(private):
    """None of them ends the report, fills the memory, or blocks."""
    run = private / "run"
    os.mkfifo(run / "images" / "pipe.png")
    (run / "images" / "round.png").symlink_to(run / "images" / "round.png")
    with open(run / "images" / "large.png", "wb") as file:
        file.truncate(10**9)  # a sparse file
    names = ["../images/own.png", "/dev/zero", "../images/pipe.png", "../images",
             "../images/large.png", "../images/nothing.png", "a\0b.png", "\ud800.png",
             "x" * 5000, "../images/round.png", ""]  # fmt: skip
    shown, messages = read_images(run, names, image_dir=pathlib.Path("/dev"))
    assert shown == [True] + [False] * 10
    reasons = ["not a regular file", "not a regular file", "not a regular file",
               "1000000000 bytes are more than 64000000", "No such file", "null", "surrogates",
               "File name too long", "symbolic links", "not a regular file"]  # fmt: skip
    for text, reason in zip(messages, reasons, strict=True):
        assert reason in text
    done = run_report(run, f"--out={private / 'r.html'}")
    assert done.returncode == 0 and "11 of 11 episodes" in done.stdout, done.stderr[-3000:]
    assert "/dev/zero: not in the directory of the report" in done.stderr


def test_invalid_lines_are_reported_and_skipped(report, run_with_episodes):
    _, done = report
    path = run_with_episodes[0] / "episodes" / "000002.jsonl"
    messages = done.stderr.splitlines()
    assert [line.split(":")[0] for line in messages] == [
        f"{path}, line {number}" for number in (101, 102, 103, 105)
    ]
    assert "not JSON" in messages[0] and "'segments' must be a list" in messages[2]
    assert "1000 of 1004 episodes" in done.stdout


def test_evenly_spaced_episodes_of_many_are_read(run_with_episodes):
    data = reader.read(run_with_episodes[0], 100)
    ids = [episode["id"] for episode in data.episodes]
    assert 96 <= len(ids) <= 100 and (data.num_lines, data.num_read) == (1004, 100)
    indices = [int(name[1:]) for name in ids]
    assert indices == sorted(indices) and max(np.diff(indices)) <= 21 and indices[-1] > 975
    assert {episode["step"] for episode in data.episodes} == {1, 2, 3, 4}


def test_unreadable_input_is_named_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        reader.read(tmp_path / "nowhere", 10)
    with pytest.raises(ValueError, match=r"contains no metrics.jsonl, results.json or episodes"):
        reader.read(tmp_path, 10)
    file = tmp_path / "e.jsonl"
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="contains no valid episode .*line 1: 'segments'"):
        reader.read(file, 10)
    done = run_report(file, f"--out={file}")
    assert done.returncode == 2 and "would overwrite the input" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
