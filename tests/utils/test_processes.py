"""Processes of a run: exchange of facts, disagreement, failure, silence, death."""

import os
import signal
import time

import pytest

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils import processes
from tests.hosts import hosts, script


def run(body, count=3, expected=0, within=60.0, **limits):
    """Run `body` in several processes, check their exit codes, and return their outputs."""
    with hosts([script(body, **limits)] * count) as group:
        assert group.wait(within) == [expected] * count, [group.output(i) for i in range(count)]
        return [group.output(i) for i in range(count)]


def test_one_process_needs_nobody():
    processes.start(
        coordinator=None, count=None, index=None, start_seconds=1, timeout=1, heartbeat_seconds=4
    )
    assert (processes.index(), processes.count(), processes.main()) == (0, 1, True)
    assert processes.exchange("facts", {"a": [1]}) == [{"a": [1]}]
    assert processes.broadcast("fact", 7) == 7
    processes.agree({"a": 1})
    with processes.watchdog("update", 0.0):
        processes.barrier("here")
    processes.finish()


@pytest.mark.parametrize(
    "arguments", [("h:1", None, None), (None, 2, 0), ("h:1", 2, 2), ("h:1", 2, -1)]
)
def test_incomplete_arguments_are_refused(arguments):
    coordinator, count, index = arguments
    with pytest.raises(UserError, match="--process_id|--num_processes"):
        processes.start(
            coordinator=coordinator,
            count=count,
            index=index,
            start_seconds=1,
            timeout=1,
            heartbeat_seconds=4,
        )


def test_all_processes_get_the_values_of_all_by_index():
    outputs = run("""
for step in range(5):
    values = processes.exchange("squares", {"of": step, "is": index ** 2})
    assert values == [{"of": step, "is": p ** 2} for p in range(3)], values
assert processes.broadcast("first", index + 10) == 10
keys = processes.state.client.key_value_dir_get("mmsr1/exchange/")
processes.barrier("looked")
assert sum("squares" in key for key, _ in keys) <= 6, keys  # old ones are removed
processes.agree({"same": [1, None], "other": (2,)})
print("done", index)
""")
    assert all(f"done {index}" in output for index, output in enumerate(outputs))


def test_slurm_is_detected(monkeypatch):
    assert processes._detect(1) == (None, None, None)
    variables = {"JOB_ID": "4095", "STEP_NODELIST": "node[07,11-12]", "NTASKS": "3", "PROCID": "2",
                 "LOCALID": "0"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes._detect(1) == ("node07:65535", 3, 2)
    for name, value in {"NTASKS": "1", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    processes.start(
        coordinator=None, count=None, index=None, start_seconds=1, timeout=1, heartbeat_seconds=4
    )
    assert processes.count() == 1


def test_what_one_process_refuses_all_refuse():
    outputs = run("""
class Refused(Exception): pass
def function():
    if index == 1:
        raise Refused("no key")
    return index
try:
    processes.call_together("rewards", function, Refused)
except Refused as error:
    print("refused:", error)
assert processes.call_together("rewards", lambda: index, Refused) == index
counts = processes.sum_counts("fallbacks", {"a": index, f"b{index}": 1.0})
assert counts == {"a": 3.0, "b0": 1.0, "b1": 1.0, "b2": 1.0}, counts
""")
    assert all("refused: no key" in output for output in outputs)


def test_processes_that_disagree_are_refused_with_the_fact_that_differs():
    body = "processes.agree({'seed': 1, 'config.run.steps': 8 if index == 2 else 9})"
    for output in run(body, expected=2):
        assert "process 2: config.run.steps is 8, and in process 0 9" in output
        assert "Traceback" not in output


def test_a_failure_reaches_every_process():
    outputs = run("""
processes.barrier("start")
if index == 1:
    raise ValueError("no such luck")
processes.barrier("never")
""", expected=1, within=20)  # fmt: skip
    for output in outputs:
        assert "process 1: ValueError: no such luck" in output
    assert "Traceback" in outputs[1] and "Traceback" not in outputs[0] + outputs[2]


@pytest.mark.proof
def test_a_failure_of_the_coordinator_reaches_every_process():
    outputs = run("""
from mmsr1_jax.config.errors import UserError
processes.barrier("start")
if index == 0:
    raise UserError("the disk is full")
processes.barrier("never")
""", expected=2, within=20)  # fmt: skip
    for output in outputs:
        assert "process 0: the disk is full" in output and "Traceback" not in output


@pytest.mark.proof
def test_a_process_that_does_not_answer_in_time_is_named():
    outputs = run("""
processes.barrier("start")
if index == 2:
    processes.phase("validation")
    time.sleep(60)
processes.exchange("lengths", index, timeout=2)
""", expected=1, within=20)  # fmt: skip
    for output in outputs:
        assert "lengths: no answer in 2 s from process 2 (in validation)" in output


@pytest.mark.proof
def test_a_process_for_which_others_wait_in_a_collective_is_named():
    outputs = run("""
processes.barrier("start")
if index == 1:
    processes.phase("rollout")
    time.sleep(60)
with processes.watchdog("update", 1):
    time.sleep(60)
""", expected=1, within=20)  # fmt: skip
    for output in outputs:
        assert "update takes longer than 1 s: process 1 is in rollout" in output


@pytest.mark.proof
@pytest.mark.parametrize(
    ("victim", "kill"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)]
)
def test_a_dead_or_silent_process_is_named_and_ends_the_others(victim, kill):
    body = """
processes.barrier("start")
print("started", flush=True)
processes.exchange("forever", index, timeout=600) if index != VICTIM else time.sleep(600)
""".replace("VICTIM", str(victim))
    with hosts([script(body)] * 3) as group:
        deadline = time.monotonic() + 60
        while any("started" not in group.output(i) for i in range(3)):
            assert time.monotonic() < deadline, [group.output(i) for i in range(3)]
            time.sleep(0.1)
        os.kill(group.processes[victim].pid, kill)
        for index in {0, 1, 2} - {victim}:
            assert group.processes[index].wait(30) != 0
            # JAX itself ends the others if process 0 dies, its leader task.
            name = f"process {victim}" if victim else "leader task"
            assert name in group.output(index), group.output(index)


@pytest.mark.proof
def test_a_coordinator_that_cannot_be_reached_is_named():
    begin = time.monotonic()
    with hosts([script("", start=5)] * 2) as group:
        group.processes[0].kill()  # before it listens
        assert group.processes[1].wait(40) != 0
        assert "no answer in 5 s" in group.output(1), group.output(1)
        assert "Traceback" not in group.output(1)
    assert time.monotonic() - begin < 30


def test_values_of_many_megabytes_are_exchanged():
    outputs = run("""
values = processes.exchange("large", str(index) * 16_000_000)
print("done", [value[0] for value in values], [len(value) for value in values])
""")
    for output in outputs:
        assert "done ['0', '1', '2'] [16000000, 16000000, 16000000]" in output


def test_the_rule_of_process_0_decides_for_all():
    outputs = run("""
for step in range(5):
    chosen = processes.decide("next", [index, step], lambda values: max(values))
    assert chosen == [2, step], chosen
keys = processes.state.client.key_value_dir_get("mmsr1/decide/")
processes.barrier("looked")
assert len(keys) <= 6, keys  # old ones are removed
processes.notify(f"notice-{index}")
while not all(processes.notified(f"notice-{p}") for p in range(3)):
    time.sleep(0.1)
print("done", index)
""")
    assert all(f"done {index}" in output for index, output in enumerate(outputs))
