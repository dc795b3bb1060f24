"""ASGI app of the demo page: routes, request validation and limits.

    GET  /        the page, its style and its scripts
    POST /ask     a question and an image; the response is a stream of events, one line of JSON each
                  (`events.py`)

The body of /ask is the question as one line of JSON, followed by the image file:

    (echo '{"question": "What is it?"}'; cat image.jpg) |
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
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, TypedDict

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

_FOLDER = pathlib.Path(__file__).parent
_FILES = {
    "style.css": (_FOLDER / "style.css", "text/css"),
    "dom.js": (_FOLDER.parent / "report" / "dom.js", "text/javascript"),  # shared with the report
    "page.js": (_FOLDER / "page.js", "text/javascript"),
}
# Formats that browsers show, and that Pillow reads without external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_KEEP_ALIVE = 5.0  # interval of keep-alive lines in seconds, so that the stream does not time out
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
      max_image_bytes: Maximum size of an image file in bytes.
      max_image_pixels: Maximum number of pixels of an image, before it is downscaled.
      max_question_chars: Maximum length of a question in characters.
      max_waiting: Maximum number of questions that wait for a lane. Beyond it, the last question of
        the client with the most waiting ones is evicted in favour of a client with fewer.
      max_uploads: Maximum number of concurrent uploads. Beyond it, the upload with the fewest bytes
        received is dropped.
      upload_timeout: Maximum duration of an upload in seconds.
      grace_period: Seconds before `min_upload_rate` is enforced.
      min_upload_rate: Minimum average rate of an upload in bytes per second, after `grace_period`.
    """

    max_image_bytes: int = 10_000_000
    max_image_pixels: int = 40_000_000
    max_question_chars: int = 2000
    max_waiting: int = 32
    max_uploads: int = 32
    upload_timeout: float = 60.0
    grace_period: float = 10.0
    min_upload_rate: int = 10_000


class RefusedError(Exception):
    """A refused request, with its HTTP status and a reason for the user."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def make_app(
    queue: RequestQueue,
    processor: Processor,
    *,
    title: str,
    limits: Limits = Limits(),
    names: Collection[str] | None = None,
) -> ASGIApp:
    """Build the ASGI app.

    Args:
      queue: Queue that receives the questions.
      processor: The policy's processor.
      title: Title of the page: the policy's name.
      limits: Limits on requests.
      names: Accepted host names, in lower case, or None for any. Names protect against DNS
        rebinding, where a foreign page reaches the server through its own domain name.
    """
    handler = _AskHandler(queue, processor, limits)
    page = string.Template((_FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        accept=",".join(f"image/{name.lower()}" for name in FORMATS),
        bytes=limits.max_image_bytes,
        megabytes=f"{limits.max_image_bytes / 1e6:g}",
        megapixels=f"{limits.max_image_pixels / 1e6:g}",
        chars=limits.max_question_chars,
    )
    routes = [
        Route("/", functools.partial(_static, page, "text/html")),
        Route("/ask", handler.ask, methods=["POST"]),
    ]
    for name, (path, media_type) in _FILES.items():
        text = path.read_text(encoding="utf-8")
        routes.append(Route(f"/{name}", functools.partial(_static, text, media_type)))
    app = Starlette(routes=routes, exception_handlers={RefusedError: _error_response})
    return _SecurityMiddleware(app, names)


async def _static(text: str, media_type: str, request: Request) -> Response:
    return Response(text, media_type=media_type)


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse({"error": str(error)}, error.status)


class _SecurityMiddleware:
    """Middleware that rejects foreign hosts and origins and sets security headers."""

    def __init__(self, app: ASGIApp, names: Collection[str] | None):
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self._app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
            if self._names is not None and _host_name(host) not in self._names:
                app = JSONResponse({"error": "This server does not answer to that name."}, 421)
            elif scope["method"] != "GET" and origin and origin.partition("://")[2] != host:
                app = JSONResponse({"error": "Requests from other sites are not allowed."}, 403)
        await app(scope, receive, send_with_headers)


def _host_name(host: str) -> str:
    """Return the host name of a Host header, without the port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@dataclasses.dataclass(eq=False)
class _Upload:
    """An upload in progress.

    Attributes:
      body: Bytes received so far.
      deadline: Timeout of the upload, extended as bytes arrive.
    """

    body: bytearray
    deadline: asyncio.Timeout

    def set_deadline(self, when: float) -> None:
        """Set the deadline, unless it has expired."""
        if not self.deadline.expired():
            self.deadline.reschedule(when)


