"""Test requests to the configured services, sent before the first step of a command."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import PIL.Image

from mmsr1_jax.config import settings
from mmsr1_jax.processing.image_files import public_jpeg
from mmsr1_jax.tools.image_search import ImageUploader
from mmsr1_jax.tools.service import Service, ServiceRefusedError, is_refusal
from mmsr1_jax.tools.service_clients import SERVICE_SETTINGS, ServiceClients
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils.logs import log

_TIMEOUT = 60.0  # seconds; time limit of a service's test request, including retries
_Test = tuple[Service, Callable[[], Awaitable[Any]]]


def check_services(
    config: settings.Config, turns: Sequence[settings.Turns], *, judge: bool = True
) -> None:
    """Send one harmless test request to every service that a command will use.

    The requests are a search for `test`, the page example.com, a summary of one sentence, a verdict
    on one answer, and the upload of a small white image. Hosts of pages and images are not
    contacted, and in replay mode no service is. A transient failure is logged and does not stop the
    command.

    Args:
      config: Settings.
      turns: Turn limits of the episodes. Services of a search that all of them forbid are skipped.
      judge: Whether the command uses the judge.

    Raises:
      ServiceRefusedError: One or more services refuse requests (a 3xx or 4xx status other than 408,
        425 and 429) or are unreachable (connection refused, unknown host name, invalid
        certificate).
      ToolsError, KeyMissingError: A setting or an API key is missing.
    """
    services = config.services
    if services.cache is not None and services.cache_mode == "replay":
        return
    text, image = (
        any(min(t.max_searches, getattr(t, f"max_{kind}_searches")) > 0 for t in turns)
        for kind in ("text", "image")
    )
    # Test requests do not belong to a step, so their failures are not counted.
    clients = ServiceClients(services, ToolCache(None, "off"), count_failures=False)
    tests = _tests(clients, _used_services(config, text=text, image=image, judge=judge))
    refusals = asyncio.run(_refusals(tests))
    if refusals:
        raise ServiceRefusedError("; ".join(refusals))


def _used_services(config: settings.Config, *, text: bool, image: bool, judge: bool) -> list[str]:
    """Return the names of the web services in use, without repetitions.

    Args:
      config: Settings.
      text: Whether text search is used.
      image: Whether image search is used.
      judge: Whether answers are judged.
    """
    tools, services = config.tools, config.services
    names: list[str] = []
    if text and tools.text == "retrieval":
        names.append("retrieval")
    elif text and tools.text in SERVICE_SETTINGS:
        names.append(tools.text)
        if services.reader == "jina":
            names.append("reader")
        if services.summariser_url is not None and services.reader != "none":
            names.append("summariser")
    if image and tools.image in SERVICE_SETTINGS:  # both kinds of search share account and address
        names += [tools.image, "uploader"]
    if judge and services.judge_url is not None:
        names.append("judge")
    return list(dict.fromkeys(names))


def _tests(clients: ServiceClients, names: Sequence[str]) -> list[_Test]:
    """Return the HTTP client and the test request of each service."""
    tests: list[_Test] = []
    for name in names:
        service = clients.service(name)
        request = functools.partial(_TEST_REQUESTS[name], clients.client(name, service))
        tests.append((service, request))
    return tests


async def _refusals(tests: Sequence[_Test]) -> list[str]:
    """Return one line per service that refuses its test request; log other failures."""

    async def run(service: Service, request: Callable[[], Awaitable[Any]]) -> str | None:
        try:
            async with asyncio.timeout(_TIMEOUT):
                await request()
        except TimeoutError:
            reason = f"no response within {_TIMEOUT:g} s"
        except WebError as error:
            if is_refusal(error, at_start=True):
                return service.refusal_message(error)
            reason = str(error)
        else:
            return None
        log.warning(
            "warning: the test request to %s failed (%s); it is contacted again when needed",
            service.name, reason,
        )  # fmt: skip
        return None

    return [line for line in await asyncio.gather(*(run(*test) for test in tests)) if line]


async def _upload_test_image(upload: ImageUploader) -> None:
    jpeg, _ = await public_jpeg(PIL.Image.new("RGB", (8, 8), "white"))
    await upload(jpeg)


# Harmless test request of each service, given its client.
_TEST_REQUESTS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    **dict.fromkeys(("serpapi", "serper", "searxng"), lambda client: client.search("test", 1)),
    "retrieval": lambda client: client.passages("test", 1),
    "reader": lambda client: client.read("https://example.com/"),
    "summariser": lambda client: client.summarise("Paris is in France.", "Where is Paris?"),
    "judge": lambda client: client.test(),
    "uploader": _upload_test_image,
}
