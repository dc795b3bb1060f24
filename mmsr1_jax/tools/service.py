"""HTTP client of a web service, with retries, rate limits and a circuit breaker.

- Identical concurrent calls share one request.
- The number of concurrent requests and of requests per second is limited.
- Status 429, 5xx, timeouts and connection failures are retried with exponential backoff, and no
  earlier than the server asks.
- After several consecutive failures the service is not contacted for a while, which is logged once.
- Requests that fail after all retries, and requests that the service refuses, are counted
  (`utils/fallbacks.py`).
"""

import asyncio
import dataclasses
import hashlib
import socket
import ssl
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiolimiter
import tenacity

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools.web import RefusedError, StatusError, WebClient, WebError, WebResponse
from mmsr1_jax.utils import fallbacks
from mmsr1_jax.utils.checked_json import utf8
from mmsr1_jax.utils.logs import log

_KEY_REFUSED_STATUS = (401, 402, 403)
_NO_LOOKUP = "its name cannot be looked up"
_TRANSIENT_STATUS = (408, 425)  # client errors that may be transient


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
      max_concurrency: Maximum number of concurrent requests, per asyncio loop.
      max_qps: Maximum number of requests per second, per asyncio loop.
      max_attempts: Maximum number of attempts per call.
      max_wait: Maximum wait between two attempts, in seconds. If the server asks for a longer one,
        the call is not retried.
      max_failures: Number of consecutive failures that opens the circuit breaker. None disables it,
        for instance for requests to many hosts.
      cooldown: Seconds for which an open circuit breaker rejects calls.
      wait_for_slot: Function awaited before each attempt, for a rate limit shared with other
        processes. It applies in addition to `max_qps`.
      before_request: Function called before each request is sent, for instance to count it. An
        exception that it raises ends the call.
      count_failures: Whether failures are counted as metrics (`utils/fallbacks.py`).
      address: Address of the service without secrets, for messages.
      settings: Names of the settings that configure the service, for messages.
    """

    def __init__(
        self,
        name: str,
        web: WebClient,
        *,
        max_concurrency: int = 32,
        max_qps: float = 50.0,
        max_attempts: int = 3,
        max_wait: float = 20.0,
        max_failures: int | None = 20,
        cooldown: float = 30.0,
        wait_for_slot: Callable[[], Awaitable[None]] | None = None,
        before_request: Callable[[], None] | None = None,
        count_failures: bool = True,
        address: str = "",
        settings: str = "",
    ):
        self.name = name
        self._label = f"{name} at {address}" if address else name
        self._settings, self._count_failures = settings, count_failures
        self._web = web
        self._max_concurrency, self._max_qps = max_concurrency, max_qps
        self._max_attempts, self._max_wait = max_attempts, max_wait
        self._max_failures, self._cooldown = max_failures, cooldown
        self._wait_for_slot, self._before_request = wait_for_slot, before_request
        # State of the circuit breaker: it is open until a time on the monotonic clock.
        self._num_failures, self._open_until, self._has_warned = 0, 0.0, False
        self._last_error: WebError | None = None
        self._loops: weakref.WeakKeyDictionary[Any, _LoopState] = weakref.WeakKeyDictionary()

    async def call(
        self,
        method: str,
        url: str,
        *,
        parse: Callable[[WebResponse], Any] | None = None,
        ignore_breaker: bool = False,
        **request: Any,
    ) -> Any:
        """Send a request by `WebClient.request`, with retries, rate limits and a circuit breaker.

        Args:
          method: HTTP method.
          url: URL of the request.
          parse: Function that parses the response. A WebError that it raises counts as a failure of
            the request, which is retried if the error is transient. If None, return the response.
          ignore_breaker: Whether to send the request even if the circuit breaker is open.
          **request: Further arguments of `WebClient.request`.

        Returns:
          Result of `parse`, or the response.

        Raises:
          WebError: The last attempt failed.
          ServiceDownError: The circuit breaker is open.
        """
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops[loop] = _LoopState(self._max_concurrency, self._max_qps)
        pending = self._loops[loop].pending
        key = _request_key(method, url, request)
        if key not in pending:

            async def send() -> Any:
                return await self._send(method, url, request, parse)

            task = asyncio.ensure_future(self._call(self._loops[loop], send, ignore_breaker))
            pending[key] = _PendingCall(task)
            task.add_done_callback(lambda done: self._remove(pending, key, done))
        shared = pending[key]
        shared.num_waiters += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.num_waiters -= 1
            if not shared.num_waiters and not shared.task.done():
                # No caller waits any more. A later identical call sends a new request.
                del pending[key]
                shared.task.cancel()

    @staticmethod
    def _remove(pending: "dict[bytes, _PendingCall]", key: bytes, task: asyncio.Task) -> None:
        if key in pending and pending[key].task is task:
            del pending[key]
        if not task.cancelled():
            task.exception()  # mark the exception as retrieved, even if no caller waits

    async def _call(
        self, loop: "_LoopState", send: Callable[[], Awaitable[Any]], ignore_breaker: bool
    ) -> Any:
        """Send a request with retries, and count it if it fails after all of them."""
        try:
            return await self._retry(loop, send, ignore_breaker)
        except WebError as error:
            if self._count_failures:
                metric = f"service/{self.name}"
                if _is_key_refused(error):
                    fallbacks.count(f"{metric}/refused", f"warning: {self.refusal_message(error)}")
                fallbacks.count(f"{metric}/failed")
            raise

    async def _retry(
        self, loop: "_LoopState", send: Callable[[], Awaitable[Any]], ignore_breaker: bool
    ) -> Any:
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._max_attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception(self._is_retryable),
            reraise=True,
        ):
            with attempt:
                async with loop.slots, loop.rate:
                    if time.monotonic() < self._open_until and not ignore_breaker:
                        raise ServiceDownError(
                            f"{self.name} failed too often; no requests are sent for now"
                        ) from self._last_error
                    if self._wait_for_slot is not None:
                        await self._wait_for_slot()
                    return await send()

    async def _send(
        self,
        method: str,
        url: str,
        request: dict[str, Any],
        parse: Callable[[WebResponse], Any] | None,
    ) -> Any:
        """Send a request once, and update the circuit breaker."""
        if self._before_request is not None:
            self._before_request()
        try:
            response = await self._web.request(method, url, **request)
            result = response if parse is None else parse(response)
        except WebError as error:
            if error.transient:
                self._record_failure(error)
            raise
        self._num_failures, self._open_until, self._has_warned = 0, 0.0, False
        return result

    def refusal_message(self, error: WebError) -> str:
        """Return a one-line message that names the service and why it refuses requests."""
        reason = _connection_refusal(error) or str(error)
        settings = f" (settings: {self._settings})" if self._settings else ""
        return f"{self._label} refuses requests: {reason}{settings}"

    def _is_retryable(self, error: BaseException) -> bool:
        return (
            isinstance(error, WebError)
            and error.transient
            and (error.retry_after or 0.0) <= self._max_wait
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Return the seconds to wait before the next attempt."""
        jittered = tenacity.wait_random_exponential(multiplier=0.5, max=self._max_wait)(state)
        error = None if state.outcome is None else state.outcome.exception()
        retry_after = error.retry_after if isinstance(error, WebError) else None
        return max(retry_after or 0.0, jittered)

    def _record_failure(self, error: WebError) -> None:
        self._num_failures += 1
        self._last_error = error
        if self._max_failures is None or self._num_failures < self._max_failures:
            return
        self._open_until = time.monotonic() + self._cooldown
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: %d consecutive failures (%s); it is contacted at most every %g s",
                self.name, self._num_failures, error, self._cooldown,
            )  # fmt: skip


