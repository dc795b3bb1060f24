"""HTTP connection pool that looks up idle connections by host.

Replaces httpcore's own pool, which compares all of its connections with one another on every
request. With a few hundred connections, that takes longer than the rest of the request.
"""

import asyncio
import collections
import ssl
from collections.abc import AsyncIterator

import httpcore

_Host = tuple[bytes, bytes, int]


class Connections:
    """Connection pool for httpx's transport, bound to one asyncio loop.

    Args:
      backend: Network backend that opens connections.
      ssl_context: TLS context for https.
      limit: Maximum number of connections in use, and of idle connections. Requests beyond the
        limit wait; idle connections beyond it are closed.
      idle_seconds: Seconds after which an idle connection is no longer reused.
    """

    def __init__(
        self,
        backend: httpcore.AsyncNetworkBackend,
        ssl_context: ssl.SSLContext,
        *,
        limit: int,
        idle_seconds: float = 30.0,
    ):
        self._backend, self._ssl_context = backend, ssl_context
        self._limit, self._idle_seconds = limit, idle_seconds
        self._room = asyncio.Semaphore(limit)
        self._idle_count = 0
        # Ordered by last use, most recent host last.
        self._idle: collections.OrderedDict[_Host, list[httpcore.AsyncHTTPConnection]] = (
            collections.OrderedDict()
        )

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        """Send a request on a pooled or new connection. Raises the exceptions of httpcore."""
        origin = request.url.origin
        host = (origin.scheme, origin.host, origin.port)
        await self._room.acquire()
        connection = None
        try:
            connection = await self._take(host) or httpcore.AsyncHTTPConnection(
                origin,
                ssl_context=self._ssl_context,
                keepalive_expiry=self._idle_seconds,
                network_backend=self._backend,
            )
            response = await connection.handle_async_request(request)
        except BaseException:
            self._room.release()
            if connection is not None:
                await connection.aclose()
            raise
        return httpcore.Response(
            response.status,
            headers=response.headers,
            content=_Body(response.stream, lambda: self._give_back(host, connection)),
            extensions=response.extensions,
        )

    async def _take(self, host: _Host) -> httpcore.AsyncHTTPConnection | None:
        """Return the most recently used idle connection to a host, or None."""
        idle = self._idle.get(host, [])
        while idle:
            connection = idle.pop()
            self._idle_count -= 1
            if not connection.has_expired():
                return connection
            await connection.aclose()
        return None

    async def _give_back(self, host: _Host, connection: httpcore.AsyncHTTPConnection) -> None:
        self._room.release()
        if not connection.is_idle():  # the body was closed before it was read to its end
            await connection.aclose()
            return
        self._idle.setdefault(host, []).append(connection)
        self._idle.move_to_end(host)
        self._idle_count += 1
        while self._idle_count > self._limit:
            oldest, idle = next(iter(self._idle.items()))
            if not idle:
                del self._idle[oldest]
                continue
            self._idle_count -= 1
            await idle.pop(0).aclose()

    async def aclose(self) -> None:
        for idle in self._idle.values():
            for connection in idle:
                await connection.aclose()
        self._idle.clear()
        self._idle_count = 0


class _Body:
    """Response body that calls `closed` when it is closed."""

    def __init__(self, stream, closed):
        self._stream, self._closed = stream, closed

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            yield chunk

    async def aclose(self) -> None:
        closed, self._closed = self._closed, None
        if closed is None:
            return
        try:
            await self._stream.aclose()
        finally:
            await closed()
