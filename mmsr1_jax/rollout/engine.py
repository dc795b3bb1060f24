"""The rollout engine: many concurrent episodes, none waiting for another (see `scheduler`).

With the same seed, examples and tool responses, the episodes are identical, whatever the number of
lanes, the number of steps per decoding call and the order in which tools respond.
"""

import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.episodes import prompts, turns
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.turn_machine import OnEvent
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout import forcing, stop
from mmsr1_jax.rollout.active import STOP_INTERVAL, NextExamples, OnTokens, RolloutStopped
from mmsr1_jax.rollout.device import Device, EngineStats
from mmsr1_jax.rollout.lockstep import Lockstep
from mmsr1_jax.rollout.programs import Programs
from mmsr1_jax.rollout.runner import LocalRunner, Runner
from mmsr1_jax.rollout.scheduler import END_TOKENS, Scheduler
from mmsr1_jax.rollout.timeline import EngineTimeline, Timeline
from mmsr1_jax.tools import Tool
from mmsr1_jax.tools.tool_executor import ToolExecutor


class Engine:
    """Rollout engine for one policy.

    Args:
      model: The policy.
      processor: Tokenizer and image processor of the policy.
      config: All settings.
      tools: Tools by action, `text_search` and `image_search`. The searches of an action without a
        tool fail, and the policy receives an error message.
      donate: Whether the engine deletes the model's parameters once it has its own copy, so that
        they take no memory beside its caches.
      lockstep: The engines that run their programs together with this one, which have the
        parameters; None: it runs its own.

    Attributes:
      device: Parameters, lanes and programs on the device.
      stops: Stop strings and end tokens of a turn.
      token_bytes: Bytes that each token decodes to, by token id.
      image_token: Token id of the image placeholder.
      merge_size: Number of patches along each side of a merged image token.
      pool: Threads that prepare prompts and search results.
      tool_executor: Executor of tool calls.
      lockstep: The engines that run their programs together with this one, or None.
    """

    def __init__(
        self,
        model: Policy,
        processor: Processor,
        config: settings.Config,
        tools: Mapping[str, Tool] | None = None,
        *,
        donate: bool = False,
        lockstep: Lockstep | None = None,
    ):
        self.config = config
        self.processor = processor
        self.tools = dict(tools or {})
        self.token_bytes = token_bytes = processor.token_bytes()
        vocab_size = model.config.text.vocab_size
        ends = {name: processor.control[name] for name in END_TOKENS}
        self.stops = stop.build(token_bytes, vocab_size, turns.STOPS, ends)
        allowed = np.zeros(vocab_size, bool)
        allowed[: len(token_bytes)] = [bool(text) for text in token_bytes]
        allowed[list(processor.control.values())] = False
        allowed[list(ends.values())] = True
        self.lockstep = lockstep
        tables = dict(next_state=self.stops.next_state, allowed=allowed)
        if lockstep is None:
            programs = Programs(
                model, config, states=len(self.stops.next_state), running=self.stops.running
            )
            params = nnx.split(model)[1]
            runner: Runner = LocalRunner(programs, params, **tables, donate=donate)
        else:
            runner = lockstep.join(**tables, running=self.stops.running)
        self.device = Device(runner, model.config, config)
        self._rules = self.make_rules(config.turns, prompts.load(config.turns.prompt_dir))
        self.image_token = model.config.image_token_id
        self.merge_size = model.config.vision.merge_size
        self.pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="prepare")
        self.tool_executor = ToolExecutor(self.pool)
        self._busy = False
        if config.rollout.precompile:
            self.device.warm_up()

    @property
    def stats(self) -> EngineStats:
        """Counters of the device's work."""
        return self.device.stats

    def load(self, params: nnx.State) -> None:
        """Load the trainer's parameters, `nnx.split(model)[1]`, and free both caches.

        Raises:
          RuntimeError: A rollout is in progress.
        """
        self._check_idle()
        self.device.load(params)

    def release(self) -> None:
        """Free the memory of parameters and caches. `load` must be called before a rollout.

        Raises:
          RuntimeError: A rollout is in progress.
        """
        self._check_idle()
        self.device.release()

    def release_caches(self) -> None:
        """Free the memory of KV cache and encoded images until the next rollout.

        Raises:
          RuntimeError: A rollout is in progress.
        """
        self._check_idle()
        self.device.release_caches()

    def _check_idle(self) -> None:
        if self._busy:
            raise RuntimeError("Engine: a rollout is in progress")

    def make_rules(
        self, limits: settings.Turns, texts: Mapping[str, str], forced: Sequence[turns.Action] = ()
    ) -> Rules:
        """Return rules for a `rollout` that differ from those of the config; see `Rules`.

        Raises:
          ValueError: `limits.max_episode_tokens` exceeds the config's, the capacity of the lanes.
          UserError: `limits.min_turn_tokens` is too small for the tags of a forced action.
        """
        for action in forced:
            required = 1 + sum(forcing.num_tag_tokens(action, self.processor.encode_text))
            if limits.min_turn_tokens < required:
                raise UserError(
                    f"config.turns.min_turn_tokens={limits.min_turn_tokens} is too small for turns "
                    f"whose action is prescribed; the tags of {action} take {required - 1} tokens"
                )
        if limits.max_episode_tokens > self.config.turns.max_episode_tokens:
            raise ValueError(
                f"turns.max_episode_tokens={limits.max_episode_tokens} of these rules exceeds "
                f"the engine's {self.config.turns.max_episode_tokens}"
            )
        return Rules(
            self.processor,
            limits,
            self.config.tools,
            texts,
            max_file_pixels=self.config.images.max_file_pixels,
            check_image=self.device.check_image,
            forced=forced,
        )

    def close(self) -> None:
        """Shut down the threads that call tools and prepare prompts."""
        self.tool_executor.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def rollout(
        self,
        examples: Iterable[Example],
        *,
        group_size: int = 1,
        sampling: settings.Sampling | None = None,
        on_event: OnEvent = lambda episode, event: None,
        rules: Rules | None = None,
        indices: Iterable[int] | None = None,
        timeline: Timeline | None = None,
        must_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Episode]:
        """Yield episodes as they end, in any order; `group` and `index` identify them.

        Args:
          examples: Questions. An unusable one yields episodes with `end == "error"`.
          group_size: Number of episodes per question.
          sampling: Sampling settings; None: `config.sampling`. Random numbers depend on the seed,
            the episode's index in this call and the token index, so different calls need different
            seeds.
          on_event: Callback for the progress of episodes, see `OnEvent`.
          rules: Rules from `make_rules`; None: those of the config.
          indices: Distinct indices of the examples; None: 0, 1, .. They determine the indices of
            the episodes, so that part of a call can be repeated exactly.
          timeline: Recorder of what the device and each lane do; None: nothing is recorded.
          must_stop: Called every second or less; the rollout ends when it returns True.

        Raises:
          RolloutStopped: `must_stop` has returned True.
          RuntimeError: Another rollout of this engine is in progress, or it has no parameters.
          ConfigError: The sampling settings are invalid.
        """
        indexed = zip(itertools.count() if indices is None else indices, examples, strict=False)

        def next_examples(count: int) -> list[tuple[int, Example]]:
            if must_stop is not None and must_stop():
                raise RolloutStopped
            return list(itertools.islice(indexed, count))

        yield from self.rollout_part(
            next_examples,
            group_size=group_size,
            sampling=sampling or self.config.sampling,
            on_event=on_event,
            rules=rules,
            poll_interval=None if must_stop is None else STOP_INTERVAL,
            timeline=None if timeline is None else timeline.engine(0, self.config),
        )

    def rollout_part(
        self,
        next_examples: NextExamples,
        *,
        group_size: int,
        sampling: settings.Sampling,
        on_event: OnEvent = lambda episode, event: None,
        on_tokens: OnTokens = lambda episode, tokens: None,
        rules: Rules | None = None,
        poll_interval: float | None = None,
        timeline: EngineTimeline | None = None,
    ) -> Iterator[Episode]:
        """Yield episodes of the examples that `next_examples` returns.

        The iterator ends once all episodes have ended and `next_examples` returns no more examples.

        Args:
          next_examples: Source of examples with their indices in the whole rollout, see
            `NextExamples`.
          group_size: Number of episodes per example.
          sampling: Sampling settings.
          on_event: Callback for the progress of episodes, see `OnEvent`.
          on_tokens: Callback for sampled tokens, see `OnTokens`.
          rules: Rules from `make_rules`; None: those of the config.
          poll_interval: Seconds after which an engine that only waits for tools calls
            `next_examples` again; None: it sleeps until a tool replies.
          timeline: Recorder of this engine; None: nothing is recorded.

        Raises:
          RuntimeError: Another rollout of this engine is in progress, or it has no parameters.
          ConfigError: The sampling settings are invalid.
        """
        settings.validate_sampling(sampling)
        if self._busy:
            raise RuntimeError("Engine.rollout: another rollout is in progress")
        self._busy = True
        try:
            with self.device.rollout(timeline):
                scheduler = Scheduler(
                    self,
                    rules or self._rules,
                    next_examples,
                    group_size=group_size,
                    sampling=sampling,
                    on_event=on_event,
                    on_tokens=on_tokens,
                    poll_interval=poll_interval,
                    timeline=timeline,
                )
                yield from scheduler.episodes()
        finally:
            self.tool_executor.cancel_all()
            self._busy = False
