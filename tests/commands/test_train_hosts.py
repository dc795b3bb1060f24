"""`mmsr1_jax.train` on several processes: the same run as on one, and how it ends."""

import itertools
import os
import pathlib
import random
import shutil
import signal
import time

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from mmsr1_jax.rl import train_batch
from mmsr1_jax.training import metrics
from tests import train_runs
from tests.episode_factory import answer, episode_of, reward_of
from tests.hosts import cut_off, hosts, namespaces
from tests.servers import serve

# Four devices in all, whatever the number of processes.
STEPS = ["--config.run.prompts_per_step=4", "--config.run.steps=2", "--config.run.save_every=1",
         "--config.run.validate_every=2", "--config.mesh.fsdp=4", "--config.run.log_to=",
         "--config.processes.heartbeat_seconds=10"]  # fmt: skip
VARIANTS = {
    "one update": [],
    "four updates, KL, reference on the host": [
        "--config.objective.num_minibatches=4", "--config.objective.kl_coef=0.01",
        "--config.objective.reference=host",
    ],
    "LoRA": ["--config.update.lora_rank=4", "--config.update.learning_rate=0.01"],
    "tensor groups": ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"],
    "refill, sequence ratio": [
        "--config.objective.max_resample_rounds=2", "--config.objective.ratio_level=sequence",
        "--config.objective.loss_aggregation=sequence", "--config.objective.num_minibatches=2",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return train_runs.write_questions(tmp_path_factory.mktemp("questions"), 16)


def start(workdir, questions, count, *arguments):
    """Return a context of the processes of a new run."""
    command = train_runs.new_run_command(workdir, questions, *STEPS, *arguments)
    return hosts([command] * count, devices=4 // count)


def run(workdir, questions, count, *arguments) -> pathlib.Path:
    """Run to the end, and return the directory."""
    with start(workdir, questions, count, *arguments) as group:
        assert group.wait(900) == [0] * count, [group.output(i)[-3000:] for i in range(count)]
    return workdir


def figures(workdir) -> list[dict]:
    """Return the metrics of the steps, without times."""
    return [
        {name: value for name, value in line.items()
         if not name.startswith("time/") and not name.endswith("tool/seconds")}
        for line in metrics.read(workdir / "metrics.jsonl")
    ]  # fmt: skip


def tokens(workdir, step: int) -> list[list]:
    """Return the segments of the saved episodes of a step, as texts."""
    path = workdir / "episodes" / f"{step:06d}.jsonl"
    return [
        [episode["id"], episode["index"], [segment["tokens"] for segment in episode["segments"]]]
        for episode in train_runs.read_file(path)
    ]


def check_equal(one, other, steps=(1, 2)):
    """Check that two runs have the same episodes, and figures that differ by rounding."""
    for ours, theirs in zip(figures(one), figures(other), strict=True):
        if ours["step"] not in steps:
            continue
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if name == "update/packing_efficiency":
                continue  # each process packs its own episodes
            # Figures of the episodes are equal, those of an update differ by rounding: means over
            # tokens of terms of size 1, which may cancel.
            bar = dict(rel=1e-5, abs=1e-6) if name.startswith("update/") else dict(rel=1e-12)
            assert theirs[name] == pytest.approx(value, **bar), (ours["step"], name)
    for step in steps:
        assert tokens(one, step) == tokens(other, step)


@pytest.fixture(scope="module")
def alone(questions, tmp_path_factory):
    """Directories of runs of one process, by variant, made when asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def get(variant: str) -> pathlib.Path:
        if variant not in made:
            workdir = folder / str(len(made))
            made[variant] = run(workdir, questions, 1, *VARIANTS[variant])
        return made[variant]

    return get


@pytest.mark.proof
@pytest.mark.parametrize(
    ("variant", "count"),
    [("one update", 2), *((name, 2 if name == "tensor groups" else 4) for name in VARIANTS)],
)
def test_a_run_does_not_depend_on_the_number_of_processes(
    variant, count, alone, questions, tmp_path
):
    workdir = run(tmp_path / "run", questions, count, *VARIANTS[variant])
    check_equal(alone(variant), workdir)
    names = {path.name for path in (workdir / "episodes").iterdir()}
    assert names == {"000001.jsonl", "000002.jsonl"}
    assert sorted(path.name for path in workdir.glob("policy/*.safetensors"))


@pytest.mark.proof
@pytest.mark.parametrize("tensor", [1, 2])
def test_engines_in_lockstep_sample_the_same_episodes(tensor, alone, questions, tmp_path):
    """On two processes; those of one process are independent."""
    variant = "one update" if tensor == 1 else "tensor groups"
    lockstep = ["--config.rollout.lockstep=always", "--config.rollout.precompile=True"]
    workdir = run(tmp_path / "run", questions, 2, *VARIANTS[variant], *lockstep)
    check_equal(alone(variant), workdir)


@pytest.mark.proof
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1)])
def test_a_run_resumes_on_another_number_of_processes(before, after, alone, questions, tmp_path):
    workdir = run(tmp_path / "run", questions, before, "--config.run.steps=1")
    shutil.rmtree(workdir / "policy")
    command = train_runs.train_command(workdir, "--config.run.steps=2")
    with hosts([command] * after, devices=4 // after) as group:
        assert group.wait(600) == [0] * after, [group.output(i)[-3000:] for i in range(after)]
    check_equal(alone("one update"), workdir, steps=[2])  # the first run ended with a validation


def wait_for_step(group, workdir, step):
    """Wait until a step is in the metrics."""
    deadline = time.monotonic() + 600
    while not any(line["step"] >= step for line in metrics.read(workdir / "metrics.jsonl")):
        assert time.monotonic() < deadline, [log(group, i) for i in range(len(group.processes))]
        assert all(p.poll() is None for p in group.processes), log(group, 0)
        time.sleep(0.2)


def log(group, index) -> str:
    return group.output(index)[-3000:]


@pytest.mark.proof
@pytest.mark.parametrize(("victim", "grace"), [(0, 600), (1, 600), (1, 0)])
def test_sigterm_to_one_process_ends_all_with_the_same_step_saved(
    questions, tmp_path, victim, grace
):
    """Without grace the rollout is dropped, and the step before is saved."""
    arguments = ["--config.run.steps=50", "--config.run.save_every=20"]
    arguments.append(f"--config.run.grace_seconds={grace}")
    with start(tmp_path / "run", questions, 2, *arguments) as group:
        wait_for_step(group, tmp_path / "run", 1)
        os.kill(group.processes[victim].pid, signal.SIGTERM)
        assert group.wait(300) == [0, 0], [log(group, i) for i in range(2)]
        assert ("was dropped" in group.output(0)) == (grace == 0), log(group, 0)
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    last = metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert saved[-1] == last < 50


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["killed", "stopped"])
def test_a_dead_process_ends_the_others_and_the_run_resumes(alone, questions, tmp_path, kind):
    workdir = tmp_path / "run"
    with start(workdir, questions, 2) as group:
        wait_for_step(group, workdir, 1)
        begin = time.monotonic()
        signals = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
        os.kill(group.processes[1].pid, signals[kind])
        assert group.processes[0].wait(60) != 0
        assert "process 1" in group.output(0), log(group, 0)
        assert time.monotonic() - begin < 60
    with hosts([train_runs.train_command(workdir)] * 2, devices=2) as group:
        assert group.wait(600) == [0, 0], [log(group, i) for i in range(2)]
    check_equal(alone("one update"), workdir)


@pytest.mark.proof
def test_a_run_whose_processes_die_ten_times_is_bit_identical_to_an_unbroken_one(
    questions, tmp_path
):
    """At random moments of a step: rollout, update, save."""
    arguments = ["--config.run.steps=30", "--config.run.validate_every=0"]
    unbroken = run(tmp_path / "unbroken", questions, 2, *arguments)
    workdir, rng = tmp_path / "killed", random.Random(0)
    command = train_runs.new_run_command(workdir, questions, *STEPS, *arguments)
    for moment in range(10):
        done = metrics.read(workdir / "metrics.jsonl")
        with hosts([command] * 2, devices=2) as group:
            wait_for_step(group, workdir, max((line["step"] for line in done), default=0) + 1)
            time.sleep(rng.uniform(0, 3))
            begin, victim = time.monotonic(), group.processes[moment % 2]
            victim.kill()
            assert group.processes[1 - moment % 2].wait(60) != 0, moment
            assert time.monotonic() - begin < 60
        command = train_runs.train_command(workdir)
    with hosts([command] * 2, devices=2) as group:
        assert group.wait(600) == [0, 0], [log(group, i) for i in range(2)]
    assert train_runs.run_results(workdir) == train_runs.run_results(unbroken)


@pytest.mark.proof
def test_four_processes_search_as_often_as_one_and_within_the_rate(questions, tmp_path):
    times: list[float] = []

    def search(request):
        times.append(time.monotonic())
        hit = {"url": "http://page.example/", "title": "Landmark", "content": "It is 12 m high."}
        return JSONResponse({"results": [hit]})

    searches, limit = {}, 1.0
    with serve(Starlette(routes=[Route("/{rest:path}", search)])) as address:
        for count in (1, 4):
            times.clear()
            run(
                tmp_path / str(count), questions, count,
                "--config.run.validate_every=0", "--config.run.group_size=16",
                "--config.tools.text=searxng", f"--config.services.searxng_url={address}",
                f"--config.services.max_qps={limit}", "--config.services.reader=none",
                f"--config.services.allowed_hosts=('{address.removeprefix('http://')}',)",
            )  # fmt: skip
            searches[count] = len(times)
            for begin in times:  # each of four loops may send one at once
                assert sum(begin <= t < begin + 4 for t in times) <= 4 * limit + 4
    check_equal(tmp_path / "1", tmp_path / "4")
    assert searches[1] == searches[4] > 12


@pytest.mark.proof
def test_what_cannot_run_together_is_refused(questions, tmp_path):
    """Another configuration, another directory, and processes that do not divide the questions."""
    workdir = tmp_path / "run"
    any_mesh = "--config.mesh.fsdp=-1"
    command = train_runs.new_run_command(workdir, questions, *STEPS, any_mesh)
    elsewhere = train_runs.new_run_command(tmp_path / "other", questions, *STEPS, any_mesh)
    cases = [
        ([command, [*command, "--config.run.seed=5"]],
         "process 1: config.run.seed is 5, and in process 0"),
        ([command, elsewhere], "process 1: does not see the files that process 0 writes to"),
        ([command] * 3, "prompts_per_step=4 must be a positive multiple"),
    ]  # fmt: skip
    for commands, message in cases:
        with hosts(commands) as group:
            codes = group.wait(120)
            assert all(codes), codes
            for index in range(len(commands)):
                lines = group.output(index).splitlines()
                errors = [line for line in lines if line.startswith("error: ")]
                assert message in errors[0] and len(errors) == 1, lines
                assert "Traceback" not in group.output(index)


@pytest.mark.proof
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and `ip`"
)
def test_a_host_that_is_cut_off_ends_the_others(questions, tmp_path):
    workdir = tmp_path / "run"
    command = train_runs.new_run_command(workdir, questions, *STEPS, "--config.run.steps=50")
    with namespaces(4) as names:
        commands = [["ip", "netns", "exec", name, *command] for name in names]
        with hosts(commands, address="10.77.0.1") as group:
            wait_for_step(group, workdir, 1)
            cut_off(names[2])
            begin = time.monotonic()
            assert all(process.wait(60) != 0 for process in group.processes)
            assert time.monotonic() - begin < 60
            for index in (0, 1, 3):
                assert "process 2 has been silent" in group.output(index), log(group, index)


def test_groups_belong_to_updates_whatever_the_number_of_processes():
    groups = [
        [(episode_of(answer("x"), group=number), reward_of(1.0, True))] for number in range(10)
    ]

    def numbers(part):
        return [episode.group for ((episode, _),) in part]

    whole = [numbers(part) for part in train_batch.split(groups, range(10), 10, 4)]
    assert whole == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    for count in (2, 3, 5):
        parts = [train_batch.split(groups[p::count], range(p, 10, count), 10, 4)
                 for p in range(count)]  # fmt: skip
        for update in range(4):
            merged = itertools.chain(*(numbers(part[update]) for part in parts))
            assert sorted(merged) == whole[update]
    assert train_batch.split([[]], [0], 1, 2) == [[], []]  # a group without usable episodes
