"""The rules of an episode: what follows a turn, and what is then written to the policy.

    turn of the policy         what follows
    answer                     the episode ends
    search                     the tool is called; then a user turn with what it found, or that says
                               that it failed
    search over a limit        a user turn that says so; the policy may still answer
    none of them, or cut off   a user turn that says what was wrong
    the last turn              the episode ends, whatever it was

What comes from outside goes through `Rules.observed`: text that can hold no control token and
imitate nothing of ours (`escaping.py`), pictures of a bounded size, results whose text is shortened
so that all fit (`layout.py`).
"""

import asyncio
import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

from mmsr1_jax.config import settings
from mmsr1_jax.episodes import layout, prompts
from mmsr1_jax.episodes.episode import End, Episode, Example, ToolCall
from mmsr1_jax.episodes.escaping import harmless as harmless  # a part of the rules
from mmsr1_jax.episodes.turns import Action, Turn
from mmsr1_jax.processing.image_files import ImageError, process_image, process_image_async
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.tools import Observation, Part, Picture, Query, Tool
from mmsr1_jax.utils.checked_json import valid_text

_NO_PICTURE = "(picture not available)"
_MOST_PARTS = 100  # of one result
_DECODED_BY = 0.9  # share of a call's time after which images that are not decoded are left out
_MAX_RETRIEVED_PIXELS = 20_000_000  # of the file of a retrieved image
_REASON = {
    "ok": "the results are too long to be shown",
    "empty": "nothing was found",
    "failed": "the service failed",
}


