"""Fetching from real servers on loopback: bounded, checked, retried, and never more than asked."""

import asyncio
import gzip
import pickle
import time

import httpcore
import pytest
from starlette.applications import Starlette
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from mmsr1_jax.tools import web
from mmsr1_jax.tools.service import Service, ServiceDownError
from mmsr1_jax.tools.web import JSON, BodyError, RefusedError, StatusError, TimedOutError, Web
from tests.servers import serve

COUNTS: dict[str, int] = {}


def endpoint(answer):
    async def handle(request):
        COUNTS[request.url.path] = COUNTS.get(request.url.path, 0) + 1
        result = answer(request)
        return await result if asyncio.iscoroutine(result) else result

    return handle


def gzipped(body: bytes, cut: int = 0) -> Response:
    packed = gzip.compress(body)
    return packed_response(packed[: len(packed) - cut])


def packed_response(packed: bytes) -> Response:
    return Response(
        packed,
        media_type="application/json",
        headers={"content-encoding": "gzip"},
    )


BOMB = gzip.compress(b" " * 200_000_000, 1)  # made before anybody waits for it


async def endless():
    while True:
        yield b"x" * 65536
        await asyncio.sleep(0)


async def slow(request):
    await asyncio.sleep(5)
    return JSONResponse({})


async def a_little_slow(request):
    await asyncio.sleep(0.2)
    return JSONResponse({"n": COUNTS["/slowish"]})


def cookie(request):
    response = JSONResponse({"cookies": request.headers.get("cookie")})
    response.set_cookie("track", "me")
    return response


def then_fine(request):
    """Two failures, then an answer."""
    return JSONResponse({}) if COUNTS["/flaky"] % 3 == 0 else Response(status_code=503)


async def dripping():
    while True:
        yield b"x"
        await asyncio.sleep(0.2)


def with_header(name, value, status=200):
    response = Response(status_code=status, media_type="application/json")
    response.raw_headers.append((name, value))
    return response


ROUTES = {
    "/drip": lambda r: StreamingResponse(dripping(), media_type="application/json"),
    "/nowhere": lambda r: Response(status_code=302),
    "/same": lambda r: Response(status_code=304),
    "/odd-target": lambda r: with_header(b"location", b"http://xn--a/", 302),
    "/odd-wait": lambda r: with_header(b"retry-after", b"\xb2", 429),
    "/wait-until": lambda r: with_header(b"retry-after", b"Fri, 31 Dec 2100 23:59:59 GMT", 429),
    "/elsewhere": lambda r: with_header(
        b"location", f"http://localhost:{r.url.port}/headers".encode(), 302
    ),
    "/headers": lambda r: JSONResponse({"key": r.headers.get("authorization")}),
    "/ok": lambda r: JSONResponse({"query": dict(r.query_params)}),
    "/packed": lambda r: gzipped(b'{"a": 1}'),
    "/torn": lambda r: gzipped(b'{"a": 1}' * 100, cut=10),
    "/bomb": lambda r: packed_response(BOMB),
    "/large": lambda r: Response(b" " * 50_000_000, media_type="application/json"),
    "/endless": lambda r: StreamingResponse(endless(), media_type="application/json"),
    "/cut": lambda r: Response(b'{"a": [1, 2', media_type="application/json"),
    "/html": lambda r: PlainTextResponse("hello"),
    "/slow": slow,
    "/slowish": a_little_slow,
    "/cookie": cookie,
    "/flaky": then_fine,
    "/busy": lambda r: Response(status_code=429, headers={"retry-after": "1"}),
    "/later": lambda r: Response(status_code=429, headers={"retry-after": "3600"}),
    "/down": lambda r: Response(status_code=500),
    "/forbidden": lambda r: Response(status_code=403),
    "/header": lambda r: JSONResponse({"key": r.headers.get("x-api-key")}),
    "/loop": lambda r: RedirectResponse("/loop"),
    "/round": lambda r: RedirectResponse("/ok?a=b"),
    "/metadata": lambda r: RedirectResponse("http://169.254.169.254/latest/meta-data/"),
    "/inside": lambda r: RedirectResponse("http://127.0.0.1:1/secret"),
    "/file": lambda r: RedirectResponse("file:///etc/passwd"),
}


@pytest.fixture(scope="module")
def address():
    app = Starlette(routes=[
        Route(path, endpoint(answer), methods=["GET", "POST"]) for path, answer in ROUTES.items()
    ])  # fmt: skip
    with serve(app) as address:
        yield address


class Recording(httpcore.AnyIOBackend):
    """Connects, and remembers where to."""

    def __init__(self):
        self.tried = []

    async def connect_tcp(self, host, port, *rest, **keywords):
        self.tried.append((host, port))
        return await super().connect_tcp(host, port, *rest, **keywords)


