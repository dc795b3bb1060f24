"""Connections of the page's server: how long each may do nothing, and who gives way to whom.

Uvicorn waits for a request's head as long as its client likes, and for a client to read its answer.
Here a connection has no request under way for `idle` seconds at most: silent, with a part of a
head, between two requests, or sending a body that nobody reads any more. Where there are too many,
one without a request gives way, the longest without one first: of the client with most of them. A
client that sends its request at once is never among those.
"""

import collections
import dataclasses

from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What connections may take.

    Attributes:
      connections: Connections at a time, those without a request included.
      share: Connections of one client address without a request.
      idle: Seconds that a connection may be without a request.
      unread: Seconds for which a client may leave what was sent unread.
    """

    connections: int = 224
    share: int = 64
    idle: float = 10.0
    unread: float = 30.0


def make_protocol(limits: ConnectionLimits = ConnectionLimits()) -> type[H11Protocol]:
    """Return an HTTP protocol for uvicorn's `http` that keeps the limits."""

    class Protocol(H11Protocol):
        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._timer = self._unread_timer = None
            self._wait_for_request()
            _make_room(self.connections, self, limits)

        @property
        def working(self) -> bool:
            """Whether a request is under way."""
            return self.cycle is not None and not self.cycle.response_complete

        def handle_events(self) -> None:
            super().handle_events()
            if self.working:
                self._timer.cancel()

        def on_response_complete(self) -> None:
            self._wait_for_request()  # first: the next request may be there already
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
    """Close a connection without a request where there are too many."""
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
    # Where all have requests under way uvicorn refuses the new one's (`limit_concurrency`).
    if crowd:
        min(crowd, key=lambda one: one.since).transport.abort()


def _address(connection: H11Protocol) -> str:
    return connection.client[0] if connection.client else ""
