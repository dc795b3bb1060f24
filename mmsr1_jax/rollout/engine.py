"""The rollout engine: many episodes at a time, none waiting for another (`loop`).

Same seed, same examples, same answers of tools: same episodes, whatever the number of lanes, the
length of a chunk and the order in which tools answer.
"""

import concurrent.futures
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.episodes import prompts, turns
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout import stop
from mmsr1_jax.rollout.device import Counts, Device
from mmsr1_jax.rollout.scheduler import END_TOKENS, Drawn, Run, Take, Watch
from mmsr1_jax.tools import Tool
from mmsr1_jax.tools.tool_executor import Background


class Engine:
    """Rolls out episodes with one policy.

    Args of the constructor:
      model: the policy.
      processor: its tokenizer and image processor.
      config: see `config.Config`.
      tools: by action, `text_search` and `image_search`; a search without its tool fails in words.

    Attributes:
      device: its side of the engine.
      stops: where turns end.
      token_bytes: of each token, what it writes.
      pool: threads that make prompts and results ready; background: that waits for tools.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        processor: Processor,
        config: settings.Config,
        tools: Mapping[str, Tool] | None = None,
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
        self.device = Device(
            model,
            config,
            capacity=config.turns.max_episode_tokens,
            stops=self.stops,
            allowed=allowed,
        )
        self._rules = self.make_rules(config.turns, prompts.load(config.turns.prompt_dir))
        self.image_token = model.config.image_token_id
        self.merge_size = model.config.vision.merge_size
        self.pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="prepare")
        self.background = Background(self.pool)
        self._busy = False
        if config.rollout.precompile:
            self.device.warm_up()

    @property
    def counts(self) -> Counts:
        """What the device has done."""
        return self.device.counts

    def load(self, params: nnx.State) -> None:
        """Takes the trainer's parameters, `nnx.split(model)[1]`; images are encoded anew from here
        on.

        Raises:
          RuntimeError: while a rollout is under way.
        """
        if self._busy:
            raise RuntimeError("Engine.load: a rollout is under way")
        self.device.load(params)

    def make_rules(
        self, limits: settings.Turns, texts: Mapping[str, str], forced: Sequence[turns.Action] = ()
    ) -> Rules:
        """Rules for a `rollout` by others than those of the settings; see `Rules`. Tokens of an
        episode are at most as many as in the settings."""
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
        """Ends the threads of tools and preparation."""
        self.background.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def rollout(
        self,
        examples: Iterable[Example],
        *,
        rollouts: int = 1,
        sampling: settings.Sampling | None = None,
        watch: Watch = lambda episode, event: None,
        rules: Rules | None = None,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[Episode]:
        """Yields episodes as they end, in any order; `group` and `number` tell which they are.

        Args:
          examples: the questions. One that cannot be used gives episodes with `end == "error"`.
          rollouts: episodes of each question.
          sampling: instead of `config.sampling`. Random numbers depend on its seed, on the number
            of the episode in this call and on the token: another call wants another seed.
          watch: see `Watch`.
          rules: of `make_rules`; None: those of the settings.
          numbers: of the examples, each another; None: 0, 1, .. They make the episodes' numbers, so
            a part of a call can be done again.

        Raises:
          RuntimeError: another rollout of this engine is under way.
          ValueError: settings of sampling that cannot be.
        """
        numbered = zip(itertools.count() if numbers is None else numbers, examples, strict=False)
        yield from self.rollout_part(
            lambda count: list(itertools.islice(numbered, count)),
            rollouts=rollouts,
            sampling=sampling or self.config.sampling,
            watch=watch,
            rules=rules,
        )

    def rollout_part(
        self,
        take: Take,
        *,
        rollouts: int,
        sampling: settings.Sampling,
        watch: Watch,
        rules: Rules | None = None,
        look_again: float | None = None,
        drawn: Drawn = lambda episode, tokens: None,
    ) -> Iterator[Episode]:
        """`rollout` of those examples that `take` gives to this engine, with their numbers in the
        whole. It is over when it has no episodes left and `take` gives none.

        Args:
          look_again: seconds after which an engine that only waits for tools asks `take` again;
            None: it sleeps until a tool answers.
          drawn: see `Drawn`.
        """
        settings.validate_sampling(sampling)
        if self._busy:
            raise RuntimeError("Engine.rollout: another rollout is under way")
        self._busy = True
        run = Run(self, rules or self._rules, take, rollouts, sampling, watch, look_again, drawn)
        try:
            yield from run.episodes()
        finally:
            self.background.forget()
            self._busy = False
