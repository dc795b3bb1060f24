"""The scheduler of a rollout: continuous batching of episodes over the lanes of an engine.

while examples or active episodes remain:
    collect tool responses              they become pending tokens of their lanes
    admit episodes into free lanes      a group's prompt is written once and forked to the others
    extend lanes with pending tokens
    decode some steps of ready lanes    a turn that ends starts a search, gets a reply or frees
                                        the lane
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from mmsr1_jax.config import Config
from mmsr1_jax.episodes import turns
from mmsr1_jax.episodes.episode import Episode, Example, Segment
from mmsr1_jax.episodes.rules import Reply, Rules
from mmsr1_jax.models.qwen2_5_vl import mrope_positions
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.rollout import forcing
from mmsr1_jax.rollout.device import Device, PrefillChunk
from mmsr1_jax.rollout.sampler import Sampling
from mmsr1_jax.rollout.stop import StopTable
from mmsr1_jax.tools import Query, Tool
from mmsr1_jax.tools.tool_executor import Call, ToolExecutor

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_DRAWN = ("tokens", "logprobs", "sampling_logprobs")
_NOTHING = np.zeros(0, np.int32)

# Callback for the progress of an episode. The event is "turn" (the policy's turn has ended),
# "reply" (the user turn after it has been added) or "end".
OnEvent = Callable[[Episode, str], None]

# Callback for newly sampled tokens, int32[n]: the next tokens of the episode's current turn. They
# become part of the episode when the turn ends.
OnTokens = Callable[[Episode, np.ndarray], None]

# Source of examples: returns up to the given number of next examples with their indices, possibly
# none for now. It is called in each round of the loop, and may raise an exception to end it.
NextExamples = Callable[[int], list[tuple[int, Example]]]


class Engine(Protocol):
    """Interface of `rollout.engine.Engine` that the scheduler uses."""

    config: Config
    processor: Processor
    device: Device
    tools: Mapping[str, Tool]
    stops: StopTable
    token_bytes: Sequence[bytes]
    image_token: int
    merge_size: int
    pool: concurrent.futures.ThreadPoolExecutor
    tool_executor: ToolExecutor


@dataclasses.dataclass(eq=False)
class _Group:
    """An example and its rollouts.

    Attributes:
      index: Index of the example.
      example: The example.
      waiting: Numbers of the episodes that have no lane yet.
      prompt: Future of the tokenized prompt, computed in the pool.
      lanes: Lanes that begin with the prompt, any of which can be forked.
      hidden: Final hidden state of the last prompt token, set after prefill.
      position: M-RoPE position of the token after the prompt.
    """

    index: int
    example: Example
    waiting: collections.deque[int]
    prompt: concurrent.futures.Future
    lanes: set[int] = dataclasses.field(default_factory=set)
    hidden: jax.Array | None = None
    position: int = 0


@dataclasses.dataclass(eq=False)
class _ActiveEpisode:
    """An active episode and its lane.

    Attributes:
      episode: Record of the episode so far.
      group: Group of the episode.
      lane: Lane of the episode.
      to_write: Pieces still to be written into the lane, in reverse order.
      position: M-RoPE position of the next token.
      length: Number of tokens in the lane.
      drawn: Number of tokens sampled in all turns.
      left: Remaining token budget of the current turn.
      stop_state: State of the stop automaton.
      parts: Outputs of the decoding calls of the current turn, by the names in `_DRAWN`.
      opened: Tokens of the current turn up to a forced opening tag; None if none was forced.
      unwritten: Forced tokens at the end of the episode that are not in the lane yet.
      waited: Seconds spent on tools.
    """

    episode: Episode
    group: _Group
    lane: int
    to_write: list[PrefillChunk] = dataclasses.field(default_factory=list)
    position: int = 0
    length: int = 0
    drawn: int = 0
    left: int = 0
    stop_state: int = 0
    parts: dict[str, list] = dataclasses.field(default_factory=lambda: {n: [] for n in _DRAWN})
    opened: np.ndarray | None = None
    unwritten: np.ndarray = dataclasses.field(default_factory=lambda: _NOTHING)
    waited: float = 0.0


class Scheduler:
    """Scheduler of one call of `Engine.rollout_part`, with the state of its loop."""

    def __init__(
        self,
        engine: Engine,
        rules: Rules,
        next_examples: NextExamples,
        rollouts: int,
        sampling,
        on_event: OnEvent,
        look_again: float | None,
        on_tokens: OnTokens,
    ):
        self._device, self._rules = engine.device, rules
        self._engine, self._on_event, self._on_tokens = engine, on_event, on_tokens
        self._settings = engine.config
        rows = engine.config.rollout.decode_batch_size
        self._seed = sampling.seed
        self._sampling = Sampling.uniform(
            rows, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )
        self._next_examples, self._look_again = next_examples, look_again
        self._rollouts = rollouts
        # Number of examples to prepare in advance: enough for all lanes, and one more.
        self._ahead = math.ceil(engine.config.rollout.lanes / rollouts) + 1
        self._groups: collections.deque[_Group] = collections.deque()
        self._free = set(range(engine.config.rollout.lanes))
        self._holder: dict[int, _Group] = {}  # group whose prompt a lane begins with
        self._live: dict[int, _ActiveEpisode] = {}
        # Lanes ready to decode, the longest idle first.
        self._turn: collections.deque[int] = collections.deque()
        self._ended: list[Episode] = []

    def episodes(self) -> Iterator[Episode]:
        while True:
            self._look_ahead()
            if not self._groups and not self._live:
                return
            self._take_answers(wait=self._must_wait_for_tools())
            admitted = self._admit()
            self._write()
            self._fork(admitted)
            self._decode()
            yield from self._ended
            self._ended.clear()

    # Admission

    def _look_ahead(self) -> None:
        """Start preparing the prompts of the next examples in the pool."""
        for number, example in self._next_examples(self._ahead - len(self._groups)):
            numbers = range(number * self._rollouts, (number + 1) * self._rollouts)
            prompt = self._engine.pool.submit(self._rules.initial_prompt, example)
            self._groups.append(_Group(number, example, collections.deque(numbers), prompt))

    def _must_wait_for_tools(self) -> bool:
        """Return whether all active episodes wait for tools and no other can be admitted."""
        waiting = len(self._engine.tool_executor)
        return waiting > 0 and waiting == len(self._live) and not (self._free and self._groups)

    def _admit(self) -> list[_ActiveEpisode]:
        """Assign free lanes to episodes; return those to fork from their group's prompt."""
        forked = []
        while self._groups and self._free:
            group = self._groups[0]
            if not group.prompt.done() and (self._turn or self._unwritten()):
                break  # other lanes have work to do in the meantime
            try:
                prompt = group.prompt.result()
            except Exception as error:  # an unusable image or question
                self._fail(self._groups.popleft(), error)
                self._look_ahead()
                continue
            live = self._place(group, prompt)
            if group.position == 0:
                self._device.clear(live.lane)
                live.position = group.position = self._to_write(live, prompt, position=0)
            else:
                forked.append(live)
            if not group.waiting:
                self._groups.popleft()
                self._look_ahead()
        return forked

    def _place(self, group: _Group, prompt: Prompt) -> _ActiveEpisode:
        """Assign a free lane to the group's next episode, preferably one with its prompt."""
        lane = min(self._free & group.lanes or self._free)
        self._free.remove(lane)
        if lane in self._holder and self._holder[lane] is not group:
            self._holder[lane].lanes.discard(lane)
        self._holder[lane] = group
        number = group.waiting.popleft()
        episode = Episode(example=group.example, group=group.index, index=number)
        episode.segments.append(Segment("prompt", prompt.tokens))
        episode.images += prompt.images
        self._live[lane] = live = _ActiveEpisode(episode, group, lane)
        return live

    def _fail(self, group: _Group, error: Exception) -> None:
        for number in group.waiting:
            episode = Episode(example=group.example, group=group.index, index=number)
            episode.end, episode.error = "error", f"{type(error).__name__}: {error}"
            self._on_event(episode, "end")
            self._ended.append(episode)

    def _fork(self, admitted: list[_ActiveEpisode]) -> None:
        for live in admitted:
            group, length = live.group, len(live.episode)
            source = live.lane if live.lane in group.lanes else min(group.lanes)
            self._device.fork(source, live.lane, length, group.hidden)
            group.lanes.add(live.lane)
            live.position = group.position
            self._begin_turn(live)

    # Writing into lanes

    def _to_write(self, live: _ActiveEpisode, prompt: Prompt, position: int) -> int:
        """Split tokens into pieces of the bucket table; return the M-RoPE position after them."""
        token, merge = self._engine.image_token, self._engine.merge_size
        positions, after = mrope_positions(
            prompt.tokens, prompt.grids, image_token_id=token, merge_size=merge, start=position
        )
        sizes = [len(image.values) // merge**2 for image in prompt.images]
        owner = np.repeat(np.arange(len(sizes)), sizes)  # image of each image token
        is_image = prompt.tokens == token
        begin, pieces = 0, []
        while begin < len(prompt.tokens):
            end = begin + self._device.piece_length(len(prompt.tokens) - begin)
            seen, inside = int(is_image[:begin].sum()), is_image[begin:end]
            images = np.unique(owner[seen : seen + inside.sum()])
            skipped = seen - sum(sizes[: images[0]]) if len(images) else 0
            index = np.where(inside, np.cumsum(inside) - 1 + skipped, -1)
            pieces.append(
                PrefillChunk(
                    lane=live.lane,
                    tokens=prompt.tokens[begin:end],
                    positions=positions[:, begin:end],
                    images=tuple(prompt.images[number] for number in images),
                    image_index=index,
                )
            )
            begin = end
        live.to_write = pieces[::-1]
        return after

    def _unwritten(self) -> list[_ActiveEpisode]:
        return [live for live in self._live.values() if live.to_write]

    def _write(self) -> None:
        """Write all pending tokens, and begin the turns of the lanes written to."""
        while todo := self._unwritten():
            hidden = self._device.extend([live.to_write.pop() for live in todo])
            for live, last in zip(todo, hidden, strict=True):
                if not live.to_write:
                    if live.group.hidden is None:
                        live.group.hidden = last
                        live.group.lanes.add(live.lane)
                    self._begin_turn(live)

    def _begin_turn(self, live: _ActiveEpisode) -> None:
        limits = self._rules.limits
        live.left = min(limits.max_new_tokens, limits.max_episode_tokens - len(live.episode))
        if (
            self._rules.forced_action(live.episode) is not None
        ):  # reserve tokens for a tag and its content
            live.left -= limits.min_turn_tokens // (2 if live.opened is None else 4)
        live.stop_state, live.length = 0, len(live.episode)
        live.parts = {name: [] for name in _DRAWN}
        self._turn.append(live.lane)

    # Decoding

    def _decode(self) -> None:
        if not self._turn:
            return
        count = min(len(self._turn), self._settings.rollout.decode_batch_size)
        chosen = [self._live[self._turn.popleft()] for _ in range(count)]
        chosen.sort(key=lambda live: live.length)  # see `cached_attention`
        rows = [
            {
                "lane": live.lane,
                "stop_state": live.stop_state,
                "position": live.position,
                "episode": live.episode.index,
                "drawn": live.drawn,
                "left": live.left,
            }
            for live in chosen
        ]
        # Return once an eighth of the rows have stopped, so that their tools can start and other
        # lanes can take their place.
        drawn = self._device.decode(
            rows, self._sampling, seed=self._seed, leave_at=count - max(1, count // 8)
        )
        for row, live in enumerate(chosen):
            n = int(drawn.count[row])
            for name in _DRAWN:
                live.parts[name].append(getattr(drawn, name)[row, :n])
            self._on_tokens(live.episode, live.parts["tokens"][-1])
            live.position += n
            live.length += n
            live.drawn += n
            live.left -= n
            live.stop_state = int(drawn.stop_state[row])
            if live.left > 0 and live.stop_state < self._engine.stops.running:
                self._turn.append(live.lane)
            else:
                self._end_turn(live)

    def _end_turn(self, live: _ActiveEpisode) -> None:
        """Parse the turn that the policy wrote, and take the next step of the episode."""
        values = {name: np.concatenate(parts) for name, parts in live.parts.items()}
        episode, processor = live.episode, self._engine.processor
        ended_by = self._engine.stops.reason(live.stop_state)
        tokens = values["tokens"][:-1] if ended_by in END_TOKENS else values["tokens"]
        begun, live.opened = live.opened, None
        turn = turns.parse(processor.decode([*(() if begun is None else begun), *tokens]))
        wanted = self._rules.forced_action(episode)
        if wanted is None or turn.action == wanted:
            episode.segments.append(Segment("model", **values))
        else:
            turn, ended_by = self._force(live, values, tokens, begun, wanted), ""
            if turn is None:
                return
        episode.turns.append(turn)
        self._on_event(episode, "turn")
        step = self._rules.next_step(episode.turns, episode.calls, cut=ended_by is None)
        if step.kind == "end":
            self._end(live, step.end)
            return
        closing = processor.closing()
        closing = closing[1:] if ended_by == END_TOKENS[0] else closing
        room = self._rules.token_budget(episode, len(closing))
        if step.kind == "search":
            self._search(live, closing, room)
        else:
            self._reply(live, closing, self._rules.notice(step, episode, room))

    def _force(
        self,
        live: _ActiveEpisode,
        values: dict,
        tokens: np.ndarray,
        begun: np.ndarray | None,
        wanted,
    ) -> turns.Turn | None:
        """Make a turn take the prescribed action, see `forcing`.

        Args:
          live: The active episode.
          values: Sampled tokens and log-probs, by the names in `_DRAWN`.
          tokens: Sampled tokens, without an end token.
          begun: Earlier tokens of the turn, up to a forced opening tag; None if none was forced.
          wanted: Prescribed action.

        Returns:
          The turn, or None if the policy has to complete it first.
        """
        episode, processor = live.episode, self._engine.processor
        pieces = [self._engine.token_bytes[token] for token in tokens]
        text = b"".join(pieces).decode("latin-1")  # one character per byte; tags are ASCII
        if begun is None:
            stay, follows = forcing.opened(text, wanted)
        else:
            stay, follows = forcing.closed(text, wanted, episode.example.question)
        ends = np.cumsum([len(piece) for piece in pieces])
        kept = int(np.searchsorted(ends, stay, side="right"))  # whole tokens; the rest is forced
        rest = (
            text[ends[kept - 1] if kept else 0 : stay].encode("latin-1").decode("utf-8", "replace")
        )
        forced = np.array(processor.encode_text(rest + follows), np.int32)
        if (
            begun is not None
            and len(forced) > self._rules.limits.max_episode_tokens - len(episode) - kept
        ):
            _, follows = forcing.closed(text, wanted, "")  # no room for the question as a query
            forced = np.array(processor.encode_text(rest + follows), np.int32)
        dropped = len(values["tokens"]) - kept
        if kept:
            values = {name: value[:kept] for name, value in values.items()}
            episode.segments.append(Segment("model", **values))
        if dropped:
            live.position -= dropped
            live.length -= dropped
            self._device.fork(live.lane, live.lane, live.length, live.group.hidden)
        episode.segments.append(Segment("forced", forced))
        written = np.concatenate([_NOTHING if begun is None else begun, tokens[:kept], forced])
        room = self._rules.limits.max_episode_tokens - len(episode)
        if (
            begun is None
            and wanted != "image_search"
            and room > self._rules.limits.min_turn_tokens // 4
        ):
            live.opened = written
            live.position = self._to_write(live, Prompt(forced, ()), live.position)
            return None
        live.unwritten = forced
        return turns.parse(processor.decode(written))

    def _search(self, live: _ActiveEpisode, closing: list[int], room: int) -> None:
        """Submit the search requested by the turn to its tool."""
        episode, turn, limits = live.episode, live.episode.turns[-1], self._settings.tools
        tool, number = self._engine.tools.get(turn.action), len(episode.turns) - 1
        example = episode.example
        query = Query(
            action=turn.action, text=turn.payload, question=example.question,
            images=tuple(example.images), example=example.id,
        )  # fmt: skip

        async def begin():
            return await self._rules.call_tool(tool, query, seconds)

        def finish(observation, error, seconds) -> tuple[list[int], Reply]:
            observed = functools.partial(self._rules.tool_reply, query, example, number, room)
            try:
                return closing, observed(observation, error, seconds)
            except Exception as unforeseen:  # a tool may return objects that raise
                return closing, observed(None, unforeseen, seconds)

        seconds = min(limits.timeout, limits.episode_timeout - live.waited)
        if seconds > 0:
            self._engine.tool_executor.submit(Call(live.lane, begin, finish, seconds))
        else:
            error = TimeoutError("the episode's time for tools is used up")
            self._reply(live, *finish(None, error, 0.0))

    def _take_answers(self, wait: bool) -> None:
        look_again = self._look_again if wait else None
        answers = self._engine.tool_executor.poll(wait and look_again is None)
        if look_again is not None and not answers:
            time.sleep(look_again)
        for lane, answer in answers:
            if isinstance(answer, Exception):
                raise answer
            live = self._live[lane]
            live.waited += answer[1].call.seconds
            self._reply(live, *answer)

    def _reply(self, live: _ActiveEpisode, closing: list[int], reply: Reply) -> None:
        """Close the policy's turn and append the user turn, or end the episode for lack of room."""
        episode = live.episode
        if reply.call is not None:
            episode.calls.append(reply.call)
        if reply.prompt is None:
            self._end(live, "tokens")
            return
        closing = np.array(closing, np.int32)
        episode.segments.append(Segment("forced", closing))
        episode.segments.append(Segment("tool", reply.prompt.tokens))
        episode.images += reply.prompt.images
        self._on_event(episode, "reply")
        new, live.unwritten = [live.unwritten, closing, reply.prompt.tokens], _NOTHING
        whole = Prompt(np.concatenate(new), reply.prompt.images)
        live.position = self._to_write(live, whole, live.position)

    def _end(self, live: _ActiveEpisode, why) -> None:
        live.episode.end = why
        self._on_event(live.episode, "end")
        self._ended.append(live.episode)
        del self._live[live.lane]
        self._free.add(live.lane)
