"""Files that a data set names are regular, of bounded size, and in its folder."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmsr1_jax.data import QuestionSource, benchmarks
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools.index_builder import build_index
from mmsr1_jax.training import sft_lines
from mmsr1_jax.utils import files


@pytest.fixture
def folders(tmp_path):
    """A data folder with links that lead out of it, and a folder with a private image."""
    data, secret = tmp_path / "data", tmp_path / "secret"
    (data / "images").mkdir(parents=True)
    secret.mkdir()
    rng = np.random.default_rng(0)
    for path in (data / "own.png", data / "images" / "deep.png", secret / "private.png"):
        PIL.Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8)).save(path)
    (data / "link.png").symlink_to(secret / "private.png")
    (data / "folder").symlink_to(secret)
    (data / "round.png").symlink_to(data / "round.png")
    (data / "inner.png").symlink_to(data / "own.png")
    os.mkfifo(data / "pipe.png")
    (data / "pages.jsonl").write_text('{"title": "a"}\n')
    return data, secret


def outside(secret: pathlib.Path) -> list[str]:
    return [
        "../secret/private.png", str(secret / "private.png"), "images/../../secret/private.png",
        "link.png", "folder/private.png", "/dev/zero", "/proc/self/environ", "/etc/passwd",
        "../data/../secret/private.png", "/proc/self/root/etc/passwd",
    ]  # fmt: skip


UNUSABLE = ("pipe.png", "round.png", "none.png", "a\0b.png", "x" * 5000, "", "images")
USABLE = ("own.png", "images/deep.png", "./own.png", "images/../own.png", "inner.png")


def test_paths_are_resolved_before_they_are_checked(folders, tmp_path):
    data, secret = folders
    for name in USABLE:
        assert files.resolve_inside(name, data).read_bytes()
    assert files.resolve_inside(str(data / "own.png"), data) == data / "own.png"
    for name in outside(secret):
        with pytest.raises(
            files.FileRefusedError, match="add its folder to config.data.image_roots"
        ):
            files.resolve_inside(name, data)
    assert files.resolve_inside("link.png", data, [secret]) == secret / "private.png"
    (tmp_path / "data2").mkdir()  # a folder whose name only starts like the data folder's
    (tmp_path / "data2" / "x.png").write_bytes(b"x")
    with pytest.raises(files.FileRefusedError, match="outside of"):
        files.resolve_inside("../data2/x.png", data)


def test_only_regular_files_of_bounded_size_are_read(folders, tmp_path):
    """Other files neither fill the memory nor block."""
    data, _ = folders
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 10**12)  # a sparse file
    for path in (data / "pipe.png", "/dev/zero", "/dev/tty", data, tmp_path / "large", "a\0b"):
        with pytest.raises(files.FileRefusedError):
            files.read_regular(path)
    with pytest.raises(files.FileRefusedError, match="larger than 10 bytes"):
        files.read_regular("/proc/self/status", max_bytes=10)  # a regular file of size 0
    assert files.read_regular(data / "pages.jsonl") == b'{"title": "a"}\n'


def table(path: pathlib.Path, names) -> pathlib.Path:
    rows = [
        {
            "prompt": [{"content": "What?", "role": "user"}],
            "images": [{"bytes": None, "path": name}],
            "reward_model": {"ground_truth": "x", "candidate_answers": None},
        }
        for name in names
    ]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_a_parquet_file_may_name_images_of_its_folder_only(folders, capsys):
    data, secret = folders
    rejected = [*outside(secret), *(name for name in UNUSABLE if name)]
    path = table(data / "a.parquet", ["own.png", *rejected, "inner.png"])
    questions = list(QuestionSource(path))
    own = (data / "own.png").read_bytes()
    assert [(q.row, q.images) for q in questions] == [(0, (own,)), (len(rejected) + 1, (own,))]
    stderr = capsys.readouterr().err
    for row in range(1, len(rejected) + 1):
        assert f"{path}, row {row}: images[0]: " in stderr
    assert stderr.count("add its folder to config.data.image_roots") == len(outside(secret))
    allowed = QuestionSource(table(data / "b.parquet", ["link.png"]), image_roots=[str(secret)])
    assert allowed[0].images == ((secret / "private.png").read_bytes(),)


def test_a_scripted_episode_may_name_images_and_indices_of_its_folder_only(folders):
    data, secret = folders
    line = {"question": "q", "turns": ["t"]}
    file = data / "s.jsonl"
    assert sft_lines.read_scripted_episode(line | {"image": "own.png"}, file, 1).example.images == [
        data / "own.png"
    ]
    for name in [*outside(secret), *UNUSABLE]:
        for field, value in (("image", name), ("images", ["own.png", name])):
            with pytest.raises(sft_lines.LineError, match=f"^{field!r}: "):
                sft_lines.read_scripted_episode(line | {field: value}, file, 1)
    for name in [*outside(secret), "../secret", "folder", "pipe.png", "none", str(secret)]:
        with pytest.raises(sft_lines.LineError, match="^'index': "):
            sft_lines.read_scripted_episode(line | {"index": name}, file, 1)
    assert sft_lines.read_scripted_episode(line | {"index": "."}, file, 1).index == data
    # A folder that contains a link to a file outside.
    (data / "index.sqlite").symlink_to(secret / "private.png")
    with pytest.raises(sft_lines.LineError, match="outside of"):
        sft_lines.read_scripted_episode(line | {"index": "."}, file, 1)
    assert (
        sft_lines.read_scripted_episode(line | {"index": "../secret"}, file, 1, [str(secret)]).index
        == secret
    )


def test_saved_episodes_may_name_images_of_their_run_only(folders):
    """A step's images are in a folder beside that of its file."""
    data, secret = folders
    run = data / "run"
    (run / "episodes").mkdir(parents=True)
    (run / "images").mkdir()
    roots = (run / "images",)
    (run / "images" / "x.png").write_bytes((data / "own.png").read_bytes())
    episode = {"segments": [], "images": ["../images/x.png"]}
    with pytest.raises(ValueError, match="does not match the digest|multiples"):
        # The path is allowed, and the file is opened.
        sft_lines.read_saved_episode(episode, run / "episodes", random_policy.IMAGES, ())
    for name in (str(secret / "private.png"), "../../own.png"):
        with pytest.raises(sft_lines.LineError, match="outside of"):
            sft_lines.read_saved_episode(
                episode | {"images": [name]}, run / "episodes", random_policy.IMAGES, roots
            )


