"""The rules of an episode: the step after each turn, and the user turns shown to the policy.

    turn of the policy         next step
    answer                     the episode ends
    search                     the tool is called, then a user turn shows the results or reports
                               the failure
    search over a limit        a user turn reports the limit; the policy may still answer
    no action, or truncated    a user turn describes the problem
    the last turn              the episode ends, whatever the turn contains

All external data pass through `Rules.tool_reply`. Text cannot contain control tokens or imitate our
markup (`escaping.py`), images have a bounded size (`observations.py`), and the text of results is
shortened to fit (`layout.py`). `turn_machine.py` applies the rules to episodes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.episodes import layout, prompts
from mmsr1_jax.episodes.episode import EndReason, Episode, Example, ToolCall
from mmsr1_jax.episodes.observations import ObservationReader, describe, failed
from mmsr1_jax.episodes.turns import Action, Turn
from mmsr1_jax.processing.image_files import ImageError
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.tools import Observation, Query, Result, Tool
from mmsr1_jax.utils.checked_json import valid_text

# Texts that the policy reads.
_UNAVAILABLE_IMAGE = "(picture not available)"
_SEARCH_TARGETS = {"image_search": "the picture", "text_search": "the web"}
_NO_RESULTS = {
    "ok": "the results are too long to be shown",
    "empty": "nothing was found",
    "failed": "the service failed",
}


class PromptTooLongError(UserError):
    """A question whose first user turn leaves no tokens for the policy."""


@dataclasses.dataclass(frozen=True)
class Step:
    """The step after a turn.

    Attributes:
      kind: Kind of step: `end`, `search`, or `notice` (a user turn without a search).
      end: Why the episode ends; only for `end`.
      prompt, reason: Name of the prompt and the reason to insert into it; only for `notice`.
    """

    kind: Literal["end", "search", "notice"]
    end: EndReason | None = None
    prompt: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A user turn.

    Attributes:
      prompt: Tokens and images of the turn; None if they do not fit, and the episode ends.
      call: Record of the search that the turn responds to, if any.
    """

    prompt: Prompt | None
    call: ToolCall | None = None


