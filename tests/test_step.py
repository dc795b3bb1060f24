"""A step of training: its episodes, their rewards, what is measured of them, and how a run ends.

Engine and judge are stand-ins that answer as they are told; the command is run as a user runs it.
"""

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from starlette.applications import Starlette
from starlette.routing import Route

from mmsr1_jax import train
from mmsr1_jax.config import settings
from mmsr1_jax.data import Question, tiny_world, write_parquet
from mmsr1_jax.episodes.episode import Episode, Example, Segment, ToolCall
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.rewards.reward_function import Reward, episode_reward
from mmsr1_jax.tools.judge import Verdict
from mmsr1_jax.training import metrics
from tests.programs import environment
from tests.servers import serve
from tests.test_rewards import Server
from tests.test_train import ROOT

PROMPT, SHOWN = 5, 2  # tokens
TEXT = {
    "image": "<reason>r</reason><search><img></search>",
    "text": "<reason>r</reason><text_search>q</text_search>",
    "nonsense": "r",
}


def answer(text):
    return f"<reason>r</reason><answer>{text}</answer>"


def episode_of(
    *texts, sampled=3, seed=0, calls=(), end="answer", group=0, number=0, error=None, images=(),
    example=None,
):  # fmt: skip
    """Turns of `sampled` random tokens each, between them a forced token and what is shown."""
    rng = np.random.default_rng(seed)
    segments = [Segment("prompt", rng.integers(8, 500, PROMPT, np.int32))]
    for place in range(len(texts)):
        if place:
            segments.append(Segment("forced", rng.integers(8, 500, 1, np.int32)))
            segments.append(Segment("tool", rng.integers(8, 500, SHOWN, np.int32)))
        drawn = rng.normal(-6.2, 0.3, (2, sampled)).astype(np.float32)
        segments.append(Segment("model", rng.integers(8, 500, sampled, np.int32), *drawn))
    return Episode(
        example=example or Example(question="?"), group=group, index=number, segments=segments,
        images=list(images), turns=[parse(text) for text in texts],
        calls=[ToolCall(turn=i, action=f"{kind}_search", query=None, status=status, seconds=s)
               for i, (kind, status, s) in enumerate(calls)],
        end=end, error=error,
    )  # fmt: skip


def reward_of(value, correct=False, format=True):
    return Reward(value, correct, format, 0, 1.0)


# Rollouts


class Engine:
    """Yields episodes in a random order, with the answers that it is given by question; None: an
    episode that could not be run."""

    def __init__(self, answers: dict[str, Sequence[str | None]]):
        self.answers, self.seeds = answers, []
        self._rng = np.random.default_rng(0)

    def rollout(self, examples, *, rollouts, sampling):
        self.seeds.append(sampling.seed)
        episodes = []
        for group, example in enumerate(examples):
            assert len(self.answers[example.id]) == rollouts
            for place, text in enumerate(self.answers[example.id]):
                broken = {"end": "error", "error": "no picture"} if text is None else {}
                texts = [] if text is None else [answer(text)]
                episodes.append(
                    episode_of(*texts, group=group, number=group * rollouts + place,
                               example=example, **broken)
                )  # fmt: skip
        return iter([episodes[i] for i in self._rng.permutation(len(episodes))])


def questions_of(answers, a_step):
    questions = [
        Question(id=name, question=f"Which {name}?", images=(b"",), answers=("right", "correct"))
        for name in answers
    ]
    return iter([questions[i : i + a_step] for i in range(0, len(questions), a_step)])


def config_of(questions=3, rollouts=2, rewards=None, **objective):
    return settings.Config(
        objective=settings.Objective(**objective),
        run=settings.Run(prompts_per_step=questions, group_size=rollouts),
        rewards=rewards or settings.Rewards(),
    )


