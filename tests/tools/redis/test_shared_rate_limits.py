"""Rate limits that processes share through a Redis server."""

import asyncio
import subprocess
import sys
import time

from mmsr1_jax.tools.redis_cache import RedisCache
from tests.tools.redis_server import ENVIRONMENT, client

# Program that calls a service for some seconds, 8 calls at a time, after a line on stdin.
CALLER = """
import asyncio, functools, sys, time
from mmsr1_jax.tools.redis_cache import RedisCache
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import WebClient
cache, address, name, rate, seconds = *sys.argv[1:4], float(sys.argv[4]), float(sys.argv[5])
wait_for_slot = functools.partial(RedisCache(cache).wait_for_slot, "engine", rate)
web = WebClient(allowed_hosts=[address.removeprefix("http://")])
service = Service("engine", web, max_qps=rate, wait_for_slot=wait_for_slot)

async def call(number):
    params = {"n": f"{name} {number} {time.monotonic()}"}
    await service.call("GET", address, params=params, accept=("application/json",))

async def work(number, end):
    while time.monotonic() < end:
        await call(number)

async def main():
    await asyncio.gather(*map(call, range(8)))  # opens the connections
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    end = time.monotonic() + seconds
    await asyncio.gather(*(work(number, end) for number in range(8)))

asyncio.run(main())
"""


def test_three_processes_share_a_rate_limit(address, engine):
    """40 requests per second in total, over the whole time and in any second."""
    url, requests = engine
    rate, seconds = 40, 2.0
    callers = [
        subprocess.Popen(
            [sys.executable, "-c", CALLER, address, url, str(i), str(rate), str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        ) for i in range(3)
    ]  # fmt: skip
    for caller in callers:
        assert caller.stdout.readline() == "ready\n"
    requests.clear()
    for caller in callers:
        caller.stdin.write("go\n")
        caller.stdin.flush()
    assert [caller.wait() for caller in callers] == [0, 0, 0]
    in_time = [t for t in requests if t < requests[0] + seconds]
    # A call may be late and the next one in time.
    assert 0.8 * rate * seconds <= len(in_time) <= 1.1 * rate * seconds
    max_per_second = max(sum(start <= t < start + 1 for t in requests) for start in requests)
    assert max_per_second <= 1.2 * rate


def test_slots_are_one_interval_apart(address, port):
    """Slots of several clients, also after the server's clock was set back."""
    caches = [RedisCache(address) for _ in range(3)]

    async def wait_for_slots():
        start = time.monotonic()

        async def wait(index):
            await caches[index % 3].wait_for_slot("s", 20.0)
            return time.monotonic() - start

        return sorted(await asyncio.gather(*(wait(index) for index in range(10))))

    for index, elapsed in enumerate(asyncio.run(wait_for_slots())):
        assert index / 20 - 0.01 < elapsed < index / 20 + 0.2
    hour = 3_600_000_000
    fields = {k: int(v) + hour for k, v in client(port).hgetall("mmsr1-rate:s").items()}
    client(port).hset("mmsr1-rate:s", mapping=fields)
    assert asyncio.run(asyncio.wait_for(wait_for_slots(), 5.0))[-1] < 1.0
    assert client(port).pttl("mmsr1-rate:s") < 3000  # the key expires soon
