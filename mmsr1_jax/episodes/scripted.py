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
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools import Query, Tool

_AT_ONCE = 64


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
    stories: Iterable[ScriptedEpisode],
    processor: Processor,
    rules: Rules,
    tools: Mapping[str, Tool],
) -> Iterator[Episode]:
    """Yield an episode for each story, in order.

    An episode with an unusable question or image has `end == "error"`. Turns after the end of an
    episode are dropped.
    """
    stories = enumerate(stories)
    with asyncio.Runner() as runner:
        while batch := [story for story, _ in zip(stories, range(_AT_ONCE), strict=False)]:
            yield from runner.run(_together(batch, processor, rules, tools))


async def _together(batch, processor, rules, tools) -> list[Episode]:
    return await asyncio.gather(
        *(_episode(number, story, processor, rules, tools) for number, story in batch)
    )


async def _episode(number: int, story: ScriptedEpisode, processor, rules: Rules, tools) -> Episode:
    episode = Episode(example=story.example, group=number, index=number)
    try:
        prompt = rules.initial_prompt(story.example)
    except Exception as error:  # an unusable image or question
        episode.end, episode.error = "error", f"{type(error).__name__}: {error}"
        return episode
    episode.segments.append(Segment("prompt", prompt.tokens))
    episode.images += prompt.images
    for text in story.texts:
        tokens = np.array(processor.encode_text(text), np.int32)
        nothing = np.zeros(len(tokens), np.float32)
        episode.segments.append(Segment("model", tokens, nothing, nothing))
        episode.turns.append(turns.parse(text))
        step = rules.next_step(episode.turns, episode.calls, cut=False)
        if step.kind == "end":
            episode.end = step.end
            return episode
        closing = processor.closing()
        room = rules.token_budget(episode, len(closing))
        if step.kind == "search":
            reply = await _searched(episode, rules, tools, room)
        else:
            reply = rules.notice(step, episode, room)
        if reply.call is not None:
            episode.calls.append(reply.call)
        if reply.prompt is None:
            episode.end = "tokens"
            return episode
        episode.segments.append(Segment("forced", np.array(closing, np.int32)))
        episode.segments.append(Segment("tool", reply.prompt.tokens))
        episode.images += reply.prompt.images
    episode.end = "turns"
    return episode


async def _searched(episode: Episode, rules: Rules, tools, room: int):
    turn, example = episode.turns[-1], episode.example
    query = Query(
        action=turn.action,
        text=turn.payload,
        question=example.question,
        images=tuple(example.images),
        example=example.id,
    )
    observation = error = None
    try:
        async with asyncio.timeout(rules.tool_timeout):
            observation = await rules.call_tool(tools[turn.action], query, rules.tool_timeout)
    except Exception as raised:
        error = raised
    turn_number = len(episode.turns) - 1
    try:
        return rules.tool_reply(query, example, turn_number, room, observation, error, seconds=0.0)
    except Exception as unforeseen:  # a tool may return objects that raise
        return rules.tool_reply(query, example, turn_number, room, None, unforeseen, seconds=0.0)
