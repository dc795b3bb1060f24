"""Workflows: their limits and prompts, and forced turns in the engine."""

import dataclasses
import itertools

import numpy as np
import pytest

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.config.settings import Turns
from mmsr1_jax.episodes import prompts, turns
from mmsr1_jax.evaluation.workflows import WORKFLOWS, max_searches, workflow_limits
from mmsr1_jax.rollout import forcing
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.scripts import random_policy
from tests.engines import (
    LIMITS,
    VOCAB_SIZE,
    assert_logprobs_match_score,
    by_index,
    examples,
    make_config,
    search_tools,
)
from tests.scripted_policy import config_for, scripted_processor


def test_workflow_limits():
    limits = Turns(max_turns=5, max_searches=4, max_image_searches=1, max_text_searches=3)
    assert all(workflow_limits(name, limits) is limits for name in ("on_demand", "agent"))
    direct, rag = workflow_limits("direct", limits), workflow_limits("rag", limits)
    assert (direct.max_turns, direct.max_searches, rag.max_turns, rag.max_searches) == (1, 0, 3, 2)
    assert direct.max_episode_tokens == rag.max_episode_tokens == limits.max_episode_tokens
    assert [max_searches(limits, has_images) for has_images in (True, False)] == [4, 3]
    assert [max_searches(rag, has_images) for has_images in (True, False)] == [2, 1]
    assert max_searches(direct, True) == 0


def test_each_workflow_has_its_own_prompts(tmp_path):
    """Prompts of a directory take precedence over the built-in ones."""
    trained = prompts.load()
    assert prompts.load(None, "on_demand") == trained
    questions = {name: prompts.load(None, name)["question"] for name in WORKFLOWS}
    assert len(set(questions.values())) == 4
    for name in WORKFLOWS:
        texts = prompts.load(None, name)
        assert set(texts) == set(trained)
        assert "{images}" in texts["question"] and "{question}" in texts["question"]
        for kind in ("after_image_search", "after_text_search"):
            assert "<information>\n" in texts[kind] and "\n{results}\n</info" in texts[kind]
    (tmp_path / "question.txt").write_text("{images} {question}")
    assert prompts.load(tmp_path, "rag")["question"] == "{images} {question}"
    rag = prompts.load(None, "rag")["after_text_search"]
    assert prompts.load(tmp_path, "rag")["after_text_search"] == rag != trained["after_text_search"]
    (tmp_path / "rag").mkdir()
    (tmp_path / "rag" / "question.txt").write_text("{images} {question}?")
    assert prompts.load(tmp_path, "rag")["question"] == "{images} {question}?"
    assert prompts.load(tmp_path, "direct")["question"] == "{images} {question}"
    (tmp_path / "rag" / "question.txt").write_text("{images}")
    with pytest.raises(prompts.PromptsError, match="lacks {question}"):
        prompts.load(tmp_path, "rag")


# Forced turns


@pytest.mark.parametrize(
    "text, action, expected",
    [
        ("<reason>r</reason> <answer>a</answer>", "text_search",
         "<reason>r</reason> <text_search>"),
        ("<reason>r</reason>\n<search><img></search>", "answer", "<reason>r</reason> <answer>"),
        ("<reason>r</reason> and so on", "image_search",
         "<reason>r</reason> <search><img></search>"),
        (" <reason>cut off", "answer", " <reason>cut off</reason> <answer>"),
        ("<answer>a</answer>", "image_search", " <search><img></search>"),
        ("I see </text_search>", "answer", "I see  <answer>"),
        ("", "text_search", " <text_search>"),
    ],
)  # fmt: skip
def test_a_forced_action_is_opened_after_the_reasoning(text, action, expected):
    kept, inserted = forcing.open_action(text, action)
    assert text[:kept] + inserted == expected
    if action == "image_search" or "<reason>" not in text:
        return
    closed = turns.parse(f"{expected}x</{turns.TAGS[action]}>")
    assert closed.action == action and closed.form is not None


@pytest.mark.parametrize("text", ["Paris", "Paris</search>", "Paris<answer>x</answer>"])
def test_a_forced_action_is_closed_after_its_payload(text):
    kept, inserted = forcing.close_action(text, "answer", "Which city?")
    assert text[:kept] + inserted == "Paris</answer>"


@pytest.mark.parametrize("action", ["text_search", "image_search", "answer"])
@pytest.mark.parametrize("resumed", [False, True])
def test_forced_tokens_fit_whatever_was_sampled(action, resumed):
    """Sampled tokens are dropped; those that are kept and inserted still form the action."""

    def encode(text):
        return list(text.encode())

    rng, name = np.random.default_rng(0), turns.TAGS[action]
    pieces = ["<reason>", "why so", "</reason>", " <answer>", "Paris", "</answer>", "é", " a<b"]
    minimum = sum(forcing.num_tag_tokens(action, encode))
    for _ in range(200):
        sampled = [str(piece).encode() for piece in rng.choice(pieces, rng.integers(0, 30))]
        max_tokens = int(minimum + rng.integers(0, 40))
        kept, forced = forcing.force_action(
            sampled, action, resumed=resumed, question="Who built this? " * 9,
            max_tokens=max_tokens, encode=encode,
        )  # fmt: skip
        assert kept + len(forced) <= max_tokens
        text = (b"".join(sampled[:kept]) + bytes(forced.tolist())).decode()
        assert text.endswith(f"</{name}>" if resumed or action == "image_search" else f"<{name}>")


