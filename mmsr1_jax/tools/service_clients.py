"""Clients of the configured web services, with the limits and addresses that the settings name."""

import contextlib
import functools
import re
import urllib.parse
from collections.abc import Callable
from typing import Any

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools.addresses import parse_host
from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.image_search import ImageUploader
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.redis_cache import RedisCache
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services.chat import Chat
from mmsr1_jax.tools.services.jina import Jina
from mmsr1_jax.tools.services.retrieval import Retrieval
from mmsr1_jax.tools.services.searxng import SearXNG
from mmsr1_jax.tools.services.serpapi import SerpApi
from mmsr1_jax.tools.services.serper import Serper
from mmsr1_jax.tools.services.summariser import Summariser
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import WebClient
from mmsr1_jax.utils.logs import log

SERVICES = (
    "serpapi", "serper", "searxng", "retrieval", "reader", "summariser", "judge", "writer",
    "checker", "thumbnails", "uploader",
)  # fmt: skip
# Fields of `config.services` and environment variables that configure each service.
SERVICE_SETTINGS = {
    "serpapi": ("serpapi_url", "SERPAPI_API_KEY"),
    "serper": ("serper_url", "SERPER_API_KEY"),
    "searxng": ("searxng_url",),
    "retrieval": ("retrieval_url",),
    "reader": ("jina_url", "JINA_API_KEY"),
    "summariser": ("summariser_url", "summariser_model", "SUMMARISER_API_KEY"),
    "judge": ("judge_url", "judge_model", "JUDGE_API_KEY"),
    "writer": ("writer_url", "writer_model", "WRITER_API_KEY"),
    "checker": ("checker_url", "checker_model", "CHECKER_API_KEY"),
    "uploader": ("upload_url", "UPLOAD_AUTHORIZATION", "UPLOAD_QUERY"),
}
_MAX_TOKENS = 2000  # of a reply of the models that construct questions
_JUDGE_RETRY_WAIT = 60.0  # seconds; longer than the cooldown of a circuit breaker (`Service`)


class ToolsError(UserError):
    """Inconsistent tool settings; the message names the field."""


