"""Parsing of turns: their action, payload and format."""

import json

import numpy as np
import pytest

from mmsr1_jax.episodes.turns import STOPS, Turn, parse
from mmsr1_jax.rollout import stop

R = "<reason>It is a bridge.</reason>"


def test_turns_of_the_released_policy(shared):
    lines = (shared / "data" / "transcripts.jsonl").read_text("utf-8").splitlines()
    turns = [turn for line in lines for turn in json.loads(line)["turns"]]
    assert len(lines) == 26 and len(turns) == 57
    for recorded in turns:
        turn = parse(recorded["response"])
        assert turn.action == recorded["action"]
        assert turn.payload == recorded["payload"]
        assert turn.form is not None and turn.reason


@pytest.mark.parametrize(
    "text, action, payload",
    [
        (f"{R}<answer>Tagus</answer>", "answer", "Tagus"),
        (f"\n {R}\n\n<answer>\n Tagus\nriver </answer>\n ", "answer", "Tagus\nriver"),
        (f"{R} <search><img></search>", "image_search", None),
        (f"{R}<text_search>who built\nit?</text_search>\n", "text_search", "who built\nit?"),
        (f"{R}<answer>a < b > c </b></answer>", "answer", "a < b > c </b>"),
        ("<reason></reason><answer>x</answer>", "answer", "x"),
        ("<reason>I may <search> or not\n</reason><answer>x</answer>", "answer", "x"),
    ],
)
def test_well_formed_turns(text, action, payload):
    turn = parse(text)
    assert (turn.action, turn.payload, turn.problem) == (action, payload, None)
    assert turn.form == turn.strict_form == action and turn.form is not None


@pytest.mark.parametrize(
    "text, action, payload",
    [
        (f"{R} so <answer>Tagus</answer>", "answer", "Tagus"),
        (f"{R}\nI look it up.\n<text_search>q</text_search>\n", "text_search", "q"),
        (f"{R} This picture: <search><img></search>", "image_search", None),
        (f"{R} <answer> </answer>", "answer", ""),
        (f"{R} </b> <search> <answer>Tagus</answer>", "answer", "Tagus"),
    ],
)
def test_turns_well_formed_in_the_published_format_only(text, action, payload):
    turn = parse(text)
    assert (turn.action, turn.payload, turn.problem) == (action, payload, None)
    assert turn.form is not None and turn.strict_form is None


@pytest.mark.parametrize(
    "text, action, problem",
    [
        (f"{R} <search> <img>\n</search>\n", "image_search", "white space inside"),
        (f"{R} <search>\n<img></search>\n", "image_search", "white space inside"),
        ("<reason>an <answer> is</reason><text_search>q</text_search>", "text_search",
         "<answer> stands beside the action"),
        ("<reason>or <text_search>?</reason><search><img></search>", "image_search",
         "<text_search> stands beside the action"),
    ],
)  # fmt: skip
def test_turns_well_formed_in_the_strict_format_only(text, action, problem):
    turn = parse(text)
    assert turn.action == turn.strict_form == action
    assert problem in turn.problem and turn.form is None


@pytest.mark.parametrize(
    "text, action, payload, problem",
    [
        ("<answer>Tagus</answer>", "answer", "Tagus", "does not begin with"),
        (f"Well. {R}<answer>Tagus</answer>", "answer", "Tagus", "does not begin with"),
        (f"{R}{R}<answer>Tagus</answer>", "answer", "Tagus", "<reason> comes more than once"),
        (f"{R}<answer>Tagus</answer> I think", "answer", "Tagus", "text after"),
        (f"{R}<answer>a<answer>b</answer>", "answer", "a<answer>b", "<answer> comes more than"),
        ("<reason>a<reason>b</reason><answer>c</answer>", "answer", "c", "<reason> comes more"),
        ("<reason>a<answer>b</reason>c</answer>", "answer", "b</reason>c", "does not begin with"),
        (f"{R}<text_search>q</text_search><answer>a</answer>", "text_search", "q", "text after"),
        (f"{R}<text_search>a<text_search>b</text_search>", "text_search", "b", "comes more than"),
        (f"{R}<search>bridge</search>", None, None, "something else than <img>"),
        (f"{R}Tagus</answer>", None, None, "</answer> without <answer>"),
        (f"{R}<answer>Tagus", None, None, "no closing tag"),
        ("", None, None, "no closing tag"),
        ("<reason>", None, None, "no closing tag"),
    ],
)
def test_malformed_turns(text, action, payload, problem):
    turn = parse(text)
    assert (turn.action, turn.payload) == (action, payload)
    assert problem in turn.problem and turn.form is None and turn.strict_form is None


def test_an_empty_query_is_well_formed_but_no_action():
    turn = parse(f"{R}<text_search> \n</text_search>")
    assert (turn.action, turn.problem) == (None, "an empty query")
    assert turn.form == "text_search" and turn.strict_form is None


def test_loaded_turns_without_text_keep_their_recorded_format():
    assert Turn("answer", "x", "r", None).form == "answer"
    assert Turn("answer", "x", "r", "text after the action").form is None
    assert Turn("answer", "x", "r", None).strict_form == "answer"


def test_the_action_is_the_one_at_which_the_engine_stops():
    table = stop.build([bytes([b]) for b in range(256)], 256, STOPS, {})
    rng = np.random.default_rng(0)
    pieces = [R, "<answer>", "</answer>", "<search><img></search>", "<text_search>", "q", " "]
    pieces += ["</text_search>", "</search>", "</", "\n"]
    actions = 0
    for _ in range(3000):
        text = "".join(rng.choice(pieces, rng.integers(1, 8)))
        state, read = 0, 0
        for byte in text.encode():
            read += 1
            state = table.next_state[state, byte]
            if state >= table.running:
                break
        turn, paused = parse(text), parse(text[:read])
        assert (turn.action, turn.payload) == (paused.action, paused.payload)
        if turn.action:
            assert table.reason(state) == f"</{turn.action.removeprefix('image_')}>"
            actions += 1
    assert actions > 500
