"""Outputs have one writer at a time, and are complete or absent whenever a process is killed."""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

from mmsr1_jax import curate, sft
from mmsr1_jax.config import settings
from mmsr1_jax.data import curation
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools.index_builder import build_index
from mmsr1_jax.utils import outputs
from tests.programs import run_module

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 600.0  # seconds, enough on a busy machine


def python(code: str, *arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


HOLD = """
import sys, time
from mmsr1_jax.utils import outputs
with outputs.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    """A directory that another process has locked, and that process."""
    process = python(HOLD, tmp_path / "run")
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "run", process
    process.kill()
    process.communicate()


def test_a_locked_directory_cannot_be_locked_again(holder):
    directory, process = holder
    with pytest.raises(outputs.LockedError) as error, outputs.lock(directory):
        pass
    assert str(error.value).startswith(
        f"{directory}: in use by process {process.pid} on {socket.gethostname()}; "
    )
    other = directory.parent / "link"
    other.symlink_to(directory)
    with pytest.raises(outputs.LockedError), outputs.lock(other):  # also by another name
        pass


def test_a_lock_is_released_when_its_process_ends(holder):
    directory, process = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (directory / ".mmsr1-lock").is_file()
    with outputs.lock(directory):
        assert outputs.locked_directories() == [directory]
    assert not outputs.locked_directories() and list(directory.iterdir()) == []


def test_only_one_of_many_threads_holds_a_lock(tmp_path):
    """However calls interleave, two threads never hold the lock at the same time."""
    inside, max_inside, acquired, refused = [0], [0], [0], [0]
    guard = threading.Lock()

    def work():
        for _ in range(150):
            try:
                with outputs.lock(tmp_path):
                    with guard:
                        inside[0] += 1
                        max_inside[0] = max(max_inside[0], inside[0])
                        acquired[0] += 1
                    time.sleep(0)
                    with guard:
                        inside[0] -= 1
            except outputs.LockedError:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max_inside[0] == 1 and acquired[0] >= 1 and acquired[0] + refused[0] == 900


def test_an_unused_new_directory_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), outputs.lock(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_locks_are_released_after_an_exception(tmp_path, kind):
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    with pytest.raises(kind) as error, outputs.lock(outer), outputs.lock(inner):
        assert outputs.locked_directories() == [outer, inner]
        raise kind
    assert not outputs.locked_directories()
    if kind is KeyboardInterrupt:
        assert error.value.interrupted == [inner, outer]


def test_a_filesystem_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(outputs.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(outputs.fcntl, "flock", refuse)
    with outputs.lock(tmp_path / "run"):
        pass
    assert "does not support locks" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_second_command_on_a_locked_directory_ends_at_once(holder, command):
    directory, process = holder
    data = "eval.data" if command == "evaluate" else "data.train"
    flag = "workdir" if command == "train" else "out"
    done = run_module(
        "--config=tests/small_config.py",
        "--model=nowhere",
        f"--{flag}={directory}",
        f"--config.{data}=('x.parquet',)",
        module=f"mmsr1_jax.{command}",
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {directory}: in use by process {process.pid} on ")
    assert sorted(path.name for path in directory.iterdir()) == [".mmsr1-lock"]


@pytest.mark.parametrize(("module", "flag"), [(sft, "_WORKDIR"), (curate, "_OUT")])
def test_other_commands_on_a_locked_directory_fail(holder, monkeypatch, module, flag):
    directory, process = holder
    values = {flag: str(directory), "_MIX": curation.PAPER_MIX}
    for name, value in values.items():
        monkeypatch.setattr(module, name, types.SimpleNamespace(value=value), raising=False)
    config = types.SimpleNamespace(value=settings.Config())
    monkeypatch.setattr(module, "_CONFIG", config, raising=False)
    monkeypatch.setattr(module, "_START_PROCESSES", lambda config: None, raising=False)
    locked = (outputs.LockedError, SystemExit)  # before and after `cli.run` shows the error
    with pytest.raises(locked, match=f"{directory}: in use by process {process.pid} "):
        module.main([])


def test_a_locked_index_or_policy_directory_is_not_written(holder, tmp_path):
    directory, _ = holder
    with pytest.raises(outputs.LockedError):
        build_index(directory)
    with outputs.new_directory(tmp_path / "policy"), pytest.raises(outputs.LockedError):
        random_policy.write(tmp_path / "policy")


# Leftovers


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "episodes").mkdir()
    (tmp_path / "other").mkdir()
    removed = [".results.json.mmsr1-partial", ".index.sqlite.17.mmsr1-partial",
            ".index.sqlite.mmsr1-partial-journal",
            "episodes/.000003.jsonl.mmsr1-partial"]  # fmt: skip
    (tmp_path / ".b.mmsr1-lock").write_text("process 17 on host")
    (tmp_path / ".c.lock").write_text("of another program")
    kept = [
        "a.partial",
        "partial",
        ".hidden",
        ".old",
        ".bashrc.old",
        ".notes.partial",
        ".lock",
        "other/.x.mmsr1-partial",
        ".x.mmsr1-partial.txt",
        ".mmsr1-partial",
    ]
    for name in removed + kept:
        (tmp_path / name).write_text("x")
    (tmp_path / ".policy.mmsr1-partial" / "deep").mkdir(parents=True)
    (tmp_path / ".policy.mmsr1-partial" / "deep" / "file").write_text("x")
    (tmp_path / ".link.mmsr1-partial").symlink_to(tmp_path / ".hidden")
    with outputs.lock(tmp_path):
        assert not any((tmp_path / name).exists() for name in removed)
        assert all((tmp_path / name).read_text() == "x" for name in kept)
        assert not (tmp_path / ".policy.mmsr1-partial").exists()
        assert not (tmp_path / ".b.mmsr1-lock").exists() and (tmp_path / ".c.lock").exists()
        assert (tmp_path / ".link.mmsr1-partial").is_symlink()


def files(folder: pathlib.Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


@pytest.mark.parametrize("with_target", [True, False])
def test_files_of_the_user_are_never_removed_or_renamed(tmp_path, with_target):
    for name in (
        ".bashrc.old", ".config.old/thesis", ".notes.partial", ".work.partial/a", ".lock",
        ".config.lock", ".x.partial-wal", ".a.json.partial", ".a.json.old", "images/.p.png.old",
        "episodes/.e.partial", ".other.old/b", *(["config/new"] if with_target else []),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = files(tmp_path)
    with outputs.lock(tmp_path), outputs.new_file(tmp_path / "a.json") as file:
        file.write_text("a.json")
    assert files(tmp_path) == before | {"a.json": "a.json"}
    with outputs.new_directory(tmp_path / "other") as new:
        (new / "x").write_text("x")
    assert files(tmp_path) == before | {"a.json": "a.json", "other/x": "x"}


@pytest.mark.parametrize("two_steps", [True, False])
def test_a_directory_never_replaces_a_file(tmp_path, monkeypatch, two_steps):
    if two_steps:
        monkeypatch.setattr(outputs, "_swap", lambda first, second: False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError) as error, outputs.new_directory(tmp_path / "file"):
        raise AssertionError("must not be reached")
    assert error.value.filename == str(tmp_path / "file") and "\n" not in str(error.value)
    with pytest.raises(NotADirectoryError), outputs.new_directory(tmp_path / "late"):
        (tmp_path / "late").write_text("y")
    assert files(tmp_path) == {"file": "x", "late": "y"}
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_are_being_written_are_not_removed(tmp_path):
    with outputs.new_file(tmp_path / "a.json") as file, outputs.new_directory(tmp_path / "d") as d:
        file.write_text("1")
        (d / "x").write_text("1")
        with outputs.lock(tmp_path):
            assert file.read_text() == (d / "x").read_text() == "1"
    assert (tmp_path / "a.json").read_text() == (tmp_path / "d" / "x").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "d"]


# Files and directories


def test_a_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    (tmp_path / ".a.json.mmsr1-partial").write_text("of a killed process, and longer")
    with outputs.new_file(path) as partial:
        assert partial.read_text() == ""
        partial.write_text("new")
        assert path.read_text() == "old"
        refused = pytest.raises(outputs.LockedError, match=r"a\.json: in use")
        with refused, outputs.new_file(path):
            pass
    assert path.read_text() == "new"
    with pytest.raises(ZeroDivisionError), outputs.new_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_text_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "a.txt"
    with outputs.new_text_file(path, errors="backslashreplace") as file:
        file.write("é\udfff")
        assert not path.exists()
    assert path.read_bytes() == "é\\udfff".encode()
    outputs.write_text(path, "x\udfff", errors="replace")
    assert path.read_text() == "x?"
    with pytest.raises(UnicodeEncodeError):
        outputs.write_text(path, "\udfff")
    assert path.read_text() == "x?" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


EXCHANGE = """
import itertools, sys
from mmsr1_jax.utils import outputs
if sys.argv[2] == "two steps":
    outputs._swap = lambda first, second: False
for number in itertools.count():
    with outputs.new_directory(sys.argv[1]) as new:
        for name in ("a", "b"):
            (new / name).write_text(f"{number}" * 1000)
    print(number, flush=True)
"""


@pytest.mark.parametrize("how", ["one step", "two steps"])
def test_a_killed_writer_leaves_the_old_or_the_new_directory(tmp_path, how):
    target, rng, seen = tmp_path / "policy", random.Random(0), 0
    for _ in range(6):
        process = python(EXCHANGE, target, how)
        for _ in range(rng.randrange(2, 12)):
            process.stdout.readline()
        if how == "one step":  # the directory exists at every moment
            deadline = time.monotonic() + rng.random() * 0.05
            while time.monotonic() < deadline:
                assert target.is_dir()
                seen += 1
        process.kill()
        process.communicate()
        with outputs.lock(tmp_path):
            texts = {(target / name).read_text() for name in ("a", "b")}
            assert len(texts) == 1 and len(texts.pop()) >= 1000
            assert sorted(path.name for path in tmp_path.iterdir()) == [".mmsr1-lock", "policy"]
    assert seen or how != "one step"


def test_an_interrupted_two_step_exchange_is_undone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs, "_swap", lambda first, second: False)
    for text in ("old", "new"):
        with outputs.new_directory(tmp_path / "policy") as new:
            (new / "x").write_text(text)
    assert (tmp_path / "policy" / "x").read_text() == "new"
    assert "in two steps" in capsys.readouterr().err
    # As if killed between the two steps.
    (tmp_path / "policy").rename(tmp_path / ".policy.mmsr1-old")
    (tmp_path / ".policy.mmsr1-partial").mkdir()
    with outputs.lock(tmp_path):
        assert (tmp_path / "policy" / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_failed_write_leaves_the_old_directory(tmp_path):
    for error in (None, ZeroDivisionError):
        try:
            with outputs.new_directory(tmp_path / "d") as new:
                (new / "x").write_text(str(error))
                if error is not None:
                    raise error
        except ZeroDivisionError:
            pass
    assert (tmp_path / "d" / "x").read_text() == "None"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_link_to_a_directory_remains_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with outputs.new_directory(tmp_path / "link") as new:
        (new / "x").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_text() == "1"
    assert oct(os.stat(tmp_path / "real").st_mode & 0o777) == oct(0o777 & ~_umask())


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before
