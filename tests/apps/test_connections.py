"""Server of the page under clients that send nothing, send slowly, send too much, or never read.

Other clients are served meanwhile, and inactive connections are closed.
"""

import asyncio
import contextlib
import socket
import threading
import time
import types

import pytest
import uvicorn

from mmsr1_jax.apps.serve.app import Limits, make_app
from mmsr1_jax.apps.serve.connections import ConnectionLimits, make_protocol
from mmsr1_jax.apps.serve.request_queue import RequestQueue
from mmsr1_jax.config.settings import Config
from mmsr1_jax.episodes.episode import Episode
from tests.scripted_policy import scripted_processor
from tests.serving import IMAGES, body, wait_for

PATIENCE = 600.0  # seconds; generous, for busy machines
LONG = 3600.0  # seconds; longer than any test
ENDLESS, DEFAULT = ConnectionLimits(idle_timeout=LONG, unread_timeout=LONG), Limits()


class SlowEngine:
    """Engine that finishes no episode before `go` is set."""

    lockstep = None

    def __init__(self):
        self.config = Config()
        self.config.rollout.lanes = 1
        self.go = threading.Event()

    def rollout_part(self, take, *, on_event, **_):
        while taken := take(1):
            self.go.wait(PATIENCE)
            for index, example in taken:
                episode = Episode(example=example, group=index, index=index, end="answer")
                on_event(episode, "end")
                yield episode


@pytest.fixture(scope="module")
def processor():
    return scripted_processor()


@contextlib.contextmanager
def served(processor, connections=ENDLESS, limits=DEFAULT, app=None):
    """Run the app and yield its port, queue, engine and uvicorn server."""
    engine = SlowEngine()
    queue = RequestQueue(engine, engine.config.sampling)
    app = app or make_app(queue, processor, title="slow", limits=limits)
    server = uvicorn.Server(uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="critical", lifespan="off",
        limit_concurrency=256, http=make_protocol(connections), timeout_keep_alive=3600,
    ))  # fmt: skip
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], queue, engine, server
    finally:
        engine.go.set()
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE)
        queue.close()


def connect(port, data=b"", source="127.0.0.1") -> socket.socket:
    connection = socket.create_connection(
        ("127.0.0.1", port), timeout=PATIENCE, source_address=(source, 0)
    )
    connection.sendall(data)
    return connection


def head(method="GET", path="/", **headers) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def status(connection) -> int:
    """Return the status of the response, or 0 if the connection was closed."""
    try:
        answer = connection.recv(4096)
    except ConnectionError:
        return 0
    return int(answer.split(b" ")[1]) if answer else 0


def get(port, source="127.0.0.1") -> int:
    with connect(port, head(Connection="close"), source) as connection:
        return status(connection)


def request_with_retries(port, data) -> tuple[int, socket.socket]:
    """Return the status of the response and the connection, retrying if it was closed.

    A busy machine may stall for so long that the server closes the connection.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            connection = connect(port, data)
            if status_code := status(connection):
                return status_code, connection
    raise AssertionError("no answer")


def serves(port) -> bool:
    status_code, connection = request_with_retries(port, head(Connection="close"))
    connection.close()
    return status_code == 200


def is_closed(connection) -> bool:
    """Wait until the server has closed a connection."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return True


def ask(port, question="?", source="127.0.0.1") -> socket.socket:
    content = body(question, IMAGES[0])
    sent = head("POST", "/ask", Content_Length=len(content)) + content
    return connect(port, sent, source)


PARTS = {
    "silent": b"",
    "half a head": b"POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
    "half a line": b"GE",
    "after a response": head(),
    "a body that is not read": head(Content_Length=10**9),
    "an endless body that is not read": head(Transfer_Encoding="chunked") + b"5\r\nabcde\r\n",
}


