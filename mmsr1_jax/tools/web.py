"""Safe HTTP client: public addresses only, bounded response bodies, no cookies.

Every connection is checked when it is opened: the host name is resolved once, all of its addresses
must be public, and the connection goes to one of those addresses. This also covers redirects and
host names that resolve differently the second time (DNS rebinding).
"""

import asyncio
import dataclasses
import email.utils
import logging
import re
import time
import weakref
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import httpcore
import httpx

from mmsr1_jax.tools.addresses import foreign_names, is_public, normal_host, own_names, parse_host
from mmsr1_jax.tools.connection_pool import Connections
from mmsr1_jax.utils import checked_json

# At lower levels it logs requests, including the API keys in them.
logging.getLogger("httpcore").setLevel(logging.WARNING)

JSON = ("application/json",)
PAGES = ("text/html", "application/xhtml+xml", "text/plain", "text/markdown")
IMAGES = ("image/",)
_HEADERS = {"User-Agent": "mmsr1_jax", "Accept": "*/*", "Accept-Encoding": "gzip"}
_MAX_REDIRECTS = 5
_CHUNK = 65536
_ERROR_BYTES = 4096
_HOST = re.compile(r"[^\s/@\\%]+")


class WebError(Exception):
    """Failed request. The message contains neither the address nor an API key.

    Attributes:
      transient: Whether a retry may succeed.
      retry_after: Seconds that the server asks to wait, or None.
    """

    transient = False
    retry_after: float | None = None

    def __reduce__(self):  # by default, an exception is unpickled from its message alone
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[WebError], args: tuple, state: dict[str, Any]) -> WebError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class RefusedError(WebError):
    """Request that this client refuses, for instance because its address is not public."""


class BodyError(WebError):
    """Response that is too large, of the wrong type, or damaged."""


class TimedOutError(WebError):
    transient = True


class UnreachableError(WebError):
    transient = True


class StatusError(WebError):
    """Response with an HTTP status other than success.

    Attributes:
      status: HTTP status.
      body: Beginning of the response body, which may describe the error.
    """

    def __init__(self, status: int, retry_after: float | None = None, body: bytes = b""):
        super().__init__(f"HTTP status {status}")
        self.status, self.body = status, body
        self.transient = status == 429 or status >= 500
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Answer:
    """HTTP response.

    Attributes:
      url: Final URL after redirects.
      media_type: Media type in lower case, without parameters.
      charset: Charset declared by the server, or None.
      body: Decompressed body.
    """

    url: str
    media_type: str
    charset: str | None
    body: bytes

    def json(self) -> Any:
        """Return the body parsed as JSON. Raises BodyError if it is not JSON."""
        try:
            return checked_json.loads(self.body, surrogates=True)
        except checked_json.FormatError as error:
            raise BodyError(str(error)) from None


