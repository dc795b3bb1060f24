"""The rules of an episode: the step after each turn, and the user turns shown to the policy.

    turn of the policy         next step
    answer                     the episode ends
    search                     the tool is called, then a user turn shows the results or reports
                               the failure
    search over a limit        a user turn reports the limit; the policy may still answer
    no action, or cut off      a user turn describes the problem
    the last turn              the episode ends, whatever the turn contains

All external data pass through `Rules.tool_reply`. Text cannot contain control tokens or imitate our
markup (`escaping.py`), images have a bounded size, and the text of results is shortened to fit
(`layout.py`).
"""

import asyncio
import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.episodes import layout, prompts
from mmsr1_jax.episodes.episode import End, Episode, Example, ToolCall
from mmsr1_jax.episodes.escaping import (
    escape_tags as escape_tags,  # re-exported as part of the rules
)
from mmsr1_jax.episodes.turns import Action, Turn
from mmsr1_jax.processing.image_files import ImageError, process_image, process_image_async
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.tools import ImageLike, Observation, Part, Query, Tool
from mmsr1_jax.utils.checked_json import valid_text

_NO_PICTURE = "(picture not available)"
_MOST_PARTS = 100  # parts of one result
_DECODED_BY = 0.9  # fraction of a call's time limit after which undecoded images are left out
_MAX_RETRIEVED_PIXELS = 20_000_000  # pixels in the file of a retrieved image
_REASON = {
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
      kind: Kind of step: `end`, `search`, or `say` (a user turn without a search).
      end: Why the episode ends; only for `end`.
      prompt, reason: Name of the prompt and the reason to insert into it; only for `say`.
    """

    kind: Literal["end", "search", "notice"]
    end: End | None = None
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
        texts: dict[str, str],
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
        self._max_file_pixels = max_file_pixels
        self._max_retrieved = min(max_file_pixels, _MAX_RETRIEVED_PIXELS)
        self._check_image = check_image
        # Identical images of different episodes share memory.
        self._known: weakref.WeakValueDictionary[str, Patches] = weakref.WeakValueDictionary()
        low = min(processor.images.min_pixels, tools.max_pixels // 4)
        self._retrieved = dataclasses.replace(
            processor.images, min_pixels=low, max_pixels=tools.max_pixels
        )

    @property
    def tool_timeout(self) -> float:
        """Time limit of a tool call in seconds, from `config.tools.timeout`."""
        return self._tools.timeout

    def initial_prompt(self, example: Example) -> Prompt:
        """Return the prompt of a question.

        Raises:
          ImageError: An image is unusable.
          PromptTooLongError: The prompt leaves no room for the policy's turn.
        """
        images = [self._open(image) for image in example.images]
        fields = {"question": [valid_text(example.question)], "images": images}
        prompt = self._processor.first_turn(prompts.fill(self._texts["question"], fields))
        room = self.limits.max_episode_tokens - self.limits.min_turn_tokens
        if len(prompt.tokens) > room:
            raise PromptTooLongError(
                f"the prompt has {len(prompt.tokens)} tokens, at most {room} leave room for a turn "
                "(turns.max_episode_tokens, turns.min_turn_tokens; images.max_pixels makes "
                "pictures smaller)"
            )
        return prompt

    def forced_action(self, episode: Episode) -> Action | None:
        """Return the action prescribed for the episode's next turn; None if the policy chooses.

        Image searches are skipped for a question without images.
        """
        skipped = () if episode.example.images else ("image_search",)
        actions = [action for action in self._forced if action not in skipped]
        return actions[min(len(episode.turns), len(actions) - 1)] if actions else None

    def next_step(self, turns: Sequence[Turn], calls: Sequence[ToolCall], cut: bool) -> Step:
        """Return the step after the last of these turns.

        Args:
          turns: Turns of the episode.
          calls: Searches of the episode.
          cut: Whether the last turn reached its token limit.
        """
        turn, limits = turns[-1], self.limits
        if turn.action == "answer":
            return Step("end", end="answer")
        if len(turns) >= limits.max_turns:
            return Step("end", end="turns")
        if turn.action is None:
            reason = "it is too long, and was cut off" if cut else turn.problem
            return Step("notice", prompt="malformed", reason=reason)
        made = [call.action for call in calls if call.status != "refused"]
        of_kind = {
            "image_search": limits.max_image_searches,
            "text_search": limits.max_text_searches,
        }
        if made.count(turn.action) >= of_kind[turn.action]:
            what = "the picture" if turn.action == "image_search" else "the web"
            count = _times(of_kind[turn.action])
            return Step("notice", prompt="over_limit", reason=f"{what} may be searched {count}")
        if len(made) >= limits.max_searches:
            count = _times(limits.max_searches)
            return Step("notice", prompt="over_limit", reason=f"you may search {count} in all")
        return Step("search")

    def notice(self, step: Step, episode: Episode, room: int) -> Reply:
        """Return a user turn without results, of at most `room` tokens, after the last turn."""
        prompt = self._within(room, step.prompt, episode.example, reason=[step.reason])
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
        """Validate the return value of a tool, and read its results into a list.

        At most `config.tools.max_results` results are read. An invalid value gives a failed
        observation. Call this within the tool's time limit, since the results may be a generator.
        """
        if not isinstance(value, Observation):
            return _failed(f"the tool returned {type(value).__name__}, not an Observation")
        if value.status not in ("ok", "empty"):
            return _failed(value.error)
        results = []
        for result in itertools.islice(value.results, self._tools.max_results):
            parts = tuple(itertools.islice(result, _MOST_PARTS))
            for part in parts:
                is_text = isinstance(part, Part) and isinstance(part.text, str)
                if not isinstance(part, Part) or is_text == (part.image is not None):
                    return _failed("results that are not parts of text or pictures")
                if not _are_fields(part.fields):
                    return _failed("fields of a part that are not (label, value)")
            results.append(parts)
        return Observation(status="ok" if results else "empty", results=results, error=value.error)

    def tool_reply(
        self, query: Query, example: Example, turn: int, room: int,
        observation: Observation | None, error: BaseException | None, seconds: float,
    ) -> Reply:  # fmt: skip
        """Return the user turn after a search.

        Args:
          query: Query of the search.
          example: The question.
          turn: Index of the turn that requested the search.
          room: Token budget of the user turn.
          observation: Result of the tool, validated by `read`; None if there is an `error`.
          error: Exception that the tool raised.
          seconds: Seconds that the tool took; the record adds the time spent on decoding here.
        """
        observation, spent = self._decode_rest(observation or _failed(error))
        results = observation.results
        notes = [] if observation.error is None else [describe(observation.error)]
        budget = min(room, self.limits.max_result_tokens)
        blocks = {}
        for number, result in enumerate(results, start=1):
            block = self._block(result, number, budget, notes)
            if block is not None:
                blocks[number] = block
        prompt, shown = self._fitted(f"after_{query.action}", example, blocks, budget, notes)
        if len(shown) < len(results):
            notes.append(f"{len(results) - len(shown)} of {len(results)} results left out: no room")
        if prompt is None:
            reason = _REASON[observation.status]
            reason = "it took too long" if isinstance(error, TimeoutError) else reason
            prompt = self._within(room, "search_failed", example, reason=[reason])
        return Reply(
            prompt,
            ToolCall(
                turn=turn,
                action=query.action,
                query=query.text,
                status=observation.status,
                seconds=seconds + spent,
                num_results=len(results),
                num_shown=len(shown),
                notes=tuple(notes),
                results=layout.shown(shown),
            ),
        )

    def _turn(self, name: str, example: Example, **fields) -> Prompt:
        fields["question"] = [valid_text(example.question)]
        return self._processor.next_turn(prompts.fill(self._texts[name], fields))

    def _within(self, room: int, name: str, example: Example, **fields) -> Prompt | None:
        prompt = self._turn(name, example, **fields)
        return prompt if len(prompt.tokens) <= room else None

    def _fitted(
        self, name: str, example: Example, blocks: dict[int, layout.Block], budget: int,
        notes: list[str],
    ) -> tuple[Prompt | None, list[layout.Block]]:  # fmt: skip
        """Return the user turn with results shortened to `budget` tokens, and the results shown.

        The turn is None if no result fits.
        """
        shown = list(blocks.values())
        if not shown:
            return None, []
        prompt = self._turn(name, example, results=layout.written(shown))
        if len(prompt.tokens) <= budget:
            return prompt, shown
        shortener = layout.Shortener(self._processor, blocks)
        left = budget - len(self._turn(name, example, results=[]).tokens)
        while True:
            fitting, cut = shortener(left)
            shown = list(fitting.values())
            if not shown:
                return None, []
            prompt = self._turn(name, example, results=layout.written(shown))
            if len(prompt.tokens) <= budget:
                notes += cut
                return prompt, shown
            left -= len(prompt.tokens) - budget  # the whole may have more tokens than its parts

    def _block(self, result, number: int, budget: int, notes: list[str]) -> layout.Block | None:
        """Return a result as a block; None if its images alone exceed the budget."""
        text_left, tokens = self._tools.max_result_chars, 0
        pieces: list[layout.Fragment] = []
        for part in result:
            if part.image is None:
                if len(part.text) > text_left >= 0:
                    notes.append(
                        f"result {number}: text cut to {self._tools.max_result_chars} characters"
                    )
                pieces += layout.fragments_of(part, not pieces, max(text_left, 0))
                text_left -= len(part.text)
                continue
            try:
                if isinstance(part.image, ImageError):
                    raise part.image
                picture = part.image
                if len(picture.values) * self._retrieved.patch_size**2 > self._tools.max_pixels:
                    raise ImageError("a strip, too long for its width")
            except ImageError as error:
                notes.append(f"result {number}: {error}")
                pieces.append(layout.Fragment(_NO_PICTURE))
                continue
            tokens += self._merged(picture) + 2
            if tokens > budget:
                return None
            pieces.append(layout.Fragment(picture))
        return layout.joined(pieces)

    async def call_tool(self, tool: Tool | None, query: Query, seconds: float) -> Observation:
        """Call a tool, and decode the images of its results in worker processes.

        Args:
          tool: Tool to call; None if the action has no tool.
          query: Query of the search.
          seconds: Time limit of the call. Images not decoded within nine tenths of it are left out,
            so that the other results are not lost.

        Returns:
          The observation with each image replaced by its `Patches`, or by an `ImageError` if it is
          unusable.

        Raises:
          LookupError: `tool` is None.
          Exception: Any exception raised by the tool.
        """
        if tool is None:
            raise LookupError(f"no tool for {query.action}")
        until = time.monotonic() + _DECODED_BY * seconds
        observation = self.validate_observation(await tool(query))
        parts = [part for result in observation.results for part in result]
        tasks = {
            id(part): asyncio.ensure_future(self._decode(part.image))
            for part in parts
            if part.image is not None
        }
        try:
            if tasks:
                await asyncio.wait(tasks.values(), timeout=max(0.0, until - time.monotonic()))
            opened = {key: task.result() for key, task in tasks.items() if task.done()}
        finally:
            for task in tasks.values():
                task.cancel()
        late = ImageError("not decoded in the time of the call")
        return _with_images(observation, lambda part: opened.get(id(part), late))

    async def _decode(self, image: ImageLike) -> Patches | ImageError:
        try:
            return self._checked(
                await process_image_async(image, self._retrieved, max_pixels=self._max_retrieved)
            )
        except ImageError as error:
            return error

    def _decode_rest(self, observation: Observation) -> tuple[Observation, float]:
        """Decode the remaining images, blocking; also return the seconds taken."""
        begun = time.monotonic()
        if all(isinstance(image, (Patches, ImageError)) for image in _images(observation)):
            return observation, 0.0

        def decode(part: Part) -> Patches | ImageError:
            if isinstance(part.image, (Patches, ImageError)):
                return part.image
            try:
                limit = self._max_retrieved
                return self._checked(process_image(part.image, self._retrieved, max_pixels=limit))
            except ImageError as error:
                return error

        return _with_images(observation, decode), time.monotonic() - begun

    def _open(self, image: ImageLike) -> Patches:
        """Return the patches of a question's image. Raises ImageError."""
        processor, limit = self._processor.images, self._max_file_pixels
        return self._checked(process_image(image, processor, max_pixels=limit))

    def _checked(self, patches: Patches) -> Patches:
        """Return the patches, deduplicated. Raises ImageError if the engine rejects them."""
        try:
            self._check_image(patches)
        except ImageError:
            raise
        except ValueError as error:
            raise ImageError(describe(error)) from None
        return self._known.setdefault(patches.digest, patches)

    def _merged(self, image: Patches) -> int:
        return len(image.values) // self._processor.images.merge_size**2


def _images(observation: Observation) -> list[Any]:
    images = (part.image for result in observation.results for part in result)
    return [image for image in images if image is not None]


def _with_images(observation: Observation, image_of: Callable[[Part], Any]) -> Observation:
    """Return the observation with the image of each part replaced by `image_of(part)`."""
    results = [
        tuple(
            part if part.image is None else dataclasses.replace(part, image=image_of(part))
            for part in result
        )
        for result in observation.results
    ]
    return dataclasses.replace(observation, results=results)


def _failed(error: BaseException | str | None) -> Observation:
    return Observation(status="failed", error=describe(error))


def _are_fields(fields: Any) -> bool:
    return isinstance(fields, tuple) and all(
        isinstance(field, tuple) and len(field) == 2 and all(isinstance(x, str) for x in field)
        for field in fields
    )


def describe(error: BaseException | str | None) -> str:
    """Return a description of an error, for the record. Never raises."""
    if error is None:
        return "no reason was given"
    try:
        text = str(error)
    except Exception:
        text = "(cannot be shown)"
    if isinstance(error, BaseException):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:500]


def _times(count: int) -> str:
    return {0: "not at all", 1: "once", 2: "twice"}.get(count, f"{count} times")
