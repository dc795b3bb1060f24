"""The store: shared by processes, safe from their death, bounded, handed on."""

import functools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from mmsr1_jax.tools.tool_cache import ToolCache, ToolCacheError
from tests.programs import run

WRITER = """
import sys
from mmsr1_jax.tools.tool_cache import ToolCache
store = ToolCache(sys.argv[1])
number = 0
while True:
    store.put("page", f"{sys.argv[2]}-{number}", b"x" * 5000 + str(number).encode())
    print(number, flush=True)  # acknowledged
    number += 1
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


def test_modes(path):
    with pytest.raises(ToolCacheError, match="no such store"):
        ToolCache(path, "replay")
    with pytest.raises(ToolCacheError, match="mode 'sometimes'"):
        ToolCache(path, "sometimes")
    recording = ToolCache(path, "record")
    recording.put("links", "q", b"one")
    recording.put("page", "p", b"404", failed=True)
    assert recording.get("links", "q") is None  # a fresh record asks for everything
    using, replaying, off = ToolCache(path), ToolCache(path, "replay"), ToolCache(None, "off")
    assert using.get("links", "q") == replaying.get("links", "q") == (b"one", False)
    assert using.get("page", "p") is None and replaying.get("page", "p") == (b"404", True)
    assert using.get("page", "q") is None
    replaying.put("links", "q", b"two")
    off.put("links", "q", b"three")
    assert using.get("links", "q") == (b"one", False) and off.get("links", "q") is None
    using.put("links", "q", b"four")
    assert replaying.get("links", "q") == (b"four", False)


def test_what_is_too_old_is_asked_again(path):
    ToolCache(path).put("page", "p", b"old")
    assert ToolCache(path, days=0).get("page", "p") is None
    assert ToolCache(path, "replay", days=0).get("page", "p") == (b"old", False)


def test_the_oldest_make_room(path):
    store = ToolCache(path, max_bytes=100_000)
    for number in range(300):
        store.put("page", str(number), b"x" * 1000)
    ((_, entries, size),) = store.info()
    assert size <= 110_000 and entries >= 85
    assert store.get("page", "299") and store.get("page", "0") is None


def test_an_import_stays_within_the_size_of_the_store(path, tmp_path):
    other = ToolCache(tmp_path / "other.sqlite")
    for number in range(300):
        other.put("page", str(number), b"x" * 1000)
    other.close()
    store = ToolCache(path, max_bytes=100_000)
    assert store.take(tmp_path / "other.sqlite") == 300
    ((_, _, size),) = store.info()
    assert size <= 110_000


def test_a_damaged_store_is_set_aside(path, capsys):
    path.write_bytes(b"this is no database at all" * 1000)
    with pytest.raises(ToolCacheError, match="damaged"):
        ToolCache(path, "replay")
    store = ToolCache(path)
    store.put("page", "p", b"new")
    assert store.get("page", "p") == (b"new", False)
    assert "damaged" in capsys.readouterr().err
    (aside,) = path.parent.glob("store.sqlite.damaged-*")
    assert aside.read_bytes().startswith(b"this is no database")


def test_damage_that_shows_later(path, capsys):
    store = ToolCache(path)
    for number in range(2000):
        store.put("page", str(number), b"x" * 1000)
    store.close()
    with open(path, "r+b") as file:
        file.seek(20_000)
        file.write(os.urandom(1_500_000))
    store = ToolCache(path)
    found = [store.get("page", str(number)) for number in range(2000)]
    store.put("page", "new", b"y")
    assert store.get("page", "new") == (b"y", False)
    assert found[-1] is None and "a new one is begun" in capsys.readouterr().err


def start(path, name):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name], stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def test_two_writers_one_of_them_killed(path):
    """Twenty times: what was acknowledged is there."""
    acknowledged = {}
    for round_ in range(20):
        writers = {f"{round_}{side}": start(path, f"{round_}{side}") for side in "ab"}
        for process in writers.values():
            process.stdout.readline()
        time.sleep(0.02 * (round_ % 7))
        for name, process in writers.items():  # the second goes on while the first is dead
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().split("\n")[:-1]  # a line that was cut does not count
            process.wait()
            acknowledged[name] = int(lines[-1]) if lines else 0
        store = ToolCache(path)
        for name, last in acknowledged.items():
            value = store.get("page", f"{name}-{last}")
            assert value == (b"x" * 5000 + str(last).encode(), False)
        store.close()
    store = ToolCache(path, "replay")
    for name, last in acknowledged.items():
        assert all(store.get("page", f"{name}-{number}") for number in range(last + 1))
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert sum(acknowledged.values()) > 200


def test_another_process_is_just_making_the_file(path):
    """Then SQLite is busy at once, however long it was told to wait."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    other.execute("CREATE TABLE something (x)")
    commit = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    commit.start()
    store = ToolCache(path)
    store.put("page", "a", b"x")
    commit.join()
    other.close()
    assert store.info() == [("page", 1, 1)]


