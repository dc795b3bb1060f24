"""The page's server: what it takes, and what it refuses.

    GET  /        the page, and its style and scripts
    POST /ask     a question and a picture; the answer is a stream, a line of JSON for each event
                  (`telling.py`)

The body of /ask is the question as JSON on a line of its own, then the picture's file:

    (echo '{"question": "What is it?"}'; cat picture.jpg) |
        curl --no-buffer --data-binary @- http://127.0.0.1:8080/ask

What is refused has a status and `{"error": ..}` in words.
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

from mmsr1_jax.apps.serve.events import Teller
from mmsr1_jax.apps.serve.request_queue import Desk, Question
from mmsr1_jax.processing.image_files import ImageError, read_header
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.utils import checked_json

_HERE = pathlib.Path(__file__).parent
_FILES = {
    "style.css": (_HERE / "style.css", "text/css"),
    "dom.js": (_HERE.parent / "report" / "dom.js", "text/javascript"),  # the report's, as it is
    "page.js": (_HERE / "page.js", "text/javascript"),
}
# What browsers show, and Pillow reads without other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_BEAT = 5.0  # seconds after which something is sent, so that nobody takes the line for dead
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
    """What one may ask.

    Attributes:
      picture_bytes: of a file.
      picture_pixels: of a file, before it is made smaller.
      question_chars: of a question.
      waiting: questions that wait for a lane. Where there are more, the last one of the client with
        most of them gives way to a client with fewer.
      arriving: questions that are being sent. Where there are more, the upload with
        the fewest bytes received is dropped.
      seconds: in which a question has to be sent.
      grace: seconds in which nothing has to arrive; then `bytes_per_second` on average.
      bytes_per_second: see above.
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
    """A request that is refused: its status, and why, in words for who asked."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def make_app(
    desk: Desk,
    processor: Processor,
    *,
    title: str,
    limits: Limits = Limits(),
    names: Collection[str] | None = None,
) -> ASGIApp:
    """The ASGI app.

    Args:
      desk: where questions go.
      processor: the policy's.
      title: of the page, the policy's name.
      limits: see `Limits`.
      names: hosts by which the server may be asked for, in lower case; None: by any. With names no
        foreign page can reach it by a name of its own that leads here.
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
    """Lets requests through that were meant for this server, and sets headers of safety."""

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
    """Of a Host header, without the port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@dataclasses.dataclass(eq=False)
class _Arriving:
    """A question that is being sent.

    Attributes:
      body: What has arrived.
      deadline: Ends the sending; it moves on as bytes arrive.
    """

    body: bytearray
    deadline: asyncio.Timeout

    def move(self, when: float) -> None:
        """Sets the deadline, unless it is over."""
        if not self.deadline.expired():
            self.deadline.reschedule(when)


class _Answers:
    """Takes questions, and streams what happens to them."""

    def __init__(self, desk: Desk, processor: Processor, limits: Limits):
        self._desk, self._limits, self._processor = desk, limits, processor
        self._bytes = processor.token_bytes()
        self._arriving: dict[_Arriving, None] = {}  # the first come first

    async def ask(self, request: Request) -> Response:
        """POST /ask."""
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
            return Response(status_code=400)  # nobody reads it
        self._check_room(client)
        question = Question(text, picture, client)
        self._desk.ask(question, self._limits.waiting)
        return _Stream(self._events(question), functools.partial(self._desk.leave, question))

    def _check_room(self, client: str) -> None:
        """Raises Refused where a client's question could not wait."""
        if not self._desk.has_room(client, self._limits.waiting):
            reason = f"{self._limits.waiting} questions are waiting. Try again in a minute."
            raise Refused(503, reason)

    async def _body(self, request: Request) -> bytes:
        """Raises Refused, ClientDisconnect, and TimeoutError where it comes too slowly."""
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
                    if one in self._arriving:  # else it has given way
                        earned = limits.grace + len(one.body) / limits.bytes_per_second
                        one.move(begin + min(limits.seconds, earned))
            return bytes(one.body)
        finally:
            self._arriving.pop(one, None)

    async def _events(self, question: Question) -> AsyncIterator[bytes]:
        teller = Teller(self._processor, self._bytes)
        while True:
            ahead = self._desk.ahead(question)
            if ahead is not None:
                yield _line({"event": "waiting", "ahead": ahead})
            try:
                async with asyncio.timeout(_BEAT):
                    what = await question.happened.get()
            except TimeoutError:
                if ahead is None:
                    yield b"\n"
                continue
            if what[0] == "gave way":
                reason = "Too many questions are waiting, several of them yours. Ask again later."
                yield _line({"event": "failed", "error": reason})
                return
            yield _line(await run_in_threadpool(teller, *what))
            if what[0] in ("end", "failed"):
                return


class _Stream(StreamingResponse):
    """Lines of JSON; `left` is called when it is over, or whoever reads it has left."""

    media_type = "application/x-ndjson"

    def __init__(self, lines: AsyncIterator[bytes], left):
        super().__init__(lines, headers={"x-accel-buffering": "no"})  # of a proxy before us
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


class _Head(TypedDict):
    question: str


def split(body: bytes, limits: Limits) -> tuple[str, bytes]:
    """The question and the picture's file. Raises Refused."""
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
    """Looks at a file's header, before anything in it is decompressed. Raises Refused."""
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
    """Room for a question as JSON, each of its characters as two escapes, and what is around it."""
    return 12 * limits.question_chars + 1000


def _line(event: dict) -> bytes:
    return json.dumps(event).encode("ascii") + b"\n"