class Rules:
    """The rules of an episode, with their settings.

    Args:
      processor: Tokenizer and image processor of the policy.
      limits: Limits on turns, searches and tokens.
      tools: Settings of the tools.
      texts: Prompts from `prompts.load`.
      max_file_pixels: Maximum number of pixels in an image file, see `image_files.open_image`.
      check_image: Function that raises ValueError for an image that the engine cannot process.
      forced: Actions prescribed for successive turns; the last one applies to all later turns.
        Empty: the policy chooses its actions.
    """

    def __init__(
        self,
        processor: Processor,
        limits: settings.Turns,
        tools: settings.Tools,
        texts: Mapping[str, str],
        *,
        max_file_pixels: int = 100_000_000,
        check_image: Callable[[Patches], None] = lambda image: None,
        forced: Sequence[Action] = (),
    ):
        self.limits = limits
        self._forced = tuple(forced)
        self._processor = processor
        self._tools = tools
        self._texts = texts
        self._reader = ObservationReader(
            processor.images, tools, max_file_pixels=max_file_pixels, check_image=check_image
        )

    @property
    def tool_timeout(self) -> float:
        """Time limit of a tool call in seconds, from `config.tools.timeout`."""
        return self._tools.timeout

    def initial_prompt(self, example: Example) -> Prompt:
        """Return the prompt of a question.

        Raises:
          ImageError: An image is unusable.
          PromptTooLongError: The prompt leaves no tokens for the policy's turn.
        """
        images = [self._reader.open_image(image) for image in example.images]
        fields = {"question": [valid_text(example.question)], "images": images}
        prompt = self._processor.first_turn(prompts.fill(self._texts["question"], fields))
        max_tokens = self.limits.max_episode_tokens - self.limits.min_turn_tokens
        if len(prompt.tokens) > max_tokens:
            raise PromptTooLongError(
                f"the prompt has {len(prompt.tokens)} tokens, more than the {max_tokens} that "
                "turns.max_episode_tokens and turns.min_turn_tokens allow (a lower "
                "images.max_pixels makes images smaller)"
            )
        return prompt

    def forced_action(self, episode: Episode) -> Action | None:
        """Return the action prescribed for the episode's next turn; None if the policy chooses.

        Image searches are skipped for a question without images.
        """
        has_images = bool(episode.example.images)
        actions: list[Action] = [a for a in self._forced if a != "image_search" or has_images]
        return actions[min(len(episode.turns), len(actions) - 1)] if actions else None

    def next_step(self, turns: Sequence[Turn], calls: Sequence[ToolCall], truncated: bool) -> Step:
        """Return the step after the last of these turns.

        Args:
          turns: Turns of the episode.
          calls: Searches of the episode.
          truncated: Whether the last turn reached its token limit.
        """
        turn, limits = turns[-1], self.limits
        if turn.action == "answer":
            return Step("end", end="answer")
        if len(turns) >= limits.max_turns:
            return Step("end", end="turns")
        if turn.action is None:
            reason = "it is too long, and was cut off" if truncated else turn.problem
            return Step("notice", prompt="malformed", reason=reason or "")
        executed = [call.action for call in calls if call.status != "refused"]
        max_searches = {
            "image_search": limits.max_image_searches,
            "text_search": limits.max_text_searches,
        }[turn.action]
        if executed.count(turn.action) >= max_searches:
            reason = f"{_SEARCH_TARGETS[turn.action]} may be searched {_times(max_searches)}"
            return Step("notice", prompt="over_limit", reason=reason)
        if len(executed) >= limits.max_searches:
            reason = f"you may search {_times(limits.max_searches)} in all"
            return Step("notice", prompt="over_limit", reason=reason)
        return Step("search")

    def notice(self, step: Step, episode: Episode, budget: int) -> Reply:
        """Return a user turn without results, of at most `budget` tokens, after the last turn."""
        prompt = self._turn_within(budget, step.prompt, episode.example, reason=[step.reason])
        turn = episode.turns[-1]
        if turn.action is None:
            return Reply(prompt)
        refused = ToolCall(
            turn=len(episode.turns) - 1, action=turn.action, query=turn.payload, status="refused"
        )
        return Reply(prompt, refused)

    def token_budget(self, episode: Episode, closing: int) -> int:
        """Return the token budget of a user turn, if closing the policy's turn takes `closing`."""
        return self.limits.max_episode_tokens - self.limits.min_turn_tokens - len(episode) - closing

    def validate_observation(self, value: Any) -> Observation:
        """Validate the return value of a tool, see `ObservationReader.validate`."""
        return self._reader.validate(value)

    async def call_tool(self, tool: Tool | None, query: Query, timeout: float) -> Observation:
        """Call a tool and decode its images, see `ObservationReader.call_tool`."""
        return await self._reader.call_tool(tool, query, timeout)

    def tool_reply(
        self, query: Query, example: Example, turn: int, budget: int,
        observation: Observation | None, error: BaseException | None, seconds: float,
    ) -> Reply:  # fmt: skip
        """Return the user turn after a search.

        Args:
          query: Query of the search.
          example: The question.
          turn: Index of the turn that requested the search.
          budget: Token budget of the user turn.
          observation: Result of the tool, from `call_tool` or `validate_observation`; None if there
            is an `error`.
          error: Exception that the tool raised.
          seconds: Seconds that the tool took; the record adds the time spent on decoding here.
        """
        observation, decoding_seconds = self._reader.decode_remaining(observation or failed(error))
        results = list(observation.results)
        notes = [] if observation.error is None else [describe(observation.error)]
        results_budget = min(budget, self.limits.max_result_tokens)
        blocks = {}
        for number, result in enumerate(results, start=1):
            block = self._block(result, number, results_budget, notes)
            if block is not None:
                blocks[number] = block
        name = f"after_{query.action}"
        prompt, shown = self._fit(name, example, blocks, results_budget, notes)
        if len(shown) < len(results):
            num_dropped = len(results) - len(shown)
            notes.append(f"{num_dropped} of {len(results)} results dropped: no token budget left")
        if prompt is None:
            reason = _NO_RESULTS[observation.status]
            reason = "it took too long" if isinstance(error, TimeoutError) else reason
            prompt = self._turn_within(budget, "search_failed", example, reason=[reason])
        return Reply(
            prompt,
            ToolCall(
                turn=turn,
                action=query.action,
                query=query.text,
                status=observation.status,
                seconds=seconds + decoding_seconds,
                num_results=len(results),
                num_shown=len(shown),
                notes=tuple(notes),
                results=layout.shown_results(shown),
            ),
        )

    def _turn(self, name: str, example: Example, **fields: Sequence[str | Patches]) -> Prompt:
        fields["question"] = [valid_text(example.question)]
        return self._processor.next_turn(prompts.fill(self._texts[name], fields))

    def _turn_within(
        self, budget: int, name: str, example: Example, **fields: Sequence[str | Patches]
    ) -> Prompt | None:
        prompt = self._turn(name, example, **fields)
        return prompt if len(prompt.tokens) <= budget else None

    def _fit(
        self, name: str, example: Example, blocks: dict[int, layout.Block], budget: int,
        notes: list[str],
    ) -> tuple[Prompt | None, list[layout.Block]]:  # fmt: skip
        """Return the user turn with results shortened to `budget` tokens, and the results shown.

        The turn is None if no result fits.
        """
        shown = list(blocks.values())
        if not shown:
            return None, []
        prompt = self._turn(name, example, results=layout.number_results(shown))
        if len(prompt.tokens) <= budget:
            return prompt, shown
        shortener = layout.Shortener(self._processor, blocks)
        blocks_budget = budget - len(self._turn(name, example, results=[]).tokens)
        while True:
            shortened, truncation_notes = shortener(blocks_budget)
            shown = list(shortened.values())
            if not shown:
                return None, []
            prompt = self._turn(name, example, results=layout.number_results(shown))
            if len(prompt.tokens) <= budget:
                notes += truncation_notes
                return prompt, shown
            # The turn may have more tokens than its parts.
            blocks_budget -= len(prompt.tokens) - budget

    def _block(
        self, result: Result, number: int, budget: int, notes: list[str]
    ) -> layout.Block | None:
        """Return a result as a block; None if its images alone exceed the budget."""
        max_chars, max_pixels = self._tools.max_result_chars, self._tools.max_pixels
        remaining_chars, image_tokens = max_chars, 0
        fragments: list[layout.Fragment] = []
        for part in result:
            image: Any = part.image  # `Patches` or `ImageError`, see `ObservationReader`
            if image is None:
                num_chars = len(part.text or "")
                if num_chars > remaining_chars >= 0:
                    notes.append(f"result {number}: text truncated to {max_chars} characters")
                fragments += layout.part_fragments(part, not fragments, max(remaining_chars, 0))
                remaining_chars -= num_chars
                continue
            if isinstance(image, Patches):
                pixels = len(image.values) * self._processor.images.patch_size**2
                if pixels > max_pixels:
                    image = ImageError("too long for its width")
            if isinstance(image, ImageError):
                notes.append(f"result {number}: {image}")
                fragments.append(layout.Fragment(_UNAVAILABLE_IMAGE))
                continue
            image_tokens += len(image.values) // self._processor.images.merge_size**2 + 2
            if image_tokens > budget:
                return None
            fragments.append(layout.Fragment(image))
        return layout.make_block(fragments)


def _times(count: int) -> str:
    return {0: "not at all", 1: "once", 2: "twice"}.get(count, f"{count} times")
