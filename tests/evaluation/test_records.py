"""Lines of evaluation episodes on disk."""

import json

import pytest

from mmsr1_jax.data import DataError
from mmsr1_jax.evaluation import records
from mmsr1_jax.utils import outputs
from tests.evaluations import call, line


def test_a_line_is_converted_to_an_outcome():
    calls = [call("image_search", "ok"), call("text_search", "failed"),
             call("text_search", "empty"), call("text_search", "refused")]  # fmt: skip
    outcome = records.to_outcome(
        line(2, "in Paris.", calls=calls, judge={"correct": True}, allowed=2)
    )
    assert outcome.correct == {"em": False, "subem": True, "judge": True, "score": None}
    assert outcome.made == {"image_search": 1, "text_search": 2} and outcome.refused == 1
    assert outcome.failed == {"image_search": 0, "text_search": 1} and outcome.searches == 3
    assert (outcome.workflow, outcome.index, outcome.turns, outcome.tokens) == ("direct", 2, 1, 9)


def test_image_paths_are_rebased_to_another_folder(tmp_path):
    line_ = records.rebase_images(line(), tmp_path / "a", tmp_path / "b" / "c")
    assert line_["images"] == ["../../a/images/a.png"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"), ("[1]", "must be an object"), ("[" * 100_000, "not JSON"),
        ("{}", "not an evaluation episode .missing field 'calls'"),
        (json.dumps(line(answers=3)), "not an evaluation episode"),
        ('{"ground_truth": "x"}', "not a recorded answer"),
        ('{"ground_truth": 1, "turns": [], "question": ""}', ".*answers must be strings"),
        ("\udcff", "not UTF-8"),
    ],
)  # fmt: skip
def test_an_invalid_line_is_named(tmp_path, text, message):
    path = tmp_path / "episodes.jsonl"
    valid = json.dumps(line()).encode()
    path.write_bytes(valid + b"\n\n" + text.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(DataError, match=f"episodes.jsonl, line 3: {message}"):
        list(records.scan(path))


def test_a_partial_line_is_truncated(tmp_path):
    path = tmp_path / "episodes.jsonl"
    outputs.truncate_partial_line(path)
    complete = json.dumps(line()) + "\n"
    path.write_text(complete + complete[:40])
    outputs.truncate_partial_line(path)
    assert path.read_text() == complete
