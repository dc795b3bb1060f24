"""Rollouts of four processes: one whose tools are slow delays no other."""

import json

import pytest

from tests.hosts import hosts, script

# The tools of process 0 reply when the other processes have run all of their programs, so a wait
# for it would end in the time limit of the tool.
ROLLOUT = """
import asyncio, dataclasses, json
import jax
from flax import nnx
from mmsr1_jax.models import sharding
from mmsr1_jax.rollout.lockstep import Lockstep
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools import Observation, text_result
from tests.engines import VOCAB_SIZE, by_index, examples, make_config, search_tools
from tests.scripted_policy import config_for, scripted_processor

LOCKSTEP, SLOW = {lockstep}, {slow}
waits = []

async def slow_search(query):
    waits.append(query.action)
    while not all(processes.notified(f"finished-{{p}}") for p in range(1, 4)):
        await asyncio.sleep(0.1)
    return Observation(results=[text_result("http://x", "Found.")])

async def search(query):
    return Observation(results=[text_result("http://x", "Found.")])

async def ignore(query):
    raise AssertionError("only process 0 searches")

graph, params = nnx.split(random_policy.random_model(config_for(VOCAB_SIZE), seed=3))
devices = jax.devices() if LOCKSTEP else jax.local_devices()
mesh = sharding.make_mesh(1, -1, 1, devices=devices)
layout = sharding.param_shardings(params, mesh)

def put(x, sharding):
    return jax.make_array_from_callback(x.shape, sharding, jax.device_get(x).__getitem__)

params = jax.tree.map(put, params, layout)
model, config = nnx.merge(graph, params), make_config()
config.tools.timeout = 240.0
if index:
    config.turns = dataclasses.replace(config.turns, max_searches=0)
chosen = slow_search if SLOW else search
tools = dict.fromkeys(["text_search", "image_search"], ignore if index else chosen)
together = Lockstep(model, config) if LOCKSTEP else None
pool = EnginePool([model], scripted_processor(VOCAB_SIZE), config, tools, lockstep=together)
programs = []

class Counted:
    def __init__(self, runner):
        self.runner = runner

    def __getattr__(self, name):
        method = getattr(self.runner, name)
        if name not in ("encode", "extend", "decode", "fork"):
            return method
        return lambda *args: (programs.append(name), method(*args))[1]

device = pool.engines[0].device
device.runner = Counted(device.runner)
episodes = []
for episode in pool.rollout([examples(1)[0]], group_size=4, indices=[index]):
    episodes.append(episode)
    if len(episodes) == 4:
        processes.notify(f"finished-{{index}}")
calls = [call.status for episode in episodes for call in episode.calls]
record = {{str(k): v["tokens"] for k, v in by_index(episodes).items()}}
print("RESULT", json.dumps([programs, record, calls, len(waits)]))
"""


def run(lockstep: bool, slow: bool):
    """Return the programs, episodes, statuses of calls and number of waits of each process."""
    command = script(ROLLOUT.format(lockstep=lockstep, slow=slow), timeout=600, heartbeat=30)
    command[2] = f"import sys; sys.path.insert(0, '.')\n{command[2]}"
    with hosts([command] * 4, devices=1) as group:
        codes, outputs = group.wait(900), [group.output(i) for i in range(4)]
    assert codes == [0] * 4, [text[-3000:] for text in outputs]
    lines = [[line for line in text.splitlines() if line.startswith("RESULT")] for text in outputs]
    return [json.loads(line.removeprefix("RESULT ")) for (line,) in lines]


@pytest.mark.proof
def test_slow_tools_of_one_process_delay_no_other():
    """Independent or in lockstep: the others run the same programs as without the waits."""
    results = {}
    for lockstep in (False, True):
        for slow in (False, True):
            results[lockstep, slow] = run(lockstep, slow)
        fast, waiting = results[lockstep, False], results[lockstep, True]
        assert waiting[0][3] > 0 and set(waiting[0][2]) == {"ok"}
        for process in range(4):
            assert waiting[process][1] == fast[process][1]
            if process:
                assert waiting[process][0] == fast[process][0] and "decode" in fast[process][0]
    for process in range(4):
        assert results[True, False][process][1] == results[False, False][process][1]
