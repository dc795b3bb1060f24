"""Asks a language model's server about many answers: each once, and none twice.

    asked, by digest ─► replies.jsonl, as they come ─► replies, by digest

An interrupted asking goes on where it stopped. A server that is down is asked again after pauses,
and no more. One that refuses all requests ends the asking; the replies so far are kept.
"""

import asyncio
import hashlib
import json
import pathlib
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, TextIO, TypeVar

import msgspec
from tqdm import tqdm

from mmsr1_jax.evaluation import records
from mmsr1_jax.tools.service import ServiceDownError
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json

_AT_ONCE = 256  # that are with the server at a time

T = TypeVar("T")
Reply = dict[str, Any]
_Line = Annotated[list, msgspec.Meta(min_length=2)]


def digest_of(*asked: Any) -> str:
    """By which it is known that the same is asked; of plain data."""
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()


def replies_to(
    asked: Mapping[str, T],
    ask: Callable[[T], Awaitable[Reply]],
    failed: Callable[[WebError], Reply],
    path: pathlib.Path,
    *,
    shape: Any,
    pauses: Sequence[float],
    what: str,
) -> dict[str, Reply]:
    """The replies, by digest.

    Args:
      asked: what is asked, by `digest_of` all that the reply depends on.
      ask: the reply to one of them, plain data for JSON; or raises WebError.
      failed: what stands in the place of a reply that there is none of; it is not kept.
      path: keeps replies as they come; what it has of others is not looked at.
      shape: type of a reply.
      pauses: seconds, each before what could not be asked for is asked again.
      what: is asked for, for the bar.

    Raises:
      ServiceRefusedError: of `ask`.
      FormatError: a line of `path` that is not what this function writes; names file and line.
    """
    found: dict[str, Reply] = {}
    errors: dict[str, WebError] = {}
    records.mend(path)
    if path.is_file():
        for number, (*_, digest, reply) in checked_json.load_lines(path, _Line):
            if isinstance(digest, str) and digest in asked:
                checked_json.convert(reply, shape, name=f"{path}, line {number}")
                found[digest] = reply

    async def one(digest: str, file: TextIO) -> str | None:
        """The digest, if it may be asked again."""
        try:
            found[digest] = await ask(asked[digest])
            errors.pop(digest, None)
        except WebError as error:
            found[digest], errors[digest] = failed(error), error
            return digest if error.transient or isinstance(error, ServiceDownError) else None
        file.write(json.dumps([digest, found[digest]]) + "\n")
        file.flush()
        return None

    async def each(digests: Sequence[str], file: TextIO) -> list[str]:
        """Those that may be asked again."""
        again = []
        with tqdm(total=len(digests), desc=what, unit="answer") as bar:
            for begin in range(0, len(digests), _AT_ONCE):
                some = digests[begin : begin + _AT_ONCE]
                tasks = [asyncio.ensure_future(one(digest, file)) for digest in some]
                try:
                    for coming in asyncio.as_completed(tasks):
                        digest = await coming
                        again += [] if digest is None else [digest]
                        bar.update()
                finally:  # a server that refuses one refuses the others
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
        return again

    async def all_of(digests: Sequence[str]) -> None:
        with open(path, "a", encoding="utf-8") as file:
            digests = await each(digests, file)
            for pause in pauses:
                if not digests:
                    break
                print(f"{what}: {len(digests)} answers that the server could not be asked about "
                      f"are tried again in {pause:g} s", file=sys.stderr)  # fmt: skip
                await asyncio.sleep(pause)
                digests = await each(digests, file)

    missing = [digest for digest in asked if digest not in found]
    if missing:
        asyncio.run(all_of(missing))
    if errors:
        example = next(iter(errors.values()))
        print(f"{what}: no reply about {len(errors)} of {len(asked)} answers, the first one: "
              f"{example}", file=sys.stderr)  # fmt: skip
    return found
