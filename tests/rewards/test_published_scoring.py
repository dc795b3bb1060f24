"""Texts are scored like in the program of MMSearch-R1: a second implementation of its rules agrees
on generated and on recorded turns."""

import json
import random
import re

import pytest

from mmsr1_jax.config import Rewards
from mmsr1_jax.episodes.turns import extract_answer, parse
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.scripts.reward import reward_line

TAG = re.compile(r"</?reason>|</?answer>|</?text_search>|<search><img></search>")
ORDERS = {
    ("<reason>", "</reason>", "<answer>", "</answer>"): "answer",
    ("<reason>", "</reason>", "<search><img></search>"): "image_search",
    ("<reason>", "</reason>", "<text_search>", "</text_search>"): "text_search",
}
LETTERS = {"answer": "a", "image_search": "i", "text_search": "t"}

WELL_FORMED = [
    "<reason>r</reason><answer>Tagus</answer>",
    "<reason>r</reason> <answer>the tagus.</answer>",
    "<reason>r</reason>\nIt is this.\n<answer>Douro</answer>",
    "<reason></reason> so <answer></answer>",
    "<reason>r</reason> <search><img></search>",
    "<reason>a < b</reason> look: <search><img></search>",
    "<reason>r</reason>\n<text_search>which river?</text_search>",
    "<reason>r\n\ns</reason> ok <text_search> </text_search>",
]
PIECES = [
    "<reason>", "</reason>", "<answer>", "</answer>", "<search>", "</search>", "<img>",
    "<search><img></search>", "<text_search>", "</text_search>", "<search> <img></search>",
    "<REASON>", "</ answer>", "</", "<", " ", "\n", "\u2003", "\xa0", "\x1f", "\u200b", "\x00",
    "Tagus", "the", "<answer>Tagus</answer>", "<text_search>q</text_search>", "<reason>s</reason>",
]  # fmt: skip
AROUND = ["", "", "", "\n", " \t", "\u2003", "\u200b", "So: "]


def form_of(text):
    """Return the action of a turn whose tags occur once each, in order, and enclose the text."""
    text = text.strip()
    tags = TAG.findall(text)
    action = ORDERS.get(tuple(tags))
    return action if action and text.startswith(tags[0]) and text.endswith(tags[-1]) else None


def reward_of(turns, golds, *, part, per_search):
    """Return (reward, correct, format) of one to three turns, by the published equation."""
    answers = re.findall(r"<answer>(.*?)</answer>", turns[-1], re.DOTALL)
    answer = plain(answers[-1]) if answers else ""
    correct = any(plain(gold) in answer if part else plain(gold) == answer for gold in golds)
    is_search = [
        "<search><img></search>" in t or ("<text_search>" in t and "</text_search>" in t)
        for t in (turns if len(turns) == 1 else turns[:-1])
    ]
    count = sum(is_search) if per_search else any(is_search)
    forms = [form_of(turn) for turn in turns]
    right = None not in forms and "".join(map(LETTERS.get, forms)) in ("a", "ia", "ta", "ita")
    return 0.9 * correct * 0.9 ** (count * correct) + 0.1 * right, correct, right


