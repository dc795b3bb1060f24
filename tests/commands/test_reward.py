"""`python -m mmsr1_jax.scripts.reward` scores valid lines and reports the others."""

import json
import subprocess
import sys

import pytest

from tests.programs import read_jsonl, run_module, write_jsonl
from tests.reward_reference import slow_normalise, texts


def reward_file(folder, lines, *arguments):
    write_jsonl(folder / "in.jsonl", lines)
    out = folder / "out.jsonl"
    process = run_module(
        f"--episodes={folder / 'in.jsonl'}",
        f"--out={out}",
        *arguments,
        module="mmsr1_jax.scripts.reward",
    )
    return process, read_jsonl(out) if out.exists() else None


def test_recorded_episodes_are_scored(shared, tmp_path):
    lines = (shared / "data" / "transcripts.jsonl").read_text("utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    inputs = [
        {
            "turns": [turn["response"] for turn in episode["turns"]],
            "answers": [episode["ground_truth"], *episode["candidate_answers"]],
        }
        for episode in recorded
    ]
    assert sum(len(line["turns"]) for line in inputs) == 57
    process, out = reward_file(tmp_path, inputs)
    assert process.returncode == 0, process.stderr
    names = {"image_search": "image", "text_search": "text", "answer": "answer"}
    allowed = ("answer", "image,answer", "text,answer", "image,text,answer")
    for episode, result in zip(recorded, out, strict=True):
        golds = [
            slow_normalise(x) for x in [episode["ground_truth"], *episode["candidate_answers"]]
        ]
        answer = episode["final_answer"]
        correct = answer is not None and slow_normalise(answer) in golds
        sequence = [names[name] for name in episode["action_sequence"]]
        searches = len(sequence) - sequence.count("answer")
        right = ",".join(sequence) in allowed
        r = 0.9 * correct * (0.9 if correct and searches else 1.0) + 0.1 * right
        assert result == {"reward": pytest.approx(r), "correct": correct, "format": right,
                       "searches": searches}  # fmt: skip
    assert {round(line["reward"], 2) for line in out} == {0.0, 0.1, 0.91, 1.0}
    assert "scored 26 of 26 episodes, mean reward" in process.stdout


def test_invalid_lines_are_reported_and_the_others_are_scored(tmp_path):
    valid = {"turns": texts("answer"), "answers": ["tagus"]}
    long = {"turns": ["x" * 3_000_000, "<reason>" * 300_000], "answers": ["y" * 1_000_000]}
    lines = [
        valid, {"turns": [], "answers": ["x"]}, {"turns": texts("answer"), "answers": []},
        {"turns": texts("answer"), "answers": "Tagus"}, {"turns": "t", "answers": ["x"]},
        {"turns": [1], "answers": ["x"]}, {"turns": [], "answers": ["x", None]},
        {"turns": []}, {"answers": ["x"]}, [1], b"", b"{", b'{"turns": "\xff"}', b"[" * 200_000,
        {"turns": [], "answers": [" ", ""]}, long,
        {"turns": ["<reason>\x00\udfff</reason><answer>\x1f東京 \x85\udfff</answer>"],
         "answers": ["東京 \udfff"]},
        valid,
    ]  # fmt: skip
    encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    encoded[0] = b"\xef\xbb\xbf" + encoded[0]
    process, out = reward_file(tmp_path, encoded)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    correct = {"reward": 1.0, "correct": True, "format": True, "searches": 0}
    zero = {"reward": 0.0, "correct": False, "format": False, "searches": 0}
    assert [line for line in out if "error" not in line] == [correct, zero, zero, correct, correct]
    errors = [line["error"] for line in out if "error" in line]
    expected = [
        "line 3: 'answers' contains only blank strings",
        "line 4: 'answers' must be a list of strings, not a string",
        "line 5: 'turns' must be a list of strings, not a string",
        "line 6: turns[0] must be a string, not a number",
        "line 7: answers[1] must be a string, not null", "line 8: has no 'answers'",
        "line 9: has no 'turns'", "line 10: must be an object", "line 12: not JSON",
        "line 13: not UTF-8", "line 14: not JSON", "line 15: 'answers' contains only blank strings",
    ]  # fmt: skip
    for error, message in zip(errors, expected, strict=True):
        assert error.startswith(message), error
        assert error in process.stderr
    assert ["error" in line for line in out] == [False] * 2 + [True] * 12 + [False] * 3
    assert "12 of 17 lines could not be scored" in process.stderr
    assert not list(tmp_path.glob(".*partial"))


def test_flags_change_the_reward(tmp_path):
    line = {"turns": texts("image,text,answer"), "answers": ["tag"]}
    arguments = ["--match=SubEM", "--per_search_penalty", "--search_penalty=0.2"]
    process, out = reward_file(tmp_path, [line], *arguments, "--format_penalty=0.5")
    assert process.returncode == 0, process.stderr
    assert out[0]["reward"] == pytest.approx(0.5 * 0.8**2 + 0.5)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--search_penalty=2", "--search_penalty=2.0 must be at most 1"),
        ("--match=F1", "--match"),
        ("--out=no/such/folder", "must be a file in an existing directory"),
        ("--episodes=nothing.jsonl", "nothing.jsonl"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_invalid_arguments_end_with_one_line(tmp_path, argument, message):
    process, out = reward_file(tmp_path, [{}], argument)
    assert process.returncode == 2 and out is None
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert message in process.stderr


def test_the_input_file_is_not_overwritten(tmp_path):
    process, _ = reward_file(tmp_path, [{}], f"--out={tmp_path / 'in.jsonl'}")
    assert "would overwrite the input" in process.stderr
    assert (tmp_path / "in.jsonl").read_bytes() == b"{}\n"


def test_the_command_starts_without_jax():
    modules = "mmsr1_jax.scripts.reward, mmsr1_jax.tools.judge"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_strict_form_is_a_flag(tmp_path):
    line = {"turns": ["<reason>r</reason> So: <answer>Tagus</answer>"], "answers": ["tagus"]}
    for arguments, right in (((), True), (["--strict_form"], False)):
        process, out = reward_file(tmp_path, [line], *arguments)
        assert process.returncode == 0, process.stderr
        assert out[0]["format"] is right
        assert out[0]["reward"] == pytest.approx(1.0 if right else 0.9)


def test_no_mean_is_printed_if_no_episode_was_scored(tmp_path):
    process, _ = reward_file(tmp_path, [{"turns": 3}])
    assert process.stdout.startswith("scored 0 of 1 episodes, 0 correct")
