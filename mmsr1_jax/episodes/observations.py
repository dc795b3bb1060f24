"""Reading of tool outputs and images: everything external is validated before the rules use it.

A tool may return anything. `ObservationReader` bounds the number of results and parts, checks their
types, decodes images in worker processes, and replaces those that are unusable by an `ImageError`.
"""

import asyncio
import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable
from typing import Any

from mmsr1_jax.config import settings
from mmsr1_jax.processing.image_files import ImageError, process_image, process_image_async
from mmsr1_jax.processing.images import ImageProcessor, Patches
from mmsr1_jax.tools import ImageLike, Observation, Part, Query, Tool

_MAX_PARTS = 100  # parts of one result
_DECODING_DEADLINE = 0.9  # fraction of a call's timeout after which undecoded images are dropped
_MAX_RETRIEVED_PIXELS = 20_000_000  # pixels in the file of a retrieved image


class ObservationReader:
    """Reader of the outputs of tools and of the images of questions.

    Args:
      images: Image processor of the policy.
      tools: Settings of the tools.
      max_file_pixels: Maximum number of pixels in an image file, see `image_files.open_image`.
      check_image: Function that raises ValueError for an image that the engine cannot process.
    """

    def __init__(
        self,
        images: ImageProcessor,
        tools: settings.Tools,
        *,
        max_file_pixels: int,
        check_image: Callable[[Patches], None],
    ):
        self._images, self._tools = images, tools
        self._max_file_pixels = max_file_pixels
        self._max_retrieved_pixels = min(max_file_pixels, _MAX_RETRIEVED_PIXELS)
        self._check_image = check_image
        self._retrieved_images = dataclasses.replace(
            images,
            min_pixels=min(images.min_pixels, tools.max_pixels // 4),
            max_pixels=tools.max_pixels,
        )
        # Identical images of different episodes share memory.
        self._patches: weakref.WeakValueDictionary[str, Patches] = weakref.WeakValueDictionary()

    def open_image(self, image: ImageLike) -> Patches:
        """Return the patches of a question's image. Raises ImageError."""
        return self._checked(process_image(image, self._images, max_pixels=self._max_file_pixels))

    def validate(self, value: Any) -> Observation:
        """Validate the return value of a tool, and read its results into a list.

        At most `config.tools.max_results` results are read. An invalid value gives a failed
        observation. Call this within the tool's time limit, since the results may be a generator.
        """
        if not isinstance(value, Observation):
            return failed(f"the tool returned {type(value).__name__}, not an Observation")
        if value.status not in ("ok", "empty"):
            return failed(value.error)
        results = []
        for result in itertools.islice(value.results, self._tools.max_results):
            parts = tuple(itertools.islice(result, _MAX_PARTS))
            for part in parts:
                is_text = isinstance(part, Part) and isinstance(part.text, str)
                if not isinstance(part, Part) or is_text == (part.image is not None):
                    return failed("the results are not parts of text or images")
                if not _are_fields(part.fields):
                    return failed("the fields of a part are not (label, value) pairs")
            results.append(parts)
        return Observation(status="ok" if results else "empty", results=results, error=value.error)

    async def call_tool(self, tool: Tool | None, query: Query, timeout: float) -> Observation:
        """Call a tool, and decode the images of its results in worker processes.

        Args:
          tool: Tool to call; None if the action has no tool.
          query: Query of the search.
          timeout: Time limit of the call in seconds. Images not decoded within nine tenths of it
            are dropped, so that the other results are not lost.

        Returns:
          The observation with each image replaced by its `Patches`, or by an `ImageError` if it is
          unusable.

        Raises:
          LookupError: `tool` is None.
          Exception: Any exception raised by the tool.
        """
        if tool is None:
            raise LookupError(f"no tool for {query.action}")
        deadline = time.monotonic() + _DECODING_DEADLINE * timeout
        observation = self.validate(await tool(query))
        parts = [part for result in observation.results for part in result]
        tasks = {
            id(part): asyncio.ensure_future(self._decode_async(part.image))
            for part in parts
            if part.image is not None
        }
        try:
            if tasks:
                remaining = max(0.0, deadline - time.monotonic())
                await asyncio.wait(tasks.values(), timeout=remaining)
            decoded = {key: task.result() for key, task in tasks.items() if task.done()}
        finally:
            for task in tasks.values():
                task.cancel()
        late = ImageError("not decoded within the time limit of the call")
        return _map_images(observation, lambda part: decoded.get(id(part), late))

    def decode_remaining(self, observation: Observation) -> tuple[Observation, float]:
        """Decode images that `call_tool` has not, blocking; also return the seconds taken."""
        start = time.monotonic()
        images = [part.image for result in observation.results for part in result]
        if all(image is None or isinstance(image, (Patches, ImageError)) for image in images):
            return observation, 0.0

        def decode(part: Part) -> Any:
            if part.image is None or isinstance(part.image, (Patches, ImageError)):
                return part.image
            try:
                return self._checked(
                    process_image(
                        part.image, self._retrieved_images, max_pixels=self._max_retrieved_pixels
                    )
                )
            except ImageError as error:
                return error

        return _map_images(observation, decode), time.monotonic() - start

    async def _decode_async(self, image: ImageLike) -> Patches | ImageError:
        try:
            return self._checked(
                await process_image_async(
                    image, self._retrieved_images, max_pixels=self._max_retrieved_pixels
                )
            )
        except ImageError as error:
            return error

    def _checked(self, patches: Patches) -> Patches:
        """Return the patches, deduplicated. Raises ImageError if the engine rejects them."""
        try:
            self._check_image(patches)
        except ImageError:
            raise
        except ValueError as error:
            raise ImageError(describe(error)) from None
        return self._patches.setdefault(patches.digest, patches)


def failed(error: BaseException | str | None) -> Observation:
    """Return the observation of a search that failed with this error."""
    return Observation(status="failed", error=describe(error))


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


def _map_images(observation: Observation, image_of: Callable[[Part], Any]) -> Observation:
    """Return the observation with the image of each part replaced by `image_of(part)`."""
    results = [
        tuple(
            part if part.image is None else dataclasses.replace(part, image=image_of(part))
            for part in result
        )
        for result in observation.results
    ]
    return dataclasses.replace(observation, results=results)


def _are_fields(fields: Any) -> bool:
    return isinstance(fields, tuple) and all(
        isinstance(field, tuple) and len(field) == 2 and all(isinstance(x, str) for x in field)
        for field in fields
    )
