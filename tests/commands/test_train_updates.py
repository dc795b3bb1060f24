"""Updates of `python -m mmsr1_jax.train`: runs that end on NaN gradients, and a mesh of devices."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from mmsr1_jax.data import tiny_world
from mmsr1_jax.training import metrics
from tests.programs import environment
from tests.train_runs import run_without_tools


@pytest.mark.proof
def test_a_run_ends_after_too_many_nonfinite_updates_in_a_row(tmp_path):
    """Updates are counted across minibatches and steps."""
    policy, workdir = tmp_path / "policy", tmp_path / "run"
    shutil.copytree(tiny_world.POLICY, policy)
    weights = policy / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, weights, {"format": "pt"})
    result = run_without_tools(workdir, policy, "--config.update.max_nonfinite_updates=3")
    assert result.returncode == 1, result.stderr[-3000:]
    (path,) = workdir.glob("*.npz")
    message = "error: step 2: the loss or gradient of 3 updates in a row was not finite"
    assert message in result.stderr and f"Their micro-batches are in {path}" in result.stderr
    with np.load(path) as arrays:
        indices = {name.split(".")[0] for name in arrays}
        assert len(indices) > 1  # micro-batches of both minibatches of the step
        for index in indices:
            mask = arrays[f"{index}.mask"]
            assert mask.any() and np.isnan(arrays[f"{index}.rollout_logprobs"][mask]).all()
            tokens = arrays[f"{index}.rows.tokens"]
            positions = np.nonzero(mask)[0], arrays[f"{index}.logit_columns"][mask] + 1
            np.testing.assert_array_equal(tokens[positions], arrays[f"{index}.targets"][mask])
    (line,) = metrics.read(workdir / "metrics.jsonl")
    assert line["step"] == 1 and line["update/nonfinite"] == 2 and line["update/finite"] == 0
    config = json.loads((workdir / "config.json").read_text())
    assert "max_nonfinite_updates" in json.dumps(config)
    assert not (workdir / "policy").exists()


@pytest.mark.proof
def test_a_mesh_of_eight_devices_trains(tmp_path):
    result = run_without_tools(
        tmp_path / "run", tiny_world.POLICY,
        "--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.run.steps=2",
        env=environment(devices=8),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2
    for line in lines:
        assert line["errors"] == 0 and line["update/finite"] == 1
        assert 0 < line["update/rollout_logprob_diff_abs"] < 1e-4
        assert line["update/gradient_norm"] > 0
        assert line["update/log_ratio_abs"] > 1e-6  # the second update is off policy
    assert (tmp_path / "run" / "policy" / "config.json").is_file()