def test_reading_does_not_wait_for_a_writer(path):
    store = ToolCache(path)
    store.put("page", "a", b"x")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = threading.Thread(target=store.put, args=("page", "b", b"y"))
    waiting.start()
    time.sleep(0.1)
    begin = time.monotonic()
    assert store.get("page", "a") == (b"x", False)
    assert time.monotonic() - begin < 1
    other.execute("COMMIT")
    waiting.join()
    assert store.get("page", "b") == (b"y", False)


def test_what_is_no_damage_sets_nothing_aside(path, capsys):
    store = ToolCache(path)
    store.put("page", "a", b"x")
    with pytest.raises(ToolCacheError):
        store.put("page", "b", object())
    store.put("page", "half a \ud800 pair", b"z")
    assert store.get("page", "half a \ud800 pair") == (b"z", False)
    assert store.get("page", "a") == (b"x", False) and "damaged" not in capsys.readouterr().err


def test_two_that_use_a_store_that_is_damaged(path, capsys):
    """The second goes on with the file that the first began, and what is in it."""
    first, second, third = ToolCache(path), ToolCache(path), ToolCache(path)
    for number in range(500):
        first.put("page", str(number), b"x" * 1000)
    for store in (first, second, third):
        store.close()
    second.get("page", "0")  # it has the file open
    with open(path, "r+b") as file:
        file.write(b"rubbish" * 50_000)
    first.put("page", "b", b"y")
    second.put("page", "c", b"z")
    third.put("page", "d", b"w")
    for store in (first, second, third, ToolCache(path, "replay")):
        assert store.get("page", "b") == (b"y", False)
        assert store.get("page", "c") == (b"z", False)
        assert store.get("page", "d") == (b"w", False)
    assert capsys.readouterr().err.count("a new one is begun") == 1


def test_a_failure_does_not_take_the_place_of_what_was_found(path, tmp_path):
    store = ToolCache(path)
    store.put("page", "a", b"x")
    store.put("page", "a", b"503", failed=True)
    assert store.get("page", "a") == (b"x", False)
    other = ToolCache(tmp_path / "other.sqlite")
    other.put("page", "a", b"503", failed=True)
    assert other.take(path) == 1 and other.get("page", "a") == (b"x", False)
    recording = ToolCache(path, "record")
    recording.put("page", "a", b"404", failed=True)
    assert ToolCache(path, "replay").get("page", "a") == (b"404", True)


def test_a_recorded_store_is_only_read(path, tmp_path):
    store = ToolCache(path)
    store.put("page", "a", b"x")
    store.close()
    before = path.read_bytes()
    os.chmod(path, 0o444)
    os.chmod(tmp_path, 0o555)
    try:
        replaying = ToolCache(path, "replay")
        assert replaying.get("page", "a") == (b"x", False)
        assert replaying.info() == [("page", 1, 1)]
        replaying.close()
    finally:
        os.chmod(tmp_path, 0o755)
    assert path.read_bytes() == before
    other = tmp_path / "no_store.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE something (x)")
    with pytest.raises(ToolCacheError, match="no such table"):
        ToolCache(other, "replay")


def test_the_command(path, tmp_path):
    command = functools.partial(run, module="mmsr1_jax.scripts.cache")
    store = ToolCache(path)
    store.put("links", "q", b"one")
    store.put("page", "p", b"x" * 2_000_000)
    copy, other = tmp_path / "copy.sqlite", tmp_path / "other.sqlite"
    assert command("info", path).stdout == "links: 1 entries, 0.0 MB\npage: 1 entries, 2.0 MB\n"
    assert command("export", path, copy).returncode == 0
    ToolCache(other).put("links", "q", b"mine")
    done = command("import", other, copy)
    assert done.stdout.startswith(f"1 entries imported from {copy}\n")
    assert ToolCache(other).get("links", "q") == (b"mine", False)
    assert ToolCache(other).get("page", "p") == (b"x" * 2_000_000, False)
    (tmp_path / "no").write_bytes(b"rubbish" * 1000)
    for arguments, message in (
        (["info", tmp_path / "none"], "no such cache"), (["info", tmp_path / "no"], "damaged"),
        (["import", other, tmp_path / "no"], "not a store"), (["export", path], "usage: "),
        ([], "usage: "),
    ):  # fmt: skip
        done = command(*arguments)
        assert done.returncode == 1 and message in done.stderr.strip().splitlines()[-1], done
