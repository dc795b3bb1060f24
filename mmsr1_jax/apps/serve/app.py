"""ASGI app of the demo page: routes, request validation and limits.

    GET  /        the page, its style and its scripts
    POST /ask     a question and an image; the response is a stream of events, one line of JSON each
                  (`events.py`)

The body of /ask is the question as one line of JSON, followed by the image file:

    (echo '{"question": "What is it?"}'; cat picture.jpg) |
        curl --no-buffer --data-binary @- http://127.0.0.1:8080/ask

A refused request gets an HTTP error status and `{"error": ..}` with a message for the user.
"""

import asyncio
import dataclasses
import functools
import html
import json
import pathlib
import string
import urllib.parse
from collections.abc import AsyncIterator, Collection
from typing import TypedDict

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmsr1_jax.apps.serve.events import EventSerializer
from mmsr1_jax.apps.serve.request_queue import Question, RequestQueue
from mmsr1_jax.processing.image_files import ImageError, read_header
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.utils import checked_json

_HERE = pathlib.Path(__file__).parent
_FILES = {
    "style.css": (_HERE / "style.css", "text/css"),
    "dom.js": (_HERE.parent / "report" / "dom.js", "text/javascript"),  # shared with the report
    "page.js": (_HERE / "page.js", "text/javascript"),
}
# Formats that browsers show, and that Pillow reads without external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_BEAT = 5.0  # interval of keep-alive lines in seconds, so that the stream does not time out
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on requests.

    Attributes:
      picture_bytes: Maximum size of an image file in bytes.
      picture_pixels: Maximum number of pixels of an image, before it is downscaled.
      question_chars: Maximum length of a question in characters.
      waiting: Maximum number of questions that wait for a lane. Beyond it, the last question of the
        client with the most waiting ones is evicted in favour of a client with fewer.
      arriving: Maximum number of concurrent uploads. Beyond it, the upload with the fewest bytes
        received is dropped.
      seconds: Maximum duration of an upload in seconds.
      grace: Seconds before `bytes_per_second` is enforced.
      bytes_per_second: Minimum average rate of an upload after `grace`.
    """

    picture_bytes: int = 10_000_000
    picture_pixels: int = 40_000_000
    question_chars: int = 2000
    waiting: int = 32
    arriving: int = 32
    seconds: float = 60.0
    grace: float = 10.0
    bytes_per_second: int = 10_000


class Refused(Exception):
    """A refused request, with its HTTP status and a reason for the user."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def make_app(
    desk: RequestQueue,
    processor: Processor,
    *,
    title: str,
    limits: Limits = Limits(),
    names: Collection[str] | None = None,
) -> ASGIApp:
    """Build the ASGI app.

    Args:
      desk: Queue that receives the questions.
      processor: The policy's processor.
      title: Title of the page: the policy's name.
      limits: Limits on requests.
      names: Accepted host names, in lower case, or None for any. Names protect against DNS
        rebinding, where a foreign page reaches the server through a name of its own.
    """
    answers = _Answers(desk, processor, limits)
    page = string.Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        accept=",".join(f"image/{name.lower()}" for name in FORMATS),
        bytes=limits.picture_bytes,
        megabytes=f"{limits.picture_bytes / 1e6:g}",
        megapixels=f"{limits.picture_pixels / 1e6:g}",
        chars=limits.question_chars,
    )
    routes = [
        Route("/", functools.partial(_static, page, "text/html")),
        Route("/ask", answers.ask, methods=["POST"]),
    ]
    for name, (path, kind) in _FILES.items():
        text = path.read_text(encoding="utf-8")
        routes.append(Route(f"/{name}", functools.partial(_static, text, kind)))
    return _Guard(Starlette(routes=routes, exception_handlers={Refused: _say}), names)


async def _static(text: str, kind: str, request: Request) -> Response:
    return Response(text, media_type=kind)


async def _say(request: Request, refused: Refused) -> Response:
    return JSONResponse({"error": str(refused)}, refused.status)


class _Guard:
    """Middleware that rejects foreign hosts and origins and sets security headers."""

    def __init__(self, app: ASGIApp, names: Collection[str] | None):
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app, headers = self._app, Headers(scope=scope) if scope["type"] == "http" else {}
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        if scope["type"] == "http":
            if self._names is not None and _name(host) not in self._names:
                app = JSONResponse({"error": "This server is not asked for by that name."}, 421)
            elif scope["method"] != "GET" and origin and origin.partition("://")[2] != host:
                app = JSONResponse({"error": "Another site may not ask from here."}, 403)
        await app(scope, receive, send_with_headers)