def make(address, **keywords):
    backend = Recording()
    host = address.removeprefix("http://")
    return Web(allowed_hosts=[host], backend=backend, **({"seconds": 60.0} | keywords)), backend


def allowing(address):
    return Web(allowed_hosts=[address.removeprefix("http://")])


def get(client, url, **keywords):
    return asyncio.run(client.request("GET", url, **({"accept": JSON} | keywords)))


def test_answers(address):
    client, _ = make(address)
    assert get(client, f"{address}/ok", params={"q": "a b"}).json() == {"query": {"q": "a b"}}
    assert get(client, f"{address}/packed").json() == {"a": 1}
    assert get(client, f"{address}/round").json() == {"query": {"a": "b"}}
    answer = get(client, f"{address}/header", headers={"X-API-KEY": "k"})
    assert answer.json() == {"key": "k"} and answer.media_type == "application/json"
    text = get(client, f"{address}/html", accept=("text/",))
    assert (text.body, text.charset) == (b"hello", "utf-8")


@pytest.mark.parametrize(
    "path, error, message",
    [
        ("/torn", BodyError, "gzip is cut off"),
        ("/bomb", BodyError, "more than 1000000 bytes"),
        ("/large", BodyError, "more than 1000000 bytes"),
        ("/endless", BodyError, "more than 1000000 bytes"),
        ("/html", BodyError, "content type 'text/plain', not application/json"),
        ("/slow", TimedOutError, "in time"),
        ("/down", StatusError, "HTTP status 500"),
        ("/forbidden", StatusError, "HTTP status 403"),
        ("/loop", RefusedError, "too many redirects"),
        ("/metadata", RefusedError, "not public"),
        ("/inside", RefusedError, "not public"),
        ("/file", RefusedError, "not an http or https address"),
    ],
)
def test_what_is_not_taken(address, path, error, message):
    # A limit on time where time is the matter; no other answer depends on how busy the machine is.
    seconds = 0.5 if path == "/slow" else 60.0
    client, backend = make(address, max_bytes=1_000_000, seconds=seconds)
    with pytest.raises(error, match=message):
        get(client, address + path)
    # The server itself was reached, and nothing else was even tried.
    assert {f"http://{host}:{port}" for host, port in backend.tried} == {address}


@pytest.mark.parametrize("path, error", [
    ("/nowhere", StatusError), ("/same", StatusError), ("/odd-target", web.WebError),
    ("/odd-wait", StatusError), ("/wait-until", StatusError),
])  # fmt: skip
def test_odd_answers_are_errors_of_ours(address, path, error):
    with pytest.raises(error) as raised:
        get(allowing(address), address + path)
    waits = raised.value.retry_after
    assert (waits is not None and waits > 1e9) == (path == "/wait-until")


def test_headers_stay_with_their_host(address):
    one = Web(allowed_hosts=["localhost", "127.0.0.1"])
    request = {"accept": JSON, "headers": {"Authorization": "Bearer key"}}
    assert asyncio.run(one.request("GET", f"{address}/headers", **request)).json()["key"]
    assert asyncio.run(one.request("GET", f"{address}/elsewhere", **request)).json()["key"] is None


def test_a_server_that_drips_has_a_limit_and_gives_its_place_back(address):
    one = Web(allowed_hosts=[address.removeprefix("http://")], seconds=0.5, total_seconds=1.0)
    with pytest.raises(TimedOutError):
        get(one, f"{address}/drip")

    async def cancelled():
        slow = Web(allowed_hosts=[address.removeprefix("http://")], seconds=30)
        service = Service("test", slow, at_once=1)
        for _ in range(2):  # the same call, which others do not join once nobody waits for it
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(service.call("GET", f"{address}/drip", accept=JSON), 0.3)
        return await asyncio.wait_for(service.call("GET", f"{address}/ok", accept=JSON), 5)

    assert asyncio.run(cancelled()).json() == {"query": {}}


def test_a_burst_at_a_dead_service_ends_early(address, capsys):
    async def burst():
        one = Service("test", allowing(address), at_once=8, failures=20, attempts=1, per_second=1e4)
        calls = (one.call("GET", f"{address}/down?{i}", accept=JSON) for i in range(300))
        return await asyncio.gather(*calls, return_exceptions=True)

    COUNTS.pop("/down", None)
    found = asyncio.run(burst())
    assert sum(isinstance(error, ServiceDownError) for error in found) > 200
    assert COUNTS["/down"] < 60 and capsys.readouterr().err.count("in a row") == 1


def test_damaged_json(address):
    client, _ = make(address)
    with pytest.raises(BodyError, match="not JSON"):
        get(client, f"{address}/cut").json()


