"""The page's server under clients that send nothing, slowly, too much, or never read: the others
are answered meanwhile, and whoever does nothing is cut off."""

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
from tests.acting import acting_processor
from tests.serving import IMAGES, body, wait_for

PATIENCE = 600.0  # seconds: on a busy machine everything takes its time
LONG = 3600.0  # seconds: never, in a test
ENDLESS, DEFAULT = ConnectionLimits(idle_timeout=LONG, unread_timeout=LONG), Limits()


class SlowEngine:
    """An engine that answers nothing until it is let."""

    def __init__(self):
        self.config = Config()
        self.config.rollout.lanes = 1
        self.go = threading.Event()

    def rollout_part(self, take, *, watch, **_):
        while taken := take(1):
            self.go.wait(PATIENCE)
            for number, example in taken:
                episode = Episode(example=example, group=number, index=number, end="answer")
                watch(episode, "end")
                yield episode


@pytest.fixture(scope="module")
def processor():
    return acting_processor()


@contextlib.contextmanager
def served(processor, connections=ENDLESS, limits=DEFAULT, app=None):
    """Yields the port, the desk, the engine and uvicorn's server."""
    engine = SlowEngine()
    desk = RequestQueue(engine, engine.config.sampling)
    app = app or make_app(desk, processor, title="slow", limits=limits)
    server = uvicorn.Server(uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="critical", lifespan="off",
        limit_concurrency=256, http=make_protocol(connections), timeout_keep_alive=3600,
    ))  # fmt: skip
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], desk, engine, server
    finally:
        engine.go.set()
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE)
        desk.close()


def connect(port, first=b"", source="127.0.0.1") -> socket.socket:
    made = socket.create_connection(
        ("127.0.0.1", port), timeout=PATIENCE, source_address=(source, 0)
    )
    made.sendall(first)
    return made


def head(method="GET", path="/", **headers) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def status(connection) -> int:
    """Of the answer; 0: there is none, as the connection was cut."""
    try:
        answer = connection.recv(4096)
    except ConnectionError:
        return 0
    return int(answer.split(b" ")[1]) if answer else 0


def get(port, source="127.0.0.1") -> int:
    with connect(port, head(Connection="close"), source) as connection:
        return status(connection)


