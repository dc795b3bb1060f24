"""Updates of two processes whose samples differ in number, length and kind."""

import json

import pytest

from tests.hosts import hosts, script

UPDATE = """
import json
from mmsr1_jax.models import sharding
from mmsr1_jax.rl import packing
from tests.rl import learners

mesh = sharding.make_mesh(1, -1, 1)
learner = learners.make_learner(learners.CONFIG, mesh)
samples = learners.make_samples(learners.CONFIG, 10)
own = SPLIT[index] if processes.count() > 1 else sum(SPLIT, [])
shape = packing.RowShape(sharding.num_local_batch_shards(mesh), 128, 16)
batches = learners.off_policy_batches(learner, [samples[i] for i in own], shape)
used = sum(bool(batch.mask.any()) for batch in batches)
print("RESULT", json.dumps([used, len(batches), learner.update(batches, 0.0)]))
"""
SPLITS = {
    "unequal": [[0], [1, 2, 3, 4, 5, 6, 7, 8, 9]],
    "no usable sample": [[0, 1, 2, 3, 4, 5], []],
    "no picture": [[0, 2, 5, 7], [1, 3, 4, 6, 8, 9]],
}


def run(split, count):
    """Return the numbers of used and of all micro-batches, and the metrics, of each process."""
    command = script(UPDATE.replace("SPLIT", json.dumps(split)))
    command[2] = f"import sys; sys.path.insert(0, '.')\n{command[2]}"
    with hosts([command] * count, devices=2 // count) as group:
        codes, outputs = group.wait(300), [group.output(i) for i in range(count)]
    assert codes == [0] * count, [text[-3000:] for text in outputs]
    lines = [[line for line in text.splitlines() if line.startswith("RESULT")] for text in outputs]
    return [json.loads(line.removeprefix("RESULT ")) for (line,) in lines]


@pytest.mark.proof
@pytest.mark.parametrize("name", SPLITS)
def test_an_update_equals_that_of_one_process(name):
    (_, _, expected), parts = run(SPLITS[name], 1)[0], run(SPLITS[name], 2)
    assert parts[0][1] == parts[1][1] == max(used for used, _, _ in parts)
    if name != "no picture":
        assert parts[0][0] != parts[1][0]
    for _, _, metrics in parts:
        assert metrics.keys() == expected.keys() and metrics["finite"] == 1
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