class PromptTooLongError(ValueError):
    """A question whose first user turn leaves the policy no room."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What follows a turn.

    Attributes:
      kind: `end`, `search`, or `say` (a user turn without a search).
      end: why the episode ends.
      prompt, reason: of what is said, the prompt's name and the reason that goes into it.
    """

    kind: Literal["end", "search", "say"]
    end: End | None = None
    prompt: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A user turn.

    Attributes:
      prompt: its tokens and pictures; None where there is no room for it, and the episode ends.
      call: the record of the search that it answers.
    """

    prompt: Prompt | None
    call: ToolCall | None = None


class Rules:
    """The rules with their settings.

    Args of the constructor:
      processor: makes tokens.
      limits: see `config.Turns`.
      tools: see `config.Tools`.
      texts: the prompts, from `prompts.load`.
      max_file_pixels: see `images.open_image`.
      check_image: raises ValueError for a picture that the engine cannot take.
      forced: what the turns are made to do, one after the other, the last as long as there are
        turns; empty: whatever the policy likes.
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
        # Equal pictures of different episodes are held once.
        self._known: weakref.WeakValueDictionary[str, Patches] = weakref.WeakValueDictionary()
        low = min(processor.images.min_pixels, tools.max_pixels // 4)
        self._retrieved = dataclasses.replace(
            processor.images, min_pixels=low, max_pixels=tools.max_pixels
        )

    @property
    def seconds(self) -> float:
        """Time limit of a tool's call, from `config.tools.timeout`."""
        return self._tools.timeout

    def first(self, example: Example) -> Prompt:
        """The prompt of a question.

        Raises:
          ImageError: a picture that cannot be used.
          PromptTooLongError: no room is left for the policy.
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

    def forced(self, episode: Episode) -> Action | None:
        """What the episode's next turn is made to do, None for whatever the policy likes. There is
        no image search where there is no picture."""
        skipped = () if episode.example.images else ("image_search",)
        actions = [action for action in self._forced if action not in skipped]
        return actions[min(len(episode.turns), len(actions) - 1)] if actions else None

    def after(self, turns: Sequence[Turn], calls: Sequence[ToolCall], cut: bool) -> Step:
        """What follows the last of these turns; `cut`: it was ended by the limit of its tokens."""
        turn, limits = turns[-1], self.limits
        if turn.action == "answer":
            return Step("end", end="answer")
        if len(turns) >= limits.max_turns:
            return Step("end", end="turns")
        if turn.action is None:
            reason = "it is too long, and was cut off" if cut else turn.problem
            return Step("say", prompt="malformed", reason=reason)
        made = [call.action for call in calls if call.status != "refused"]
        of_kind = {
            "image_search": limits.max_image_searches,
            "text_search": limits.max_text_searches,
        }
        if made.count(turn.action) >= of_kind[turn.action]:
            what = "the picture" if turn.action == "image_search" else "the web"
            count = _times(of_kind[turn.action])
            return Step("say", prompt="over_limit", reason=f"{what} may be searched {count}")
        if len(made) >= limits.max_searches:
            count = _times(limits.max_searches)
            return Step("say", prompt="over_limit", reason=f"you may search {count} in all")
        return Step("search")

    def say(self, step: Step, episode: Episode, room: int) -> Reply:
        """A user turn without results, of at most `room` tokens, after the episode's last turn."""
        prompt = self._within(room, step.prompt, episode.example, reason=[step.reason])
        turn = episode.turns[-1]
        if turn.action is None:
            return Reply(prompt)
        refused = ToolCall(
            turn=len(episode.turns) - 1, action=turn.action, query=turn.payload, status="refused"
        )
        return Reply(prompt, refused)

    def room(self, episode: Episode, closing: int) -> int:
        """Tokens that a user turn may have, if the policy's turn is closed with so many."""
        return self.limits.max_episode_tokens - self.limits.min_turn_tokens - len(episode) - closing

    def read(self, value: Any) -> Observation:
        """What a tool returned, as far as it is an observation: at most so many results, in lists.
        To be called within the tool's time, as what is read may be a generator."""
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

    def observed(
        self, query: Query, example: Example, turn: int, room: int,
        observation: Observation | None, error: BaseException | None, seconds: float,
    ) -> Reply:  # fmt: skip
        """The user turn after a search.

        Args:
          query: what was asked.
          example: the question.
          turn: number of the turn that asked.
          room: tokens that the user turn may have.
          observation: what the tool returned, through `read`; None where there is an `error`.
          error: what it raised.
          seconds: Time that the tool took; the record adds the time of decoding here.
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
                found=len(results),
                shown=len(shown),
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
        """The user turn with these results, shortened to `budget` tokens where they have more; and
        the results that it holds. None where it can hold none."""
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
            left -= len(prompt.tokens) - budget  # the parts have fewer tokens than the whole

    def _block(self, result, number: int, budget: int, notes: list[str]) -> layout.Block | None:
        """A result as texts and pictures; None where its pictures alone exceed the budget."""
        text_left, tokens = self._tools.max_result_chars, 0
        pieces: list[layout.Piece] = []
        for part in result:
            if part.image is None:
                if len(part.text) > text_left >= 0:
                    notes.append(
                        f"result {number}: text cut to {self._tools.max_result_chars} characters"
                    )
                pieces += layout.pieces_of(part, not pieces, max(text_left, 0))
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
                pieces.append(layout.Piece(_NO_PICTURE))
                continue
            tokens += self._merged(picture) + 2
            if tokens > budget:
                return None
            pieces.append(layout.Piece(picture))
        return layout.joined(pieces)

    async def call(self, tool: Tool | None, query: Query, seconds: float) -> Observation:
        """Call a tool, and decode the images of its results in worker processes.

        Args:
          tool: None where there is none for the action.
          query: What is asked.
          seconds: Time limit of the call. Images that are not decoded in nine tenths of it are left
            out, so that the other results are not lost.

        Returns:
          The observation with `Patches` in place of its images, or the `ImageError` of one that
          cannot be used.

        Raises:
          LookupError: There is no tool.
          Exception: Whatever the tool raises.
        """
        if tool is None:
            raise LookupError(f"no tool for {query.action}")
        until = time.monotonic() + _DECODED_BY * seconds
        observation = self.read(await tool(query))
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

    async def _decode(self, image: Picture) -> Patches | ImageError:
        try:
            return self._checked(
                await process_image_async(image, self._retrieved, max_pixels=self._max_retrieved)
            )
        except ImageError as error:
            return error

    def _decode_rest(self, observation: Observation) -> tuple[Observation, float]:
        """Decode the remaining images, blocking; also return the seconds that it took."""
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

    def _open(self, image: Picture) -> Patches:
        """Return the patches of a question's image. Raises ImageError."""
        processor, limit = self._processor.images, self._max_file_pixels
        return self._checked(process_image(image, processor, max_pixels=limit))

    def _checked(self, patches: Patches) -> Patches:
        """Return the patches, equal ones once, if the engine can take them. Raises ImageError."""
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
    """Return the observation with `image_of` of each part that has an image in its place."""
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
    """An error in words, for the record. Never raises, whatever the error is made of."""
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
