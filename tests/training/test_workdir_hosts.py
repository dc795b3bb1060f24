"""A run of two processes in an object store: no file passes between them on a disk."""

import json
import os

import pytest

from mmsr1_jax.training import metrics
from tests import object_stores
from tests.hosts import Hosts, hosts, script

pytestmark = pytest.mark.proof

# The learner has one parameter, split over the two processes.
RUN = """
import dataclasses, types
import jax, jax.numpy as jnp, numpy as np
from mmsr1_jax.data import Question
from mmsr1_jax.training import metrics, rollouts, train_utils
from tests.episode_factory import reward_of
from tests.training.test_training_run import FakeLearner, finish_step, make_config, make_run

mesh = jax.make_mesh((2,), ("fsdp",))
sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
learner = FakeLearner()
zeros = lambda: jax.make_array_from_callback((4,), sharding, lambda _: np.zeros(2, np.float32))
learner.trained, learner.optimizer = {{"w": zeros()}}, {{"mu": zeros()}}
train_utils.save_policy = lambda *_: None
rollouts.to_line = lambda episode, *_: {{"index": episode.index}}
question = Question(id="q", question="?", images=(), answers=("a",))
engine = types.SimpleNamespace(processor=None)
with train_utils.open_workdir("{address}") as workdir:
    with make_run(workdir, make_config(steps={steps}, save_every=1), learner) as run:
        run.restore()
        run.start()
        for step in run.steps():
            learner.update(step)
            (workdir.path / f"image{{index}}_{{step}}").write_text("x")
            own = [(2 * i + index, types.SimpleNamespace(group=0, index=2 * i + index), REWARD)
                   for i in range(2)]
            batch = types.SimpleNamespace(saved_episodes=lambda _: own, questions={{0: question}})
            (workdir.path / "episodes").mkdir(exist_ok=True)
            rollouts.write_episodes(workdir, step, batch, 4, engine)
            finish_step(run, step)
        run.finish()
print("w", [float(x) for s in learner.trained["w"].addressable_shards for x in np.array(s.data)])
"""


def start(address, steps, home):
    """Return a context of two processes with folders of their own, as on two hosts."""
    body = RUN.replace("REWARD", "reward_of(1.0)").format(address=address, steps=steps)
    command = script(body, timeout=300, heartbeat=60)
    commands = [["env", f"XDG_CACHE_HOME={home / str(i)}", *command] for i in range(2)]
    return hosts(commands)


def finish(group: Hosts) -> None:
    assert group.wait(500) == [0, 0], [group.output(i)[-3000:] for i in range(2)]


def test_two_processes_resume_from_the_store_alone(address, store_url, tmp_path):
    with start(address, 2, tmp_path / "first") as group:
        finish(group)
        assert all("w [3.0, 3.0]" in group.output(i) for i in range(2))
    with start(address, 3, tmp_path / "second") as group:
        finish(group)
        assert all("w [6.0, 6.0]" in group.output(i) for i in range(2))
    prefix = address.removeprefix("gs://bucket/")
    folder = object_stores.download(store_url, prefix, tmp_path / "downloaded")
    assert [line["step"] for line in metrics.read(folder / "metrics.jsonl")] == [1, 2, 3]
    for step in (1, 2, 3):
        lines = (folder / "episodes" / f"{step:06d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]
        assert all((folder / f"image{i}_{step}").is_file() for i in range(2))
    assert len(os.listdir(folder / "episodes")) == 3  # no parts are left
    caches = [
        {path.name for path in (tmp_path / "second" / str(i)).rglob("*") if path.is_file()}
        for i in range(2)
    ]
    assert "000003.jsonl" in caches[0] and "000003.jsonl" not in caches[1]


def test_processes_with_different_addresses_are_refused(address, tmp_path):
    body = "from mmsr1_jax.training import train_utils\n"
    body += f'with train_utils.open_workdir("{address}" + str(index)) as workdir:\n    pass'
    with hosts([script(body)] * 2) as group:
        assert group.wait(300) == [2, 2]
        for i in range(2):
            assert f'process 1: --workdir is "{address}1", and in process 0' in group.output(i)