@pytest.mark.parametrize("text", ["", " ", "</text_search>", " <answer>x</answer>"])
def test_an_empty_query_is_replaced_by_the_question(text):
    question = "Who built this?</text_search> " + 40 * "x "
    kept, inserted = forcing.close_action(text, "text_search", question)
    turn = turns.parse(f"<reason>r</reason> <text_search>{text[:kept]}{inserted}")
    assert turn.payload.strip() == "Who built this? " + 28 * "x " + "x"
    assert forcing.close_action("", "answer", question) == (0, "</answer>")


@pytest.fixture(scope="module")
def model():
    return random_policy.random_model(config_for(VOCAB_SIZE), seed=3)


def make_engine(model, **keywords):
    return Engine(model, scripted_processor(VOCAB_SIZE), make_config(**keywords), search_tools())


@pytest.fixture(scope="module")
def engine(model):
    engine = make_engine(model)
    yield engine
    engine.close()


def rollout(engine, name, count=5, group_size=4, **keywords):
    limits = workflow_limits(name, engine.config.turns)
    rules = engine.make_rules(limits, prompts.load(), WORKFLOWS[name].forced)
    return list(engine.rollout(examples(count), group_size=group_size, rules=rules, **keywords))


@pytest.fixture(scope="module")
def forced(engine):
    return {name: rollout(engine, name) for name in ("rag", "direct")}


def test_forced_episodes_do_not_exceed_their_limit(forced):
    lengths = [len(episode) for episodes in forced.values() for episode in episodes]
    assert max(lengths) <= LIMITS.max_episode_tokens


def test_rules_whose_forced_tags_do_not_fit_a_turn_are_refused(engine):
    limits = dataclasses.replace(LIMITS, min_turn_tokens=2)
    with pytest.raises(UserError, match="min_turn_tokens=2 is too small .* tags of image_search"):
        engine.make_rules(limits, prompts.load(), WORKFLOWS["rag"].forced)


def test_forced_turns_take_the_forced_actions(forced):
    complete = 0
    for episode in forced["rag"]:
        expected = ["image_search", "text_search", "answer"][not episode.example.images :]
        actions = [turn.action for turn in episode.turns]
        assert actions == expected[: len(actions)]
        if episode.end == "answer":
            assert actions[-1] == "answer" and len(actions) >= len(expected)
            complete += actions == expected
        searches = [call.action for call in episode.calls]
        assert searches == [a for a in actions if a in ("image_search", "text_search")]
    assert complete > 10
    for episode in forced["direct"]:
        assert [turn.action for turn in episode.turns] == ["answer"] and not episode.calls


def test_forced_tokens_are_recorded_as_forced(forced, engine):
    """Turns equal the parsed tokens, and every sampled token that was kept is in a segment."""
    processor, truncated = engine.processor, 0
    end = processor.control["<|im_end|>"]
    for episode in itertools.chain(*forced.values()):
        texts, tokens = [], []
        for segment in [*episode.segments[1:], None]:
            if segment is None or segment.kind == "tool":
                tokens = tokens[: tokens.index(end)] if end in tokens else tokens
                texts.append(processor.decode(tokens))
                tokens = []
            else:
                assert len(segment.tokens)
                tokens += segment.tokens.tolist()
        assert [turns.parse(text) for text in texts] == episode.turns
        kinds = [segment.kind for segment in episode.segments]
        truncated += "forced" in "".join(kinds).replace("forcedtool", "")
    assert truncated > 10


@pytest.mark.proof
def test_logprobs_of_forced_episodes_equal_those_of_score(forced, model):
    selected = {name: sorted(episodes, key=lambda e: e.index) for name, episodes in forced.items()}
    assert_logprobs_match_score(model, [*selected["rag"][3:13], *selected["direct"][:3]], 1.0)


@pytest.mark.proof
@pytest.mark.parametrize("lanes, chunk", [(4, 3)])
def test_the_number_of_lanes_does_not_change_forced_episodes(model, forced, lanes, chunk):
    engine = make_engine(model, lanes=lanes, decode_steps=chunk)
    for name, episodes in forced.items():
        assert by_index(rollout(engine, name)) == by_index(episodes)
    engine.close()


@pytest.mark.proof
def test_a_pool_forces_the_same_turns(model, forced):
    pool = EnginePool([model], scripted_processor(VOCAB_SIZE), make_config(), search_tools())
    assert by_index(rollout(pool, "rag")) == by_index(forced["rag"])
    part = rollout(pool, "direct", 1, indices=[0])
    pool.close()
    assert by_index(part) == {n: by_index(forced["direct"])[n] for n in range(4)}


def test_forced_workflows_do_not_change_on_demand_episodes(engine):
    plain = by_index(engine.rollout(examples(4), group_size=2))
    assert by_index(rollout(engine, "on_demand", 4, 2)) == plain
    part = engine.rollout(examples(4)[2:], group_size=2, indices=[2, 3])
    assert by_index(part) == {number: plain[number] for number in range(4, 8)}
