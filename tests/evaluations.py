"""Outcomes and lines of evaluation episodes, and the command `evaluate`, for several tests."""

import dataclasses
import sys
from typing import Any

from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.evaluation.metrics import Outcome
from tests import programs

CONFIG = """
from mmsr1_jax.config import Buckets, Config, Rollout, Tools, Turns

def get_config():
    return Config(
        buckets=Buckets(image_windows=(4, 16, 64)),
        rollout=Rollout(lanes=4, decode_batch_size=4, prefill_buckets=(64, 256), prefill_tokens=256,
                        image_cache_tokens=8192, precompile=False),
        turns=Turns(max_new_tokens=48, max_episode_tokens=4096, min_turn_tokens=32,
                    max_result_tokens=768),
        tools=Tools(max_result_chars=300, max_pixels=112 * 112),
    )
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mmsr1_jax.evaluate", *map(str, arguments)]


def run(arguments: list[str]) -> str:
    """Run a command that must succeed, and return its output."""
    done = programs.run(arguments, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def outcome(index: int, correct: bool, made: str = "", **fields: Any) -> Outcome:
    """Return an outcome; `made` has a letter per search, i or t, in upper case if it failed."""
    letters = {"image_search": "i", "text_search": "t"}
    defaults = {
        "workflow": "on_demand", "sample": 0, "id": f"q{index}", "question": f"What is {index}?",
        "source": "s", "category": "", "correct": {"em": correct, "subem": correct, "judge": None,
        "score": None}, "reward": float(correct), "format": True,
        "made": {action: made.lower().count(letter) for action, letter in letters.items()},
        "failed": {action: made.count(letter.upper()) for action, letter in letters.items()},
        "refused": 0, "allowed": 2, "turns": 1 + len(made), "tokens": 100, "tokens_sampled": 10,
        "end": "answer",
    }  # fmt: skip
    return Outcome(index=index, **defaults | fields)


def judged(index: int, em: bool, judge: bool | None) -> Outcome:
    """Return an outcome with a judge's verdict."""
    correct = {"em": em, "subem": em, "judge": judge, "score": None}
    return dataclasses.replace(outcome(index, em), correct=correct)


def line(index: int = 0, answer: str = "Paris", **fields: Any) -> dict[str, Any]:
    """Return a line of `episodes.jsonl`."""
    defaults = {
        "id": f"q{index}", "question": "Where?", "group": index, "index": index, "sample": 0,
        "workflow": "direct", "end": "answer", "error": None, "answer": answer,
        "turns": [dataclasses.asdict(Turn("answer", answer, "r", None))], "calls": [],
        "images": ["images/a.png"], "segments": [], "answers": ["paris"], "category": "c",
        "source": "s", "reward": {"reward": 1.0, "format": True}, "allowed": 0, "tokens": 9,
        "tokens_sampled": 4, "em": None, "subem": None, "judge": None,
    }  # fmt: skip
    return defaults | fields


def call(action: str, status: str) -> dict[str, Any]:
    return {"turn": 0, "action": action, "query": None, "status": status}
