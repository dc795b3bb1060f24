"""The scheduler of a rollout: continuous batching of episodes over the lanes of an engine.

while examples or active episodes remain:
    collect tool replies                they become pending chunks of their lanes
    admit episodes into free lanes      a group's prompt is written once and shared by the others
    extend lanes with pending chunks
    read the tokens of the lanes that are decoding
    decode the next steps of ready lanes
    end turns                           which starts a search, gets a reply or frees the lane

The next steps start as soon as the tokens of the last ones have been read, and everything else of a
round is done while they run. `episodes/turn_machine.py` decides the step after a turn.
"""

import collections
import contextlib
import math
import time
from collections.abc import Iterator

import numpy as np

from mmsr1_jax.config import settings
from mmsr1_jax.episodes import turns
from mmsr1_jax.episodes.episode import Episode, Segment
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.turn_machine import OnEvent, Search, TurnMachine
from mmsr1_jax.processing.processor import Prompt
from mmsr1_jax.rollout import forcing
from mmsr1_jax.rollout.active import (
    NO_TOKENS,
    SAMPLED,
    ActiveEpisode,
    Group,
    NextExamples,
    OnTokens,
    WaitingGroups,
)
from mmsr1_jax.rollout.device import RunningDecode
from mmsr1_jax.rollout.engine_protocol import Engine
from mmsr1_jax.rollout.prefill import make_chunks
from mmsr1_jax.rollout.sampler import Sampling
from mmsr1_jax.rollout.timeline import (
    DECODE,
    FORK,
    PREFILL,
    SCHEDULER,
    EngineTimeline,
    Execution,
)
from mmsr1_jax.tools.tool_executor import Call

