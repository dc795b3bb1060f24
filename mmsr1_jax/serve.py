"""Serve a web page that answers questions about images with a policy that may search.

    python -m mmsr1_jax.serve --model=DIR [--tools.index=DIR] [--port=8080] \\
        [--config=FILE --config.rollout.lanes=8 ..]

Each engine answers up to `rollout.lanes` questions concurrently; further questions wait for a lane.
The answers are those of `infer`: decoding is greedy unless a `--config.sampling` flag is given.

The server listens only on this machine unless `--host` is set. It has no password: anyone who
reaches the page can use the policy and its searches. Behind a proxy that adds authentication and
TLS, keep the default host and pass the page's public name as `--name`.
"""

import contextlib
import ipaddress
import pathlib
import socket
from collections.abc import Sequence

import uvicorn
from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.apps.serve.app import Limits, make_app
from mmsr1_jax.apps.serve.connections import make_protocol
from mmsr1_jax.apps.serve.request_queue import RequestQueue
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.rollout.build import make_engine
from mmsr1_jax.utils.logs import log

_MAX_REQUESTS = 256  # maximum number of active requests; more are refused


def main(argv: Sequence[str]) -> None:
    del argv
    config, host = _CONFIG.value, _HOST.value
    if _INDEX.value is not None:
        config.tools.index = _INDEX.value
    if not any(name.startswith("config.sampling.") for name in flags.FLAGS):
        config.sampling.temperature = 0.0
    limits = Limits()
    config.images.max_file_pixels = min(config.images.max_file_pixels, limits.max_image_pixels)
    limits = Limits(max_image_pixels=config.images.max_file_pixels)
    listener = _listen(host, _PORT.value)
    engine = make_engine(config, _MODEL.value)
    names = {"localhost", "127.0.0.1", "::1", host.lower(), *(n.lower() for n in _NAMES.value)}
    if not _is_loopback(host):
        log.warning("warning: the page has no password; anyone who reaches %s can use it", host)
    queue = RequestQueue(engine, config.sampling)
    app = make_app(
        queue,
        engine.processor,
        title=pathlib.Path(_MODEL.value).resolve().name,
        limits=limits,
        names=names if _is_loopback(host) or _NAMES.value else None,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app, lifespan="off", log_level="warning", access_log=False, server_header=False,
            limit_concurrency=_MAX_REQUESTS, timeout_graceful_shutdown=1,
            http=make_protocol(), ws="none",
        )
    )  # fmt: skip
    url_host = f"[{host}]" if ":" in host else host
    print(f"http://{url_host}:{listener.getsockname()[1]}/ (Ctrl-C stops it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    queue.close()
    engine.close()


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, opened before the policy is loaded so that errors appear early.

    Raises:
      UserError: The address is unusable, for example because the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy", required=True)
    _INDEX = flags.DEFINE_string(
        "tools.index",
        None,
        "local index to search in (config.tools.index); see mmsr1_jax.scripts.index",
    )
    _HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0 for all")
    _PORT = flags.DEFINE_integer("port", 8080, "port to listen on; 0 for any free port", 0, 65535)
    _NAMES = flags.DEFINE_multi_string(
        "name", [], "additional host name of the page; may be repeated"
    )
    cli.run(main, interrupted=0)