BOTH, RIGHT, WRONG = ("right", "wrong"), ("right", "correct"), ("wrong", "other")
STEP = {
    "a": BOTH, "b": RIGHT, "c": WRONG,
    "d": ("wrong", None), "e": ("wrong", "right"), "f": WRONG,
    "g": (None, None), "h": RIGHT, "i": RIGHT,
    "j": BOTH, "k": BOTH, "l": BOTH,
}  # fmt: skip


def rolled_out(config, answers=STEP, number=7):
    engine = Engine(answers)
    questions = questions_of(answers, config.run.prompts_per_step)
    rolled = train.roll_out(engine, questions, config, None, seed=11, step=number)
    return rolled, engine


def names(rolled):
    """The question of each group; its episodes and their rewards fit to it."""
    for group in rolled.groups:
        for episode, reward in group:
            assert rolled.questions[episode.group].id == episode.example.id
            assert reward.correct == (episode.answer in ("right", "correct"))
    return [group[0][0].example.id if group else None for group in rolled.groups]


def check_episodes(rolled, answers=STEP):
    """All that was asked is there, in order, with the rewards of the answers that were chosen."""
    given = [text for question in rolled.questions for text in answers[question.id]]
    asked = [question.id for question in rolled.questions for _ in answers[question.id]]
    assert [episode.example.id for episode, _ in rolled.episodes] == asked
    assert [rolled.questions[episode.group].id for episode, _ in rolled.episodes] == asked
    assert [episode.answer for episode, _ in rolled.episodes] == given
    assert [episode.end for episode, _ in rolled.episodes] == [
        "error" if text is None else "answer" for text in given
    ]
    for _, reward in (pair for pair in rolled.episodes if pair[0].end != "error"):
        assert reward.reward in (pytest.approx(1.0), pytest.approx(0.1))
    right = [reward.correct for _, reward in rolled.episodes]
    assert right == [text in ("right", "correct") for text in given]


def test_a_step_without_refill(capsys):
    rolled, engine = rolled_out(config_of())
    assert names(rolled) == ["a", "b", "c"] and len(engine.seeds) == 1
    assert [len(group) for group in rolled.groups] == [2, 2, 2]
    assert rolled.num_with_variance == 1 and len(rolled.questions) == 3
    check_episodes(rolled)
    # No group takes another's place, not even one that teaches where others do not.
    answers = {name: STEP[name] for name in "ghe"}
    rolled, _ = rolled_out(config_of(), answers)
    assert names(rolled) == [None, "h", "e"] and rolled.num_with_variance == 1
    check_episodes(rolled, answers)
    said = capsys.readouterr().err
    assert said.count("step 7, question g: no picture") == 2


@pytest.mark.parametrize(
    "refill, chosen, asked, spread",
    [
        (1, "aeb", 6, 2),  # two that teach; of the others those that came first
        (2, "aeb", 9, 2),
        (3, "aej", 12, 5),  # the last attempt finds more than are needed
        (9, "aej", 12, 5),  # enough: no more is asked for
    ],
)
def test_groups_without_spread_give_way_to_new_ones(refill, chosen, asked, spread, capsys):
    rolled, engine = rolled_out(config_of(max_resample_rounds=refill))
    assert names(rolled) == list(chosen)
    assert len(rolled.questions) == asked and len(rolled.episodes) == 2 * asked
    assert rolled.num_with_variance == spread
    assert len(set(engine.seeds)) == len(engine.seeds) == asked // 3
    check_episodes(rolled)
    assert [len(group) for group in rolled.groups] == [2, 2, 2]
    assert [e.end for e, _ in rolled.usable] == ["answer"] * 6
    assert "step 7, question d: no picture" in capsys.readouterr().err


def test_an_episode_that_could_not_be_run_is_in_no_group():
    """A question whose other episodes differ teaches still."""
    answers = {"m": ("right", None, "wrong"), "n": ("wrong", None, None), "o": (None, None, None)}
    rolled, _ = rolled_out(config_of(rollouts=3), answers)
    assert [[episode.answer for episode, _ in group] for group in rolled.groups] == [
        ["right", "wrong"], ["wrong"], [],
    ]  # fmt: skip
    assert rolled.num_with_variance == 1 and len(rolled.episodes) == 9
    check_episodes(rolled, answers)