class _AskHandler:
    """Handler that accepts questions and streams their events."""

    def __init__(self, queue: RequestQueue, processor: Processor, limits: Limits):
        self._queue, self._limits, self._processor = queue, limits, processor
        self._token_bytes = processor.token_bytes()
        self._uploads: dict[_Upload, None] = {}  # in order of arrival

    async def ask(self, request: Request) -> Response:
        """Handle POST /ask."""
        client = request.client.host if request.client else ""
        self._check_capacity(client)
        try:
            body = await self._receive_body(request)
            text, image = split(body, self._limits)
            await run_in_threadpool(check_image, image, self._limits)
        except TimeoutError:
            raise RefusedError(408, "The image arrived too slowly. Try again.") from None
        except ClientDisconnect:
            return Response(status_code=400)  # the client has disconnected
        self._check_capacity(client)
        question = Question(text, image, client)
        self._queue.submit(question, self._limits.max_waiting)
        return _Stream(self._events(question), functools.partial(self._queue.withdraw, question))

    def _check_capacity(self, client: str) -> None:
        """Raise RefusedError if the queue cannot accept a question of the client."""
        max_waiting = self._limits.max_waiting
        if not self._queue.has_capacity(client, max_waiting):
            raise RefusedError(503, f"{max_waiting} questions are waiting. Try again in a minute.")

    async def _receive_body(self, request: Request) -> bytes:
        """Receive the body of a request.

        Raises:
          RefusedError: The body is too large.
          ClientDisconnect: The client has disconnected.
          TimeoutError: The body arrives too slowly.
        """
        limits = self._limits
        max_bytes = limits.max_image_bytes + _max_line_bytes(limits)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > max_bytes:
            raise _too_large(limits)
        start = asyncio.get_running_loop().time()
        timeout = min(limits.grace_period, limits.upload_timeout)
        upload = _Upload(bytearray(), asyncio.timeout_at(start + timeout))
        if len(self._uploads) >= limits.max_uploads:
            slowest = min(self._uploads, key=lambda other: len(other.body))
            del self._uploads[slowest]
            slowest.set_deadline(start)
        try:
            async with upload.deadline:
                self._uploads[upload] = None
                async for chunk in request.stream():
                    upload.body += chunk
                    if len(upload.body) > max_bytes:
                        raise _too_large(limits)
                    if upload in self._uploads:  # otherwise it has been dropped
                        allowed = limits.grace_period + len(upload.body) / limits.min_upload_rate
                        upload.set_deadline(start + min(limits.upload_timeout, allowed))
            return bytes(upload.body)
        finally:
            self._uploads.pop(upload, None)

    async def _events(self, question: Question) -> AsyncIterator[bytes]:
        serialize = EventSerializer(self._processor, self._token_bytes)
        while True:
            ahead = self._queue.position(question)
            if ahead is not None:
                yield _encode({"event": "waiting", "ahead": ahead})
            try:
                async with asyncio.timeout(_KEEP_ALIVE):
                    event = await question.events.get()
            except TimeoutError:
                if ahead is None:
                    yield b"\n"
                continue
            if event[0] == "evicted":
                reason = "Too many questions are waiting, several of them yours. Ask again later."
                yield _encode({"event": "failed", "error": reason})
                return
            yield _encode(await run_in_threadpool(serialize, *event))
            if event[0] in ("end", "failed"):
                return


class _Stream(StreamingResponse):
    """Stream of JSON lines; `on_close` is called when it ends or the client disconnects."""

    media_type = "application/x-ndjson"

    def __init__(self, lines: AsyncIterator[bytes], on_close: Callable[[], None]):
        super().__init__(lines, headers={"x-accel-buffering": "no"})  # no proxy buffering
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


class _Head(TypedDict):
    question: str


def split(body: bytes, limits: Limits) -> tuple[str, bytes]:
    """Split the body of /ask into the question and the image file.

    Raises:
      RefusedError: The question is malformed, empty or too long.
    """
    end = body.find(b"\n", 0, _max_line_bytes(limits))
    try:
        head = checked_json.loads(body[: max(end, 0)], _Head)
        question = head["question"].strip()
    except checked_json.FormatError:
        reason = 'The first line must be {"question": ..} as JSON, followed by the image.'
        raise RefusedError(400, reason) from None
    if not question:
        raise RefusedError(422, "Write a question.")
    if len(question) > limits.max_question_chars:
        raise RefusedError(
            422, f"The question is longer than {limits.max_question_chars} characters."
        )
    return question, body[end + 1 :]


def check_image(file: bytes, limits: Limits) -> None:
    """Check an image file by its header, before any of it is decompressed.

    Raises:
      RefusedError: The file is missing or too large, its format is not one of `FORMATS`, or it has
        too many pixels.
    """
    if not file:
        raise RefusedError(422, "Choose an image.")
    if len(file) > limits.max_image_bytes:
        raise _too_large(limits)
    try:
        file_format, width, height = read_header(file)
    except ImageError:
        file_format, width, height = "", 0, 0
    if file_format not in FORMATS:
        raise RefusedError(415, f"The file is not an image in the formats {', '.join(FORMATS)}.")
    if width * height > limits.max_image_pixels:
        megapixels = limits.max_image_pixels / 1e6
        raise RefusedError(
            422, f"The image has more than {megapixels:g} million pixels. Make it smaller."
        )


def _too_large(limits: Limits) -> RefusedError:
    return RefusedError(413, f"The image is larger than {limits.max_image_bytes / 1e6:g} MB.")


def _max_line_bytes(limits: Limits) -> int:
    """Return the maximum size of the JSON line, with two escapes for each character."""
    return 12 * limits.max_question_chars + 1000


def _encode(event: dict[str, Any]) -> bytes:
    """Encode an event as a line of JSON."""
    return json.dumps(event).encode("ascii") + b"\n"
