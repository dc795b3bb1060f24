"""Worker processes: exceeding a limit fails one task only, and workers inherit no secrets."""

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mmsr1_jax.utils import workers
from mmsr1_jax.utils.workers import Limits, WorkerError, run

# Limits on CPU time, so that results do not depend on the load of the machine.
SHORT = Limits(cpu_seconds=0.5, wall_seconds=600.0, memory_bytes=200 << 20)
ENDLESS = "sum(range(10**15))"  # in C: no Python code can interrupt it


def test_a_task_returns_its_result_or_raises_its_error():
    assert run(len, b"abc") == 3
    with pytest.raises(ZeroDivisionError):
        run(eval, "1 / 0")


@pytest.mark.parametrize("code, message", [
    (ENDLESS, "used more than 0.5 s of CPU time"),
    ("len(bytes(10**9))", "used more than 200 MiB"),
    ("[[0] * 10**6 for _ in range(100)]", "used more than 200 MiB"),
    ("__import__('os').kill(__import__('os').getpid(), 9)", "its process died"),
    ("__import__('os')._exit(3)", "its process died"),
    ("exit(3)", "SystemExit: 3"),
    ("lambda: 1", "the worker failed"),
    ("(_ for _ in ()).throw(type('LocalError', (Exception,), {})('boo'))", "LocalError: boo"),
    ("'a' + 'b' * 2**33", "used more than 200 MiB"),
])  # fmt: skip
def test_exceeding_a_limit_fails_that_task_only(code, message):
    with pytest.raises(WorkerError, match=message):
        run(eval, code, limits=SHORT)
    assert run(len, b"abc") == 3


def test_wall_time_is_limited_too():
    with pytest.raises(WorkerError, match=r"took longer than 0.5 s"):
        run(time.sleep, 1000, limits=Limits(wall_seconds=0.5))


def test_tasks_queued_behind_hostile_ones_complete():
    async def main():
        hostile = [workers.run_async(eval, ENDLESS, limits=SHORT) for _ in range(4)]
        honest = [workers.run_async(len, b"abc") for _ in range(8)]
        return await asyncio.gather(*hostile, *honest, return_exceptions=True)

    results = asyncio.run(main())
    assert all(isinstance(result, WorkerError) for result in results[:4])
    assert results[4:] == [3] * 8


BUSY = "import time\nend = time.process_time() + 1.0\nwhile time.process_time() < end: pass"


def test_short_tasks_do_not_queue_behind_long_ones():
    """Short tasks complete first, and long ones still complete within their limit."""

    async def main():
        order = []

        async def task(name, code):
            await workers.run_async(exec, code, limits=Limits(cpu_seconds=3.0, wall_seconds=600.0))
            order.append(name)

        long = [task("long", BUSY) for _ in range(2 * workers.count())]
        await asyncio.gather(*long, *(task("short", "") for _ in range(8)))
        return order

    assert asyncio.run(main()) == ["short"] * 8 + ["long"] * 2 * workers.count()


def test_a_cancelled_task_frees_its_worker():
    """Otherwise this test would not end."""

    async def main():
        endless = Limits(cpu_seconds=10_000, wall_seconds=100_000)
        tasks = [
            asyncio.ensure_future(workers.run_async(eval, ENDLESS, limits=endless))
            for _ in range(3 * workers.count())
        ]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        return await workers.run_async(len, b"abc")

    assert asyncio.run(main()) == 3


def test_workers_see_no_api_key_and_do_not_import_jax(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "secret-key")
    monkeypatch.setenv("SOME_TOKEN", "secret-key")
    workers.close()  # workers of other tests were started with another environment
    code = "(open('/proc/self/environ').read(), sorted(__import__('sys').modules))"
    environment, _ = run(eval, code)
    assert "secret-key" not in environment and "PATH=" in environment
    from mmsr1_jax.processing.image_files import open_image
    from mmsr1_jax.tools.services.reader import extract

    with pytest.raises(ValueError):
        open_image(b"no image")
    run(extract, b"<html><p>some text</p></html>")
    for _ in range(2 * workers.count()):
        modules = run(eval, "sorted(__import__('sys').modules)")
        assert not [name for name in modules if name.split(".")[0] in ("jax", "flax", "pytest")]


PROGRAM = """
import multiprocessing, sys, threading, time
from mmsr1_jax.utils import workers

workers._FIRST_RUN_CPU_TIME = 1e6  # so that no process is replaced

def hang():
    try:
        workers.run(eval, "sum(range(10**15))", limits=workers.Limits(cpu_seconds=10_000))
    except workers.WorkerError as error:
        sys.stdout.write(f"{error}\\n")  # in one piece, among other threads

if __name__ == "__main__":
    threads = [threading.Thread(target=hang) for _ in range(6)]
    for thread in threads:
        thread.start()
    pids = set()
    while len(pids) < workers.count():
        pids |= {process.pid for process in multiprocessing.active_children()}
    time.sleep(1.0)
    print(*pids, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(10_000)
    sys.exit(5)
"""


def start_program(tmp_path, mode):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, str(program), mode], stdout=subprocess.PIPE, text=True, env=environment
    )
    return process, [int(pid) for pid in process.stdout.readline().split()]


def all_ended(pids, timeout=60.0):
    """Return whether the processes end in time. A zombie counts as ended."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        states = []
        for pid in pids:
            try:
                states.append(
                    pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]
                )
            except OSError:
                states.append("gone")
        if set(states) <= {"gone", "Z"}:
            return True
        time.sleep(0.05)
    return False


def test_the_program_exits_while_workers_are_busy(tmp_path):
    process, pids = start_program(tmp_path, "exit")
    assert pids and process.wait(timeout=60) == 5  # 0.6 s on an idle machine
    assert process.stdout.read().splitlines() == ["the program is shutting down"] * 6
    assert all_ended(pids)


def test_workers_end_when_the_program_is_killed(tmp_path):
    """Idle workers end at once, and busy ones at their CPU limit."""
    process, pids = start_program(tmp_path, "wait")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    for pid in pids:  # as at the CPU limit
        os.kill(pid, signal.SIGXCPU)
    assert all_ended(pids)
