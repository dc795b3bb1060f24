"""The state machine of episodes: segments, budgets, events and records after each turn."""

import numpy as np
import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.episode import Example, Segment
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.turn_machine import Search, TurnMachine
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.tools import Observation, text_result

EXAMPLE = Example(id="e", question="Who built it?")
ANSWER = "<reason>r</reason><answer>a</answer>"
TEXT = "<reason>r</reason><text_search>q</text_search>"


@pytest.fixture
def events():
    return []


@pytest.fixture
def machine(processor, events):
    limits = settings.Turns(max_episode_tokens=1000, min_turn_tokens=100, max_new_tokens=200,
                            max_result_tokens=500)  # fmt: skip
    rules = Rules(processor, limits, settings.Tools(), prompts.load())
    return TurnMachine(rules, processor, lambda episode, event: events.append(event))


@pytest.fixture
def episode(machine):
    prompt = machine.rules.initial_prompt(EXAMPLE)
    return machine.start(EXAMPLE, prompt, group=2, index=9)


def finish(machine, processor, episode, text, **keywords):
    """Append a turn of the policy, and take the next step."""
    tokens = np.array(processor.encode_text(text), np.int32)
    episode.segments.append(Segment("model", tokens))
    return machine.finish_turn(episode, parse(text), **keywords)


def kinds(episode):
    return [segment.kind for segment in episode.segments]


def test_an_answer_ends_the_episode(machine, processor, episode, events):
    assert finish(machine, processor, episode, ANSWER) is None
    assert (episode.group, episode.index, episode.end, episode.answer) == (2, 9, "answer", "a")
    assert events == ["turn", "end"] and kinds(episode) == ["prompt", "model"]


def test_a_search_waits_for_its_reply(machine, processor, episode, events):
    search = finish(machine, processor, episode, TEXT)
    assert isinstance(search, Search) and events == ["turn"] and kinds(episode)[1:] == ["model"]
    assert (search.query.action, search.query.text, search.turn) == ("text_search", "q", 0)
    assert search.budget == 1000 - 100 - len(episode) - len(search.closing)
    observation = Observation(results=[text_result("http://x", "built in 1886")])
    reply = machine.reply(search, observation, None, 0.5)
    assert events == ["turn"] and episode.last_call is None  # the episode has not changed
    new = machine.add_reply(episode, search, reply)
    assert events == ["turn", "reply"] and kinds(episode) == ["prompt", "model", "forced", "tool"]
    assert isinstance(new, Prompt) and episode.last_call is reply.call is episode.calls[0]
    tail = np.concatenate([segment.tokens for segment in episode.segments[-2:]])
    np.testing.assert_array_equal(new.tokens, tail)


def test_a_malformed_turn_gets_a_notice(machine, processor, episode, events):
    new = finish(machine, processor, episode, "hm", truncated=True)
    assert isinstance(new, Prompt) and events == ["turn", "reply"] and episode.calls == []
    assert "it is too long, and was cut off" in processor.decode(new.tokens.tolist())


def test_a_sampled_end_token_is_not_forced_again(machine, processor, episode):
    finish(machine, processor, episode, "hm", has_end_token=True)
    assert episode.segments[2].tokens.tolist() == processor.closing()[1:]


def test_an_episode_ends_if_no_reply_fits(machine, processor, episode, events):
    search = finish(machine, processor, episode, "x" * 700 + TEXT)
    assert isinstance(search, Search)
    error = RuntimeError("the service is down")
    assert machine.add_reply(episode, search, machine.reply(search, None, error, 0.0)) is None
    assert episode.end == "tokens" and events == ["turn", "end"]
    assert episode.calls[0].status == "failed" and kinds(episode) == ["prompt", "model"]


def test_an_unusable_result_counts_as_a_failure(machine, processor, episode):
    class Unusable:
        @property
        def results(self):
            raise RuntimeError("broken")

    search = finish(machine, processor, episode, TEXT)
    reply = machine.reply(search, Unusable(), None, 0.0)
    assert reply.call.status == "failed" and "broken" in reply.call.notes[0]


def test_an_unusable_question_fails_the_episode(machine, events):
    episode = machine.fail(EXAMPLE, ValueError("no image"), group=1, index=3)
    assert (episode.end, episode.error, episode.index) == ("error", "ValueError: no image", 3)
    assert events == ["end"] and episode.segments == []
