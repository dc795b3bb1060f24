"""Questions are classified by their correct episodes, and mixes have exact sizes."""

import collections
import dataclasses
import fractions
import itertools

import numpy as np
import pytest

from mmsr1_jax.config import Rewards
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data import curation
from mmsr1_jax.data.curation import cheapest, choose, classify, read_attempt, read_mix
from mmsr1_jax.episodes.episode import Episode, Example, ToolCall
from mmsr1_jax.episodes.turns import parse

KINDS = {"i": "image_search", "t": "text_search"}
TURNS = {
    "i": "<reason>r</reason> <search><img></search>",
    "t": "<reason>r</reason> <text_search>q</text_search>",
    "+": "<reason>r</reason> <answer>Tagus</answer>",
    "-": "<reason>r</reason> <answer>Douro</answer>",
}


def episode(code, index=0, status="ok"):
    """Return the episode of a code: `it+` is an image search, a text search and a correct answer
    (`-`: a wrong one), and `!` a technical error."""
    if code == "!":
        return Episode(example=Example(question="?"), group=0, index=index, end="error")
    return Episode(
        example=Example(question="?"),
        group=0,
        index=index,
        turns=[parse(TURNS[letter]) for letter in code],
        calls=[
            ToolCall(turn=turn, action=KINDS[letter], query=None, status=status)
            for turn, letter in enumerate(code)
            if letter in KINDS
        ],
        end="answer",
    )


def line(episode):
    data = {"index": episode.index, "group": episode.group, "end": episode.end}
    data["turns"] = [dataclasses.asdict(turn) for turn in episode.turns]
    data["calls"] = [dataclasses.asdict(call) for call in episode.calls]
    return data | {"answers": ["Tagus", "Tejo"]}


def attempts(*codes, **keywords):
    return [
        read_attempt(line(episode(code, index, **keywords)), Rewards())
        for index, code in enumerate(codes)
    ]


# Classes


@pytest.mark.parametrize(
    "codes, expected",
    [
        ("- i- t- it- it", "never_correct"),
        ("! !", "not_run"),
        ("! -", "never_correct"),
        ("it+ i+ t+ + -", "search_free"),
        ("! +", "search_free"),
        ("- t- i+", "image_required"),
        ("i+ i+ ! it-", "image_required"),
        ("- i- t+", "text_required"),
        ("tt+ t+", "text_required"),
        ("- i- t- it+", "mix_required"),
        ("ti+ it+", "mix_required"),
        ("i+ t+", "mix_required"),
        ("it+ i+", "mix_required"),
        ("it+ t+", "mix_required"),
    ],
)
def test_a_question_is_classified_by_its_correct_episodes(codes, expected):
    for order in itertools.islice(itertools.permutations(codes.split()), 24):
        assert classify(attempts(*order)) == expected


def test_failed_searches_count_and_refused_ones_do_not():
    assert classify(attempts("i+", status="refused")) == "search_free"
    for status in ("failed", "empty"):
        assert classify(attempts("i+", status=status)) == "image_required"


def test_correctness_comes_from_the_judge_or_from_matching():
    wordy = parse("<reason>r</reason> <answer>It is the Tejo.</answer>")
    data = line(dataclasses.replace(episode("t-"), turns=[parse(TURNS["t"]), wordy]))
    assert not read_attempt(data, Rewards()).correct
    assert read_attempt(data, Rewards(match="SubEM")).correct
    assert read_attempt(data, Rewards(), True).correct
    assert not read_attempt(line(episode("t+")), Rewards(), False).correct
    assert not read_attempt(line(episode("t")), Rewards(), True).correct  # without an answer
    # Published: 0.9 * 0.9 + 0.1 if correct after a search, 1 if without a search, 0.1 if wrong.
    rewards = [attempt.reward.reward for attempt in attempts("t+", "it+", "+", "i-")]
    np.testing.assert_allclose(rewards, [0.91, 0.91, 1.0, 0.1], rtol=1e-12)


def test_episodes_with_the_fewest_searches_come_first():
    malformed = {"turns": [parse("So: " + TURNS["i"]), parse(TURNS["+"])]}
    candidates = attempts("it+", "i+", "-", "t+", "it+", "!")
    candidates.append(
        read_attempt(line(dataclasses.replace(episode("i+", 1), **malformed)), Rewards())
    )
    candidates[-1] = dataclasses.replace(candidates[-1], index=-1)  # malformed, but earlier
    assert [attempt.index for attempt in cheapest(candidates, 9)] == [1, 3, -1, 0, 4]
    assert [attempt.index for attempt in cheapest(candidates, 2)] == [1, 3]
    assert cheapest(attempts("-", "!"), 3) == []


# Mixes


