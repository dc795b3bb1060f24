"""A judge in a training step: failed requests exclude episodes, and permanent refusals end it."""

import random
import socket
import types

import pytest
from starlette.responses import Response

from mmsr1_jax import train
from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.service import ServiceRefusedError
from mmsr1_jax.training import metrics
from tests.fake_engine import FakeEngine, question_batches, step_config
from tests.tools import judge_server
from tests.tools.judge_server import RIGHT, SECRET, WRONG, message


@pytest.fixture(scope="module")
def running():
    with judge_server.run_server() as server:
        yield server


@pytest.fixture
def server(running, monkeypatch):
    judge_server.reset(running, monkeypatch)
    return running


def episodes_of(answers):
    return [
        Episode(example=Example(question="q"), group=0, index=index, end="answer",
                turns=[parse(f"<reason>r</reason><answer>{answer}</answer>")])
        for index, answer in enumerate(answers)
    ]  # fmt: skip


QUESTIONS = [types.SimpleNamespace(question="q", answers=["New York"])]


def step(judge, answers):
    episodes = episodes_of(answers)
    rewards = train.compute_rewards(episodes, QUESTIONS, settings.Config(), judge, step=0)
    facts = metrics.episode_facts(episodes, rewards, ["c"] * len(episodes))
    return rewards, metrics.episode_metrics(facts)


@pytest.mark.parametrize("status", [401, 402, 403, 404, 400, 308])
def test_judge_that_refuses_all_requests_ends_the_step_with_one_line(server, capsys, status):
    server.reply = lambda _: Response(status_code=status)
    config = settings.Config()
    config.services.judge_url = f"{server.url}/?token={SECRET}"
    with pytest.raises(ServiceRefusedError) as raised:
        step(make_judge(config), [f"NYC {index}" for index in range(64)])
    line = str(raised.value)
    for text in ("judge", server.url, f"HTTP status {status}", "config.services.judge_url",
                  "JUDGE_API_KEY"):  # fmt: skip
        assert text in line
    assert SECRET not in line and "\n" not in line and capsys.readouterr().err == ""


def test_unreachable_judge_ends_the_step(monkeypatch):
    """With many answers, the circuit breaker opens before the refusal is confirmed."""
    monkeypatch.setattr("mmsr1_jax.tools.judge._CONFIRMATION_WAIT", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = settings.Config()
    config.services.judge_url, config.services.max_attempts = url, 2
    for count in (1, 100):
        with pytest.raises(ServiceRefusedError, match=f"{url} refuses .*: connection refused"):
            step(make_judge(config), [f"NYC {index}" for index in range(count)])


def test_step_continues_when_a_tenth_of_the_judge_requests_fail(server, capsys):
    def reply(answer):
        if answer.endswith("7"):
            return Response(status_code=503)
        return message("Yes" if answer.endswith("3") else RIGHT if "right" in answer else WRONG)

    server.reply = reply
    answers = [f"{'right' if index % 20 < 10 else 'no'} {index}" for index in range(100)]
    rewards, values = step(server.judge(max_failures=None), [*answers, "New York"])
    assert values["judge/requests"] == 100
    assert values["judge/failed"] == values["judge/unreadable"] == 0.1
    assert [r.known for r in rewards] == [not a.endswith("7") for a in answers] + [True]
    right = 40 + 1  # of each ten, one failed and one was unreadable
    assert values["accuracy"] == values["accuracy_by_category/c"] == right / 91
    known = [reward.reward for reward in rewards if reward.known]
    assert values["reward"] == pytest.approx(sum(known) / 91)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "step 1: 10 of 101 answers could not be judged; their episodes are skipped",
        "step 1: 10 of 101 answers got a reply without a verdict and count as wrong",
    ]


def test_episode_without_verdict_is_excluded_from_its_group(server):
    """The other episodes of its question are used."""
    server.reply = lambda answer: Response(status_code=503) if "maybe" in answer else message(RIGHT)
    answers = {"m": ("right", "maybe", "sure"), "n": ("maybe", "maybe 2", "y")}
    rollouts = train.roll_out(
        FakeEngine(answers), question_batches(answers, 2),
        step_config(prompts_per_step=2, group_size=3),
        server.judge(max_failures=None), seed=0, step=1,
    )  # fmt: skip
    assert [[episode.answer for episode, _ in group] for group in rollouts.groups] == [
        ["right", "sure"], ["y"],
    ]  # fmt: skip
    assert len(rollouts.episodes) == 6
    assert sum(not reward.known for _, reward in rollouts.episodes) == 3


def test_step_without_any_verdict_has_no_accuracy(server):
    """The answers that match a gold answer are not representative."""
    server.reply = lambda _: Response(status_code=500)
    _, values = step(server.judge(), ["New York", "NYC", "NYC!"])
    assert values["judge/failed"] == 1 and values["judge/requests"] == 2
    assert not {"accuracy", "reward"} & set(values)
    _, values = step(server.judge(), ["New York"])  # no request is necessary
    assert values["judge/requests"] == values["judge/failed"] == 0 and values["accuracy"] == 1


def test_no_judge_metrics_without_a_judge():
    _, values = step(None, ["New York", "NYC"])
    assert values["accuracy"] == 0.5 and not any(name.startswith("judge") for name in values)


@pytest.mark.parametrize("status", [403, 400, 413, 422, 404])
def test_refused_answer_affects_only_its_own_episode(server, status):
    """For instance by a firewall: no page may end a run through the answer that it provokes."""
    server.reply = lambda answer: (
        Response(status_code=status) if "<script>" in answer else message(RIGHT)
    )
    rewards, values = step(server.judge(), ["<script>", "NYC", "<script> 2", "N.Y."])
    assert [reward.known for reward in rewards] == [False, True, False, True]
    assert values["judge/failed"] == 0.5


def test_random_refusals_of_one_server_in_ten_do_not_end_a_run(server):
    """As behind a load balancer with one misconfigured server."""
    rng = random.Random(3)
    server.reply = lambda _: Response(status_code=401) if rng.random() < 0.1 else message(RIGHT)
    _, values = step(server.judge(), [f"NYC {index}" for index in range(100)])
    assert 0 < values["judge/failed"] < 0.25
