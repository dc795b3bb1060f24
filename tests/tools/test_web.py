"""HTTP client and service client against real servers on loopback."""

import asyncio
import gzip
import pickle
import time

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
from mmsr1_jax.tools.web import (
    JSON_TYPES,
    BodyError,
    RefusedError,
    StatusError,
    TimedOutError,
    WebClient,
)
from tests.servers import RecordingBackend, serve

COUNTS: dict[str, int] = {}


def endpoint(answer):
    async def handle(request):
        COUNTS[request.url.path] = COUNTS.get(request.url.path, 0) + 1
        result = answer(request)
        return await result if asyncio.iscoroutine(result) else result

    return handle


def gzip_of(body: bytes, num_missing: int = 0) -> Response:
    compressed = gzip.compress(body)
    return gzip_response(compressed[: len(compressed) - num_missing])


def gzip_response(compressed: bytes) -> Response:
    return Response(
        compressed,
        media_type="application/json",
        headers={"content-encoding": "gzip"},
    )


BOMB = gzip.compress(b" " * 200_000_000, 1)  # compressed in advance, as it takes a while


async def endless():
    while True:
        yield b"x" * 65536
        await asyncio.sleep(0)


async def slow(request):
    await asyncio.sleep(5)
    return JSONResponse({})


async def short_delay(request):
    await asyncio.sleep(0.2)
    return JSONResponse({"n": COUNTS["/slowish"]})


def cookie(request):
    response = JSONResponse({"cookies": request.headers.get("cookie")})
    response.set_cookie("track", "me")
    return response


def flaky(request):
    """Fail twice, then succeed."""
    return JSONResponse({}) if COUNTS["/flaky"] % 3 == 0 else Response(status_code=503)


async def slow_bytes():
    while True:
        yield b"x"
        await asyncio.sleep(0.2)


def with_header(name, value, status=200):
    response = Response(status_code=status, media_type="application/json")
    response.raw_headers.append((name, value))
    return response


ROUTES = {
    "/drip": lambda r: StreamingResponse(slow_bytes(), media_type="application/json"),
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
    "/packed": lambda r: gzip_of(b'{"a": 1}'),
    "/torn": lambda r: gzip_of(b'{"a": 1}' * 100, num_missing=10),
    "/bomb": lambda r: gzip_response(BOMB),
    "/large": lambda r: Response(b" " * 50_000_000, media_type="application/json"),
    "/endless": lambda r: StreamingResponse(endless(), media_type="application/json"),
    "/cut": lambda r: Response(b'{"a": [1, 2', media_type="application/json"),
    "/html": lambda r: PlainTextResponse("hello"),
    "/slow": slow,
    "/slowish": short_delay,
    "/cookie": cookie,
    "/flaky": flaky,
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


def make_client(address, **options):
    backend = RecordingBackend()
    host = address.removeprefix("http://")
    options = {"timeout": 60.0} | options
    return WebClient(allowed_hosts=[host], backend=backend, **options), backend


def client_for(address):
    return WebClient(allowed_hosts=[address.removeprefix("http://")])


def get(client, url, **options):
    return asyncio.run(client.request("GET", url, **({"accept": JSON_TYPES} | options)))


def test_responses_are_returned_decompressed(address):
    client, _ = make_client(address)
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
        ("/torn", BodyError, "truncated gzip data"),
        ("/bomb", BodyError, "more than 1000000 bytes"),
        ("/large", BodyError, "more than 1000000 bytes"),
        ("/endless", BodyError, "more than 1000000 bytes"),
        ("/html", BodyError, "content type 'text/plain', not application/json"),
        ("/slow", TimedOutError, "in time"),
        ("/down", StatusError, "HTTP status 500"),
        ("/forbidden", StatusError, "HTTP status 403"),
        ("/loop", RefusedError, "more than 5 redirects"),
        ("/metadata", RefusedError, "not public"),
        ("/inside", RefusedError, "not public"),
        ("/file", RefusedError, "not an http or https URL"),
    ],
)
def test_invalid_responses_are_rejected(address, path, error, message):
    # Only the slow response has a short time limit; the others must not depend on the machine.
    timeout = 0.5 if path == "/slow" else 60.0
    client, backend = make_client(address, max_bytes=1_000_000, timeout=timeout)
    with pytest.raises(error, match=message):
        get(client, address + path)
    # The server itself was reached, and no connection to another host was attempted.
    assert {f"http://{host}:{port}" for host, port in backend.connections} == {address}


