"""Rollouts of a training step: groups, resampling, and rewards with and without a judge."""

import asyncio
import json
from itertools import chain

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from mmsr1_jax.config import settings
from mmsr1_jax.data import Question
from mmsr1_jax.episodes.episode import ToolCall
from mmsr1_jax.rewards.reward_function import episode_reward
from mmsr1_jax.tools.judge import Verdict
from mmsr1_jax.train import roll_out
from mmsr1_jax.training.rollouts import RolloutBatch, compute_rewards
from tests.constant_judge import ConstantJudge
from tests.episode_factory import TEXT, answer, episode_of
from tests.fake_engine import FakeEngine, question_batches, step_config
from tests.servers import serve

# Answers of a question's two episodes, by question ID; None is an episode that could not be run.
BOTH, RIGHT, WRONG = ("right", "wrong"), ("right", "correct"), ("wrong", "other")
ANSWERS = {
    "a": BOTH, "b": RIGHT, "c": WRONG,
    "d": ("wrong", None), "e": ("wrong", "right"), "f": WRONG,
    "g": (None, None), "h": RIGHT, "i": RIGHT,
    "j": BOTH, "k": BOTH, "l": BOTH,
}  # fmt: skip


def roll_out_step(config, answers=ANSWERS, step=7) -> tuple[RolloutBatch, FakeEngine]:
    engine = FakeEngine(answers)
    questions = question_batches(answers, config.run.prompts_per_step)
    return roll_out(engine, questions, config, None, seed=11, step=step), engine


def group_ids(batch: RolloutBatch) -> list[str | None]:
    """Return the question ID of each group, after checking its episodes and rewards."""
    for group in batch.groups:
        for episode, reward in group:
            assert batch.questions[episode.group].id == episode.example.id
            assert reward.correct == (episode.answer in ("right", "correct"))
    return [group[0][0].example.id if group else None for group in batch.groups]


def check_episodes(batch: RolloutBatch, answers=ANSWERS) -> None:
    """Check that the batch has all episodes of its questions, in order, with their rewards."""
    assert list(batch.questions) == list(range(batch.num_sampled))
    questions = batch.questions.values()
    texts = [text for question in questions for text in answers[question.id]]
    ids = [question.id for question in questions for _ in answers[question.id]]
    assert [episode.example.id for episode, _ in batch.episodes] == ids
    assert [batch.questions[episode.group].id for episode, _ in batch.episodes] == ids
    assert [episode.answer for episode, _ in batch.episodes] == texts
    assert [episode.end for episode, _ in batch.episodes] == [
        "error" if text is None else "answer" for text in texts
    ]
    for _, reward in (pair for pair in batch.episodes if pair[0].end != "error"):
        assert reward.reward in (pytest.approx(1.0), pytest.approx(0.1))
    correct = [reward.correct for _, reward in batch.episodes]
    assert correct == [text in ("right", "correct") for text in texts]


# Groups and resampling


def test_without_resampling_every_question_keeps_its_group(capsys):
    batch, engine = roll_out_step(step_config())
    assert group_ids(batch) == ["a", "b", "c"] and len(engine.seeds) == 1
    assert [len(group) for group in batch.groups] == [2, 2, 2]
    assert batch.num_with_variance == 1 and len(batch.questions) == 3
    check_episodes(batch)
    # Groups stay in the order of the questions, whether or not their rewards differ.
    answers = {name: ANSWERS[name] for name in "ghe"}
    batch, _ = roll_out_step(step_config(), answers)
    assert group_ids(batch) == [None, "h", "e"] and batch.num_with_variance == 1
    check_episodes(batch, answers)
    assert capsys.readouterr().err.count("step 7, question g: no image") == 2


@pytest.mark.parametrize(
    "max_rounds, ids, num_questions, num_groups_with_variance",
    [
        (1, "aeb", 6, 2),  # two groups with variance, and the first one without
        (2, "aeb", 9, 2),
        (3, "aej", 12, 5),  # the last round has more groups with variance than are needed
        (9, "aej", 12, 5),  # stops once there are enough
    ],
)
def test_groups_with_zero_reward_variance_are_resampled(
    max_rounds, ids, num_questions, num_groups_with_variance, capsys
):
    batch, engine = roll_out_step(step_config(max_resample_rounds=max_rounds))
    assert group_ids(batch) == list(ids)
    assert len(batch.questions) == num_questions and len(batch.episodes) == 2 * num_questions
    assert batch.num_with_variance == num_groups_with_variance
    assert len(set(engine.seeds)) == len(engine.seeds) == num_questions // 3
    check_episodes(batch)
    assert [len(group) for group in batch.groups] == [2, 2, 2]
    assert [episode.end for episode, _ in chain(*batch.groups)] == ["answer"] * 6
    assert "step 7, question d: no image" in capsys.readouterr().err


def test_episodes_that_could_not_be_run_are_in_no_group():
    """The other episodes of the question are kept."""
    answers = {"m": ("right", None, "wrong"), "n": ("wrong", None, None), "o": (None, None, None)}
    batch, _ = roll_out_step(step_config(group_size=3), answers)
    assert [[episode.answer for episode, _ in group] for group in batch.groups] == [
        ["right", "wrong"], ["wrong"], [],
    ]  # fmt: skip
    assert batch.num_with_variance == 1 and len(batch.episodes) == 9
    check_episodes(batch, answers)


