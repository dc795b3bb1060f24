"""Rewards are the published ones."""

import itertools

import numpy as np
import pytest

from mmsr1_jax.config import ConfigError
from mmsr1_jax.config.rewards import Rewards, check
from mmsr1_jax.episodes.episode import Episode, Example, ToolCall
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.rewards import reward_function
from tests.reward_reference import MALFORMED, TURNS, parsed, slow_normalise


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("The  Tagus,\n river!", "tagus river"),
        ("A.N. Other", "other"),  # without punctuation, the article "an" remains
        ("theatre at an end", "theatre at end"),
        ("$3.5 (US)", "35 us"),
        ("ÉCOLE “The” 東京", "école “ ” 東京"),  # other punctuation is kept
        ("snake_case\x00\x1fx", "snakecase\x00 x"),
        ("The A", ""),
    ],
)
def test_normalisation_examples(text, normalised):
    assert reward_function.normalise(text) == normalised == slow_normalise(text)


def test_normalisation_equals_a_second_implementation():
    rng = np.random.default_rng(0)
    pieces = ["the", "a", "an", "The", "A", " ", " ", "\t", "x", "É", "İ", "ß", "東", "\x00"]
    pieces += ["\x85", "“", "—", "\u200b", "٣", "\udfff", "1", *"!-.,_'\"$<>"]
    for _ in range(3000):
        text = "".join(rng.choice(pieces, rng.integers(0, 12)))
        assert reward_function.normalise(text) == slow_normalise(text)


@pytest.mark.parametrize(
    "answer, golds, exact, part",
    [
        ("the Tagus River", ["Tejo", "Tagus river."], True, True),
        ("It is the Tagus River", ["Tagus river"], False, True),
        ("Tagus", ["Tagus River"], False, False),
        ("Tagus", [], False, False),
        ("Tagus", ["", " ", "the", "!"], False, False),  # blank ones would match any answer
        ("A", ["a"], True, True),
        ("the", ["", " "], False, False),
        (" ", ["a", " "], False, False),
        (None, ["a"], False, False),
        ("cart", ["art"], False, True),  # substrings of words match, as published
    ],
)
def test_exact_and_substring_matches(answer, golds, exact, part):
    assert reward_function.exact_match(answer, golds) is exact
    assert reward_function.sub_exact_match(answer, golds) is part


def test_a_single_text_is_rejected_as_gold_answers():
    for match in (reward_function.exact_match, reward_function.sub_exact_match):
        with pytest.raises(TypeError, match="a list of texts"):
            match("T", "Tagus")


@pytest.mark.parametrize(
    "turns, correct, settings, expected",
    [
        (parsed("answer"), True, {}, 1.00),
        (parsed("image,answer"), True, {}, 0.91),
        (parsed("text,answer"), True, {}, 0.91),
        (parsed("image,text,answer"), True, {}, 0.91),
        (parsed("image,text,answer"), True, {"per_search_penalty": True}, 0.829),
        (parsed("text,answer"), True, {"per_search_penalty": True}, 0.91),
        (parsed("answer", MALFORMED), True, {}, 0.90),
        (parsed("image,answer", MALFORMED), True, {}, 0.81),
        (parsed("image") + parsed("answer", MALFORMED), True, {}, 0.81),
        (parsed("text,image,answer"), True, {}, 0.81),
        (parsed("text,text,answer"), True, {}, 0.81),
        (parsed("answer"), False, {}, 0.10),
        (parsed("image,text,answer"), False, {}, 0.10),
        (parsed("answer", MALFORMED), False, {}, 0.00),
        (parsed("image,text"), False, {}, 0.00),
        (parsed("text", MALFORMED), False, {}, 0.00),
        ([], False, {}, 0.00),
        # Without an answer, an episode is never correct.
        ([], True, {}, 0.00),
        (parsed("image,text"), True, {}, 0.00),
        (parsed("answer,text"), True, {}, 0.00),
        # The allowed sequences are a setting, of any length.
        (parsed("text,text,answer"), True, {"sequences": ("text,text,answer",)}, 0.91),
        (parsed("image,text,text,text,answer"), True,
         {"sequences": ("image,text,text,text,answer",), "per_search_penalty": True},
         0.9 * 0.9**4 + 0.1),
        (parsed("answer"), True, {"sequences": ()}, 0.90),
    ],
)  # fmt: skip
def test_rewards_of_published_cases(turns, correct, settings, expected):
    reward = reward_function.compute_reward(turns, correct, check(Rewards(**settings)))
    assert reward.reward == pytest.approx(expected, abs=1e-12)


