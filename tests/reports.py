"""Episodes and files that the tests of the report read."""

import dataclasses
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from mmsr1_jax.config import Rewards
from mmsr1_jax.episodes import turns
from mmsr1_jax.episodes.episode import Episode, Example, Segment, ShownResult, ToolCall
from mmsr1_jax.evaluation.metrics import CRITERIA, Outcome
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.training.sft_dataset import to_line
from tests.programs import run_module

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!--"
    " javascript:alert(1)"
)
PAGE = "https://example.org/bridge?a=1&b=%3Cscript%3E"
CATEGORIES = ("search_free", "search_required", "<b>other</b>")
METRICS = (
    "reward", "accuracy", "searches", "turns", "tokens", "tokens_sampled",
    "accuracy_by_category/free", "search/any", "search/text", "search/image", "search/both",
    "search/none", "search_by_category/free", "time/rollout", "time/update", "time/step",
)  # fmt: skip
SUBJECTS = ("bridge", "tower", "cathedral", "stadium", "zürich", "canal")
Reply = tuple[list[Any], tuple[ShownResult, ...]]  # parts of a reply, and the results in it


def patches(processor: Processor, seed: int, side: int = 112) -> Patches:
    """Return a random image as patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = PIL.Image.fromarray(pixels).resize((side, side), PIL.Image.Resampling.NEAREST)
    return processor.images(image)


def make_episode(
    processor: Processor,
    index: int,
    *,
    texts: Sequence[str],
    replies: Sequence[Reply] = (),
    question: str = "Q",
    images: Sequence[Patches] = (),
    rng: np.random.Generator | None = None,
) -> Episode:
    """Return an episode of given turns as the engine records it.

    Args:
      processor: Processor of the policy.
      index: Index of the episode and its question.
      texts: Text of each turn.
      replies: Reply to each turn except the last.
      question, images: Question of the episode.
      rng: Source of log-probs.
    """
    rng = rng or np.random.default_rng(0)
    example = Example(id=f"q{index}", question=question)
    episode = Episode(example=example, group=index, index=index)
    prompt = processor.first_turn([*images, question])
    episode.segments.append(Segment("prompt", prompt.tokens))
    episode.images += prompt.images
    for turn_index, text in enumerate(texts):
        tokens = np.array(processor.encode_text(text), np.int32)
        logprobs = -rng.exponential(0.7, len(tokens)).astype(np.float32)
        episode.segments.append(Segment("model", tokens, logprobs, logprobs))
        episode.turns.append(turns.parse(text))
        if turn_index < len(texts) - 1:
            turn = episode.turns[-1]
            parts, results = replies[turn_index]
            reply = processor.next_turn(parts)
            call = ToolCall(
                turn=turn_index, action=turn.action, query=turn.payload, status="ok", seconds=0.25,
                num_results=2, num_shown=2, notes=("result 2: cut",), results=results,
            )  # fmt: skip
            episode.calls.append(call)
            closing = np.array(processor.closing(), np.int32)
            episode.segments += [Segment("forced", closing), Segment("tool", reply.tokens)]
            episode.images += reply.images
    episode.end = "answer"
    return episode


def make_line(
    episode: Episode, processor: Processor, folder: pathlib.Path, answers: list[str], **fields: Any
) -> dict[str, Any]:
    """Return the episode's line in a file of `folder`, and write its images."""
    folder.mkdir(exist_ok=True)
    reward = reward_function.episode_reward(episode, answers, Rewards())
    line = to_line(episode, processor, folder, folder.parent / "images")
    return line | {"answers": answers, "reward": dataclasses.asdict(reward)} | fields


def image_reply(processor: Processor, seed: int, title: str) -> Reply:
    parts = ["<information>\n[Image Search Results]\n1. image: ", patches(processor, seed, 56),
             f"\ntitle: {title}\n2. image: ", patches(processor, seed + 1, 56),
             "\ntitle: another\n</information>\nGo on."]  # fmt: skip
    return parts, (ShownResult(title=title, images=(0,)), ShownResult(title="another", images=(1,)))


def text_reply(link: str, text: str) -> Reply:
    parts = [f"<information>\n[Text Search Results]\n1. link: {link}\nsummary: {text}\n"
             "2. link: ftp://example.org/x\nsummary: second\n</information>\nGo on."]  # fmt: skip
    second = ShownResult(link="ftp://example.org/x", text="second")
    return parts, (ShownResult(link=link, text=text), second)


def make_outcome(workflow: str, index: int, rng: np.random.Generator) -> Outcome:
    correct = bool(rng.integers(2))
    return Outcome(
        workflow=workflow, index=index, sample=0, id=str(index), question="?", source="s",
        category=CATEGORIES[index % 2], correct=dict.fromkeys(CRITERIA) | {"em": correct},
        reward=0.5, format=True, made={"image_search": 1, "text_search": int(correct)},
        failed={"image_search": 0, "text_search": 0}, refused=0, allowed=2, turns=2, tokens=100,
        tokens_sampled=20, end="answer",
    )  # fmt: skip


def run_report(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module(*arguments, module="mmsr1_jax.report")
