"""`mmsr1_jax.train` with its directory in an object store: the same run as on a disk."""

import pathlib
import shutil
import signal
import sys

import pytest

from tests import sft_files, train_runs
from tests.hosts import hosts
from tests.object_stores import download, objects
from tests.programs import run, start, wait_until
from tests.train_runs import read_file, run_results

STEPS = ("--config.run.steps=3", "--config.run.save_every=1")


@pytest.fixture
def prefix(address):
    return address.removeprefix("gs://bucket/")


def command_of(done) -> list[str]:
    """Return the command that `train_runs.run_without_tools` has run."""
    return [sys.executable, "-m", *done.args]


@pytest.mark.proof
def test_a_killed_run_resumes_without_its_disk(address, prefix, store_url, tiny_dir, tmp_path):
    disk = tmp_path / "disk"
    done = train_runs.run_without_tools(disk, tiny_dir, *STEPS)
    assert done.returncode == 0, done.stderr[-3000:]

    # Killed while the second checkpoint is saved, or just after.
    command = [*command_of(done), f"--workdir={address}"]
    process = start(command)
    wait_until(process, lambda: any(objects(store_url, f"{prefix}/checkpoints/2/")), interval=0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(tmp_path / "cache")

    resumed = run([sys.executable, "-m", "mmsr1_jax.train", f"--workdir={address}"])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"{address}: taking over from process {process.pid}" in resumed.stderr
    assert f"{address}: resuming after step" in resumed.stderr
    folder = download(store_url, prefix, tmp_path / "downloaded")
    assert run_results(folder) == run_results(disk)
    assert (folder / "policy_step").read_text() == "3"
    for episode in read_file(folder / "episodes" / "000003.jsonl"):
        assert all((folder / "episodes" / name).resolve().is_file() for name in episode["images"])

    # A complete run is left alone, and other settings are refused.
    again = run([sys.executable, "-m", "mmsr1_jax.train", f"--workdir={address}"])
    assert again.returncode == 0 and "the run is complete, and its policy" in again.stderr
    refused = run([*command, "--config.run.seed=7"])
    assert refused.returncode == 2
    assert f"{address}: already contains a run with config.run.seed=0" in refused.stderr


def test_other_stores_are_refused_in_one_line(address):
    for module, flag in (
        ("train", "--workdir=s3://bucket/run"),
        ("evaluate", f"--workdir={address}"),
        ("evaluate", f"--out={address}"),
    ):
        given = [] if flag.startswith("--workdir") else ["--model=policy"]
        config = [] if flag.endswith(address) else ["--config=configs/tiny.py"]
        done = run([sys.executable, "-m", f"mmsr1_jax.{module}", flag, *given, *config])
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "object store" in done.stderr or "other stores are not supported" in done.stderr


@pytest.mark.proof
def test_two_processes_without_a_shared_disk(address, prefix, store_url, tmp_path):
    questions = train_runs.write_questions(tmp_path, 16)
    arguments = ["--config.run.prompts_per_step=4", "--config.run.steps=2",
                 "--config.run.save_every=1", "--config.run.validate_every=2",
                 "--config.mesh.fsdp=4", "--config.run.log_to="]  # fmt: skip

    def start_both(name, command):
        return hosts(
            [["env", f"XDG_CACHE_HOME={tmp_path / name / str(i)}", *command] for i in range(2)],
            devices=2,
        )

    def finish(group):
        assert group.wait(900) == [0, 0], [group.output(i)[-3000:] for i in range(2)]

    command = train_runs.new_run_command(pathlib.Path("disk"), questions, *arguments)
    on_disk = [*command, f"--workdir={tmp_path / 'disk'}"]
    with hosts([on_disk] * 2, devices=2) as group:
        finish(group)
    in_store = [*command, f"--workdir={address}"]
    with start_both("first", [*in_store, "--config.run.steps=1"]) as group:
        finish(group)
    with start_both("second", in_store) as group:
        finish(group)
        assert f"{address}: resuming after step 1" in group.output(1)
    folder = download(store_url, prefix, tmp_path / "downloaded")
    expected, actual = run_results(tmp_path / "disk"), run_results(folder)
    # The first run ended with a validation that the other does not have.
    for line in (*expected[0], *actual[0]):
        for name in [name for name in line if name.startswith("validation/")]:
            del line[name]
    assert actual == expected


@pytest.mark.proof
def test_sft_prepares_its_examples_once(address, prefix, store_url, tmp_path):
    sft_files.write(tmp_path)
    command = [sys.executable, "-m", "mmsr1_jax.sft", f"--model={tmp_path / 'policy'}",
               *sft_files.make_flags(tmp_path), f"--workdir={address}"]  # fmt: skip
    first = run([*command, "--config.run.steps=1"])
    assert first.returncode == 0 and "replayed from scripted turns" in first.stderr
    shutil.rmtree(tmp_path / "cache")
    second = run([*command, "--config.run.steps=2"])
    assert second.returncode == 0, second.stderr[-3000:]
    assert "replayed from scripted turns" not in second.stderr
    found = objects(store_url, f"{prefix}/")
    assert found["metrics.jsonl"].count(b"\n") == 2 and found["policy_step"] == b"2"
