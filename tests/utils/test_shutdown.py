"""Ctrl-C ends a command within seconds, with one line, even if tools and threads hang."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mmsr1_jax.utils import shutdown

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 600.0  # seconds, enough on a busy machine
# Maximum seconds from the signal to the end of the process: 2 by design, more on a busy machine.
# Without the code under test, these processes would never end.
BOUND = 30.0

BEGIN = """
import asyncio, concurrent.futures, contextlib, hashlib, sys, threading, time
from mmsr1_jax.utils import outputs, shutdown
def main(argv):
    with outputs.lock("run"):
        return work()
"""
END = """
if __name__ == "__main__":
    sys.exit(shutdown.guard(main)(sys.argv))
"""
WORK = {
    "the main thread waits": """
def work():
    print("now", flush=True); time.sleep(3600)
""",
    "a thread of a pool hangs": """
def work():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(time.sleep, 3600); print("now", flush=True)
""",
    "a coroutine swallows its cancellation": """
async def never():
    print("now", flush=True)
    while True:
        with contextlib.suppress(asyncio.CancelledError): await asyncio.sleep(3600)
def work(): asyncio.run(never())
""",
    "a coroutine blocks its loop in a thread": """
async def blocks(): print("now", flush=True); time.sleep(3600)
def work(): asyncio.run(asyncio.to_thread(asyncio.run, blocks()))
""",
    "the main thread computes in C": """
def work():
    print("now", flush=True); hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
""",
    "a child process computes": """
def work():
    import multiprocessing
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600,))
    child.start(); print("now", flush=True); child.join()
""",
    "KeyboardInterrupt is caught": """
def work():
    while True:
        with contextlib.suppress(KeyboardInterrupt): print("now", flush=True); time.sleep(3600)
""",
    "the clean-up waits for a lock": """
def work():
    lock = threading.Lock(); lock.acquire()
    try: print("now", flush=True); time.sleep(3600)
    finally: lock.acquire()
""",
}


def start(code: str, folder: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def interrupt(process: subprocess.Popen) -> tuple[float, str]:
    """Send Ctrl-C. Return the seconds until the process ended, and its stderr."""
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        stderr = process.communicate(timeout=TIMEOUT)[1]
    finally:
        process.kill()
    return time.monotonic() - start, stderr


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_ctrl_c_ends_a_hanging_command(tmp_path, work):
    process = start(BEGIN + work + END, tmp_path)
    assert process.stdout.readline() == "now\n"
    seconds, stderr = interrupt(process)  # waits until no child has its pipes open
    assert process.returncode == shutdown.INTERRUPTED
    assert stderr.strip() == "interrupted; the same command resumes run from its saved state"
    assert seconds < BOUND


LOUD = """
def work():
    shutdown._UNWIND_TIMEOUT = 3600.0
    while True:
        try: print("now", flush=True); time.sleep(3600)
        except KeyboardInterrupt: print("once", flush=True)
"""


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    process = start(BEGIN + LOUD + END, tmp_path)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "once\n"
    interrupt(process)
    assert process.returncode == shutdown.INTERRUPTED


@pytest.mark.parametrize(("last", "code", "stderr"), [
    ("return 3", 3, ""), ("return None", 0, ""), ("sys.exit('error: x')", 1, "error: x\n"),
])  # fmt: skip
def test_a_finished_command_exits_despite_a_hanging_thread(tmp_path, last, code, stderr):
    work = f"""
def work():
    concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 3600)
    {last}
"""
    process = start(BEGIN + work + END, tmp_path)
    assert process.communicate(timeout=TIMEOUT) == ("", stderr)
    assert process.returncode == code


ROLLOUT = """
import asyncio, concurrent.futures, contextlib, sys, threading, time
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.utils import shutdown
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.episodes.episode import Example
from tests.scripted_policy import scripted_processor, config_for
from tests.engines import VOCAB_SIZE, make_config

queries = []

async def tool(query):
    queries.append(query)
    if len(queries) == 1:
        await asyncio.to_thread(time.sleep, 3600)
    if len(queries) == 2:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
    print("now", flush=True)
    time.sleep(3600)

def main(argv):
    config = make_config()
    config.tools.timeout = config.tools.episode_timeout = 3600.0
    model = random_policy.random_model(config_for(VOCAB_SIZE), seed=3)
    engine = Engine(model, scripted_processor(VOCAB_SIZE), config,
                    {"text_search": tool, "image_search": tool})
    list(engine.rollout([Example(question="Who built it?")], group_size=8))
    engine.close()

sys.exit(shutdown.guard(main)(sys.argv))
"""


def test_ctrl_c_ends_a_rollout_with_hanging_tools(tmp_path):
    """Tools hang in a thread, in a wait that ignores cancellation, and in the event loop itself."""
    process = start(ROLLOUT, tmp_path)
    assert process.stdout.readline() == "now\n", process.communicate()[1][-2000:]
    seconds, stderr = interrupt(process)
    assert process.returncode == shutdown.INTERRUPTED
    assert stderr.strip().endswith("interrupted") and "Traceback" not in stderr
    assert seconds < BOUND, json.dumps(stderr[-1000:])
