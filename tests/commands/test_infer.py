"""`python -m mmsr1_jax.infer`, run as a command."""

import functools
import json

import pytest

from tests import scripted_policy
from tests.programs import run_module

infer = functools.partial(run_module, module="mmsr1_jax.infer")
IMAGE = "docs/demo/bridge.jpg"
# A policy of which every other token is a whole turn, usually a search.
TURNS = {
    "<reason>because {}</reason> <text_search>bridge {}</text_search>\n": 280,
    "<reason>r{}</reason> <answer>a {}</answer>": 4,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy") / "acting"
    scripted_policy.write(directory, vocab_size=832, actions=TURNS)
    return directory


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    directory = tmp_path_factory.mktemp("index")
    page = {"url": "http://bridges", "title": "Bridge", "summary": "A bridge of 1937."}
    (directory / "pages.jsonl").write_text(json.dumps(page))
    return directory


@pytest.fixture(scope="module")
def arguments(directory, index):
    return [f"--model={directory}", f"--image={IMAGE}", "--question=When was it opened?",
            f"--tools.index={index}", "--config=tests/small_config.py",
            "--config.sampling.temperature=1", "--config.sampling.seed=2"]  # fmt: skip


def test_turns_are_printed(arguments):
    done = infer(*arguments)
    assert done.returncode == 0, done.stderr
    for text in ("--- turn 1\n", "reasoning: because ", "text search: bridge ",
                 "--- to the policy\n",
                 "[Text Search Results]\n1. link: http://bridges\nsummary: A bridge of 1937.\n",
                 "--- turn 2", "--- end: ", "\nanswer: "):  # fmt: skip
        assert text in done.stdout, done.stdout
    assert done.stdout.index("--- turn 1") < done.stdout.index("--- to the policy")
    assert "<|image_pad|><|image_pad|>" not in done.stdout


def test_the_episode_is_printed_as_json(arguments):
    done = infer(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    episode = json.loads(done.stdout)
    assert episode["end"] in ("answer", "turns") and episode["error"] is None
    assert episode["calls"][0]["status"] == "ok" and episode["calls"][0]["num_shown"] == 1
    assert episode["turns"][0]["action"] == "text_search"
    kinds = [segment["kind"] for segment in episode["segments"]]
    assert kinds[:4] == ["prompt", "model", "forced", "tool"]
    for segment in episode["segments"]:
        sampled = segment["kind"] == "model"
        assert ("logprobs" in segment) == sampled
        if sampled:
            assert len(segment["logprobs"]) == len(segment["tokens"])
    again = json.loads(infer(*arguments, "--json").stdout)
    for data in (episode, again):
        for call in data["calls"]:
            del call["seconds"]
    assert again == episode


def test_user_errors_are_shown_in_one_line(arguments, directory, tmp_path):
    def line(*others, code=2):
        done = infer(*arguments, *others)
        assert done.returncode == code and not done.stdout.startswith("{"), done
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    no_index = line(f"--tools.index={tmp_path}")
    assert "error: " in no_index and "pages.jsonl" in no_index
    assert "no such directory" in line("--config.turns.prompt_dir=nowhere")
    assert "no such file" in line("--image=nowhere.jpg", code=1)
    assert "turns.max_episode_tokens" in line("--question=" + "word " * 3000, code=1)
