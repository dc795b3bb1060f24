"""Settings of search tools and web services. The other settings are in `config/settings.py`."""

import dataclasses
from typing import Any

from mmsr1_jax.config import redaction
from mmsr1_jax.config.bounds import setting
from mmsr1_jax.config.choices import CACHE_MODES, IMAGE_SEARCHES, READERS, TEXT_SEARCHES

# Environment variable for the credential of a service, by the field that holds its URL. Other
# fields have none.
_SECRET_VARIABLES = {
    "serpapi_url": "SERPAPI_API_KEY",
    "serper_url": "SERPER_API_KEY",
    "jina_url": "JINA_API_KEY",
    "summariser_url": "SUMMARISER_API_KEY",
    "judge_url": "JUDGE_API_KEY",
    "writer_url": "WRITER_API_KEY",
    "checker_url": "CHECKER_API_KEY",
    "upload_url": "UPLOAD_AUTHORIZATION or UPLOAD_QUERY",
    "public_url": "UPLOAD_AUTHORIZATION or UPLOAD_QUERY",
    "cache": "CACHE_PASSWORD",
}


@dataclasses.dataclass(kw_only=True, slots=True)
class Tools:
    """Search tools, and limits on the results that the policy sees.

    Attributes:
      text: Backend of the text search: `none`, `local` (the index), or one of the services
        `serpapi`, `serper`, `searxng` and `retrieval`. `auto` selects `local` if `index` is set and
        `none` otherwise.
      image: Backend of the image search: `none`, `local`, `serpapi`, `serper`, or `fvqa` (the
        published cache). `auto` selects `local` if `index` is set and `none` otherwise.
      index: Local index (`mmsr1_jax.scripts.index`), or a directory with a `pages.jsonl`.
      image_model: HF directory with the vision tower that built the index (`--model`). The local
        image search then compares embeddings; with None it compares perceptual hashes.
      max_results: Maximum number of results of one search.
      max_result_chars: Maximum number of text characters in one result; the rest is truncated.
      max_pixels: Maximum size of a retrieved image, in pixels.
      timeout: Time limit of one tool call, in seconds.
      episode_timeout: Total time that an episode may wait for tools, in seconds. Later searches of
        the episode fail immediately, without a tool call.
    """

    text: str = setting("auto", one_of=TEXT_SEARCHES)
    image: str = setting("auto", one_of=IMAGE_SEARCHES)
    index: str | None = None
    image_model: str | None = None
    max_results: int = setting(5, at_least=1, at_most=1000)
    max_result_chars: int = setting(4000, at_least=1, at_most=2**24)
    max_pixels: int = setting(224 * 224, at_least=1, at_most=2**31 - 1)
    timeout: float = setting(60.0, over=0, at_most=86400)
    episode_timeout: float = setting(180.0, over=0, at_most=7 * 86400)


