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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, TextIO, TypeVar

import msgspec
from tqdm import tqdm

from mmsr1_jax.tools.service import ServiceDownError
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json, outputs
from mmsr1_jax.utils.logs import log

_MAX_CONCURRENCY = 256  # concurrent requests

T = TypeVar("T")
Reply = dict[str, Any]
_Line: Any = Annotated[list[Any], msgspec.Meta(min_length=2)]


def request_digest(*request: Any) -> str:
    """Return a digest that identifies a request, given as JSON-serialisable data."""
    return hashlib.blake2b(json.dumps(request).encode(), digest_size=16).hexdigest()


def fetch_replies(
    requests: Mapping[str, T],
    send: Callable[[T], Awaitable[Reply]],
    placeholder: Callable[[WebError], Reply],
    path: pathlib.Path,
    *,
    reply_type: Any,
    pauses: Sequence[float],
    name: str,
) -> dict[str, Reply]:
    """Return the replies to all requests, by digest.

    Args:
      requests: Requests, each keyed by the `request_digest` of everything that its reply depends
        on.
      send: Function that returns the reply to one request as plain data for JSON, or raises
        WebError.
      placeholder: Function that builds the placeholder for a missing reply. Placeholders are not
        written to `path`.
      path: File to which replies are appended as they arrive. Its replies are reused; those to
        other requests are ignored.
      reply_type: Type of a reply, against which the replies in `path` are checked.
      pauses: Seconds to wait before each retry of the failed requests.
      name: Name of the batch for the progress bar and log lines.

    Raises:
      ServiceRefusedError: Raised by `send`.
      FormatError: A line of `path` was not written by this function; names the file and the line.
    """
    stored = _read_replies(path, requests, reply_type)
    missing = [digest for digest in requests if digest not in stored]
    if not missing:
        return stored
    batch = _Batch(requests, send, placeholder, name)
    with open(path, "a", encoding="utf-8") as file:
        asyncio.run(batch.run(missing, file, pauses))
    if batch.errors:
        log.warning(
            "%s: no reply to %d of %d requests; the first error: %s",
            name, len(batch.errors), len(requests), next(iter(batch.errors.values())),
        )  # fmt: skip
    return stored | batch.replies


def _read_replies(
    path: pathlib.Path, requests: Mapping[str, Any], reply_type: Any
) -> dict[str, Reply]:
    """Return the replies that `path` contains to any of `requests`, by digest."""
    replies: dict[str, Reply] = {}
    outputs.truncate_partial_line(path)
    if path.is_file():
        for line_number, (*_, digest, reply) in checked_json.load_jsonl(path, _Line):
            if isinstance(digest, str) and digest in requests:
                checked_json.convert(reply, reply_type, name=f"{path}, line {line_number}")
                replies[digest] = reply
    return replies


class _Batch(Generic[T]):
    """Requests that are sent together.

    Attributes:
      replies: Replies received so far, by digest, with placeholders for failed requests.
      errors: Last error of each failed request, by digest.
    """

    def __init__(
        self,
        requests: Mapping[str, T],
        send: Callable[[T], Awaitable[Reply]],
        placeholder: Callable[[WebError], Reply],
        name: str,
    ):
        self.replies: dict[str, Reply] = {}
        self.errors: dict[str, WebError] = {}
        self._requests, self._send = requests, send
        self._placeholder, self._name = placeholder, name

    async def run(self, digests: Sequence[str], file: TextIO, pauses: Sequence[float]) -> None:
        """Send requests; retry those with transient errors after each of `pauses`."""
        failed = await self._send_all(digests, file)
        for pause in pauses:
            if not failed:
                break
            log.warning(
                "%s: the server did not reply to %d requests; retrying in %g s",
                self._name, len(failed), pause,
            )  # fmt: skip
            await asyncio.sleep(pause)
            failed = await self._send_all(failed, file)

    async def _send_all(self, digests: Sequence[str], file: TextIO) -> list[str]:
        """Send requests concurrently. Return the digests of those that may be retried."""
        retryable: list[str] = []
        with tqdm(total=len(digests), desc=self._name, unit="answer") as bar:
            for start in range(0, len(digests), _MAX_CONCURRENCY):
                chunk = digests[start : start + _MAX_CONCURRENCY]
                tasks = [asyncio.ensure_future(self._send_one(digest, file)) for digest in chunk]
                try:
                    for task in asyncio.as_completed(tasks):
                        digest = await task
                        retryable += [] if digest is None else [digest]
                        bar.update()
                finally:  # a server that refuses one request refuses the others
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
        return retryable

    async def _send_one(self, digest: str, file: TextIO) -> str | None:
        """Send one request. Return its digest if it may be retried, else None."""
        try:
            reply = await self._send(self._requests[digest])
        except WebError as error:
            self.replies[digest], self.errors[digest] = self._placeholder(error), error
            return digest if error.transient or isinstance(error, ServiceDownError) else None
        self.replies[digest] = reply
        self.errors.pop(digest, None)
        file.write(json.dumps([digest, reply]) + "\n")
        file.flush()
        return None