@pytest.mark.parametrize("data", PARTS.values(), ids=PARTS)
def test_other_clients_are_served_beside_256_inactive_connections(processor, data):
    """They do not time out; the oldest ones are closed for new ones."""
    with served(processor) as (port, _, _, server):
        connections = [connect(port, data) for _ in range(256)]
        assert get(port) == 200
        wait_for(lambda: len(server.server_state.connections) <= 65)
        # The client closed none of them.
        assert sum(connection.fileno() >= 0 for connection in connections) == 256
        assert get(port, "127.0.0.2") == 200
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("data", PARTS.values(), ids=PARTS)
def test_inactive_connection_is_closed(processor, data):
    with served(processor, ConnectionLimits(idle_timeout=0.3, unread_timeout=LONG)) as (
        port,
        _,
        _,
        server,
    ):
        assert is_closed(connect(port, data))
        wait_for(lambda: not server.server_state.connections)


@pytest.mark.parametrize("piece", [b"X", b"X: 1\r\n", b"\r\n"])
def test_slow_header_is_closed_like_a_stalled_one(processor, piece):
    """Single bytes do not reset the timeout."""
    with served(processor, ConnectionLimits(idle_timeout=0.5, unread_timeout=LONG)) as (
        port,
        _,
        _,
        _,
    ):
        connection = connect(port, b"" if piece == b"\r\n" else b"GET / HTTP/1.1\r\nHost: h\r\n")
        end = time.monotonic() + PATIENCE
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(piece)
                time.sleep(0.02)
        assert time.monotonic() < end


def test_pending_request_is_not_closed(processor):
    """However long it takes, and however many connections are open."""
    with served(processor, ConnectionLimits(idle_timeout=0.2, unread_timeout=LONG)) as (
        port,
        queue,
        engine,
        _,
    ):
        question = ask(port)
        wait_for(lambda: any(queue._active))
        many = [connect(port) for _ in range(300)]
        assert all(map(is_closed, many))
        engine.go.set()
        events = b""
        while b'"event": "end"' not in events:
            piece = question.recv(4096)
            assert piece
            events += piece