class Web:
    """HTTP client with one connection pool per asyncio loop.

    Args:
      allowed_hosts: `host`, `host:port` or URLs of trusted services, whose addresses may be
        private.
      seconds: Time limit for connecting, and for each wait for data.
      total_seconds: Time limit of a whole request, including redirects and body. None means three
        times `seconds`.
      max_bytes: Maximum size of a body, both as received and decompressed.
      connections: Maximum number of concurrent connections per loop.
      backend: Network backend that opens connections, replaced in tests.
    """

    def __init__(
        self,
        *,
        allowed_hosts: Collection[str] = (),
        seconds: float = 20.0,
        total_seconds: float | None = None,
        max_bytes: int = 10_000_000,
        connections: int = 256,
        backend: httpcore.AsyncNetworkBackend | None = None,
    ):
        self._allowed = frozenset(map(parse_host, allowed_hosts))
        self._seconds = seconds
        self._total = 3 * seconds if total_seconds is None else total_seconds
        self._max_bytes = max_bytes
        self._connections = connections
        self._backend = backend
        self._transports: weakref.WeakKeyDictionary[Any, _Transport] = weakref.WeakKeyDictionary()

    def _transport(self) -> "_Transport":
        loop = asyncio.get_running_loop()
        if loop not in self._transports:
            checked = CheckedBackend(self._allowed, self._backend or httpcore.AnyIOBackend())
            self._transports[loop] = _Transport(checked, self._connections)
        return self._transports[loop]

    async def request(
        self,
        method: str,
        url: str,
        *,
        accept: Iterable[str],
        params: Mapping[str, str] | None = None,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        max_bytes: int | None = None,
    ) -> Answer:
        """Send a request, following redirects of GET requests.

        `headers` are dropped once a redirect leads to another origin.

        Args:
          method: HTTP method.
          url: URL of the request.
          accept: Prefixes of the accepted media types. If empty, any type is accepted.
          params: Query parameters.
          json: Body to send as JSON.
          content: Body to send as bytes.
          headers: Additional headers.
          max_bytes: Maximum size of the body; None means the limit of the constructor.

        Raises:
          WebError: The request failed; see the subclasses.
        """
        request = {"params": params, "json": json, "content": content}
        try:
            async with asyncio.timeout(self._total):
                return await self._follow(
                    method, url, request, dict(headers or {}), tuple(accept), max_bytes
                )
        except (TimeoutError, httpx.TimeoutException):
            raise TimedOutError("the server did not answer in time") from None
        except httpx.HTTPError as error:
            if isinstance(error, httpx.UnsupportedProtocol):
                raise RefusedError("not a valid address") from None
            raise UnreachableError(f"the connection failed ({type(error).__name__})") from None
        except (httpx.InvalidURL, ValueError, KeyError) as error:
            # Raised by the libraries for malformed addresses and headers.
            raise RefusedError(f"not a valid address or answer ({type(error).__name__})") from None

    async def _follow(
        self, method: str, url: str, request: dict, headers: dict, accept: tuple[str, ...],
        max_bytes: int | None,
    ) -> Answer:  # fmt: skip
        """Return the response after following redirects."""
        timeout = {"timeout": httpx.Timeout(self._seconds).as_dict()}
        for _ in range(_MAX_REDIRECTS + 1):
            # httpx.Client is not used: it keeps cookies, and logs URLs with the API keys in them.
            made = httpx.Request(
                method, url, headers=_HEADERS | headers, extensions=timeout, **request
            )
            _check(made.url)
            response = await self._transport().handle_async_request(made)
            response.request = made
            try:
                if not (response.has_redirect_location and method == "GET"):
                    return await self._read(response, accept, max_bytes)
            finally:
                await response.aclose()
            target = made.url.join(response.headers["location"])
            headers = headers if _origin(target) == _origin(made.url) else {}
            url, request = str(target), {}
        raise RefusedError("too many redirects")

    async def _read(
        self, response: httpx.Response, accept: tuple[str, ...], max_bytes: int | None
    ) -> Answer:
        if not response.is_success:
            body = await _beginning(response)
            raise StatusError(response.status_code, _retry_after(response), body)
        media_type, _, _ = response.headers.get("content-type", "").lower().partition(";")
        media_type = media_type.strip()
        if accept and not media_type.startswith(accept):
            raise BodyError(f"content type {media_type[:40]!r}, not {' or '.join(accept)}")
        limit = self._max_bytes if max_bytes is None else max_bytes
        if int(response.headers.get("content-length") or 0) > limit:
            raise BodyError(f"more than {limit} bytes")
        encoding = response.headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip"):
            raise BodyError(f"content encoding {encoding[:20]!r}")
        body = bytearray()
        inflate = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
        came = 0
        async for chunk in response.aiter_raw(_CHUNK):
            came += len(chunk)
            try:
                # One byte beyond the limit suffices to detect that it is exceeded.
                body += inflate.decompress(chunk, limit - len(body) + 1) if inflate else chunk
            except zlib.error:
                raise BodyError("damaged gzip") from None
            if max(len(body), came) > limit:
                raise BodyError(f"more than {limit} bytes")
        if inflate is not None and not inflate.eof:
            raise BodyError("gzip is cut off")
        return Answer(str(response.url), media_type, response.charset_encoding, bytes(body))


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport with our own connection pool."""

    def __init__(self, backend: httpcore.AsyncNetworkBackend, connections: int):
        context = httpx.create_ssl_context(trust_env=False)
        super().__init__(verify=context, trust_env=False)
        self._pool = Connections(backend, context, limit=connections)


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Network backend that connects only to public addresses and to explicitly allowed hosts.

    Args:
      allowed: (host, port) pairs from `addresses.parse_host`. A port of None means any port.
      inner: Network backend that opens the connections.
    """

    def __init__(
        self, allowed: Collection[tuple[str, int | None]], inner: httpcore.AsyncNetworkBackend
    ):
        self._allowed = allowed
        self._inner = inner

    async def connect_tcp(
        self, host, port, timeout=None, local_address=None, socket_options=None
    ) -> httpcore.AsyncNetworkStream:
        name = normal_host(host)
        allowed = not {(name, port), (name, None)}.isdisjoint(self._allowed)
        names = own_names if allowed else foreign_names
        try:
            addresses = await asyncio.wait_for(names.find(host, port), timeout)
        except TimeoutError:
            raise httpcore.ConnectTimeout("name lookup") from None
        except (OSError, UnicodeError):
            raise httpcore.ConnectError("name lookup") from None
        if not allowed and not all(map(is_public, addresses)):
            raise RefusedError("an address that is not public")
        error: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failed:
                error = failed
        raise error

    async def connect_unix_socket(self, path, timeout=None, socket_options=None):
        raise RefusedError("not an address of the web")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _origin(url: httpx.URL) -> tuple:
    return url.scheme, url.host, url.port


def _check(url: httpx.URL) -> None:
    if url.scheme not in ("http", "https") or not _HOST.fullmatch(url.host):
        raise RefusedError("not an http or https address")
    if url.port is not None and not 0 < url.port < 65536:
        raise RefusedError("not a port")
    if url.userinfo:
        raise RefusedError("an address with a password in it")


async def _beginning(response: httpx.Response) -> bytes:
    """Return at most the first `_ERROR_BYTES` of an error response."""
    unpack = response.headers.get("content-encoding", "").lower() == "gzip"
    inflate = zlib.decompressobj(wbits=31) if unpack else None
    try:
        async for chunk in response.aiter_raw(_ERROR_BYTES):
            part = inflate.decompress(chunk, _ERROR_BYTES) if inflate else chunk
            return part[:_ERROR_BYTES]
    except (httpx.HTTPError, zlib.error):  # the status alone is enough
        pass
    return b""


def _retry_after(response: httpx.Response) -> float | None:
    """Parse a `Retry-After` header in either form (RFC 9110, section 10.2.3) into seconds.

    Return None if the header is missing or malformed.
    """
    text = response.headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