def test_every_rollout_samples_by_another_seed():
    config, everything = config_of(max_resample_rounds=3), set()
    for seed in (500_016, 500_017, 2**31 - 1):
        engine = Engine(dict.fromkeys(STEP, RIGHT))
        train.roll_out(engine, questions_of(STEP, 3), config, None, seed=seed, step=1)
        assert len(engine.seeds) == 4
        everything |= set(engine.seeds)
    assert len(everything) == 12
    for seed in everything:  # the engine takes them, however large a step's own is
        settings.validate_sampling(settings.Sampling(seed=seed))


# Rewards


class Judging:
    """Says of each answer what it is told to, in a random order, once all were asked."""

    def __init__(self, verdicts):
        self.verdicts, self.asked = verdicts, []
        self._rng = np.random.default_rng(0)

    async def judge(self, question, golds, answer):
        self.asked.append((question, golds, answer))
        async with asyncio.timeout(10):
            while len(self.asked) < len(self.verdicts):
                await asyncio.sleep(0)
        await asyncio.sleep(self._rng.uniform(0, 0.01))
        return Verdict(self.verdicts[answer], "", "judge")


def test_a_judge_decides_and_matching_never_takes_its_place():
    said = {
        "right": False, "that is right": None, "so correct": True, "wrong": None, "no": True,
        "right.": None, "not": False,
    }  # fmt: skip
    asked = list(next(questions_of("ab", 2)))
    episodes = [episode_of(answer(text), group=i % 2) for i, text in enumerate(said)]
    for match in ("SubEM", "EM"):
        judge, config = Judging(said), config_of(rewards=settings.Rewards(match=match))
        found = train.compute_rewards(episodes, asked, config, judge, step=0)
        assert judge.asked == [
            (asked[i % 2].question, asked[i % 2].answers, text) for i, text in enumerate(said)
        ]
        for text, reward, episode in zip(said, found, episodes, strict=True):
            right = bool(said[text])
            assert reward.known == (said[text] is not None)
            assert reward.correct == right, text
            assert reward.reward == pytest.approx(0.9 * right + 0.1)
            assert reward == episode_reward(episode, ("right", "correct"), config.rewards, 0, right)


def test_without_a_judge_the_settings_and_the_step_decide():
    """With a warm-up, the penalty of a search grows from -p to p."""
    episodes = [
        episode_of(TEXT["text"], answer("right"), calls=[("text", "ok", 1.0)], group=1),
        episode_of(answer("right"), group=0),
        episode_of(TEXT["image"], answer("other"), calls=[("image", "failed", 1.0)], group=1),
    ]
    asked = [
        Question(id="a", question="?", images=(), answers=("other",)),
        Question(id="b", question="?", images=(), answers=("right",)),
    ]
    config = config_of(rewards=settings.Rewards(penalty_warmup=10, search_penalty=0.2))
    for step, penalty in ((0, -0.2), (5, 0.0), (10, 0.2), (99, 0.2)):
        found = train.compute_rewards(episodes, asked, config, None, step=step)
        assert [reward.reward for reward in found] == pytest.approx(
            [0.9 * (1 - penalty) + 0.1, 0.1, 0.1]
        )
    # A run's first step, which has number 1, is the penalty's step 0.
    answers = {"a": BOTH, "b": RIGHT, "c": WRONG}
    engine = Engine(answers)

    def searched(examples, **keywords):
        for episode in Engine.rollout(engine, examples, **keywords):
            episode.calls.append(ToolCall(turn=0, action="text_search", query="q", status="ok"))
            yield episode

    engine.rollout = searched
    rolled = train.roll_out(engine, questions_of(answers, 3), config, None, seed=0, step=1)
    best = max(reward.reward for _, reward in rolled.episodes)
    assert best == pytest.approx(0.9 * 1.2 + 0.1)