def is_temporary(error: WebError) -> bool:
    """Return whether a failed call may succeed later, as the service was down or overloaded."""
    return error.transient or isinstance(error, ServiceDownError)


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
        return not error.transient and error.status not in _TRANSIENT_STATUS
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
    queue, seen = [error], set()
    while queue:
        error = queue.pop(0)
        if id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        queue += getattr(error, "exceptions", ())
        queue += [e for e in (error.__cause__ or error.__context__,) if e is not None]


def _is_key_refused(error: WebError) -> bool:
    if isinstance(error, StatusError):
        return error.status in _KEY_REFUSED_STATUS
    return is_refusal(error)


class _LoopState:
    """Limits and pending calls of one asyncio loop."""

    def __init__(self, max_concurrency: int, max_qps: float):
        self.slots = asyncio.Semaphore(max_concurrency)
        # A small bucket avoids bursts of a whole second's worth of calls.
        burst = max(1.0, max_qps / 10)
        self.rate = aiolimiter.AsyncLimiter(burst, burst / max_qps)
        self.pending: dict[bytes, _PendingCall] = {}


@dataclasses.dataclass(eq=False)
class _PendingCall:
    """Task of a request and the number of calls that wait for it."""

    task: asyncio.Task
    num_waiters: int = 0


def _request_key(method: str, url: str, request: dict[str, Any]) -> bytes:
    """Return a hash that identifies a request without revealing API keys or images."""
    digest = hashlib.blake2b(utf8(repr((method, url))), digest_size=16)
    for name, value in sorted(request.items()):
        content = value if isinstance(value, bytes) else utf8(repr(value))
        digest.update(name.encode() + b"=" + content)
    return digest.digest()