def test_every_rollout_has_its_own_valid_seed():
    config, seeds = step_config(max_resample_rounds=3), set()
    for seed in (500_016, 500_017, 2**31 - 1):
        engine = FakeEngine(dict.fromkeys(ANSWERS, RIGHT))
        roll_out(engine, question_batches(ANSWERS, 3), config, None, seed=seed, step=1)
        assert len(engine.seeds) == 4
        seeds |= set(engine.seeds)
    assert len(seeds) == 12
    for seed in seeds:
        settings.validate_sampling(settings.Sampling(seed=seed))


# Rewards


class FakeJudge:
    """Judge that gives fixed verdicts by answer, in random order once all have been requested."""

    def __init__(self, verdicts: dict[str, bool | None]):
        self.verdicts, self.requests = verdicts, []
        self._rng = np.random.default_rng(0)

    async def judge(self, question, golds, answer) -> Verdict:
        self.requests.append((question, golds, answer))
        async with asyncio.timeout(10):
            while len(self.requests) < len(self.verdicts):
                await asyncio.sleep(0)
        await asyncio.sleep(self._rng.uniform(0, 0.01))
        return Verdict(self.verdicts[answer], "", "judge")


def test_the_judge_decides_and_string_matching_never_replaces_it():
    verdicts = {
        "right": False, "that is right": None, "so correct": True, "wrong": None, "no": True,
        "right.": None, "not": False,
    }  # fmt: skip
    questions = next(question_batches("ab", 2))
    episodes = [episode_of(answer(text), group=i % 2) for i, text in enumerate(verdicts)]
    for match in ("SubEM", "EM"):
        judge, config = FakeJudge(verdicts), step_config(rewards=settings.Rewards(match=match))
        rewards = compute_rewards(episodes, questions, config, judge, step=0)
        assert judge.requests == [
            (questions[i % 2].question, questions[i % 2].answers, text)
            for i, text in enumerate(verdicts)
        ]
        for text, reward, episode in zip(verdicts, rewards, episodes, strict=True):
            correct = bool(verdicts[text])
            assert reward.known == (verdicts[text] is not None)
            assert reward.correct == correct, text
            assert reward.reward == pytest.approx(0.9 * correct + 0.1)
            assert reward == episode_reward(
                episode, ("right", "correct"), config.rewards, 0, correct
            )


def test_the_search_penalty_grows_over_the_warmup():
    """It grows from -p at step 0 to p at step `penalty_warmup`."""
    episodes = [
        episode_of(TEXT["text"], answer("right"), calls=[("text", "ok", 1.0)], group=1),
        episode_of(answer("right"), group=0),
        episode_of(TEXT["image"], answer("other"), calls=[("image", "failed", 1.0)], group=1),
    ]
    questions = [
        Question(id="a", question="?", images=(), answers=("other",)),
        Question(id="b", question="?", images=(), answers=("right",)),
    ]
    config = step_config(rewards=settings.Rewards(penalty_warmup=10, search_penalty=0.2))
    for step, penalty in ((0, -0.2), (5, 0.0), (10, 0.2), (99, 0.2)):
        rewards = compute_rewards(episodes, questions, config, None, step=step)
        assert [reward.reward for reward in rewards] == pytest.approx(
            [0.9 * (1 - penalty) + 0.1, 0.1, 0.1]
        )


def test_the_first_step_of_a_run_is_step_0_of_the_penalty():
    class SearchingEngine(FakeEngine):
        def rollout(self, examples, **keywords):
            for episode in super().rollout(examples, **keywords):
                episode.calls.append(ToolCall(turn=0, action="text_search", query="q", status="ok"))
                yield episode

    config = step_config(rewards=settings.Rewards(penalty_warmup=10, search_penalty=0.2))
    answers = {"a": BOTH, "b": RIGHT, "c": WRONG}
    batch = roll_out(
        SearchingEngine(answers), question_batches(answers, 3), config, None, seed=0, step=1
    )
    best = max(reward.reward for _, reward in batch.episodes)
    assert best == pytest.approx(0.9 * 1.2 + 0.1)


def test_one_judge_serves_all_steps(monkeypatch):
    """`compute_rewards` runs a new event loop each time; the judge is used in all of them."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret")
    server, config = ConstantJudge(), step_config()
    questions = next(question_batches("ab", 2))
    episodes = [episode_of(answer(text), group=i) for i, text in enumerate(("x", "y"))]
    route = Route("/v1/chat/completions", server.chat, methods=["POST"])
    with serve(Starlette(routes=[route])) as server.address:
        judge = server.judge()
        for step, correct in enumerate((True, False, True)):
            server.reply = json.dumps({"correct": correct, "reason": ""})
            rewards = compute_rewards(episodes, questions, config, judge, step=step)
            assert [reward.correct for reward in rewards] == [correct, correct]
    assert len(server.requests) == 6
