"""Benchmark of the configured text search: throughput, and latency beyond that of the servers,
which answer in 50 ms.

    python -m tests.bench.tools [--searches=2000] [--in_flight=64] [--faulty=20] [--reader=local]

cold        searches with an empty cache: concurrently, and one by one
warm        the same searches again, with the cache
replay      the same searches after the servers have stopped

The servers (`tests/load_app.py`) run in a separate process. Their own latency is measured by the
same requests over bare sockets. The last line of the output is JSON; times are in seconds.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from absl import app, flags

from mmsr1_jax.config import settings
from mmsr1_jax.tools import Observation, Query
from mmsr1_jax.tools.build import make_tools

_SEARCHES = flags.DEFINE_integer("searches", 2000, "number of text searches")
_IN_FLIGHT = flags.DEFINE_integer("in_flight", 64, "number of concurrent searches")
_ALONE = flags.DEFINE_integer("alone", 60, "number of searches measured one by one")
_WAIT = flags.DEFINE_float("wait", 0.05, "latency of the servers in seconds")
_FAULTY = flags.DEFINE_integer("faulty", 20, "one request in FAULTY fails; 0: no faults")
_READER = flags.DEFINE_enum("reader", "local", ["none", "local", "jina"], "page reader")
_SUMMARISER = flags.DEFINE_bool("summariser", False, "summarise pages")


@contextlib.contextmanager
def servers(wait: float, faulty: int) -> Iterator[str]:
    """Runs `tests/load_app.py`; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "tests.load_app:app", "--log-level=critical"]
    environment = {**os.environ, "WAIT": str(wait), "FAULTY": str(faulty), "PORT": str(port)}
    process = subprocess.Popen([*command, f"--port={port}"], env=environment)
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        assert process.poll() is None, "the servers did not start"
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def make_search(address: str, cache: pathlib.Path | None, mode: str = "use"):
    """Return the configured text search, with services at `address`."""
    config = settings.Config()
    config.tools.text, config.tools.image = "searxng", "none"
    services = config.services
    services.searxng_url = address
    services.jina_url = f"{address}/reader"
    services.reader = _READER.value
    services.summariser_url = f"{address}/v1" if _SUMMARISER.value else None
    services.allowed_hosts = (address.removeprefix("http://"),)
    services.timeout = 2.0  # for a server that does not reply
    services.max_concurrency, services.max_qps = 512, 10_000.0
    services.cache, services.cache_mode = cache and str(cache), mode
    return make_tools(config)["text_search"]


async def many(search, names: list[str], in_flight: int) -> dict:
    """Search for each name concurrently; return throughput, latencies in seconds, and statuses."""
    waiting, taken, statuses = iter(names), [], {}

    async def work():
        for name in waiting:
            begin = time.perf_counter()
            observation = await search(
                Query(action="text_search", text=name, question=f"When was {name} opened?")
            )
            taken.append(time.perf_counter() - begin)
            statuses[observation.status] = statuses.get(observation.status, 0) + 1

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    seconds = time.perf_counter() - start
    cuts = statistics.quantiles(taken, n=100, method="inclusive")
    rate = len(names) / seconds
    return {"searches_per_second": rate, "p50": cuts[49], "p99": cuts[98]} | statuses


class Bare:
    """Requests of a text search over persistent sockets, to measure the servers' own latency."""

    def __init__(self, address: str):
        self._host, _, self._port = address.removeprefix("http://").partition(":")
        self._open: list[tuple] = []

    async def __call__(self, query: Query) -> Observation:
        paths = {"none": [], "local": ["/page/"], "jina": ["/reader/x/"]}[_READER.value]
        paths += ["/v1/"] * _SUMMARISER.value
        await self._get(f"/search?q={query.text}")

        async def page(number: int):
            for path in paths:
                await self._get(f"{path}{query.text}-{number}")

        await asyncio.gather(*(page(number) for number in range(5)))
        return Observation()

    async def _get(self, path: str) -> None:
        if not self._open:
            self._open.append(await asyncio.open_connection(self._host, self._port))
        reader, writer = self._open.pop()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
        self._open.append((reader, writer))


def _memory() -> float:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def _measure(folder: pathlib.Path) -> dict:
    names = [f"n{number}" for number in range(_SEARCHES.value)]
    alone, results = [f"a{number}" for number in range(_ALONE.value)], {}
    with servers(_WAIT.value, 0) as address:  # without faults, or waiting again would count
        results["servers"] = await many(Bare(address), alone, 1)
        search = make_search(address, None)
        await many(search, alone[:5], 1)
        results["one by one, no faults"] = await many(search, alone, 1)
    with servers(_WAIT.value, _FAULTY.value) as address:
        search = make_search(address, None)
        await many(search, [f"w{number}" for number in range(_IN_FLIGHT.value)], _IN_FLIGHT.value)
        results["one by one"] = await many(search, alone, 1)
        before = _memory()
        results["cold"] = await many(search, names, _IN_FLIGHT.value)
        results["memory_grown_mb"] = _memory() - before
        recording = make_search(address, folder / "cache.sqlite", "record")
        results["cold, recorded"] = await many(recording, names, _IN_FLIGHT.value)
        warm = make_search(address, folder / "cache.sqlite")
        results["warm"] = await many(warm, names, _IN_FLIGHT.value)
    replay = make_search(address, folder / "cache.sqlite", "replay")
    results["replay"] = await many(replay, names, _IN_FLIGHT.value)
    results["replay, one by one"] = await many(replay, names[: _ALONE.value], 1)
    rate = {kind: value.get("searches_per_second") for kind, value in results.items()
            if isinstance(value, dict)}  # fmt: skip
    results["times_one_by_one"] = rate["cold"] / rate["one by one"]
    beyond = results["one by one, no faults"]["p50"] - results["servers"]["p50"]
    results["overhead_ms"] = 1000 * beyond
    return results


def main(_) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(_measure(pathlib.Path(folder)))))


if __name__ == "__main__":
    app.run(main)
