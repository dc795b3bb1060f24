"""HTTP connection pool that looks up idle connections by host.

Replaces httpcore's own pool, which compares all of its connections with one another on every
request. With a few hundred connections, that takes longer than the rest of the request. Connections
are httpcore's; the pool is an httpx transport.
"""

import asyncio
import collections
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import httpcore
import httpx

_Host = tuple[bytes, bytes, int]  # scheme, host, port
_ERRORS = {
    httpcore.TimeoutException: httpx.TimeoutException,
    httpcore.ConnectTimeout: httpx.ConnectTimeout,
    httpcore.ReadTimeout: httpx.ReadTimeout,
    httpcore.WriteTimeout: httpx.WriteTimeout,
    httpcore.NetworkError: httpx.NetworkError,
    httpcore.ConnectError: httpx.ConnectError,
    httpcore.ReadError: httpx.ReadError,
    httpcore.WriteError: httpx.WriteError,
    httpcore.UnsupportedProtocol: httpx.UnsupportedProtocol,
    httpcore.ProtocolError: httpx.ProtocolError,
    httpcore.LocalProtocolError: httpx.LocalProtocolError,
    httpcore.RemoteProtocolError: httpx.RemoteProtocolError,
}


class ConnectionPool(httpx.AsyncBaseTransport):
    """httpx transport with pooled connections, bound to one asyncio loop.

    Args:
      backend: Network backend that opens connections.
      ssl_context: TLS context for https.
      limit: Maximum number of connections in use, and of idle connections. Requests beyond the
        limit wait; idle connections beyond it are closed.
      max_idle: Seconds after which an idle connection is no longer reused.
    """

    def __init__(
        self,
        backend: httpcore.AsyncNetworkBackend,
        ssl_context: ssl.SSLContext,
        *,
        limit: int,
        max_idle: float = 30.0,
    ):
        self._backend, self._ssl_context = backend, ssl_context
        self._limit, self._max_idle = limit, max_idle
        self._slots = asyncio.Semaphore(limit)
        self._num_idle = 0
        # Ordered by last use, most recent host last.
        self._idle: collections.OrderedDict[_Host, list[httpcore.AsyncHTTPConnection]] = (
            collections.OrderedDict()
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request on a pooled or new connection. Raises the exceptions of httpx."""
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        host = (url.origin.scheme, url.origin.host, url.origin.port)
        await self._slots.acquire()
        connection = None
        try:
            with _httpx_errors():
                connection = await self._take(host) or self._new_connection(url.origin)
                response = await connection.handle_async_request(
                    httpcore.Request(
                        request.method,
                        url,
                        headers=request.headers.raw,
                        content=request.stream,
                        extensions=request.extensions,
                    )
                )
        except BaseException:
            self._slots.release()
            if connection is not None:
                await connection.aclose()
            raise
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response, lambda: self._give_back(host, connection)),
            extensions=response.extensions,
        )

    def _new_connection(self, origin: httpcore.Origin) -> httpcore.AsyncHTTPConnection:
        return httpcore.AsyncHTTPConnection(
            origin,
            ssl_context=self._ssl_context,
            keepalive_expiry=self._max_idle,
            network_backend=self._backend,
        )

    async def _take(self, host: _Host) -> httpcore.AsyncHTTPConnection | None:
        """Return the most recently used idle connection to a host, or None."""
        idle = self._idle.get(host, [])
        while idle:
            connection = idle.pop()
            self._num_idle -= 1
            if not connection.has_expired():
                return connection
            await connection.aclose()
        return None

    async def _give_back(self, host: _Host, connection: httpcore.AsyncHTTPConnection) -> None:
        self._slots.release()
        if not connection.is_idle():  # the body was closed before it was read to its end
            await connection.aclose()
            return
        self._idle.setdefault(host, []).append(connection)
        self._idle.move_to_end(host)
        self._num_idle += 1
        while self._num_idle > self._limit:
            oldest, idle = next(iter(self._idle.items()))
            if not idle:
                del self._idle[oldest]
                continue
            self._num_idle -= 1
            await idle.pop(0).aclose()

    async def aclose(self) -> None:
        """Close the idle connections."""
        for idle in self._idle.values():
            for connection in idle:
                await connection.aclose()
        self._idle.clear()
        self._num_idle = 0


class _Body(httpx.AsyncByteStream):
    """Response body that gives its connection back when it is closed."""

    def __init__(self, response: httpcore.Response, give_back: Callable[[], Awaitable[None]]):
        self._response = response
        self._give_back: Callable[[], Awaitable[None]] | None = give_back

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _httpx_errors():
            async for chunk in self._response.aiter_stream():
                yield chunk

    async def aclose(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is None:
            return
        try:
            with _httpx_errors():
                await self._response.aclose()
        finally:
            await give_back()


@contextlib.contextmanager
def _httpx_errors() -> Iterator[None]:
    """Raise the exceptions of httpcore as those of httpx."""
    try:
        yield
    except tuple(_ERRORS) as error:
        kind = next(_ERRORS[base] for base in type(error).__mro__ if base in _ERRORS)
        raise kind(str(error)) from error