def test_an_index_contains_images_of_its_source_folder_only(folders, capsys):
    data, secret = folders
    names = ["own.png", *outside(secret), *UNUSABLE]
    lines = [json.dumps({"image": name, "title": f"t{n}"}) for n, name in enumerate(names)]
    (data / "i.jsonl").write_text("\n".join(lines))
    assert build_index(data / "index", [], [data / "i.jsonl"]) == (0, 1)
    assert capsys.readouterr().err.count("add its folder to --image_roots") == len(outside(secret))
    (data / "j.jsonl").write_text(json.dumps({"image": "link.png", "title": "t"}))
    counts = build_index(data / "index", [], [data / "j.jsonl"], image_roots=[str(secret)])
    assert counts == (0, 1)


def test_a_benchmark_may_name_files_of_its_folder_only(folders, capsys):
    data, secret = folders

    def row(name):
        return {"sample_id": 1, "query": "Where?", "gt_answer": ["x"], "query_image": name}

    names = ["link.png", "folder/private.png", "pipe.png", "private.png"]
    (data / "qa.json").write_text(json.dumps([*map(row, names), row("own.png")]))
    (question,) = benchmarks.read("livevqa", data)
    assert question.images == ((data / "own.png").read_bytes(),)
    assert capsys.readouterr().err.count("query_image: ") == len(names)
    questions = benchmarks.read("livevqa", data, image_roots=[str(secret)])
    assert len(list(questions)) == 4  # all but the pipe


RESOLVE = """
import pathlib, sys
from mmsr1_jax.utils.files import FileRefusedError
from mmsr1_jax.score import resolve_paths

def message(name):
    return [{"role": "user", "content": [{"type": "image", "image": name}]}]

data, secret = map(pathlib.Path, sys.argv[1:])
for name in ("pipe.png", str(data / "pipe.png"), "/dev/zero", "images"):
    try:
        resolve_paths(message(name), data)
    except FileRefusedError:
        continue
    sys.exit(f"{name} was accepted")
private = message(str(secret / "private.png"))
assert resolve_paths(private, data) == private
assert resolve_paths(message("own.png"), data) == message(str(data / "own.png"))
"""


def test_conversations_may_name_regular_files_only(folders):
    """Images may be in any folder, since they are not copied to the output. This runs in a separate
    process, because a process can define the flags of one command only."""
    command = [sys.executable, "-c", RESOLVE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_pipe_is_rejected_without_blocking(folders):
    """Even if another process has its other end open."""
    data, _ = folders
    writer = os.open(data / "pipe.png", os.O_RDWR | os.O_NONBLOCK)
    done = threading.Event()

    def read():
        with pytest.raises(files.FileRefusedError, match="not a regular file"):
            files.read_regular(data / "pipe.png")
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(60)
    os.close(writer)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/a/cache.sqlite", "nfs4"), ("/home/a", "nfs4"), ("/homes/a", None),
        ("/home/a/scratch/x", None), ("/data set/x", "fuse.sshfs"), ("/over/x", None), ("/x", None),
    ],
)  # fmt: skip
def test_network_file_systems_are_told_by_the_innermost_mount(path, expected, tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n"
        "/dev/sdb /home/a/scratch xfs rw 0 0\nhost: /data\\040set fuse.sshfs rw 0 0\n"
        "server:/over /over nfs rw 0 0\n/dev/sdc /over ext4 rw 0 0\nodd line\n"
    )
    assert files.network_file_system(path, mounts) == expected
    assert files.network_file_system(path, tmp_path / "absent") is None
