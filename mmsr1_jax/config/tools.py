"""The settings of search tools; `config/settings.py` has the others."""

import dataclasses
from typing import Any

from mmsr1_jax.config import redaction
from mmsr1_jax.config.bounds import setting

TEXT_SEARCHES = ("auto", "none", "local", "serpapi", "serper", "searxng", "retrieval")
IMAGE_SEARCHES = ("auto", "none", "local", "serpapi", "serper", "fvqa")
READERS = ("none", "local", "jina")
STORE_MODES = ("use", "record", "replay")
# Where the secret of a service belongs, by the field of its address; of the others, nowhere.
_SECRET_VARIABLES = {
    "serpapi_url": "SERPAPI_API_KEY",
    "serper_url": "SERPER_API_KEY",
    "jina_url": "JINA_API_KEY",
    "summariser_url": "SUMMARISER_API_KEY",
    "judge_url": "JUDGE_API_KEY",
    "upload_url": "PUBLISHER_AUTHORIZATION or PUBLISHER_QUERY",
    "public_url": "PUBLISHER_AUTHORIZATION or PUBLISHER_QUERY",
    "cache": "STORE_PASSWORD",
}


@dataclasses.dataclass(kw_only=True, slots=True)
class Tools:
    """Search tools, and what of their answers reaches the policy.

    Attributes:
      text: what searches for text: `none`, `local` (the index), or a service: `serpapi`, `serper`,
        `searxng`, `retrieval`. `auto`: `local` if there is an index, else `none`.
      image: what searches for pictures: `none`, `local`, `serpapi`, `serper`, or `fvqa` (the
        published cache); `auto` as above.
      index: a local index (`mmsr1_jax.scripts.index`), or a directory with a `pages.jsonl`.
      image_model: HF directory whose vision tower made the index (`--model`): the local image
        search then goes by its embeddings. None: by perceptual hash.
      max_results: of one search, at most.
      max_result_chars: characters of text in one result; the rest is cut off.
      max_pixels: bound on a retrieved picture, in pixels.
      timeout: time limit of a call.
      episode_timeout: time that an episode may spend waiting for tools; after that no tool is
        called for it, and its searches fail at once.
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
    """Web services (`tools/services/`) and the store. Keys come from the environment only:
    SERPAPI_API_KEY, SERPER_API_KEY, JINA_API_KEY, SUMMARISER_API_KEY, JUDGE_API_KEY; a
    Redis password from STORE_PASSWORD.

    Attributes:
      serpapi_url, serper_url, jina_url: where they are.
      searxng_url, retrieval_url: of one's own servers.
      reader: what reads pages: `none` (their snippets have to do), `local`, or `jina`.
      summariser_url: of an OpenAI-compatible server; None: the best paragraphs instead.
      summariser_model: its name of the model.
      judge_url: of an OpenAI-compatible server that says whether answers are right; None: they are
        matched (`rewards.match`).
      judge_model: its name of the model.
      fvqa_cache: file of the published cache, pickle or JSON.
      upload_url, public_url: addresses to which a question's picture is put, and where a service
        then finds it; `{name}` stands for its name, which else comes at the end. Credentials come
        from PUBLISHER_AUTHORIZATION or PUBLISHER_QUERY in the environment.
      allowed_hosts: `host` or `host:port` that pages and pictures are fetched from although it is
        private; the services above may be anywhere.
      timeout: time limit of a connection, and of each wait for data.
      max_concurrency: requests to a service at a time, by one process.
      max_qps: requests to a service; of all processes together where `store` is a Redis server.
      limits: other numbers for some services, `NAME=PER_SECOND/AT_ONCE` each (names: see
        `tools/build.py`).
      max_attempts: of a request to a service. A page or picture that fails gives way to the next.
        An evaluation asks a judge that was down as many times in all, a minute apart.
      cache: file that keeps what was found, or redis://host:port/database, which many hosts share
        (`tools/redis_cache.py`; one database for each account with the services); None: nothing is
        kept.
      cache_mode: `use`, `record` or `replay` (`tools/tool_cache.py`).
      cache_ttl_days: after which `use` asks again.
      cache_max_bytes: of a file; a Redis server has its own setting, `maxmemory`.
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
    cache_mode: str = setting("use", one_of=STORE_MODES)
    cache_ttl_days: float = setting(90.0, at_least=0, at_most=1e6)
    cache_max_bytes: int = setting(20_000_000_000, at_least=1, at_most=2**60)


def secret_mistake(settings: Any, where: str = "config") -> str | None:
    """Return why an address in settings is refused, beginning with the field; None: it is not.

    Settings are written to files and logs. The message does not show the secret.

    Args:
      settings: all settings, or a part, as plain data.
      where: its name.
    """
    if isinstance(settings, dict):
        inside = [(f"{where}.{name}", value) for name, value in settings.items()]
    elif isinstance(settings, tuple):
        inside = [(where, value) for value in settings]
    elif where.endswith(".services.cache") and str(settings).startswith(("redis:", "rediss:")):
        return None  # its password is left out where settings are written
    elif isinstance(settings, str) and (found := redaction.find_secret(settings)):
        variable = _SECRET_VARIABLES.get(where.rpartition(".")[2])
        place = f"put it into the environment variable {variable}" if variable else "take it out"
        return f"{where}: the address holds {found}; {place}"
    else:
        return None
    return next(filter(None, (secret_mistake(value, name) for name, value in inside)), None)
