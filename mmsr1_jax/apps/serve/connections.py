"""Connection limits of the page's server: idle timeouts and eviction.

Uvicorn sets no timeout on receiving a request's head, nor on a client that does not read its
response. Here a connection without an active request is closed after `idle` seconds, whether it is
silent, has sent part of a head, is between two requests, or sends a body that is no longer read. If
there are too many connections, one without a request is evicted: the one idle for longest, of the
client with the most idle connections. A client that sends its request immediately is never evicted.
"""

import collections
import dataclasses

from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Limits on connections.

    Attributes:
      connections: Maximum number of concurrent connections, including those without a request.
      share: Maximum number of connections without a request for one client address.
      idle: Seconds that a connection may stay without a request.
      unread: Seconds that a client may leave sent data unread.
    """

    connections: int = 224
    share: int = 64
    idle: float = 10.0
    unread: float = 30.0


def make_protocol(limits: ConnectionLimits = ConnectionLimits()) -> type[H11Protocol]:
    """Return an HTTP protocol for uvicorn's `http` that enforces the limits."""

    class Protocol(H11Protocol):
        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._timer = self._unread_timer = None
            self._wait_for_request()
            _make_room(self.connections, self, limits)

        @property
        def working(self) -> bool:
            """Whether a request is active."""
            return self.cycle is not None and not self.cycle.response_complete

        def handle_events(self) -> None:
            super().handle_events()
            if self.working:
                self._timer.cancel()

        def on_response_complete(self) -> None:
            self._wait_for_request()  # first, as the next request may have arrived
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread_timer = self.loop.call_later(limits.unread, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_unread_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)
            self._stop_unread_timer()

        def _wait_for_request(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self.since = self.loop.time()
            unread = self.transport.get_write_buffer_size() > 0
            seconds = limits.unread if unread else limits.idle
            self._timer = self.loop.call_later(seconds, self.transport.abort)

        def _stop_unread_timer(self) -> None:
            if self._unread_timer is not None:
                self._unread_timer.cancel()
                self._unread_timer = None

    return Protocol


def _make_room(connections: set, new: H11Protocol, limits: ConnectionLimits) -> None:
    """Close a connection without a request if there are too many."""
    idle = collections.defaultdict(list)
    for one in connections:
        if one is not new and not one.working and not one.transport.is_closing():
            idle[_address(one)].append(one)
    own = idle[_address(new)]
    if len(own) >= limits.share:
        crowd = own
    elif sum(not one.transport.is_closing() for one in connections) > limits.connections:
        crowd = max(idle.values(), key=len)
    else:
        return
    # If all connections have active requests, uvicorn refuses the new one (`limit_concurrency`).
    if crowd:
        min(crowd, key=lambda one: one.since).transport.abort()


def _address(connection: H11Protocol) -> str:
    return connection.client[0] if connection.client else ""