def _name(host: str) -> str:
    """Return the host name of a Host header, without the port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@dataclasses.dataclass(eq=False)
class _Arriving:
    """An upload in progress.

    Attributes:
      body: Bytes received so far.
      deadline: Timeout of the upload, extended as bytes arrive.
    """

    body: bytearray
    deadline: asyncio.Timeout

    def move(self, when: float) -> None:
        """Set the deadline, unless it has expired."""
        if not self.deadline.expired():
            self.deadline.reschedule(when)


class _Answers:
    """Handler that accepts questions and streams their events."""

    def __init__(self, desk: RequestQueue, processor: Processor, limits: Limits):
        self._desk, self._limits, self._processor = desk, limits, processor
        self._bytes = processor.token_bytes()
        self._arriving: dict[_Arriving, None] = {}  # in order of arrival

    async def ask(self, request: Request) -> Response:
        """Handle POST /ask."""
        limits = self._limits
        client = request.client.host if request.client else ""
        self._check_room(client)
        try:
            body = await self._body(request)
            text, picture = split(body, limits)
            await run_in_threadpool(check_picture, picture, limits)
        except TimeoutError:
            raise Refused(408, "The picture arrived too slowly. Try again.") from None
        except ClientDisconnect:
            return Response(status_code=400)  # the client has disconnected
        self._check_room(client)
        question = Question(text, picture, client)
        self._desk.submit(question, self._limits.waiting)
        return _Stream(self._events(question), functools.partial(self._desk.withdraw, question))

    def _check_room(self, client: str) -> None:
        """Raise Refused if the queue cannot accept a question of the client."""
        if not self._desk.has_capacity(client, self._limits.waiting):
            reason = f"{self._limits.waiting} questions are waiting. Try again in a minute."
            raise Refused(503, reason)

    async def _body(self, request: Request) -> bytes:
        """Receive the body of a request.

        Raises:
          Refused: The body is too large.
          ClientDisconnect: The client has disconnected.
          TimeoutError: The body arrives too slowly.
        """
        limits = self._limits
        most = limits.picture_bytes + _line_bytes(limits)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise _too_large(limits)
        begin = asyncio.get_running_loop().time()
        one = _Arriving(bytearray(), asyncio.timeout_at(begin + min(limits.grace, limits.seconds)))
        if len(self._arriving) >= limits.arriving:
            slowest = min(self._arriving, key=lambda other: len(other.body))
            del self._arriving[slowest]
            slowest.move(begin)
        try:
            async with one.deadline:
                self._arriving[one] = None
                async for piece in request.stream():
                    one.body += piece
                    if len(one.body) > most:
                        raise _too_large(limits)
                    if one in self._arriving:  # otherwise it has been dropped
                        earned = limits.grace + len(one.body) / limits.bytes_per_second
                        one.move(begin + min(limits.seconds, earned))
            return bytes(one.body)
        finally:
            self._arriving.pop(one, None)

    async def _events(self, question: Question) -> AsyncIterator[bytes]:
        teller = EventSerializer(self._processor, self._bytes)
        while True:
            ahead = self._desk.position(question)
            if ahead is not None:
                yield _line({"event": "waiting", "ahead": ahead})
            try:
                async with asyncio.timeout(_BEAT):
                    what = await question.events.get()
            except TimeoutError:
                if ahead is None:
                    yield b"\n"
                continue
            if what[0] == "evicted":
                reason = "Too many questions are waiting, several of them yours. Ask again later."
                yield _line({"event": "failed", "error": reason})
                return
            yield _line(await run_in_threadpool(teller, *what))
            if what[0] in ("end", "failed"):
                return


class _Stream(StreamingResponse):
    """Stream of JSON lines; `left` is called when it ends or the client disconnects."""

    media_type = "application/x-ndjson"

    def __init__(self, lines: AsyncIterator[bytes], left):
        super().__init__(lines, headers={"x-accel-buffering": "no"})  # no proxy buffering
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


class _Head(TypedDict):
    question: str


def split(body: bytes, limits: Limits) -> tuple[str, bytes]:
    """Split the body of /ask into the question and the image file.

    Raises:
      Refused: The question is malformed, empty or too long.
    """
    end = body.find(b"\n", 0, _line_bytes(limits))
    try:
        head = checked_json.loads(body[: max(end, 0)], _Head)
        question = head["question"].strip()
    except checked_json.FormatError:
        reason = 'The first line has to be {"question": ..} as JSON, the picture follows it.'
        raise Refused(400, reason) from None
    if not question:
        raise Refused(422, "Write a question.")
    if len(question) > limits.question_chars:
        raise Refused(422, f"The question is longer than {limits.question_chars} characters.")
    return question, body[end + 1 :]


def check_picture(file: bytes, limits: Limits) -> None:
    """Check an image file by its header, before any of it is decompressed.

    Raises:
      Refused: The file is missing or too large, its format is not one of `FORMATS`, or it has too
        many pixels.
    """
    if not file:
        raise Refused(422, "Choose a picture.")
    if len(file) > limits.picture_bytes:
        raise _too_large(limits)
    try:
        form, width, height = read_header(file)
    except ImageError:
        form, width, height = "", 0, 0
    if form not in FORMATS:
        raise Refused(415, f"This is no picture in one of the forms {', '.join(FORMATS)}.")
    if width * height > limits.picture_pixels:
        most = limits.picture_pixels / 1e6
        raise Refused(422, f"The picture has more than {most:g} million pixels. Make it smaller.")


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"The picture is larger than {limits.picture_bytes / 1e6:g} MB.")


def _line_bytes(limits: Limits) -> int:
    """Return the maximum size of the JSON line, with two escapes for each character."""
    return 12 * limits.question_chars + 1000


def _line(event: dict) -> bytes:
    return json.dumps(event).encode("ascii") + b"\n"
