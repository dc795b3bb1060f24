"""Connection limits of the page's server: idle timeouts and eviction.

Uvicorn sets no timeout on receiving a request's head, nor on a client that does not read its
response. Here a connection without an active request is closed after `idle_timeout` seconds,
whether it is silent, has sent part of a head, is between two requests, or sends a body that is no
longer read. If there are too many connections, one without a request is evicted: the one idle for
longest, of the client with the most idle connections. A client that sends its request immediately
is never evicted.
"""

import asyncio
import collections
import dataclasses
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Limits on connections.

    Attributes:
      connections: Maximum number of concurrent connections, including those without a request.
      per_client: Maximum number of connections without a request for one client address.
      idle_timeout: Seconds that a connection may stay without a request.
      unread_timeout: Seconds that a client may leave sent data unread.
    """

    connections: int = 224
    per_client: int = 64
    idle_timeout: float = 10.0
    unread_timeout: float = 30.0


def make_protocol(limits: ConnectionLimits = ConnectionLimits()) -> type[H11Protocol]:
    """Return an HTTP protocol for uvicorn's `http` that enforces the limits."""

    class Protocol(H11Protocol):
        _idle_timer: asyncio.TimerHandle | None = None
        _unread_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_request()
            _evict_if_full(self.connections, self, limits)

        @property
        def is_active(self) -> bool:
            """Whether a request is active."""
            return self.cycle is not None and not self.cycle.response_complete

        def handle_events(self) -> None:
            super().handle_events()
            if self.is_active:
                self._stop_idle_timer()

        def on_response_complete(self) -> None:
            self._wait_for_request()  # first, as the next request may have arrived
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread_timer = self.loop.call_later(limits.unread_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_unread_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_idle_timer()
            super().connection_lost(exc)
            self._stop_unread_timer()

        def _wait_for_request(self) -> None:
            self._stop_idle_timer()
            self.idle_since = self.loop.time()
            unread = self.transport.get_write_buffer_size() > 0
            timeout = limits.unread_timeout if unread else limits.idle_timeout
            self._idle_timer = self.loop.call_later(timeout, self.transport.abort)

        def _stop_idle_timer(self) -> None:
            if self._idle_timer is not None:
                self._idle_timer.cancel()
                self._idle_timer = None

        def _stop_unread_timer(self) -> None:
            if self._unread_timer is not None:
                self._unread_timer.cancel()
                self._unread_timer = None

    return Protocol


def _evict_if_full(connections: set[Any], new: Any, limits: ConnectionLimits) -> None:
    """Close a connection without a request if there are too many.

    Args:
      connections: Connections of the server, instances of the class from `make_protocol`.
      new: The latest of them, which is kept.
      limits: Limits on connections.
    """
    idle = collections.defaultdict(list)
    for connection in connections:
        if connection is not new and not connection.is_active and _is_open(connection):
            idle[_address(connection)].append(connection)
    own = idle[_address(new)]
    if len(own) >= limits.per_client:
        candidates = own
    elif sum(map(_is_open, connections)) > limits.connections:
        candidates = max(idle.values(), key=len)
    else:
        return
    # If all connections have active requests, uvicorn refuses the new one (`limit_concurrency`).
    if candidates:
        min(candidates, key=lambda connection: connection.idle_since).transport.abort()


def _is_open(connection: H11Protocol) -> bool:
    return not connection.transport.is_closing()


def _address(connection: H11Protocol) -> str:
    return connection.client[0] if connection.client else ""
