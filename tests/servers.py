"""Real servers on loopback for tests: ASGI apps under uvicorn, each in a thread."""

import contextlib
import threading
import time
from collections.abc import Iterator

import httpcore
import uvicorn


@contextlib.contextmanager
def serve(app) -> Iterator[str]:
    """Run an ASGI app and yield its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=10)


class RecordingBackend(httpcore.AnyIOBackend):
    """Network backend that records the (host, port) pairs that it connects to."""

    def __init__(self):
        self.connections: list[tuple[str, int]] = []

    async def connect_tcp(self, host, port, *args, **kwargs):
        self.connections.append((host, port))
        return await super().connect_tcp(host, port, *args, **kwargs)