class ServiceClients:
    """Builder of the clients of the configured services.

    Args:
      services: Settings of the services.
      cache: Cache of their responses.
      num_loops: Number of asyncio loops that will use the clients. Limits are enforced per loop, so
        each loop gets an equal fraction of them.
      count_failures: Whether failures of the services are counted as metrics.
      before_request: Function of a service's name, called before each request to it; see `Service`.

    Attributes:
      cached_calls: Cache of calls, which the clients use.

    Raises:
      ToolsError: `limits` or `allowed_hosts` is invalid.
    """

    def __init__(
        self,
        services: settings.Services,
        cache: ToolCache | RedisCache,
        *,
        num_loops: int = 1,
        count_failures: bool = True,
        before_request: Callable[[str], None] | None = None,
    ):
        self._services, self._num_loops, self._count_failures = services, num_loops, count_failures
        self._before_request = before_request
        self._cache, self.cached_calls = cache, CachedCalls(cache)
        # Configured services may have private addresses; the URLs that they return may not.
        urls = (
            services.serpapi_url, services.serper_url, services.searxng_url, services.jina_url,
            services.retrieval_url, services.summariser_url, services.judge_url,
            services.writer_url, services.checker_url, services.upload_url,
        )  # fmt: skip
        for host in services.allowed_hosts:
            if not _has_host(host):
                raise ToolsError(
                    f"config.services.allowed_hosts: {host!r} is not `host`, `host:port` or a URL"
                )
        configured = [url for url in urls if url and _has_host(url)]
        self._services_web = WebClient(allowed_hosts=configured, timeout=services.timeout)
        self._pages_web = WebClient(allowed_hosts=services.allowed_hosts, timeout=services.timeout)
        self._limits = dict(map(_parse_limit, services.limits))

    def service(self, name: str) -> Service:
        """Return the HTTP client of a configured service, self-hosted or commercial."""
        return self._limited(
            name,
            self._services_web,
            max_attempts=self._services.max_attempts,
            # The judge has its own metrics.
            count_failures=self._count_failures and name != "judge",
        )

    def any_host(self, name: str) -> Service:
        """Return an HTTP client for arbitrary hosts.

        It has no circuit breaker, since the failures of different hosts are unrelated, and
        no retries, since the next hit is tried instead.
        """
        return self._limited(
            name, self._pages_web, max_attempts=1, max_failures=None, count_failures=False
        )

    def _limited(self, name: str, web: WebClient, **options: Any) -> Service:
        default = self._services.max_qps, self._services.max_concurrency
        max_qps, max_concurrency = self._limits.get(name, default)
        wait_for_slot = None
        if max_concurrency < self._num_loops:
            log.warning(
                "%s: %d engines may send a request each at the same time, more than the limit of "
                "%d concurrent requests (services.max_concurrency)",
                name, self._num_loops, max_concurrency,
            )  # fmt: skip
        if isinstance(self._cache, RedisCache):
            wait_for_slot = functools.partial(self._cache.wait_for_slot, name, max_qps)
        before_request = None
        if self._before_request is not None:
            before_request = functools.partial(self._before_request, name)
        names = SERVICE_SETTINGS.get(name, ())
        address = _origin(getattr(self._services, names[0]) or "") if names else ""
        fields = [n if n.isupper() else f"config.services.{n}" for n in names]
        return Service(
            name,
            web,
            max_concurrency=-(-max_concurrency // self._num_loops),
            max_qps=max_qps / self._num_loops,
            wait_for_slot=wait_for_slot,
            before_request=before_request,
            address=address,
            settings=", ".join(fields),
            **options,
        )

    def client(self, name: str, service: Service | None = None) -> Any:
        """Return the client of a service in `SERVICE_SETTINGS`, which sends requests by `service`.

        Raises:
          ToolsError, KeyMissingError: A setting or an API key is missing.
        """
        fields, service = self._services, service or self.service(name)
        match name:
            case "serpapi":
                return SerpApi(service, base_url=fields.serpapi_url)
            case "serper":
                return Serper(service, base_url=fields.serper_url)
            case "searxng":
                return SearXNG(service, base_url=fields.searxng_url)
            case "retrieval":
                return Retrieval(service, base_url=fields.retrieval_url)
            case "reader":
                return Jina(service, base_url=fields.jina_url)
            case "summariser":
                url, model = fields.summariser_url, fields.summariser_model
                return Summariser(service, base_url=required("summariser_url", url), model=model)
            case "judge":
                return Judge(
                    service,
                    self.cached_calls,
                    base_url=required("judge_url", fields.judge_url),
                    model=fields.judge_model,
                    retry_waits=[_JUDGE_RETRY_WAIT] * (fields.max_attempts - 1),
                )
            case "writer" | "checker":
                url, model = getattr(fields, f"{name}_url"), getattr(fields, f"{name}_model")
                return Chat(
                    service,
                    base_url=required(f"{name}_url", url),
                    model=model,
                    max_tokens=_MAX_TOKENS,
                    key_variable=f"{name.upper()}_API_KEY",
                )
            case "uploader":
                return ImageUploader(
                    service,
                    self.cached_calls,
                    upload_url=required("upload_url", fields.upload_url),
                    public_url=required("public_url", fields.public_url),
                )
        raise ValueError(f"unknown service {name!r}")


def required(field: str, value: str | None) -> str:
    """Return the value of a field of `config.services`. Raises ToolsError if it is None."""
    if value is None:
        raise ToolsError(f"config.services.{field} is not set")
    return value


def _has_host(url: str) -> bool:
    """Return whether a host or URL is valid. Requests to an invalid URL are refused later."""
    try:
        parse_host(url)
    except ValueError:
        return False
    return True


def _origin(url: str) -> str:
    """Return the scheme, host and port of a URL. The rest may contain secrets."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{port}" if host else ""


def _parse_limit(text: str) -> tuple[str, tuple[float, int]]:
    """Parse `NAME=MAX_QPS/MAX_CONCURRENCY` into (name, (max_qps, max_concurrency))."""
    match = re.fullmatch(r"(\w+)=([0-9.]+)/([0-9]+)", text)
    name, limits = "", (0.0, 0)
    if match is not None:
        with contextlib.suppress(ValueError):
            name, limits = match[1], (float(match[2]), int(match[3]))
    if name not in SERVICES or not all(limits):
        raise ToolsError(
            f"config.services.limits: {text!r} is not NAME=MAX_QPS/MAX_CONCURRENCY with positive "
            f"numbers and one of the names {', '.join(SERVICES)}"
        )
    return name, limits
