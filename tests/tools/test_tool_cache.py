"""The cache file: modes, size limit, damage, several processes, and the command."""

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
from tests.programs import run_module as run

WRITER = """
import sys
from mmsr1_jax.tools.tool_cache import ToolCache
cache = ToolCache(sys.argv[1])
number = 0
while True:
    cache.put("page", f"{sys.argv[2]}-{number}", b"x" * 5000 + str(number).encode())
    print(number, flush=True)  # acknowledged
    number += 1
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.sqlite"


def test_modes(path):
    with pytest.raises(ToolCacheError, match="no such cache file"):
        ToolCache(path, "replay")
    with pytest.raises(ToolCacheError, match="mode 'sometimes'"):
        ToolCache(path, "sometimes")
    recording = ToolCache(path, "record")
    recording.put("links", "q", b"one")
    recording.put("page", "p", b"404", failed=True)
    assert recording.get("links", "q") is None  # mode `record` has no hits
    using, replaying, off = ToolCache(path), ToolCache(path, "replay"), ToolCache(None, "off")
    assert using.get("links", "q") == replaying.get("links", "q") == (b"one", False)
    assert using.get("page", "p") is None and replaying.get("page", "p") == (b"404", True)
    assert using.get("page", "q") is None
    replaying.put("links", "q", b"two")
    off.put("links", "q", b"three")
    assert using.get("links", "q") == (b"one", False) and off.get("links", "q") is None
    using.put("links", "q", b"four")
    assert replaying.get("links", "q") == (b"four", False)


def test_stale_entries_are_misses_except_in_replay(path):
    ToolCache(path).put("page", "p", b"old")
    assert ToolCache(path, ttl_days=0).get("page", "p") is None
    assert ToolCache(path, "replay", ttl_days=0).get("page", "p") == (b"old", False)


def test_oldest_entries_are_evicted(path):
    cache = ToolCache(path, max_bytes=100_000)
    for index in range(300):
        cache.put("page", str(index), b"x" * 1000)
    ((_, entries, size),) = cache.info()
    assert size <= 110_000 and entries >= 85
    assert cache.get("page", "299") and cache.get("page", "0") is None


def test_import_respects_the_size_limit(path, tmp_path):
    other = ToolCache(tmp_path / "other.sqlite")
    for index in range(300):
        other.put("page", str(index), b"x" * 1000)
    other.close()
    cache = ToolCache(path, max_bytes=100_000)
    assert cache.import_entries(tmp_path / "other.sqlite") == 300
    ((_, _, size),) = cache.info()
    assert size <= 110_000


def test_damaged_file_is_moved_away(path, capsys):
    path.write_bytes(b"this is no database at all" * 1000)
    with pytest.raises(ToolCacheError, match="damaged"):
        ToolCache(path, "replay")
    cache = ToolCache(path)
    cache.put("page", "p", b"new")
    assert cache.get("page", "p") == (b"new", False)
    assert "damaged" in capsys.readouterr().err
    (moved,) = path.parent.glob("cache.sqlite.damaged-*")
    assert moved.read_bytes().startswith(b"this is no database")


def test_damage_found_while_reading_is_handled(path, capsys):
    cache = ToolCache(path)
    for index in range(2000):
        cache.put("page", str(index), b"x" * 1000)
    cache.close()
    with open(path, "r+b") as file:
        file.seek(20_000)
        file.write(os.urandom(1_500_000))
    cache = ToolCache(path)
    values = [cache.get("page", str(index)) for index in range(2000)]
    cache.put("page", "new", b"y")
    assert cache.get("page", "new") == (b"y", False)
    assert values[-1] is None and "created a new file" in capsys.readouterr().err


def start(path, name):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name], stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def test_acknowledged_writes_survive_killed_writers(path):
    """In each of twenty rounds, all acknowledged values are on disk."""
    acknowledged = {}
    for round_index in range(20):
        writers = {
            f"{round_index}{writer_name}": start(path, f"{round_index}{writer_name}")
            for writer_name in "ab"
        }
        for process in writers.values():
            process.stdout.readline()
        time.sleep(0.02 * (round_index % 7))
        for name, process in writers.items():  # the second continues after the first is killed
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().split("\n")[:-1]  # without the truncated line
            process.wait()
            acknowledged[name] = int(lines[-1]) if lines else 0
        cache = ToolCache(path)
        for name, last in acknowledged.items():
            value = cache.get("page", f"{name}-{last}")
            assert value == (b"x" * 5000 + str(last).encode(), False)
        cache.close()
    cache = ToolCache(path, "replay")
    for name, last in acknowledged.items():
        assert all(cache.get("page", f"{name}-{index}") for index in range(last + 1))
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert sum(acknowledged.values()) > 200


def test_file_being_created_by_another_process_is_waited_for(path):
    """SQLite then fails as busy at once, without waiting for its timeout."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    other.execute("CREATE TABLE something (x)")
    commit = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    commit.start()
    cache = ToolCache(path)
    cache.put("page", "a", b"x")
    commit.join()
    other.close()
    assert cache.info() == [("page", 1, 1)]


