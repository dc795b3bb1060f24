"""Ctrl-C ends a command within seconds, with one line, whatever its tools and threads still do."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mmsr1_jax.utils import shutdown

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATIENCE = 600.0  # seconds: on a busy machine everything takes its time
# Seconds of a thread that only sleeps, from the signal to the end: 2 by the code, and some for a
# machine that lets it wait. Without the code nothing here ends at all.
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
    """Sends Ctrl-C; returns the seconds until the process has ended, and what it wrote."""
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
    return time.monotonic() - begin, said


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_ctrl_c_ends_whatever_hangs(tmp_path, work):
    process = start(BEGIN + work + END, tmp_path)
    assert process.stdout.readline() == "now\n"
    seconds, said = interrupt(process)  # which waits until no child holds its pipes any more
    assert process.returncode == shutdown.INTERRUPTED
    assert said.strip() == "interrupted; the same command resumes run from what is saved"
    assert seconds < BOUND


LOUD = """
def work():
    shutdown._UNWIND = 3600.0
    while True:
        try: print("now", flush=True); time.sleep(3600)
        except KeyboardInterrupt: print("once", flush=True)
"""


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    process = start(BEGIN + LOUD + END, tmp_path)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "once\n"
    interrupt(process)
    assert process.returncode == shutdown.INTERRUPTED


@pytest.mark.parametrize(("last", "code", "said"), [
    ("return 3", 3, ""), ("return None", 0, ""), ("sys.exit('error: x')", 1, "error: x\n"),
])  # fmt: skip
def test_a_command_ends_beside_a_thread_that_hangs(tmp_path, last, code, said):
    work = f"""
def work():
    concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 3600)
    {last}
"""
    process = start(BEGIN + work + END, tmp_path)
    assert process.communicate(timeout=PATIENCE) == ("", said)
    assert process.returncode == code


ROLLOUT = """
import asyncio, concurrent.futures, contextlib, sys, threading, time
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.utils import shutdown
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.episodes.episode import Example
from tests.scripted_policy import scripted_processor, config_for
from tests.engines import VOCAB_SIZE, make_config

begun = []

async def tool(query):
    begun.append(query)
    kind = len(begun)
    if kind == 1:
        await asyncio.to_thread(time.sleep, 3600)
    if kind == 2:
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
    list(engine.rollout([Example(question="Who built it?")], rollouts=8))
    engine.close()

sys.exit(shutdown.guard(main)(sys.argv))
"""


def test_ctrl_c_ends_a_rollout_whose_tools_hang_in_every_way(tmp_path):
    """In a thread, in a wait that swallows its cancellation, and in the loop itself."""
    process = start(ROLLOUT, tmp_path)
    assert process.stdout.readline() == "now\n", process.communicate()[1][-2000:]
    seconds, said = interrupt(process)
    assert process.returncode == shutdown.INTERRUPTED
    assert said.strip().endswith("interrupted") and "Traceback" not in said
    assert seconds < BOUND, json.dumps(said[-1000:])