def answered(port, first) -> tuple[int, socket.socket]:
    """The status of the answer, and the connection. Where the machine stalled so long that the
    server cut the connection, what is to be sent is sent again."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            connection = connect(port, first)
            if found := status(connection):
                return found, connection
    raise AssertionError("no answer")


def serves(port) -> bool:
    found, connection = answered(port, head(Connection="close"))
    connection.close()
    return found == 200


def cut_off(connection) -> bool:
    """Waits until the server has cut a connection."""
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
    "after an answer": head(),
    "a body nobody reads": head(Content_Length=10**9),
    "an endless body nobody reads": head(Transfer_Encoding="chunked") + b"5\r\nabcde\r\n",
}


@pytest.mark.parametrize("first", PARTS.values(), ids=PARTS)
def test_others_are_answered_beside_256_connections_that_do_nothing(processor, first):
    """No clock: these never end by themselves, and give way to each other."""
    with served(processor) as (port, _, _, server):
        several = [connect(port, first) for _ in range(256)]
        assert get(port) == 200
        wait_for(lambda: len(server.server_state.connections) <= 65)
        assert sum(one.fileno() >= 0 for one in several) == 256  # none was closed from here
        assert get(port, "127.0.0.2") == 200
        for one in several:
            one.close()


@pytest.mark.parametrize("first", PARTS.values(), ids=PARTS)
def test_a_connection_that_does_nothing_is_cut_off(processor, first):
    with served(processor, ConnectionLimits(idle_timeout=0.3, unread_timeout=LONG)) as (
        port,
        _,
        _,
        server,
    ):
        assert cut_off(connect(port, first))
        wait_for(lambda: not server.server_state.connections)


@pytest.mark.parametrize("piece", [b"X", b"X: 1\r\n", b"\r\n"])
def test_a_head_that_drips_is_cut_off_as_one_that_stops(processor, piece):
    """Each byte that arrives in time moves nothing."""
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


def test_a_request_under_way_is_not_cut_off(processor):
    """However long it takes, beside any number of connections."""
    with served(processor, ConnectionLimits(idle_timeout=0.2, unread_timeout=LONG)) as (
        port,
        desk,
        engine,
        _,
    ):
        asked = ask(port)
        wait_for(lambda: any(desk._under_way))
        many = [connect(port) for _ in range(300)]
        assert all(map(cut_off, many))
        engine.go.set()
        told = b""
        while b'"event": "end"' not in told:
            piece = asked.recv(4096)
            assert piece
            told += piece


def test_heads_of_any_kind_leave_the_server_as_it_was(processor):
    odd = [
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
        for first in odd:
            connection = connect(port)
            with contextlib.suppress(ConnectionError):
                connection.sendall(first)
            assert serves(port)
            assert cut_off(connection)
        wait_for(lambda: not server.server_state.connections and not server.server_state.tasks)


def test_whoever_does_not_read_is_cut_off(processor):
    """And what is kept for them is bounded."""
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


def test_slow_bodies_give_way_to_a_question(processor):
    """The first ones that sent least; none ends by a clock."""
    limits = Limits(max_uploads=4, grace_period=LONG, upload_timeout=LONG)
    slow = head("POST", "/ask", Content_Length=10**6)
    with served(processor, limits=limits) as (port, desk, _, _):
        good = [connect(port, slow + b"x" * 5000 * n) for n in (1, 2, 3)]
        several = []
        for _ in range(20):
            several.append(connect(port, slow))
            if len(several) > 1:
                assert status(several[-2]) == 408
        asked = ask(port)
        assert status(several[-1]) == 408 and status(asked) == 200
        for connection in good:  # they had sent more
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
        wait_for(lambda: any(desk._under_way))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_drips_ends_while_a_steady_one_arrives(processor, chunked):
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
        # The first piece comes with the head, and is enough for many seconds.
        piece = len(content) // 8
        assert piece > 60
        first = head("POST", "/ask", Content_Length=len(content)) + content[:piece]
        connection = connect(port, first)
        for begin in range(piece, len(content), piece):
            time.sleep(0.1)  # longer in all than the grace
            connection.sendall(content[begin : begin + piece])
        assert status(connection) == 200


def test_a_body_longer_or_shorter_than_announced(processor):
    limits = Limits(grace_period=0.3, upload_timeout=0.6, max_image_bytes=100_000)
    content = body("?", IMAGES[0])
    with served(processor, ConnectionLimits(idle_timeout=0.5), limits) as (port, _, _, _):
        announced = head("POST", "/ask", Content_Length=len(content) + 50)
        found, longer = answered(port, announced + content)
        assert found == 408 and cut_off(longer)
        endless = connect(port, head("POST", "/ask", Transfer_Encoding="chunked"))
        piece = b"%x\r\n" % 4096 + b"x" * 4096 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                endless.sendall(piece)
        assert cut_off(endless)
        assert serves(port)


def test_a_client_with_many_questions_gives_way_to_another(processor):
    limits = Limits(max_waiting=4)
    with served(processor, limits=limits) as (port, desk, engine, _):
        first = ask(port, "first")
        wait_for(lambda: any(desk._under_way))
        many = []
        for number in range(4):
            many.append(ask(port, str(number)))
            wait_for(lambda: len(desk) == len(many))
        assert status(ask(port)) == 503  # of the same client
        others = [ask(port, f"other {n}", "127.0.0.2") for n in range(2)]
        for other in others:
            assert status(other) == 200
        for number in (3, 2):  # the last ones
            told = b""
            while b"failed" not in told:
                told += many[number].recv(4096)
            assert b"several of them yours" in told
        assert status(ask(port, "?", "127.0.0.2")) == 503  # would have as many
        assert status(ask(port, "?", "127.0.0.3")) == 200
        assert len(desk) == 4
        engine.go.set()
        wait_for(lambda: not len(desk) and not any(desk._under_way))
        for connection in (first, many[0], *others[:1]):
            told = b""
            while b'"event": "end"' not in told:
                told += connection.recv(4096)


def test_one_client_alone_may_use_all_places():
    desk = types.SimpleNamespace(_waiting=[], _to_give_way=None)
    for _ in range(31):
        assert RequestQueue._to_give_way(desk, "a") is None
        desk._waiting.append(types.SimpleNamespace(client="a"))
    assert RequestQueue._to_give_way(desk, "b") is desk._waiting[-1]
    assert RequestQueue._to_give_way(desk, "a") is None