def test_malformed_headers_do_not_affect_the_server(processor):
    malformed = [
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 200_000,
        b"GET / HTTP/1.1\r\n" + b"A: 1\r\n" * 20_000,
        b"GET /" + b"a" * 100_000,
        head("POST", "/ask", Content_Length="-5"), head("POST", "/ask", Content_Length="9" * 5000),
        head("POST", "/ask", Content_Length=5, Transfer_Encoding="chunked") + b"zz\r\n",
        head("POST", "/ask", Transfer_Encoding="chunked") + b"FFFFFFFFFFFFFFFFFFFF\r\nx",
        head("POST", "/ask", Content_Length=2) + b"{}" + b"rest that was not announced\r\n\r\n",
        head("POST", "/ask", Upgrade="websocket", Connection="Upgrade"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 1000, b"\n" * 100_000,
        head() * 500,
    ]  # fmt: skip
    with served(processor, ConnectionLimits(idle_timeout=0.5, unread_timeout=LONG),
                Limits(grace_period=0.2, upload_timeout=0.4)) as (port, _, _, server):  # fmt: skip
        for data in malformed:
            connection = connect(port)
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            assert serves(port)
            assert is_closed(connection)
        wait_for(lambda: not server.server_state.connections and not server.server_state.tasks)


def test_client_that_does_not_read_is_disconnected(processor):
    """The buffered data is bounded."""
    sent, done = [0], threading.Event()

    async def flood(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not done.is_set():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent[0] += 65536
            await asyncio.sleep(0.001)

    limits = ConnectionLimits(idle_timeout=LONG, unread_timeout=0.5)
    with served(processor, limits, app=flood) as (port, _, _, server):
        connection = connect(port, head())
        wait_for(lambda: sent[0] > 0)
        wait_for(lambda: not server.server_state.connections)
        done.set()
        connection.close()


# Questions


def test_slow_bodies_are_closed_for_a_question(processor):
    """Those that sent least are closed first; none times out."""
    limits = Limits(max_uploads=4, grace_period=LONG, upload_timeout=LONG)
    slow = head("POST", "/ask", Content_Length=10**6)
    with served(processor, limits=limits) as (port, queue, _, _):
        good = [connect(port, slow + b"x" * 5000 * n) for n in (1, 2, 3)]
        connections = []
        for _ in range(20):
            connections.append(connect(port, slow))
            if len(connections) > 1:
                assert status(connections[-2]) == 408
        question = ask(port)
        assert status(connections[-1]) == 408 and status(question) == 200
        for connection in good:  # they have sent more
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
        wait_for(lambda: any(queue._active))


@pytest.mark.parametrize("chunked", [False, True])
def test_slow_body_times_out_and_a_steady_one_does_not(processor, chunked):
    limits = Limits(grace_period=0.5, upload_timeout=LONG, min_upload_rate=10**4)
    kind = {"Transfer_Encoding": "chunked"} if chunked else {"Content_Length": 10**6}
    with served(processor, limits=limits) as (port, _, _, _):
        connection = connect(port, head("POST", "/ask", **kind))
        connection.settimeout(0.02)
        answer, end = b"", time.monotonic() + PATIENCE
        while not answer and time.monotonic() < end:
            connection.sendall(b"1\r\nx\r\n" if chunked else b"x")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")
    steady = Limits(grace_period=0.5, upload_timeout=LONG, min_upload_rate=1)
    with served(processor, limits=steady) as (port, _, _, _):
        content = body("?", IMAGES[0])
        # The first piece is sent with the head, and suffices for many seconds.
        piece = len(content) // 8
        assert piece > 60
        data = head("POST", "/ask", Content_Length=len(content)) + content[:piece]
        connection = connect(port, data)
        for start in range(piece, len(content), piece):
            time.sleep(0.1)  # in total longer than the grace period
            connection.sendall(content[start : start + piece])
        assert status(connection) == 200


def test_body_of_wrong_length_is_rejected(processor):
    limits = Limits(grace_period=0.3, upload_timeout=0.6, max_image_bytes=100_000)
    content = body("?", IMAGES[0])
    with served(processor, ConnectionLimits(idle_timeout=0.5), limits) as (port, _, _, _):
        announced = head("POST", "/ask", Content_Length=len(content) + 50)
        status_code, longer = request_with_retries(port, announced + content)
        assert status_code == 408 and is_closed(longer)
        endless = connect(port, head("POST", "/ask", Transfer_Encoding="chunked"))
        piece = b"%x\r\n" % 4096 + b"x" * 4096 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                endless.sendall(piece)
        assert is_closed(endless)
        assert serves(port)


def test_questions_of_a_busy_client_are_dropped_for_another_client(processor):
    limits = Limits(max_waiting=4)
    with served(processor, limits=limits) as (port, queue, engine, _):
        first = ask(port, "first")
        wait_for(lambda: any(queue._active))
        many = []
        for index in range(4):
            many.append(ask(port, str(index)))
            wait_for(lambda: len(queue) == len(many))
        assert status(ask(port)) == 503  # the same client
        others = [ask(port, f"other {n}", "127.0.0.2") for n in range(2)]
        for other in others:
            assert status(other) == 200
        for index in (3, 2):  # the most recent ones
            events = b""
            while b"failed" not in events:
                events += many[index].recv(4096)
            assert b"several of them yours" in events
        assert status(ask(port, "?", "127.0.0.2")) == 503  # this client would then have as many
        assert status(ask(port, "?", "127.0.0.3")) == 200
        assert len(queue) == 4
        engine.go.set()
        wait_for(lambda: not len(queue) and not any(queue._active))
        for connection in (first, many[0], *others[:1]):
            events = b""
            while b'"event": "end"' not in events:
                events += connection.recv(4096)


def test_single_client_may_fill_the_queue():
    queue = types.SimpleNamespace(_waiting=[], _evictable=None)
    for _ in range(31):
        assert RequestQueue._evictable(queue, "a") is None
        queue._waiting.append(types.SimpleNamespace(client="a"))
    assert RequestQueue._evictable(queue, "b") is queue._waiting[-1]
    assert RequestQueue._evictable(queue, "a") is None