def test_one_judge_serves_all_steps(monkeypatch):
    """A real one: each step asks on an event loop of its own."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret")
    server, config = Server(), config_of()
    asked = next(questions_of("ab", 2))
    episodes = [episode_of(answer(text), group=i) for i, text in enumerate(("x", "y"))]
    route = Route("/v1/chat/completions", server.chat, methods=["POST"])
    with serve(Starlette(routes=[route])) as server.address:
        judge = server.judge()
        for step, correct in enumerate((True, False, True)):
            server.reply = json.dumps({"correct": correct, "reason": ""})
            found = train.compute_rewards(episodes, asked, config, judge, step=step)
            assert [reward.correct for reward in found] == [correct, correct]
    assert len(server.asked) == 6


# Figures


def test_figures_of_hand_made_episodes():
    image, text, nonsense = TEXT["image"], TEXT["text"], TEXT["nonsense"]
    made = [  # turns, searches, why it ended, reward, category
        ([image, text, answer("x")], [("image", "ok", 0.5), ("text", "ok", 1.5)], "answer",
         reward_of(0.91, True), "need"),
        ([text, text, answer("x")], [("text", "failed", 2.0), ("text", "empty", 1.0)], "answer",
         reward_of(0.0, format=False), "need"),
        ([answer("x")], [], "answer", reward_of(1.0, True), "free"),
        ([image, image], [("image", "refused", 0.0), ("image", "refused", 0.0)], "turns",
         reward_of(0.05, 0.5, format=False), "free"),
        ([image, text, nonsense], [("image", "failed", 3.0), ("text", "refused", 0.0)], "tokens",
         reward_of(0.0, format=False), ""),
        ([], [], "error", reward_of(0.7, True), "need"),
        ([image, answer("x")], [("image", "ok", 4.0)], "answer", reward_of(0.1), "both"),
        ([text], [("text", "ok", 7.0)], "error", reward_of(0.7, True), "gone"),
    ]  # fmt: skip
    episodes = [
        episode_of(*texts, calls=calls, end=end, seed=i)
        for i, (texts, calls, end, _, _) in enumerate(made)
    ]
    found = metrics.episode_metrics(episodes, [m[3] for m in made], [m[4] for m in made])
    # A turn is 3 tokens, what stands between two is 3 more, and the prompt is 5.
    turns = [3, 3, 1, 2, 3, 2]
    assert found == pytest.approx(
        {
            "errors": 2,
            "reward": (0.91 + 0.0 + 1.0 + 0.05 + 0.0 + 0.1) / 6,
            "accuracy": (1 + 0 + 1 + 0.5 + 0 + 0) / 6,
            "format": 3 / 6,
            "searches": 6 / 6,
            "search/any": 4 / 6,
            "search/text": 1 / 6,
            "search/image": 2 / 6,
            "search/both": 1 / 6,
            "search/none": 2 / 6,
            "turns": sum(turns) / 6,
            "tokens": sum(5 + 3 * n + 3 * (n - 1) for n in turns) / 6,
            "tokens_sampled": sum(3 * n for n in turns) / 6,
            "tool/calls": 6,
            "tool/failed": 2 / 6,
            "tool/refused": 3,
            "tool/seconds": (0.5 + 1.5 + 2.0 + 1.0 + 3.0 + 4.0) / 6,
            "end/answer": 4 / 6,
            "end/turns": 1 / 6,
            "end/tokens": 1 / 6,
            "accuracy_by_category/need": 1 / 2,
            "search_by_category/need": 2 / 2,
            "accuracy_by_category/free": 1.5 / 2,
            "search_by_category/free": 0 / 2,
            "accuracy_by_category/both": 0,
            "search_by_category/both": 1,
        },
        rel=1e-12,
    )


def test_figures_where_nothing_could_be_run_or_nothing_was_searched():
    broken = episode_of(end="error")
    assert metrics.episode_metrics([broken] * 3, [reward_of(0.0)] * 3, ["a"] * 3) == {"errors": 3}
    found = metrics.episode_metrics([episode_of(answer("x"))], [reward_of(1.0, True)], [""])
    assert found["tool/calls"] == found["tool/failed"] == found["tool/seconds"] == 0
    assert found["search/none"] == found["accuracy"] == 1 and not any(
        "_by_category/" in name for name in found
    )


# The command


def run(workdir, policy, *arguments, environment):
    """Two questions a step, and no tools."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(file, "png")
    data = workdir.parent / "q.parquet"
    write_parquet(
        data,
        [Question(id=f"q{i}", question="Which?", images=(file.getvalue(),), answers=("x",))
         for i in range(3)],
    )  # fmt: skip
    command = [
        sys.executable, "-m", "mmsr1_jax.train", "--config=configs/tiny.py", f"--model={policy}",
        f"--workdir={workdir}", f"--config.data.train=('{data}',)",
        "--config.tools.text=none", "--config.tools.image=none", "--config.turns.max_new_tokens=16",
        "--config.turns.min_turn_tokens=16", "--config.rollout.lanes=4",
        "--config.rollout.decode_batch_size=4",
        "--config.rollout.precompile=False", "--config.update.pack_windows=16",
        "--config.update.micro_batch_rows=1", "--config.objective.entropy_coef=0.01",
        "--config.objective.num_minibatches=2", "--config.run.prompts_per_step=2",
        "--config.run.group_size=2",
        "--config.run.save_every=0", "--config.run.log_to=", *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.proof
def test_updates_that_are_not_finite_end_the_run(tmp_path):
    """Counted over the updates of a step and over steps."""
    policy, workdir = tmp_path / "policy", tmp_path / "run"
    shutil.copytree(tiny_world.POLICY, policy)
    weights = policy / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, weights, {"format": "pt"})
    done = run(
        workdir, policy, "--config.update.max_nonfinite_updates=3", environment=environment()
    )
    assert done.returncode == 1, done.stderr[-3000:]
    (path,) = workdir.glob("*.npz")
    message = "error: step 2: the loss or gradient of 3 updates in a row was not finite"
    assert message in done.stderr and f"Their micro-batches are in {path}" in done.stderr
    with np.load(path) as arrays:
        batches = {name.split(".")[0] for name in arrays}
        assert len(batches) > 1  # of both updates of the step
        for number in batches:
            mask = arrays[f"{number}.mask"]
            assert mask.any() and np.isnan(arrays[f"{number}.rollout_logprobs"][mask]).all()
            rows = arrays[f"{number}.rows.tokens"]
            columns = arrays[f"{number}.logit_columns"][mask] + 1
            places = np.nonzero(mask)[0], columns
            np.testing.assert_array_equal(rows[places], arrays[f"{number}.targets"][mask])
    (line,) = metrics.read(workdir / "metrics.jsonl")
    assert line["step"] == 1 and line["update/nonfinite"] == 2 and line["update/finite"] == 0
    config = json.loads((workdir / "config.json").read_text())
    assert "max_nonfinite_updates" in json.dumps(config)
    assert not (workdir / "policy").exists()


@pytest.mark.proof
def test_eight_devices_train(tmp_path):
    mesh = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.run.steps=2")
    done = run(tmp_path / "run", tiny_world.POLICY, *mesh, environment=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2
    for line in lines:
        assert line["errors"] == 0 and line["update/finite"] == 1
        assert 0 < line["update/rollout_logprob_diff_abs"] < 1e-4
        assert line["update/gradient_norm"] > 0
        assert line["update/log_ratio_abs"] > 1e-6  # the second update is off policy
    assert (tmp_path / "run" / "policy" / "config.json").is_file()