END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Scheduler:
    """Scheduler of one call of `Engine.rollout_part`, with the state of its loop.

    Args:
      engine: The engine.
      rules: Rules of the episodes.
      next_examples: Source of examples.
      group_size: Number of episodes per example.
      sampling: Sampling settings.
      on_event, on_tokens: Callbacks for the progress of episodes.
      poll_interval: Seconds after which a scheduler that only waits for tools calls `next_examples`
        again; None: it sleeps until a tool replies.
      timeline: Recorder of what each lane does; None: nothing is recorded.
    """

    def __init__(
        self,
        engine: Engine,
        rules: Rules,
        next_examples: NextExamples,
        *,
        group_size: int,
        sampling: settings.Sampling,
        on_event: OnEvent,
        on_tokens: OnTokens,
        poll_interval: float | None,
        timeline: EngineTimeline | None,
    ):
        self._engine, self._device, self._rules = engine, engine.device, rules
        self._machine = TurnMachine(rules, engine.processor, on_event)
        self._poll_interval, self._seed = poll_interval, sampling.seed
        self._on_tokens, self._timeline = on_tokens, timeline
        config = engine.config.rollout
        self._decode_batch_size = config.decode_batch_size
        self._decode_steps = config.decode_steps
        self._sampling = Sampling.uniform(
            config.decode_batch_size, temperature=sampling.temperature, top_k=sampling.top_k,
            top_p=sampling.top_p,
        )  # fmt: skip
        self._groups = WaitingGroups(
            next_examples, group_size, config.lanes, rules.initial_prompt, engine.pool
        )
        self._has_room = True  # for the next prompt, as far as known
        self._free_lanes = set(range(config.lanes))
        self._active: dict[int, ActiveEpisode] = {}  # by lane
        # Lanes that are ready to decode, in the order in which they became ready.
        self._ready_lanes: collections.deque[int] = collections.deque()
        self._running: tuple[RunningDecode, list[ActiveEpisode]] | None = None
        self._ended: list[Episode] = []

    def episodes(self) -> Iterator[Episode]:
        """Run the loop, and yield episodes as they end."""
        while True:
            self._groups.prefetch()
            if not self._groups and not self._active:
                return
            self._device.pages.restore_lanes()
            self._collect_replies(wait=self._must_wait_for_tools())
            self._make_room({a.lane: len(a.episode) for a in self._unwritten()})
            forked = self._admit()
            self._write_chunks()
            for active, copied in forked:
                self._fork(active, copied, active.group.lane)
            if self._running is None:
                self._start_decode()
            decoded = self._finish_decode()
            self._start_decode()
            for active in decoded:
                self._on_tokens(active.episode, active.sampled["tokens"][-1])
                if self._is_finished(active):
                    self._end_turn(active)
            yield from self._ended
            self._ended.clear()

    # Admission

    def _must_wait_for_tools(self) -> bool:
        """Return whether nothing can be done before a tool replies."""
        ready = any(lane not in self._device.pages.offloaded for lane in self._ready_lanes)
        can_admit = bool(self._free_lanes and self._groups and self._has_room)
        busy = ready or can_admit or self._running is not None or bool(self._unwritten())
        return len(self._engine.tool_executor) > 0 and not busy

    def _admit(self) -> list[tuple[ActiveEpisode, tuple[int, int]]]:
        """Assign free lanes to episodes whose prompts fit into the cache, and pages to the prompts.

        Returns:
          Episodes that share a prompt which is not written yet, for `_fork`: the last page of the
          prompt and its copy.
        """
        forked, pages = [], self._device.pages
        while self._groups and self._free_lanes:
            group = self._groups.first()
            busy = self._ready_lanes or self._running or self._unwritten()
            if not group.prompt.done() and busy:
                break  # other lanes have work to do in the meantime
            try:
                with self._device.waiting():
                    prompt = group.prompt.result()
            except Exception as error:  # an unusable image or question
                self._fail(group, error)
                self._groups.pop()
                continue
            self._has_room = pages.fits_prompt(len(prompt.tokens), held=group.position > 0)
            if not self._has_room:
                break
            active = self._assign_lane(group, prompt)
            if group.position == 0:
                self._set_chunks(active, prompt)
                group.position, group.lane = active.position, active.lane
                pages.reserve(active.lane, len(prompt.tokens))
                if group.waiting:
                    pages.share(active.lane, pages.prompt, len(prompt.tokens))
            else:
                if pages.prompt in pages.offloaded:
                    pages.restore(pages.prompt)
                copied = pages.fork(pages.prompt, active.lane, len(prompt.tokens))
                assert copied is not None  # `fits_prompt`
                if group.is_written:  # before another lane takes the page that is copied
                    self._fork(active, copied, pages.prompt)
                else:
                    forked.append((active, copied))
            if not group.waiting:
                pages.release(pages.prompt)
                self._groups.pop()
        return forked

    def _assign_lane(self, group: Group, prompt: Prompt) -> ActiveEpisode:
        """Assign a free lane to the group's next episode."""
        lane = min(self._free_lanes)
        self._free_lanes.remove(lane)
        index = group.waiting.popleft()
        episode = self._machine.start(group.example, prompt, group=group.index, index=index)
        self._active[lane] = active = ActiveEpisode(episode, group, lane)
        return active

    def _fail(self, group: Group, error: Exception) -> None:
        """End all episodes of a group whose prompt cannot be prepared."""
        for index in group.waiting:
            self._ended.append(
                self._machine.fail(group.example, error, group=group.index, index=index)
            )

    # Writing into lanes

    def _set_chunks(self, active: ActiveEpisode, prompt: Prompt) -> None:
        """Schedule tokens with their images to be written at the end of a lane."""
        chunks, active.position = make_chunks(
            prompt,
            active.lane,
            active.length,
            active.position,
            buckets=self._engine.config.rollout.prefill_buckets,
            image_token=self._engine.image_token,
            merge_size=self._engine.merge_size,
        )
        active.chunks = chunks[::-1]

    def _unwritten(self) -> list[ActiveEpisode]:
        """Return the episodes with chunks to write whose lanes are not offloaded."""
        offloaded = self._device.pages.offloaded
        return [a for a in self._active.values() if a.chunks and a.lane not in offloaded]

    def _make_room(self, tokens: dict[int, int]) -> None:
        """Reserve pages for this many tokens of some lanes, for the oldest lanes first.

        Lanes for which there is no room are offloaded.
        """
        pages = self._device.pages
        for lane in pages.oldest_first(tokens):
            if lane not in pages.offloaded:
                pages.make_room(lane, tokens[lane])

    def _write_chunks(self) -> None:
        """Write all pending chunks, and start the turns of the lanes written to."""
        while pending := self._unwritten():
            chunks = [active.chunks.pop() for active in pending]
            written = self._device.extend(chunks)
            for active, chunk, execution in zip(pending, chunks, written, strict=True):
                self._record(active, PREFILL, execution, len(chunk.tokens))
                if not active.chunks:
                    group = active.group
                    if not group.is_written and group.waiting:
                        self._device.keep_hidden(active.lane)
                    group.is_written = True
                    self._start_turn(active)

    def _fork(self, active: ActiveEpisode, copied: tuple[int, int], from_lane: int) -> None:
        """Copy the last page of a prompt for an episode that shares it, and start its turn.

        Args:
          active: The episode.
          copied: Page to copy and its copy.
          from_lane: Lane with the prompt's hidden state.
        """
        group, length, start = active.group, len(active.episode), time.perf_counter()
        assert group.is_written
        self._device.fork(*copied, from_lane, active.lane)
        if self._timeline is not None:
            self._timeline.record(
                active.lane, FORK, start, time.perf_counter(),
                episode=active.episode.index, turn=0, tokens=length,
            )  # fmt: skip
        active.position = group.position
        self._start_turn(active)

    def _start_turn(self, active: ActiveEpisode) -> None:
        """Make a lane ready to decode a turn, or the rest of one with a forced opening tag."""
        limits, length = self._rules.limits, len(active.episode)
        active.budget = min(limits.max_new_tokens, limits.max_episode_tokens - length)
        action = self._rules.forced_action(active.episode)
        if action is not None:
            # Reserve tokens for the tags of a forced action, and for its content.
            opening, closing = self._num_tag_tokens(action)
            content = (limits.min_turn_tokens - opening - closing) // 2
            resumed = active.forced_prefix is not None
            active.budget -= closing if resumed else opening + max(1, content) + closing
        active.stop_state, active.length = 0, length
        active.sampled = {name: [] for name in SAMPLED}
        self._ready_lanes.append(active.lane)

    # Decoding

    def _start_decode(self) -> None:
        """Start decoding some steps of the lanes that have been ready for longest."""
        offloaded = self._device.pages.offloaded
        ready = [lane for lane in self._ready_lanes if lane not in offloaded]
        batch = [self._active[lane] for lane in ready[: self._decode_batch_size]]
        self._make_room({a.lane: a.length + min(a.budget, self._decode_steps) for a in batch})
        batch = [active for active in batch if active.lane not in offloaded]
        if not batch:
            return
        for active in batch:
            self._ready_lanes.remove(active.lane)
        batch.sort(key=lambda active: active.length)  # see `paged_attention`
        # Return once an eighth of the rows have stopped, so that their tools can start and other
        # lanes can take their place.
        leave_at = len(batch) - max(1, len(batch) // 8)
        rows = [active.decode_row() for active in batch]
        running = self._device.start_decode(
            rows, self._sampling, seed=self._seed, leave_at=leave_at
        )
        self._running = (running, batch)

    def _finish_decode(self) -> list[ActiveEpisode]:
        """Read the tokens of the lanes that are decoding; return their episodes."""
        if self._running is None:
            return []
        (running, batch), self._running = self._running, None
        output = self._device.finish_decode(running)
        for row, active in enumerate(batch):
            active.add_sampled(output, row)
            self._record(active, DECODE, running.execution, int(output.count[row]))
            if not self._is_finished(active):
                self._ready_lanes.append(active.lane)
        return batch

    def _record(
        self, active: ActiveEpisode, name: str, execution: Execution | None, tokens: int
    ) -> None:
        """Record that a program writes tokens of an episode, if there is a timeline."""
        if self._timeline is not None and execution is not None:
            self._timeline.record_episode(active.lane, name, execution, active.episode, tokens)

    def _num_tag_tokens(self, action: turns.Action) -> tuple[int, int]:
        return forcing.num_tag_tokens(action, self._engine.processor.encode_text)

    def _is_finished(self, active: ActiveEpisode) -> bool:
        """Return whether a turn has ended: it is complete, or its budget is used up."""
        return active.budget <= 0 or active.stop_state >= self._engine.stops.running

    def _end_turn(self, active: ActiveEpisode) -> None:
        """Parse the turn that the policy wrote, and take the next step of the episode."""
        sampled = {name: np.concatenate(parts) for name, parts in active.sampled.items()}
        episode, processor = active.episode, self._engine.processor
        stop_reason = self._engine.stops.reason(active.stop_state)
        tokens = sampled["tokens"][:-1] if stop_reason in END_TOKENS else sampled["tokens"]
        prefix = NO_TOKENS if active.forced_prefix is None else active.forced_prefix
        turn = turns.parse(processor.decode(np.concatenate([prefix, tokens]).tolist()))
        required = self._rules.forced_action(episode)
        if required is None or turn.action == required:
            active.forced_prefix = None
            episode.segments.append(Segment("model", **sampled))
            has_end_token, truncated = stop_reason == END_TOKENS[0], stop_reason is None
        else:
            forced_turn = self._force(active, sampled, tokens, required)
            if forced_turn is None:  # the policy has to complete it first
                return
            turn, has_end_token, truncated = forced_turn, False, False
        step = self._machine.finish_turn(
            episode, turn, has_end_token=has_end_token, truncated=truncated
        )
        if isinstance(step, Search):
            self._search(active, step)
        else:
            self._continue(active, step)

    def _force(
        self,
        active: ActiveEpisode,
        sampled: dict[str, np.ndarray],
        tokens: np.ndarray,
        action: turns.Action,
    ) -> turns.Turn | None:
        """Make a turn take the prescribed action, see `forcing`.

        Args:
          active: The active episode.
          sampled: Sampled tokens and log-probs, by the names in `SAMPLED`.
          tokens: Sampled tokens without an end token, int32[n].
          action: Prescribed action.

        Returns:
          The turn, or None if the policy has to complete it first.
        """
        episode, encode = active.episode, self._engine.processor.encode_text
        prefix, active.forced_prefix = active.forced_prefix, None
        max_tokens = self._rules.limits.max_episode_tokens - len(episode)
        if prefix is None:
            max_tokens -= self._num_tag_tokens(action)[1] + 1  # to be completed by the policy
        num_kept, forced = forcing.force_action(
            [self._engine.token_bytes[token] for token in tokens],
            action,
            resumed=prefix is not None,
            question=episode.example.question,
            max_tokens=max_tokens,
            encode=encode,
        )
        num_dropped = len(sampled["tokens"]) - num_kept
        if num_kept:
            kept = {name: values[:num_kept] for name, values in sampled.items()}
            episode.segments.append(Segment("model", **kept))
        if num_dropped:
            active.position -= num_dropped
            active.length -= num_dropped
            self._device.pages.truncate(active.lane, active.length)
        episode.segments.append(Segment("forced", forced))
        turn_tokens = [NO_TOKENS if prefix is None else prefix, tokens[:num_kept], forced]
        if prefix is None and action != "image_search":
            active.forced_prefix = np.concatenate(turn_tokens)
            self._set_chunks(active, Prompt(forced, ()))
            return None
        active.unwritten = forced
        return turns.parse(self._engine.processor.decode(np.concatenate(turn_tokens).tolist()))

    # After a turn

    def _search(self, active: ActiveEpisode, search: Search) -> None:
        """Submit a search to its tool."""
        limits, machine = self._engine.config.tools, self._machine
        tool = self._engine.tools.get(search.query.action)
        timeout = min(limits.timeout, limits.episode_timeout - active.tool_seconds)
        if timeout <= 0:
            error = TimeoutError("the episode's time for tools is used up")
            reply = machine.reply(search, None, error, seconds=0.0)
            self._continue(active, machine.add_reply(active.episode, search, reply))
            return
        active.search_start = time.perf_counter()
        self._engine.tool_executor.submit(
            Call(
                active.lane,
                lambda: machine.call(search, tool, timeout),
                lambda *outcome: (search, machine.reply(search, *outcome)),
                timeout,
            )
        )

    def _collect_replies(self, wait: bool) -> None:
        """Add the replies of tools that have ended.

        Args:
          wait: Whether to wait for a reply, for at most `poll_interval` seconds if it is set.
        """
        start = time.perf_counter()
        with self._device.waiting() if wait else contextlib.nullcontext():
            results = self._engine.tool_executor.poll(wait, self._poll_interval or math.inf)
        if wait and self._timeline is not None:
            self._timeline.record(SCHEDULER, "wait for tools", start, time.perf_counter())
        for lane, result in results:
            if isinstance(result, Exception):
                raise result
            active, (search, reply) = self._active[lane], result
            active.tool_seconds += reply.call.seconds
            if self._timeline is not None:
                self._timeline.record_search(lane, active.search_start, active.episode, reply.call)
            self._continue(active, self._machine.add_reply(active.episode, search, reply))

    def _continue(self, active: ActiveEpisode, new: Prompt | None) -> None:
        """Write the tokens added after a turn, or free the lane if the episode has ended."""
        if new is None:
            self._ended.append(active.episode)
            del self._active[active.lane]
            self._device.pages.release(active.lane)
            self._free_lanes.add(active.lane)
            self._has_room = True
            return
        tokens = np.concatenate([active.unwritten, new.tokens])
        active.unwritten = NO_TOKENS
        self._set_chunks(active, Prompt(tokens, new.images))