@pytest.mark.parametrize("path, error", [
    ("/nowhere", StatusError), ("/same", StatusError), ("/odd-target", web.WebError),
    ("/odd-wait", StatusError), ("/wait-until", StatusError),
])  # fmt: skip
def test_malformed_headers_raise_web_error(address, path, error):
    with pytest.raises(error) as raised:
        get(client_for(address), address + path)
    waits = raised.value.retry_after
    assert (waits is not None and waits > 1e9) == (path == "/wait-until")


def test_headers_are_dropped_on_redirect_to_another_origin(address):
    client = WebClient(allowed_hosts=["localhost", "127.0.0.1"])
    request = {"accept": JSON_TYPES, "headers": {"Authorization": "Bearer key"}}
    assert asyncio.run(client.request("GET", f"{address}/headers", **request)).json()["key"]
    assert (
        asyncio.run(client.request("GET", f"{address}/elsewhere", **request)).json()["key"] is None
    )


def test_slow_response_times_out_and_releases_its_slot(address):
    client = WebClient(
        allowed_hosts=[address.removeprefix("http://")], timeout=0.5, total_timeout=1.0
    )
    with pytest.raises(TimedOutError):
        get(client, f"{address}/drip")

    async def cancelled():
        slow = WebClient(allowed_hosts=[address.removeprefix("http://")], timeout=30)
        service = Service("test", slow, max_concurrency=1)
        for _ in range(2):  # the same call: a cancelled one is not joined by later ones
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(
                    service.call("GET", f"{address}/drip", accept=JSON_TYPES), 0.3
                )
        return await asyncio.wait_for(service.call("GET", f"{address}/ok", accept=JSON_TYPES), 5)

    assert asyncio.run(cancelled()).json() == {"query": {}}


def test_circuit_breaker_ends_a_burst_of_calls_early(address, capsys):
    async def burst():
        client = Service(
            "test",
            client_for(address),
            max_concurrency=8,
            max_failures=20,
            max_attempts=1,
            max_qps=1e4,
        )
        calls = (client.call("GET", f"{address}/down?{i}", accept=JSON_TYPES) for i in range(300))
        return await asyncio.gather(*calls, return_exceptions=True)

    COUNTS.pop("/down", None)
    errors = asyncio.run(burst())
    assert sum(isinstance(error, ServiceDownError) for error in errors) > 200
    assert COUNTS["/down"] < 60 and capsys.readouterr().err.count("consecutive failures") == 1


def test_truncated_json_is_an_error(address):
    client, _ = make_client(address)
    with pytest.raises(BodyError, match="not JSON"):
        get(client, f"{address}/cut").json()


def test_cookies_are_not_kept(address):
    client, _ = make_client(address)

    async def twice():
        for _ in range(2):
            answer = await client.request("GET", f"{address}/cookie", accept=JSON_TYPES)
            assert answer.json() == {"cookies": None}

    asyncio.run(twice())


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/", "http://localhost/", "http://[::1]/", "http://10.0.0.1/",
     "http://192.168.1.1/", "http://169.254.169.254/", "http://[::ffff:127.0.0.1]/",
     "http://0.0.0.0/", "http://2130706433/", "http://[64:ff9b::7f00:1]/", "http://100.64.0.1/",
     "http://[fe80::1]/", "http://[fd00::1]/", "http://224.0.0.1/"],
)  # fmt: skip
def test_private_addresses_are_refused_before_connecting(url):
    backend = RecordingBackend()
    with pytest.raises(RefusedError, match="not public"):
        get(WebClient(backend=backend), url)
    assert backend.connections == []


@pytest.mark.parametrize("url", ["ftp://a/", "file:///etc/passwd", "gopher://x", "//x", "http://",
                                 "http://a:b@c/", "javascript:1", "http://a b/"])  # fmt: skip
