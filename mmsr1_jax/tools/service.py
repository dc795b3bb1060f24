"""HTTP client of a web service, with retries, rate limits and a circuit breaker.

- Identical concurrent calls share one request.
- The number of concurrent requests and of requests per second is limited.
- Status 429, 5xx, timeouts and connection failures are retried with exponential backoff, and no
  earlier than the server asks.
- After several consecutive failures the service is not contacted for a while, which is logged once.
- Requests that fail after all retries and requests that are refused are counted
  (`utils/fallbacks.py`).
"""

import asyncio
import dataclasses
import hashlib
import socket
import ssl
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiolimiter
import tenacity

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools.web import Answer, RefusedError, StatusError, Web, WebError
from mmsr1_jax.utils import fallbacks

_KEY_REFUSED = (401, 402, 403)
_NO_LOOKUP = "its name cannot be looked up"
_PASSING = (408, 425)  # client errors that may be transient


class ServiceDownError(WebError):
    """Call rejected by the open circuit breaker; `__cause__` is the last failure."""


class ServiceRefusedError(UserError):
    """Service that refuses all requests, because of a wrong key, address or model.

    The message is one line that names the service, its address without secrets and its settings.
    """


class Service:
    """HTTP client of one service.

    Args:
      name: Name of the service in messages.
      web: HTTP client that sends the requests.
      at_once: Maximum number of concurrent requests, per asyncio loop.
      per_second: Maximum number of requests per second, per asyncio loop.
      attempts: Maximum number of attempts per call.
      longest_wait: Maximum wait between two attempts, in seconds. If the server asks for a longer
        one, the call is not retried.
      failures: Number of consecutive failures that opens the circuit breaker. None disables it, for
        instance for requests to many hosts.
      pause: Seconds for which an open circuit breaker rejects calls.
      turn: Function awaited before each attempt, for a rate limit shared with other processes. It
        applies in addition to `per_second`.
      counted: Whether failures are counted as metrics (`utils/fallbacks.py`).
      address: Address of the service without secrets, for messages.
      settings: Names of the settings that configure the service, for messages.
    """

    def __init__(
        self,
        name: str,
        web: Web,
        *,
        at_once: int = 32,
        per_second: float = 50.0,
        attempts: int = 3,
        longest_wait: float = 20.0,
        failures: int | None = 20,
        pause: float = 30.0,
        turn: Callable[[], Awaitable[None]] | None = None,
        counted: bool = True,
        address: str = "",
        settings: str = "",
    ):
        self.name = name
        self._where = f"{name} at {address}" if address else name
        self._settings, self._is_counted = settings, counted
        self._web = web
        self._at_once, self._per_second = at_once, per_second
        self._attempts, self._longest_wait = attempts, longest_wait
        self._most_failures, self._pause = failures, pause
        self._turn = turn
        self._failures, self._closed_until, self._said = 0, 0.0, False
        self._last: WebError | None = None
        self._of_loop: weakref.WeakKeyDictionary[Any, _Limits] = weakref.WeakKeyDictionary()

    async def call(
        self,
        method: str,
        url: str,
        *,
        read: Callable[[Answer], Any] | None = None,
        even_if_down: bool = False,
        **request: Any,
    ) -> Any:
        """Send a request as `Web.request` does, with retries, rate limits and a circuit breaker.

        Args:
          method: HTTP method.
          url: URL of the request.
          read: Function that parses the response. A WebError that it raises counts as a failure of
            the request, which is retried if the error is transient. If None, return the response.
          even_if_down: Whether to send the request even if the circuit breaker is open.
          **request: Further arguments of `Web.request`.

        Returns:
          Result of `read`, or the response.

        Raises:
          WebError: The last attempt failed.
          ServiceDownError: The circuit breaker is open.
        """
        loop = asyncio.get_running_loop()
        if loop not in self._of_loop:
            self._of_loop[loop] = _Limits(self._at_once, self._per_second)
        under_way = self._of_loop[loop].under_way
        key = _key(method, url, request)
        if key not in under_way:
            asked = self._counted(
                self._call(self._of_loop[loop], method, url, request, read, even_if_down)
            )
            task = asyncio.ensure_future(asked)
            under_way[key] = _Shared(task)
            task.add_done_callback(lambda done: self._ended(under_way, key, done))
        shared = under_way[key]
        shared.waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if not shared.waiting and not shared.task.done():
                # No caller waits any more. A later identical call sends a new request.
                del under_way[key]
                shared.task.cancel()

    @staticmethod
    def _ended(under_way: "dict[bytes, _Shared]", key: bytes, task: asyncio.Task) -> None:
        if key in under_way and under_way[key].task is task:
            del under_way[key]
        if not task.cancelled():
            task.exception()  # mark the exception as retrieved, even if no caller waits

    async def _counted(self, asked: Awaitable[Any]) -> Any:
        try:
            return await asked
        except WebError as error:
            if self._is_counted:
                figure = f"service/{self.name}"
                if _key_is_refused(error):
                    fallbacks.count(f"{figure}/refused", f"warning: {self.refusal(error)}")
                fallbacks.count(f"{figure}/failed")
            raise

    async def _call(
        self, limits: "_Limits", method: str, url: str, request: dict,
        read: Callable[[Answer], Any] | None, even_if_down: bool,
    ) -> Any:  # fmt: skip
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception(self._again),
            reraise=True,
        ):
            with attempt:
                async with limits.at_once, limits.rate:
                    if time.monotonic() < self._closed_until and not even_if_down:
                        raise ServiceDownError(
                            f"{self.name} failed too often and is not asked for now"
                        ) from self._last
                    if self._turn is not None:
                        await self._turn()
                    answer = await self._asked(method, url, request, read)
        return answer

    async def _asked(
        self, method: str, url: str, request: dict, read: Callable[[Answer], Any] | None
    ) -> Any:
        try:
            answer = await self._web.request(method, url, **request)
            answer = answer if read is None else read(answer)
        except WebError as error:
            if error.transient:
                self._failed(error)
            raise
        self._failures, self._closed_until, self._said = 0, 0.0, False
        return answer

    def refusal(self, error: WebError) -> str:
        """Return a one-line message that names the service and why it refuses requests."""
        reason = _connection_refusal(error) or str(error)
        settings = f" (settings: {self._settings})" if self._settings else ""
        return f"{self._where} refuses requests: {reason}{settings}"

    def _again(self, error: BaseException) -> bool:
        return (
            isinstance(error, WebError)
            and error.transient
            and (error.retry_after or 0.0) <= self._longest_wait
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        jittered = tenacity.wait_random_exponential(multiplier=0.5, max=self._longest_wait)(state)
        return max(state.outcome.exception().retry_after or 0.0, jittered)

    def _failed(self, error: WebError) -> None:
        self._failures += 1
        self._last = error
        if self._most_failures is None or self._failures < self._most_failures:
            return
        self._closed_until = time.monotonic() + self._pause
        if not self._said:
            self._said = True
            print(
                f"{self.name}: {self._failures} failures in a row ({error}); it is asked again "
                f"every {self._pause:g} s",
                file=sys.stderr,
            )


def is_refusal(error: WebError, *, at_start: bool = False) -> bool:
    """Return whether an error looks like a permanent refusal, judging by a single request.

    Permanent refusals are a 3xx or 4xx status (other than 408, 425 and 429), an invalid address, a
    refused connection, an unknown host name and an invalid certificate, and an open circuit breaker
    whose last failure was one of these connection failures. A single request may also be refused
    because of its content (its length, a firewall), so send a harmless request to find out.

    Args:
      error: Error of the request.
      at_start: Whether no request has succeeded yet. A temporary failure of the name lookup then
        counts as well.
    """
    if isinstance(error, StatusError):
        return not error.transient and error.status not in _PASSING
    if isinstance(error, RefusedError):
        return True
    reason = _connection_refusal(error)
    return reason is not None and (at_start or reason != _NO_LOOKUP)


def _connection_refusal(error: WebError) -> str | None:
    """Return why no server can be reached, or None if the error does not rule it out."""
    for cause in _causes(error):
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, socket.gaierror):
            return _NO_LOOKUP if cause.errno == socket.EAI_AGAIN else "no such host name"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "its certificate is not valid"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, outermost first."""
    waiting, seen = [error], set()
    while waiting:
        error = waiting.pop(0)
        if id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        waiting += getattr(error, "exceptions", ())
        waiting += [e for e in (error.__cause__ or error.__context__,) if e is not None]


def _key_is_refused(error: WebError) -> bool:
    if isinstance(error, StatusError):
        return error.status in _KEY_REFUSED
    return is_refusal(error)


class _Limits:
    """Limits and pending calls of one asyncio loop."""

    def __init__(self, at_once: int, per_second: float):
        self.at_once = asyncio.Semaphore(at_once)
        # A small bucket avoids bursts of a whole second's worth of calls.
        burst = max(1.0, per_second / 10)
        self.rate = aiolimiter.AsyncLimiter(burst, burst / per_second)
        self.under_way: dict[bytes, _Shared] = {}


@dataclasses.dataclass(eq=False)
class _Shared:
    """Pending request and the number of calls that wait for it."""

    task: asyncio.Task
    waiting: int = 0


def _key(method: str, url: str, request: dict[str, Any]) -> bytes:
    """Return a hash that identifies a request without revealing API keys or images."""
    digest = hashlib.blake2b(repr((method, url)).encode("utf-8", "replace"), digest_size=16)
    for name, value in sorted(request.items()):
        content = value if isinstance(value, bytes) else repr(value).encode("utf-8", "replace")
        digest.update(name.encode() + b"=" + content)
    return digest.digest()
