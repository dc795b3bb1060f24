"""Concurrent, resumable requests to a language-model server, deduplicated by digest.

    requests, by digest ─► replies.jsonl, as they arrive ─► replies, by digest

An interrupted batch resumes where it stopped. If the server is down, requests are retried after
each of a fixed list of pauses. If the server refuses all requests, the batch ends; the replies
received so far are kept.
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

_AT_ONCE = 256  # concurrent requests

T = TypeVar("T")
Reply = dict[str, Any]
_Line = Annotated[list, msgspec.Meta(min_length=2)]


def digest_of(*asked: Any) -> str:
    """Return a digest that identifies a request, given as JSON-serialisable data."""
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
    """Return the replies to all requests, by digest.

    Args:
      asked: Requests, each keyed by the `digest_of` everything that its reply depends on.
      ask: Function that returns the reply to one request as plain data for JSON, or raises
        WebError.
      failed: Function that builds the placeholder for a missing reply. Placeholders are not written
        to `path`.
      path: File to which replies are appended as they arrive. Its replies are reused; those to
        other requests are ignored.
      shape: Type of a reply, against which the replies in `path` are checked.
      pauses: Seconds to wait before each retry of the failed requests.
      what: Name of the batch for the progress bar.

    Raises:
      ServiceRefusedError: Raised by `ask`.
      FormatError: A line of `path` was not written by this function; names the file and the line.
    """
    found: dict[str, Reply] = {}
    errors: dict[str, WebError] = {}
    records.truncate_partial_line(path)
    if path.is_file():
        for number, (*_, digest, reply) in checked_json.load_jsonl(path, _Line):
            if isinstance(digest, str) and digest in asked:
                checked_json.convert(reply, shape, name=f"{path}, line {number}")
                found[digest] = reply

    async def one(digest: str, file: TextIO) -> str | None:
        """Send one request. Return its digest if it may be retried, else None."""
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
        """Send requests concurrently. Return the digests that may be retried."""
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
                finally:  # a server that refuses one request refuses the others
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