def test_no_cookies(address):
    client, _ = make(address)

    async def twice():
        for _ in range(2):
            answer = await client.request("GET", f"{address}/cookie", accept=JSON)
            assert answer.json() == {"cookies": None}

    asyncio.run(twice())


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/", "http://localhost/", "http://[::1]/", "http://10.0.0.1/",
     "http://192.168.1.1/", "http://169.254.169.254/", "http://[::ffff:127.0.0.1]/",
     "http://0.0.0.0/", "http://2130706433/", "http://[64:ff9b::7f00:1]/", "http://100.64.0.1/",
     "http://[fe80::1]/", "http://[fd00::1]/", "http://224.0.0.1/"],
)  # fmt: skip
def test_private_addresses_are_refused_before_any_connection(url):
    backend = Recording()
    with pytest.raises(RefusedError, match="not public"):
        get(Web(backend=backend), url)
    assert backend.tried == []


@pytest.mark.parametrize("url", ["ftp://a/", "file:///etc/passwd", "gopher://x", "//x", "http://",
                                 "http://a:b@c/", "javascript:1", "http://a b/"])  # fmt: skip
def test_other_addresses_are_refused(url):
    backend = Recording()
    with pytest.raises(RefusedError):
        get(Web(backend=backend), url)
    assert backend.tried == []


@pytest.mark.parametrize("address, public", [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("1.2.3.4%eth0", True),
    ("168.63.129.16", False), ("192.0.0.192", False), ("::127.0.0.1", False), ("fec0::1", False),
    ("64:ff9b:1::1", False), ("2002:7f00:1::", False), ("198.18.0.1", False),
    ("nonsense", False), ("::", False),
])  # fmt: skip
def test_public_addresses(address, public):
    assert web.is_public(address) == public


def service(address, **keywords):
    client, _ = make(address)
    return Service("test", client, **keywords)


def test_failures_are_tried_again(address):
    COUNTS["/flaky"] = 0
    asyncio.run(service(address).call("GET", f"{address}/flaky", accept=JSON))
    assert COUNTS["/flaky"] == 3


def test_as_late_as_the_server_asks(address):
    COUNTS["/busy"] = COUNTS["/later"] = COUNTS["/forbidden"] = 0
    begin = time.monotonic()
    with pytest.raises(StatusError, match="429"):
        asyncio.run(service(address, attempts=2).call("GET", f"{address}/busy", accept=JSON))
    assert COUNTS["/busy"] == 2 and time.monotonic() - begin >= 1.0
    for path in ("/later", "/forbidden"):  # too late, and of no use
        with pytest.raises(StatusError):
            asyncio.run(service(address).call("GET", address + path, accept=JSON))
        assert COUNTS[path] == 1


def test_a_service_that_is_down_is_left_alone(address, capsys):
    COUNTS["/down"] = 0
    down = service(address, attempts=1, failures=3, pause=0.5)

    async def calls(count):
        errors = []
        for number in range(count):
            try:
                await down.call("GET", f"{address}/down", params={"n": str(number)}, accept=JSON)
            except web.WebError as error:
                errors.append(type(error))
        return errors

    assert asyncio.run(calls(6)) == [StatusError] * 3 + [ServiceDownError] * 3
    assert COUNTS["/down"] == 3
    time.sleep(0.5)
    assert asyncio.run(calls(2)) == [StatusError, ServiceDownError]
    told = capsys.readouterr().err
    assert told.count("test: 3 failures in a row (HTTP status 500)") == 1 == len(told.splitlines())


def test_identical_calls_are_one(address):
    COUNTS["/slowish"] = 0
    one = service(address)

    async def many():
        same = [one.call("GET", f"{address}/slowish", accept=JSON) for _ in range(20)]
        impatient = asyncio.wait_for(one.call("GET", f"{address}/slowish", accept=JSON), 0.05)
        answers = await asyncio.gather(*same, impatient, return_exceptions=True)
        assert isinstance(answers.pop(), TimeoutError)  # and the others are not hurt
        return {answer.json()["n"] for answer in answers}

    assert asyncio.run(many()) == {1} and COUNTS["/slowish"] == 1


def test_limits(address):
    """At most so many at a time, and so many a second."""

    async def timed(limited, count):
        begin = time.monotonic()
        await asyncio.gather(*(
            limited.call("GET", f"{address}/slowish", params={"n": str(n)}, accept=JSON)
            for n in range(count)
        ))  # fmt: skip
        return time.monotonic() - begin

    COUNTS["/slowish"] = 0
    assert asyncio.run(timed(service(address, at_once=2), 6)) >= 0.6
    assert asyncio.run(timed(service(address, per_second=20.0), 12)) >= 0.4
    assert asyncio.run(timed(service(address), 12)) < 0.6


def test_errors_survive_a_worker():
    error = pickle.loads(pickle.dumps(StatusError(403, 1.5, b"why")))
    assert isinstance(error, StatusError) and str(error) == "HTTP status 403"
    assert (error.status, error.retry_after, error.body) == (403, 1.5, b"why")
    assert str(pickle.loads(pickle.dumps(RefusedError("not public")))) == "not public"
