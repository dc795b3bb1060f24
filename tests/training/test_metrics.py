"""Metrics of episodes, against values computed by hand."""

import pytest

from mmsr1_jax.training import metrics
from tests.episode_factory import TEXT, answer, episode_of, reward_of


def metrics_of(*arguments):
    return metrics.episode_metrics(metrics.episode_facts(*arguments))


def test_metrics_equal_hand_computed_values():
    image, text, nonsense = TEXT["image"], TEXT["text"], TEXT["nonsense"]
    cases = [  # turns, calls, end, reward, category
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
        for i, (texts, calls, end, _, _) in enumerate(cases)
    ]
    rewards = [reward for _, _, _, reward, _ in cases]
    categories = [category for _, _, _, _, category in cases]
    values = metrics_of(episodes, rewards, categories)
    # A prompt has 5 tokens, a turn 3, and 3 more stand between two turns.
    turns = [3, 3, 1, 2, 3, 2]
    assert values == pytest.approx(
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


def test_without_a_runnable_episode_only_errors_are_counted():
    episode = episode_of(end="error")
    assert metrics_of([episode] * 3, [reward_of(0.0)] * 3, ["a"] * 3) == {"errors": 3}


def test_without_a_search_the_tool_metrics_are_zero():
    values = metrics_of([episode_of(answer("x"))], [reward_of(1.0, True)], [""])
    assert values["tool/calls"] == values["tool/failed"] == values["tool/seconds"] == 0
    assert values["search/none"] == values["accuracy"] == 1
    assert not any("_by_category/" in name for name in values)
