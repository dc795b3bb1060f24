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

from mmsr1_jax.tools.addresses import (
    is_public,
    normalise_host,
    parse_host,
    trusted_resolver,
    untrusted_resolver,
)
from mmsr1_jax.tools.connection_pool import ConnectionPool
from mmsr1_jax.utils import checked_json

# At lower levels, httpcore logs requests, including the API keys in them.
logging.getLogger("httpcore").setLevel(logging.WARNING)

JSON_TYPES = ("application/json",)
PAGE_TYPES = ("text/html", "application/xhtml+xml", "text/plain", "text/markdown")
IMAGE_TYPES = ("image/",)
_HEADERS = {"User-Agent": "mmsr1_jax", "Accept": "*/*", "Accept-Encoding": "gzip"}
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 65536
_MAX_ERROR_BYTES = 4096  # of the body of an error response
_HOST = re.compile(r"[^\s/@\\%]+")


class WebError(Exception):
    """Failed request. The message contains neither the URL nor an API key.

    Attributes:
      transient: Whether a retry may succeed.
      retry_after: Seconds that the server asks to wait, or None.
    """

    transient = False
    retry_after: float | None = None

    def __reduce__(self):  # by default, an exception is unpickled from its message alone
        return _unpickle, (type(self), self.args, self.__dict__)


def _unpickle(kind: type[WebError], args: tuple, state: dict[str, Any]) -> WebError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class RefusedError(WebError):
    """Request rejected by this client, for instance because its address is not public."""


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
class WebResponse:
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


class WebClient:
    """HTTP client with one connection pool per asyncio loop.

    Args:
      allowed_hosts: `host`, `host:port` or URLs of trusted services, whose addresses may be
        private.
      timeout: Time limit in seconds for connecting, and for each wait for data.
      total_timeout: Time limit in seconds of a whole request, including redirects and body. None
        means three times `timeout`.
      max_bytes: Maximum size of a body, both as received and decompressed.
      max_connections: Maximum number of concurrent connections per loop.
      backend: Network backend that opens connections, replaced in tests.
    """

    def __init__(
        self,
        *,
        allowed_hosts: Collection[str] = (),
        timeout: float = 20.0,
        total_timeout: float | None = None,
        max_bytes: int = 10_000_000,
        max_connections: int = 256,
        backend: httpcore.AsyncNetworkBackend | None = None,
    ):
        self._allowed = frozenset(map(parse_host, allowed_hosts))
        self._timeout = timeout
        self._total_timeout = 3 * timeout if total_timeout is None else total_timeout
        self._max_bytes = max_bytes
        self._max_connections = max_connections
        self._backend = backend
        self._pools: weakref.WeakKeyDictionary[Any, ConnectionPool] = weakref.WeakKeyDictionary()

    def _transport(self) -> ConnectionPool:
        """Return the connection pool of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            # httpcore defines another class of this name for environments without anyio.
            default: Any = httpcore.AnyIOBackend()
            backend = CheckedBackend(self._allowed, self._backend or default)
            tls = httpx.create_ssl_context(trust_env=False)
            self._pools[loop] = ConnectionPool(backend, tls, limit=self._max_connections)
        return self._pools[loop]

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
    ) -> WebResponse:
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
            async with asyncio.timeout(self._total_timeout):
                return await self._follow(
                    method, url, request, dict(headers or {}), tuple(accept), max_bytes
                )
        except (TimeoutError, httpx.TimeoutException):
            raise TimedOutError("the server did not respond in time") from None
        except httpx.HTTPError as error:
            if isinstance(error, httpx.UnsupportedProtocol):
                raise RefusedError("not a valid URL") from None
            raise UnreachableError(f"the connection failed ({type(error).__name__})") from None
        except (httpx.InvalidURL, ValueError, KeyError) as error:
            # Raised by the libraries for malformed addresses and headers.
            raise RefusedError(f"invalid URL or response ({type(error).__name__})") from None

    async def _follow(
        self,
        method: str,
        url: str,
        request: dict[str, Any],
        headers: dict[str, str],
        accept: tuple[str, ...],
        max_bytes: int | None,
    ) -> WebResponse:
        """Return the response after following redirects."""
        extensions = {"timeout": httpx.Timeout(self._timeout).as_dict()}
        for _ in range(_MAX_REDIRECTS + 1):
            # httpx.Client is not used: it keeps cookies, and logs URLs with the API keys in them.
            sent = httpx.Request(
                method, url, headers=_HEADERS | headers, extensions=extensions, **request
            )
            _check_url(sent.url)
            response = await self._transport().handle_async_request(sent)
            response.request = sent
            try:
                if not (response.has_redirect_location and method == "GET"):
                    return await self._read(response, accept, max_bytes)
            finally:
                await response.aclose()
            target = sent.url.join(response.headers["location"])
            headers = headers if _origin(target) == _origin(sent.url) else {}
            url, request = str(target), {}
        raise RefusedError(f"more than {_MAX_REDIRECTS} redirects")

    async def _read(
        self, response: httpx.Response, accept: tuple[str, ...], max_bytes: int | None
    ) -> WebResponse:
        if not response.is_success:
            body = await _error_body(response)
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
            raise BodyError(f"unsupported content encoding {encoding[:20]!r}")
        body = bytearray()
        inflate = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
        num_received = 0
        async for chunk in response.aiter_raw(_CHUNK_BYTES):
            num_received += len(chunk)
            try:
                # One byte beyond the limit suffices to detect that it is exceeded.
                body += inflate.decompress(chunk, limit - len(body) + 1) if inflate else chunk
            except zlib.error:
                raise BodyError("damaged gzip data") from None
            if max(len(body), num_received) > limit:
                raise BodyError(f"more than {limit} bytes")
        if inflate is not None and not inflate.eof:
            raise BodyError("truncated gzip data")
        return WebResponse(str(response.url), media_type, response.charset_encoding, bytes(body))


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
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        name = normalise_host(host)
        allowed = not {(name, port), (name, None)}.isdisjoint(self._allowed)
        resolver = trusted_resolver if allowed else untrusted_resolver
        try:
            addresses = await asyncio.wait_for(resolver.resolve(host, port), timeout)
        except TimeoutError:
            raise httpcore.ConnectTimeout("name lookup") from None
        except (OSError, UnicodeError):
            raise httpcore.ConnectError("name lookup") from None
        if not allowed and not all(map(is_public, addresses)):
            raise RefusedError("the address is not public")
        last_error: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last_error = error
        raise last_error

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise RefusedError("Unix sockets are not allowed")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _check_url(url: httpx.URL) -> None:
    if url.scheme not in ("http", "https") or not _HOST.fullmatch(url.host):
        raise RefusedError("not an http or https URL")
    if url.port is not None and not 0 < url.port < 65536:
        raise RefusedError("invalid port")
    if url.userinfo:
        raise RefusedError("the URL contains a user name or password")


async def _error_body(response: httpx.Response) -> bytes:
    """Return at most the first `_MAX_ERROR_BYTES` of an error response."""
    is_gzip = response.headers.get("content-encoding", "").lower() == "gzip"
    inflate = zlib.decompressobj(wbits=31) if is_gzip else None
    try:
        async for chunk in response.aiter_raw(_MAX_ERROR_BYTES):
            part = inflate.decompress(chunk, _MAX_ERROR_BYTES) if inflate else chunk
            return part[:_MAX_ERROR_BYTES]
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