def slow_sizes(mix, available):
    """Return the sizes of the largest set, by trying every total with exact fractions."""
    exact = {part: fractions.Fraction(str(fraction)) for part, fraction in mix.items()}
    best = dict.fromkeys(mix, 0)
    for total in range(1, sum(available.values()) + 1):
        if any(fraction * total > available[part] for part, fraction in exact.items()):
            return best
        best = {part: int(fraction * total) for part, fraction in exact.items()}
        rest = sorted(exact, key=lambda part: best[part] - exact[part] * total)
        for part in rest[: total - sum(best.values())]:
            best[part] += 1
    return best


def test_fractions_select_the_largest_possible_set():
    rng = np.random.default_rng(0)
    for _ in range(100):
        parts = rng.permutation(curation.USEFUL)[: rng.integers(1, 5)].tolist()
        cuts = np.sort(rng.choice(np.arange(1, 100), len(parts) - 1, replace=False))
        hundredths = np.diff([0, *cuts, 100])
        mix = {part: int(n) / 100 for part, n in zip(parts, hundredths, strict=True)}
        available = {part: int(rng.integers(0, 40)) for part in parts}
        sizes = curation.part_sizes(mix, available)
        assert sizes == slow_sizes(mix, available), (mix, available)
        assert all(sizes[part] <= available[part] for part in parts)


def test_the_published_mix_has_its_published_size():
    paper = read_mix(curation.PAPER_MIX)
    for free in (1600, 2000):
        available = {"search_required": 3400, "search_free": free}
        assert curation.part_sizes(paper, available) == {
            "search_required": 3400,
            "search_free": 1600,
        }


def test_a_choice_is_reproducible_and_follows_the_mix():
    rng = np.random.default_rng(1)
    classes = rng.choice(curation.CLASSES, 400).tolist()

    def counts(mix, seed=0):
        chosen = choose(classes, read_mix(mix), seed)
        assert chosen == sorted(set(chosen))
        return chosen, collections.Counter(classes[number] for number in chosen)

    everything, sizes = counts("")
    assert set(sizes) == set(curation.USEFUL)
    assert len(everything) == sum(name in curation.USEFUL for name in classes)
    fewer, sizes = counts("search_free=10,text_required=7")
    assert sizes == {"search_free": 10, "text_required": 7}
    more, sizes = counts("search_free=20,text_required=100000")
    assert sizes == {"search_free": 20, "text_required": classes.count("text_required")}
    assert set(fewer) < set(more)
    assert counts("search_free=10,text_required=7")[0] == fewer
    other, sizes = counts("search_free=10,text_required=7", seed=1)
    assert other != fewer and sizes == {"search_free": 10, "text_required": 7}
    shared, sizes = counts("search_required=0.5,search_free=0.5")
    assert sizes["search_free"] == sum(sizes.values()) / 2 == classes.count("search_free")
    assert len({classes[number] for number in shared}) == 4
    assert choose(["never_correct", "not_run"], read_mix(""), 0) == []
    assert choose(["never_correct", "text_required"], read_mix(curation.PAPER_MIX), 0) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("never_correct=3", "the part must be one of"),
        ("search_free", "must be search_free=NUMBER"),
        ("search_free=many", "must be search_free=NUMBER"),
        ("search_free=1,search_free=2", "occurs twice"),
        ("search_free=-1", "must not be negative"),
        ("search_free=0.4,text_required=0.5", "sum to 1"),
        ("search_free=1.5,text_required=-0.5", "above 0"),
        ("search_free=0.4,text_required=3", "not both"),
        ("search_free=nan.0", "must be search_free=NUMBER"),
        ("search_required=3,text_required=3", "already includes"),
    ],
)
def test_invalid_mixes_are_errors(text, message):
    with pytest.raises(UserError, match=message):
        read_mix(text)


def test_statistics_count_questions_by_class_and_part():
    groups = [attempts(*w.split()) for w in ("+ -", "+ +", "t+ !", "- -", "! !")]
    classes = [classify(group) for group in groups]
    statistics = curation.summarize(
        groups, classes, [1, 2], {"search_required": 3, "search_free": 1}
    )
    assert (
        statistics["questions"],
        statistics["episodes"],
        statistics["errors"],
        statistics["chosen"],
    ) == (
        5,
        10,
        3,
        2,
    )
    own = statistics["classes"]
    assert own["search_free"] == {"questions": 2, "fraction": 0.4, "accuracy": 0.75, "chosen": 1}
    assert own["text_required"] == {"questions": 1, "fraction": 0.2, "accuracy": 0.5, "chosen": 1}
    assert own["never_correct"] == {"questions": 1, "fraction": 0.2, "accuracy": 0.0, "chosen": 0}
    assert own["image_required"] == {"questions": 0, "fraction": 0.0, "accuracy": None, "chosen": 0}
    assert statistics["parts"]["search_required"] == {"requested": 3, "available": 1, "chosen": 1}
    rows = [row.split() for row in curation.format_table(statistics).splitlines()]
    assert ["search_free", "2", "40.0", "75.0", "1"] in rows
    assert ["image_required", "0", "0.0", "-", "0"] in rows
    assert rows[-1] == ["all", "5", "100.0", "-", "2"]