def test_rewards_of_random_episodes_equal_the_published_equation():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        length = int(rng.integers(0, 5))
        names = [str(name) for name in rng.choice(["answer", "image", "text"], length)]
        valid = rng.random(length) < 0.9
        turns = [parse((TURNS if f else MALFORMED)[n]) for n, f in zip(names, valid, strict=True)]
        p, a = rng.random(2)
        warmup, step = int(rng.integers(0, 6)), int(rng.integers(0, 9))
        correct = float(rng.choice([0.0, 1.0, rng.random()]))
        per_search = bool(rng.random() < 0.5)

        allowed = [["answer"], ["image", "answer"], ["text", "answer"], ["image", "text", "answer"]]
        answered = np.float64(names[-1:] == ["answer"]) * np.float64(correct)
        searches = sum(name != "answer" for name in names)
        p_t = np.interp(step, [0, warmup], [-p, p]) if warmup else p
        factor = np.prod([1 - p_t] * (searches if per_search else min(searches, 1)))
        well_formed = float(valid.all() and names in allowed)
        r = (1 - a) * answered * (factor if answered > 0 else 1.0) + a * well_formed

        settings = Rewards(
            search_penalty=float(p), format_penalty=float(a), penalty_warmup=warmup,
            per_search_penalty=per_search,
        )  # fmt: skip
        reward = reward_function.compute_reward(turns, correct, settings, step)
        assert reward.reward == pytest.approx(r, abs=1e-12)
        assert (reward.correct, reward.format) == (answered, well_formed)
        assert reward.searches == searches
        assert reward.penalty == pytest.approx(factor if answered > 0 else 1.0, abs=1e-12)


def test_the_penalty_warmup_rewards_searches_at_first():
    settings = Rewards(search_penalty=0.1, penalty_warmup=10)
    rewards = [
        reward_function.compute_reward(parsed("text,answer"), True, settings, s).reward
        for s in (0, 5, 10, 99)
    ]
    assert rewards == pytest.approx([0.9 * 1.1 + 0.1, 1.0, 0.91, 0.91], abs=1e-12)
    assert reward_function.compute_reward(
        parsed("answer"), True, settings, 0
    ).reward == pytest.approx(1.0)


@pytest.mark.parametrize("sequence", itertools.chain.from_iterable(
    itertools.product(TURNS, repeat=n) for n in range(5)))  # fmt: skip
def test_only_the_four_published_sequences_have_a_valid_format(sequence):
    turns = parsed(",".join(sequence))
    well_formed = "".join(name[0] for name in sequence) in ("a", "ia", "ta", "ita")
    assert reward_function.has_valid_format(turns) is well_formed
    for position in range(len(turns)):
        malformed = [*turns]
        malformed[position] = parse(MALFORMED[sequence[position]])
        assert not reward_function.has_valid_format(malformed)
    assert not reward_function.has_valid_format([parse("hello"), *turns], ["answer", ",answer"])


@pytest.mark.parametrize(
    "field, value",
    [
        ("match", "em"),
        ("search_penalty", 1.5),
        ("format_penalty", float("nan")),
        ("penalty_warmup", -1),
        ("sequences", ("answer", "image, answer")),
        ("sequences", ("search,answer",)),
        ("sequences", ("",)),
    ],
)
def test_invalid_settings_are_errors_that_name_the_field(field, value):
    with pytest.raises(ConfigError, match=rf"^rewards\.{field}"):
        check(Rewards(**{field: value}))


def test_correctness_must_be_between_0_and_1():
    with pytest.raises(ValueError, match="must be in"):
        reward_function.compute_reward(parsed("answer"), float("nan"), Rewards())


def episode(sequence, *statuses):
    calls = [ToolCall(turn=i, action="text_search", query="q", status=s)
             for i, s in enumerate(statuses)]  # fmt: skip
    return Episode(
        example=Example(question="?"), group=0, index=0, turns=parsed(sequence), calls=calls
    )


def test_refused_searches_are_not_penalised():
    def result(episode, **settings):
        reward = reward_function.episode_reward(episode, ["tagus"], Rewards(**settings))
        return reward.searches, reward.reward

    assert result(episode("text,answer", "ok")) == (1, pytest.approx(0.91))
    assert result(episode("text,answer", "failed")) == (1, pytest.approx(0.91))
    assert result(episode("text,answer", "refused")) == (0, pytest.approx(1.0))
    searching = episode("image,text,text,answer", "ok", "empty", "refused")
    assert result(searching, per_search_penalty=True) == (2, pytest.approx(0.9 * 0.81))


def test_correctness_of_an_episode_is_a_match_or_a_verdict():
    def result(answers, correct=None, **settings):
        return reward_function.episode_reward(
            episode("answer"), answers, Rewards(**settings), correct=correct
        )

    assert result(["Rio Tejo", "Tagus"]).correct and not result(["tag"]).correct
    assert result(["tag"], match="SubEM").correct
    assert result(["Tejo"], correct=True).reward == pytest.approx(1.0)
    assert result(["Tagus"], correct=False).reward == pytest.approx(0.1)
    searched = episode("text,answer", "ok")
    warm = reward_function.episode_reward(searched, ["Tagus"], Rewards(penalty_warmup=10), step=0)
    assert warm.reward == pytest.approx(1.09)
