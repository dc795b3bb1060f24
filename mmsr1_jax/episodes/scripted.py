"""Episodes replayed from scripted turns, executing their tool calls.

Search results are formatted exactly as by the rollout engine, so a policy that is fine-tuned on
such episodes sees the same format in its rollouts.
"""

import asyncio
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mmsr1_jax.episodes import turns
from mmsr1_jax.episodes.episode import Episode, Example, Segment
from mmsr1_jax.episodes.rules import Reply, Rules
from mmsr1_jax.episodes.turn_machine import Search, TurnMachine
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools import Tool

_MAX_CONCURRENCY = 64


@dataclasses.dataclass(frozen=True)
class ScriptedEpisode:
    """A scripted episode: a question and the policy's turns.

    Attributes:
      example: The question.
      texts: Texts of the policy's turns.
      index: Local index that its searches use, if any.
    """

    example: Example
    texts: Sequence[str]
    index: pathlib.Path | None = None


def replay(
    scripts: Iterable[ScriptedEpisode],
    processor: Processor,
    rules: Rules,
    tools: Mapping[str, Tool],
) -> Iterator[Episode]:
    """Yield the episode of each script, in order.

    An episode with an unusable question or image has `end == "error"`. Turns after the end of an
    episode are dropped.
    """
    machine = TurnMachine(rules, processor)
    numbered = enumerate(scripts)
    with asyncio.Runner() as runner:
        while batch := [pair for pair, _ in zip(numbered, range(_MAX_CONCURRENCY), strict=False)]:
            yield from runner.run(_replay_all(batch, processor, machine, tools))


async def _replay_all(
    batch: Sequence[tuple[int, ScriptedEpisode]],
    processor: Processor,
    machine: TurnMachine,
    tools: Mapping[str, Tool],
) -> list[Episode]:
    return await asyncio.gather(
        *(_replay(index, script, processor, machine, tools) for index, script in batch)
    )


async def _replay(
    index: int,
    script: ScriptedEpisode,
    processor: Processor,
    machine: TurnMachine,
    tools: Mapping[str, Tool],
) -> Episode:
    try:
        prompt = machine.rules.initial_prompt(script.example)
    except Exception as error:  # an unusable image or question
        return machine.fail(script.example, error, group=index, index=index)
    episode = machine.start(script.example, prompt, group=index, index=index)
    for text in script.texts:
        tokens = np.array(processor.encode_text(text), np.int32)
        logprobs = np.zeros(len(tokens), np.float32)
        episode.segments.append(Segment("model", tokens, logprobs, logprobs))
        step = machine.finish_turn(episode, turns.parse(text))
        if isinstance(step, Search):
            reply = await _execute(machine, step, tools)
            step = machine.add_reply(episode, step, reply)
        if step is None:
            return episode
    machine.end(episode, "turns")
    return episode


async def _execute(machine: TurnMachine, search: Search, tools: Mapping[str, Tool]) -> Reply:
    """Call the tool of a search, and return the user turn with its results."""
    timeout = machine.rules.tool_timeout
    observation = error = None
    try:
        async with asyncio.timeout(timeout):
            observation = await machine.call(search, tools[search.query.action], timeout)
    except Exception as raised:
        error = raised
    return machine.reply(search, observation, error, seconds=0.0)