@dataclasses.dataclass(kw_only=True, slots=True)
class Services:
    """Web services (`tools/services/`) and the tool cache.

    API keys are read from environment variables only: SERPAPI_API_KEY, SERPER_API_KEY,
    JINA_API_KEY, SUMMARISER_API_KEY, JUDGE_API_KEY, WRITER_API_KEY and CHECKER_API_KEY. The Redis
    password is read from CACHE_PASSWORD.

    Attributes:
      serpapi_url, serper_url, jina_url: Base URL of the service.
      searxng_url, retrieval_url: Base URL of a self-hosted server.
      reader: Page reader: `none` (results contain the search snippets only), `local`, or `jina`.
      summariser_url: Base URL of an OpenAI-compatible server that summarises pages. With None, the
        best paragraphs are selected instead.
      summariser_model: Model name on the summariser's server.
      judge_url: Base URL of an OpenAI-compatible server that judges answers. With None, answers are
        compared by string matching (`rewards.match`).
      judge_model: Model name on the judge's server.
      writer_url, writer_model: Base URL of an OpenAI-compatible server, and the name of its model,
        that writes the questions of `construct`. The model must accept images.
      checker_url, checker_model: Likewise, for the model that checks them.
      fvqa_cache: File of the published search cache, pickle or JSON.
      upload_url, public_url: URLs for uploading a question's image, and for a service to download
        it. `{name}` is replaced with the image's name, which is otherwise appended. Credentials
        come from the environment variables UPLOAD_AUTHORIZATION or UPLOAD_QUERY.
      allowed_hosts: Private hosts, each `host` or `host:port`, that pages and images may be fetched
        from. The services above may be on any host.
      timeout: Time limit of connecting, and of each wait for data, in seconds.
      max_concurrency: Maximum number of concurrent requests to a service by one process.
      max_qps: Maximum number of requests per second to a service by one process, or by all
        processes together if `cache` is a Redis server.
      limits: Other limits for individual services, each as `NAME=MAX_QPS/MAX_CONCURRENCY`. The
        names are listed in `tools/service_clients.py`.
      max_attempts: Maximum number of attempts of a request to a service. A page or image that fails
        is not retried; the next one is used instead. An evaluation queries an unavailable judge
        this many times in all, one minute apart.
      cache: File that caches tool results, or redis://host:port/database for a cache that several
        hosts share (`tools/redis_cache.py`; use one database for each account with the services).
        With None, nothing is cached.
      cache_mode: Mode of the cache: `use`, `resume`, `record` or `replay` (`tools/tool_cache.py`).
      cache_ttl_days: Age in days after which the mode `use` queries the service again.
      cache_max_bytes: Maximum size of a cache file. A Redis server has its own setting,
        `maxmemory`.
    """

    serpapi_url: str = "https://serpapi.com"
    serper_url: str = "https://google.serper.dev"
    jina_url: str = "https://r.jina.ai"
    searxng_url: str = "http://127.0.0.1:8888"
    retrieval_url: str = "http://127.0.0.1:8000"
    reader: str = setting("local", one_of=READERS)
    summariser_url: str | None = None
    summariser_model: str = "Qwen/Qwen3-32B"
    judge_url: str | None = None
    judge_model: str = "Qwen/Qwen3-32B"
    writer_url: str | None = None
    writer_model: str = "Qwen/Qwen2.5-VL-72B-Instruct"
    checker_url: str | None = None
    checker_model: str = "Qwen/Qwen2.5-VL-32B-Instruct"
    fvqa_cache: str | None = None
    upload_url: str | None = None
    public_url: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    timeout: float = setting(20.0, over=0, at_most=86400)
    max_concurrency: int = setting(64, at_least=1, at_most=65536)
    max_qps: float = setting(50.0, over=0, at_most=1e6)
    limits: tuple[str, ...] = ()
    max_attempts: int = setting(3, at_least=1, at_most=1000)
    cache: str | None = None
    cache_mode: str = setting("use", one_of=CACHE_MODES)
    cache_ttl_days: float = setting(90.0, at_least=0, at_most=1e6)
    cache_max_bytes: int = setting(20_000_000_000, at_least=1, at_most=2**60)


def credential_error(settings: Any, name: str = "config") -> str | None:
    """Return an error message for the first URL in settings that contains a credential.

    Settings are written to files and logs, so credentials are not allowed in them. The message
    begins with the field and does not reveal the credential. Return None if there is no error.

    Args:
      settings: All settings or a part of them, as plain data.
      name: Name of `settings` in the message.
    """
    if isinstance(settings, dict):
        items = [(f"{name}.{field}", value) for field, value in settings.items()]
    elif isinstance(settings, tuple):
        items = [(name, value) for value in settings]
    elif name.endswith(".services.cache") and str(settings).startswith(("redis:", "rediss:")):
        return None  # its password is redacted wherever settings are written
    elif isinstance(settings, str) and (secret := redaction.find_secret(settings)):
        variable = _SECRET_VARIABLES.get(name.rpartition(".")[2])
        action = f"put it into the environment variable {variable}" if variable else "remove it"
        return f"{name}: the address contains {secret}; {action}"
    else:
        return None
    errors = (credential_error(value, field) for field, value in items)
    return next(filter(None, errors), None)