def test_reads_do_not_wait_for_writes(path):
    cache = ToolCache(path)
    cache.put("page", "a", b"x")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer = threading.Thread(target=cache.put, args=("page", "b", b"y"))
    writer.start()
    time.sleep(0.1)
    start = time.monotonic()
    assert cache.get("page", "a") == (b"x", False)
    assert time.monotonic() - start < 1
    other.execute("COMMIT")
    writer.join()
    assert cache.get("page", "b") == (b"y", False)


def test_other_errors_do_not_move_the_file_away(path, capsys):
    cache = ToolCache(path)
    cache.put("page", "a", b"x")
    with pytest.raises(ToolCacheError):
        cache.put("page", "b", object())
    cache.put("page", "half a \ud800 pair", b"z")
    assert cache.get("page", "half a \ud800 pair") == (b"z", False)
    assert cache.get("page", "a") == (b"x", False) and "damaged" not in capsys.readouterr().err


def test_several_users_of_a_damaged_file_share_the_new_one(path, capsys):
    """The others use the file that the first one created, with its values."""
    first, second, third = ToolCache(path), ToolCache(path), ToolCache(path)
    for index in range(500):
        first.put("page", str(index), b"x" * 1000)
    for cache in (first, second, third):
        cache.close()
    second.get("page", "0")  # opens the file
    with open(path, "r+b") as file:
        file.write(b"rubbish" * 50_000)
    first.put("page", "b", b"y")
    second.put("page", "c", b"z")
    third.put("page", "d", b"w")
    for cache in (first, second, third, ToolCache(path, "replay")):
        assert cache.get("page", "b") == (b"y", False)
        assert cache.get("page", "c") == (b"z", False)
        assert cache.get("page", "d") == (b"w", False)
    assert capsys.readouterr().err.count("created a new file") == 1


def test_failure_does_not_replace_a_success(path, tmp_path):
    cache = ToolCache(path)
    cache.put("page", "a", b"x")
    cache.put("page", "a", b"503", failed=True)
    assert cache.get("page", "a") == (b"x", False)
    other = ToolCache(tmp_path / "other.sqlite")
    other.put("page", "a", b"503", failed=True)
    assert other.import_entries(path) == 1 and other.get("page", "a") == (b"x", False)
    recording = ToolCache(path, "record")
    recording.put("page", "a", b"404", failed=True)
    assert ToolCache(path, "replay").get("page", "a") == (b"404", True)


def test_replay_does_not_modify_the_file(path, tmp_path):
    cache = ToolCache(path)
    cache.put("page", "a", b"x")
    cache.close()
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
    other = tmp_path / "no_cache.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE something (x)")
    with pytest.raises(ToolCacheError, match="no such table"):
        ToolCache(other, "replay")


def test_cache_command(path, tmp_path):
    command = functools.partial(run, module="mmsr1_jax.scripts.cache")
    cache = ToolCache(path)
    cache.put("links", "q", b"one")
    cache.put("page", "p", b"x" * 2_000_000)
    copy, other = tmp_path / "copy.sqlite", tmp_path / "other.sqlite"
    assert command("info", path).stdout == "links: 1 entries, 0.0 MB\npage: 1 entries, 2.0 MB\n"
    assert command("export", path, copy).returncode == 0
    ToolCache(other).put("links", "q", b"mine")
    process = command("import", other, copy)
    assert process.stdout.startswith(f"1 entries imported from {copy}\n")
    assert ToolCache(other).get("links", "q") == (b"mine", False)
    assert ToolCache(other).get("page", "p") == (b"x" * 2_000_000, False)
    (tmp_path / "no").write_bytes(b"rubbish" * 1000)
    for arguments, message in (
        (["info", tmp_path / "none"], "no such cache"), (["info", tmp_path / "no"], "damaged"),
        (["import", other, tmp_path / "no"], "not a cache file"), (["export", path], "usage: "),
        ([], "usage: "),
    ):  # fmt: skip
        process = command(*arguments)
        assert process.returncode == 2 and message in process.stderr.strip().splitlines()[-1], (
            process
        )


def test_a_file_on_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmsr1_jax.tools.tool_cache.network_file_system", lambda path: "nfs4")
    with pytest.raises(ToolCacheError, match=r"network file system \(nfs4\).*redis://"):
        ToolCache(tmp_path / "cache.sqlite")