def test_other_urls_are_refused_before_connecting(url):
    backend = RecordingBackend()
    with pytest.raises(RefusedError):
        get(WebClient(backend=backend), url)
    assert backend.connections == []


@pytest.mark.parametrize("address, public", [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("1.2.3.4%eth0", True),
    ("168.63.129.16", False), ("192.0.0.192", False), ("::127.0.0.1", False), ("fec0::1", False),
    ("64:ff9b:1::1", False), ("2002:7f00:1::", False), ("198.18.0.1", False),
    ("nonsense", False), ("::", False),
])  # fmt: skip
def test_is_public(address, public):
    assert web.is_public(address) == public


def service(address, **options):
    client, _ = make_client(address)
    return Service("test", client, **options)


def test_transient_failures_are_retried(address):
    COUNTS["/flaky"] = 0
    asyncio.run(service(address).call("GET", f"{address}/flaky", accept=JSON_TYPES))
    assert COUNTS["/flaky"] == 3


def test_retry_after_is_respected_up_to_max_wait(address):
    COUNTS["/busy"] = COUNTS["/later"] = COUNTS["/forbidden"] = 0
    start = time.monotonic()
    with pytest.raises(StatusError, match="429"):
        asyncio.run(
            service(address, max_attempts=2).call("GET", f"{address}/busy", accept=JSON_TYPES)
        )
    assert COUNTS["/busy"] == 2 and time.monotonic() - start >= 1.0
    for path in ("/later", "/forbidden"):  # longer than max_wait, and not transient
        with pytest.raises(StatusError):
            asyncio.run(service(address).call("GET", address + path, accept=JSON_TYPES))
        assert COUNTS[path] == 1


def test_open_circuit_breaker_rejects_calls_until_the_cooldown_ends(address, capsys):
    COUNTS["/down"] = 0
    down = service(address, max_attempts=1, max_failures=3, cooldown=0.5)

    async def calls(count):
        errors = []
        for index in range(count):
            try:
                await down.call(
                    "GET", f"{address}/down", params={"n": str(index)}, accept=JSON_TYPES
                )
            except web.WebError as error:
                errors.append(type(error))
        return errors

    assert asyncio.run(calls(6)) == [StatusError] * 3 + [ServiceDownError] * 3
    assert COUNTS["/down"] == 3
    time.sleep(0.5)
    assert asyncio.run(calls(2)) == [StatusError, ServiceDownError]
    stderr = capsys.readouterr().err
    assert (
        stderr.count("test: 3 consecutive failures (HTTP status 500)")
        == 1
        == len(stderr.splitlines())
    )


def test_identical_concurrent_calls_share_one_request(address):
    COUNTS["/slowish"] = 0
    client = service(address)

    async def many():
        same = [client.call("GET", f"{address}/slowish", accept=JSON_TYPES) for _ in range(20)]
        impatient = asyncio.wait_for(
            client.call("GET", f"{address}/slowish", accept=JSON_TYPES), 0.05
        )
        answers = await asyncio.gather(*same, impatient, return_exceptions=True)
        assert isinstance(answers.pop(), TimeoutError)  # the other callers are unaffected
        return {answer.json()["n"] for answer in answers}

    assert asyncio.run(many()) == {1} and COUNTS["/slowish"] == 1


def test_concurrency_and_rate_are_limited(address):
    async def timed(limited, count):
        start = time.monotonic()
        await asyncio.gather(*(
            limited.call("GET", f"{address}/slowish", params={"n": str(n)}, accept=JSON_TYPES)
            for n in range(count)
        ))  # fmt: skip
        return time.monotonic() - start

    COUNTS["/slowish"] = 0
    assert asyncio.run(timed(service(address, max_concurrency=2), 6)) >= 0.6
    assert asyncio.run(timed(service(address, max_qps=20.0), 12)) >= 0.4
    assert asyncio.run(timed(service(address), 12)) < 0.6


def test_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(StatusError(403, 1.5, b"why")))
    assert isinstance(error, StatusError) and str(error) == "HTTP status 403"
    assert (error.status, error.retry_after, error.body) == (403, 1.5, b"why")
    assert str(pickle.loads(pickle.dumps(RefusedError("not public")))) == "not public"