def plain(text):
    kept = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def generated(count, seed=0):
    """Yield well-formed turns, most with tags inserted, removed, exchanged or repeated."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = re.findall(r"</?\w+>|[^<]+|<", rng.choice(WELL_FORMED))
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3, 5])):
            position, other = (rng.randrange(len(parts)) for _ in range(2))
            change = rng.randrange(5)
            if change < 2:
                parts.insert(position + rng.randrange(2), rng.choice(PIECES))
            elif change == 2 and len(parts) > 1:
                del parts[position]
            elif change == 3:
                parts[position], parts[other] = parts[other], parts[position]
            else:
                parts.insert(position, parts[other])
        yield rng.choice(AROUND) + "".join(parts) + rng.choice(AROUND)


def test_forms_of_generated_turns_equal_a_second_implementation():
    forms = []
    for text in generated(2000):
        turn = parse(text)
        assert turn.form == form_of(text), text
        # If both forms are valid, they agree on the action.
        assert None in (turn.strict_form, turn.form) or turn.strict_form == turn.form, text
        forms.append((turn.form, turn.strict_form))
    counts = [sum(form == action for form, _ in forms) for action in LETTERS]
    assert min(counts) > 80 and sum(counts) < 1200
    assert sum(form is not None and strict is None for form, strict in forms) > 100


def test_rewards_of_generated_episodes_equal_the_published_equation():
    rng, turns = random.Random(1), iter(list(generated(6000, seed=1)))
    seen = set()
    for _ in range(2000):
        written = [next(turns) for _ in range(rng.randint(1, 3))]
        golds = rng.choice([["Tagus"], ["Tejo", "tagus river", "Tagus!"], ["Dour"], ["which"]])
        settings = {"match": rng.choice(["EM", "SubEM"]), "per_search_penalty": rng.random() < 0.5}
        expected = reward_of(
            written, golds, part=settings["match"] == "SubEM",
            per_search=settings["per_search_penalty"],
        )  # fmt: skip
        line = json.dumps({"turns": written, "answers": golds}).encode()
        result = reward_line(1, line, Rewards(**settings))
        assert (result["correct"], result["format"]) == expected[1:], written
        assert result["reward"] == pytest.approx(expected[0], abs=1e-12), written
        seen.add(round(result["reward"], 3))
    assert seen >= {0.0, 0.1, 0.81, 0.9, 0.91, 1.0}


def recorded_turns(shared):
    lines = (shared / "data" / "transcripts.jsonl").read_text("utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    assert len(recorded) == 26
    return recorded


def test_words_between_reasoning_and_action_do_not_change_rewards(shared):
    for episode in recorded_turns(shared):
        written = [turn["response"] for turn in episode["turns"]]
        golds = [episode["ground_truth"], *episode["candidate_answers"]]
        wordy = [text.replace("</reason>", "</reason>\nSo I do this. ") for text in written]
        as_recorded, as_wordy, strict = (
            reward_function.compute_reward(
                read,
                reward_function.exact_match(reward_function.final_answer(read), golds),
                settings,
            )
            for read, settings in (
                ([parse(text) for text in written], Rewards()),
                ([parse(text) for text in wordy], Rewards()),
                ([parse(text) for text in wordy], Rewards(strict_form=True)),
            )
        )
        assert as_recorded == as_wordy and not strict.format
        assert as_recorded.reward == pytest.approx(
            reward_of(written, golds, part=False, per_search=False)[0], abs=1e-12
        )
        assert [parse(text).form for text in written] == [t["action"] for t in episode["turns"]]
        strictly = reward_function.compute_reward(
            [parse(text) for text in written], as_recorded.correct, Rewards(strict_form=True)
        )
        assert strictly == as_recorded


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>a</answer> or <answer> b\n</answer>", "b"),
        ("<answer>a<answer>b</answer>", "a<answer>b"),
        ("<answer>a</answer></answer>", "a"),
        ("</answer><answer>a", None),
        ("<answer>a</answer><answer>b", "a"),
        ("<ANSWER>a</ANSWER>", None),
        ("<answer>\u2003\xa0</answer>", ""),
        ("<text_search>q</text_search><answer>a</answer>", "a"),
        ("", None),
    ],
)
def test_the_answer_is_the_last_pair_of_tags(text, answer):
    assert extract_answer(text) == answer
    assert reward_function.final_answer([parse("x"), parse(text)]) == (answer or None)
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert answer == (answers[-1].strip() if answers else None)


def test_a_search_beside_the_answer_counts_only_in_a_single_turn_episode():
    both = "<reason>r</reason><text_search>q</text_search><answer>a</answer>"
    direct = "<reason>r</reason><answer>a</answer>"
    image = "<reason>r</reason><search><img></search>"
    for turns, searches in (
        ([both], 1), ([direct, both], 0), ([both, direct], 1), ([both, both], 1),
        ([image, both], 1), ([image, image], 2), ([image], 1), ([], 0),
        ([image.replace("<img>", " <img>"), direct], 0),
        (["</text_search> <text_search>", direct], 1),
    ):  # fmt: skip
        assert reward_function.count_searches([parse(turn) for turn in turns]) == searches


@pytest.mark.parametrize(
    "answer, gold, exact, part",
    [
        ("A", "A", True, True),
        ("It is A.", "A", False, True),
        ("Vitamin A", "a", False, True),
        ("The The", "The The", True, True),
        ("the band The The", "The The", False, True),
        ("100 %", "%", False, True),
        ("?", "?", True, True),
        ("I", "I", True, True),
        ("B", "A", False, False),
        ("Tagus", "A", False, False),  # the published program would match any answer
        ("Athens and Anatolia", "An", False, False),
        ("a_b", "A", False, False),
        ("", "A", False, False),
        (" ", "?", False, False),
        ("An", "A", True, True),  # as published: both normalise to nothing
        ("Å", "A", False, False),
        ("东京 A 座", "A", False, True),
    ],
)
def test_gold_answers_that_normalise_to_nothing(answer, gold, exact, part):
    assert reward_function.exact_match(answer, [gold]) is exact
    assert reward_function.sub_exact_match(answer, [gold, ""]) is part
