"""A web service with its manners: retries, limits, and silence while it is down.

identical calls under way are one call
at most so many at a time, and so many a second
429, 5xx and timeouts are tried again, later each time, and as late as the server asks
after a row of failures the service is not asked at all for a while, and that is said once
requests that fail in the end and requests that are refused are counted (`utils/fallbacks.py`)
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

from mmsr1_jax.tools.web import Answer, RefusedError, StatusError, Web, WebError
from mmsr1_jax.utils import fallbacks

_KEY_REFUSED = (401, 402, 403)
_NO_LOOKUP = "its name cannot be looked up"
_PASSING = (408, 425)  # of the client errors, those that another try may cure


class ServiceDownError(WebError):
    """A service that is not asked, as it failed too often just now; `__cause__` is the last
    failure."""


class ServiceRefusedError(ValueError):
    """A service that refuses requests for good: a wrong key, address or model. The message is one
    line that names the service, its address without secrets and its settings."""


class Service:
    """One service.

    Args of the constructor:
      name: for messages.
      web: makes the requests.
      at_once: calls at a time.
      per_second: calls begun in a second.
      attempts: of one call.
      longest_wait: seconds between two of them, at most; a server that asks for more is not waited
        for.
      failures: in a row, after which it is not asked; None: it always is (many hosts, say).
      pause: seconds for which it is then not asked.
      turn: awaited before each call: limits that are shared with other processes, which come beside
        `per_second`. `at_once` is of one process always.
      counted: whether its failures are figures (`utils/fallbacks.py`).
      address, settings: for messages: where it is, without secrets, and what configures it.
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
        """`Web.request` with retries, rate limits and a circuit breaker.

        Args:
          read: Reads the answer; a WebError that it raises is one of the request, which is tried
            again if the error is transient. None: the answer is returned.
          even_if_down: Ask although the service failed too often just now.

        Returns:
          What `read` returns, or the answer.

        Raises:
          WebError: of the last attempt, or ServiceDownError.
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
                # Nobody wants it any more; one who asks from now on begins anew.
                del under_way[key]
                shared.task.cancel()

    @staticmethod
    def _ended(under_way: "dict[bytes, _Shared]", key: bytes, task: asyncio.Task) -> None:
        if key in under_way and under_way[key].task is task:
            del under_way[key]
        if not task.cancelled():
            task.exception()  # it has been looked at, also where nobody waited for it

    async def _counted(self, asked: Awaitable[Any]) -> Any:
        try:
            return await asked
        except WebError as error:
            if self._is_counted:
                figure = f"service/{self.name}"
                if _key_is_refused(error):
                    fallbacks.note(f"{figure}/refused", f"warning: {self.refusal(error)}")
                fallbacks.note(f"{figure}/failed")
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
        """Return the line that tells a user which service refuses requests, and why."""
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
    """Whether the server refused a request for good, as far as one request can tell.

    That is a status of 3xx or 4xx (but for 408, 425 and 429), an address that cannot be used,
    a refused connection, a name that does not exist, or a bad certificate; and a service that is
    not asked because it failed like that. A single request may also be refused for what it holds
    (its length, a firewall): ask something harmless to find out.

    Args:
      at_start: Whether nothing has worked yet; then a name that cannot be looked up for the moment
        counts too.
    """
    if isinstance(error, StatusError):
        return not error.transient and error.status not in _PASSING
    if isinstance(error, RefusedError):
        return True
    reason = _connection_refusal(error)
    return reason is not None and (at_start or reason != _NO_LOOKUP)


def _connection_refusal(error: WebError) -> str | None:
    """Return why no server can be reached at an address, None if there may be one."""
    for cause in _causes(error):
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, socket.gaierror):
            return _NO_LOOKUP if cause.errno == socket.EAI_AGAIN else "no such host name"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "its certificate is not valid"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it, outermost first."""
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
    """What belongs to one asyncio loop."""

    def __init__(self, at_once: int, per_second: float):
        self.at_once = asyncio.Semaphore(at_once)
        # A small bucket, lest calls come in bursts of a second's worth.
        burst = max(1.0, per_second / 10)
        self.rate = aiolimiter.AsyncLimiter(burst, burst / per_second)
        self.under_way: dict[bytes, _Shared] = {}


@dataclasses.dataclass(eq=False)
class _Shared:
    """A call under way, and how many wait for it."""

    task: asyncio.Task
    waiting: int = 0


def _key(method: str, url: str, request: dict[str, Any]) -> bytes:
    """By which identical calls are known; it holds neither keys nor pictures."""
    digest = hashlib.blake2b(repr((method, url)).encode("utf-8", "replace"), digest_size=16)
    for name, value in sorted(request.items()):
        content = value if isinstance(value, bytes) else repr(value).encode("utf-8", "replace")
        digest.update(name.encode() + b"=" + content)
    return digest.digest()
