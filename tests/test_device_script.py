"""`python -m tests.device`: its result on a CPU, and parts that fail, die or take too long."""

import json
import sys

import numpy as np
import pytest

from mmsr1_jax.models import gpu_gated_linear
from mmsr1_jax.rollout import sampler
from tests import device, device_gap, device_parity, device_parts
from tests.device_parity import Measurement
from tests.programs import environment, run

# Two processes of a part. The second imports nothing that takes time.
MEASURES = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
from tests.device_parity import Measurement
from tests.device_parts import measure
out, start = (argument.split("=")[1] for argument in sys.argv[1:])
def fails(): raise ValueError("no such kernel")
measurements = [
    Measurement("first", lambda: dict(value=1.0)),
    Measurement("fails", fails),
    Measurement("dies", os.abort),
    Measurement("last", lambda: dict(value=2.0)),
]
measure(measurements, pathlib.Path(out), start=int(start))
"""
HANGS = """
import json, pathlib, sys, time
out, start = (argument.split("=")[1] for argument in sys.argv[1:])
results = []
def write(running):
    state = dict(results=results, running=running, total=3)
    pathlib.Path(out + ".partial").write_text(json.dumps(state))
    pathlib.Path(out + ".partial").rename(out)
for name in ["first", "hangs", "last"][int(start):]:
    write(name)
    time.sleep(600 if name == "hangs" else 0)
    results.append(dict(name=name))
    write(None)
"""


def run_tiny(tmp_path, *arguments):
    out = tmp_path / "results" / "device.json"
    result = run(
        [sys.executable, "-m", "tests.device", "--tiny", f"--out={out}", *arguments],
        env=environment(), timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(out.read_text()), result.stdout


def check(result, parts):
    """Check the fields that every result has, and return the measurements by part and name."""
    assert result["device"]["platform"] == "cpu" and result["device"]["jax"]
    assert result["seconds"] > 0 and list(result["parts"]) == ["device", *parts]
    for part in result["parts"].values():
        assert part["error"] is None and part["seconds"] > 0 and part["results"]
        for row in part["results"]:
            assert "error" not in row and row["seconds"] >= 0 and row.get("passed") is not False
    return {
        name: {row["name"]: row for row in part["results"]}
        for name, part in result["parts"].items()
    }


def check_parity(rows):
    assert len(rows) == 11
    for name, row in rows.items():
        assert 0 <= row["difference"] <= row["bar"], name
        if name.startswith("attention"):
            assert row["gradient_difference"] > 0
    # The comparison is with float32.
    assert rows["attention blockwise, text, bfloat16"]["difference"] > 1e-4


@pytest.mark.proof
def test_parity_and_decoding_at_tiny_sizes(tmp_path):
    result, output = run_tiny(tmp_path, "--parts", "parity", "decoding")
    rows = check(result, ["parity", "decoding"])
    check_parity(rows["parity"])
    decoding = rows["decoding"]["4 lanes of 128 tokens"]
    assert decoding["lanes"] == 4 and decoding["tokens_per_second"] > 0
    assert 0 < decoding["share_of_copy_bandwidth"] < 1
    assert rows["device"]["copies"]["gigabytes_per_second"] > 1
    assert "| decoding | 4 lanes of 128 tokens |" in output


@pytest.mark.proof
def test_all_parts_at_tiny_sizes(tmp_path):
    result, _ = run_tiny(tmp_path)
    rows = check(result, ["parity", "gap", "decoding", "speed", "update", "demo"])
    check_parity(rows["parity"])
    gap = rows["gap"]["float32, tiny policy"]
    assert gap["passed"] and 0 < gap["mean_difference"] < 1e-5
    assert gap["tokens"] > 100 and gap["calls"] > 5
    attention, paged = rows["speed"].values()
    assert attention["forward_and_gradient_tflops"] > 0 < attention["forward_tflops"]
    assert paged["gigabytes_per_second"] > 0
    assert {row["mfu"] for row in rows["update"].values()} == {None}
    assert all(row["tokens_per_second"] > 0 for row in rows["update"].values())
    demo = rows["demo"]["training"]
    assert demo["steps"] == 1 and demo["finite"] and -1 <= demo["last_reward"] <= 1
    assert demo["logprob_difference"] < 1e-4


def test_kernels_of_gpus_and_limits_of_the_sampler_have_a_bar(monkeypatch):
    """On a CPU the interpreter runs them. A wrong result does not pass."""
    measurements = {m.name: m for m in device_parity.parity(tiny=True)}
    names = "gated_linear, 256 rows, 256 to 256", "sampler, top-k and top-p by 4 bits"
    assert all(measurements[name].run()["passed"] for name in names)
    kernel, least = gpu_gated_linear.gated_linear, sampler.least_likely
    monkeypatch.setattr(
        gpu_gated_linear, "gated_linear", lambda *args, **options: kernel(*args, **options) * 1.05
    )
    monkeypatch.setattr(
        sampler, "least_likely", lambda *args, **options: least(*args, **options) + 0.02
    )
    assert not any(measurements[name].run()["passed"] for name in names)


def test_a_gap_between_engine_and_trainer_has_a_bar():
    recorded = np.linspace(-9, 0, 1000, dtype=np.float32)
    for offset, one, passed in ((0, 5e-5, True), (2e-5, 0, False), (0, 2e-4, False),
                                (0, np.nan, False)):  # fmt: skip
        ours = recorded + np.float32(offset)
        ours[7] += one
        assert device_gap.compared_logprobs(ours, recorded, "float32")["passed"] is passed


@pytest.mark.proof
def test_failures_are_recorded_and_other_measurements_follow(tmp_path):
    part = run_script(tmp_path, MEASURES.format(root=str(device.ROOT)), 120, 120)
    first, fails, dies, last = part["results"]
    assert part["error"] is None
    assert first["value"] == 1.0 and last["value"] == 2.0
    assert fails["error"] == "ValueError: no such kernel"
    assert dies["error"].startswith("exit code -6")


def test_a_measurement_that_hangs_is_stopped(tmp_path):
    part = run_script(tmp_path, HANGS, 120, 3)
    assert [row["name"] for row in part["results"]] == ["first", "hangs", "last"]
    assert part["results"][1]["error"] == "stopped after 3 s" and part["error"] is None


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    part = run_script(tmp_path, HANGS, 4, 60)
    assert [row["name"] for row in part["results"]] == ["first", "hangs"]
    assert part["error"] == "stopped after 4 s; 1 more measurements are missing"
    assert 4 <= part["seconds"] < 20


def test_a_part_that_cannot_start_has_an_error(tmp_path):
    part = device.run_part([sys.executable, "-c", "raise SystemExit('no driver')"], 30, 30)
    assert part["results"] == [] and "no driver" in part["error"]
    assert "no driver" in device.table({"parts": {"parity": part}})


def run_script(tmp_path, text, seconds, measurement_seconds):
    script = tmp_path / "part.py"
    script.write_text(text)
    return device.run_part([sys.executable, str(script)], seconds, measurement_seconds)


def test_a_broken_device_ends_the_process(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(device_parts, "device_works", lambda: False)
    file = tmp_path / "part.json"
    measurements = [Measurement("fails", fails), Measurement("next", dict)]
    with pytest.raises(SystemExit) as end:
        device_parts.measure(measurements, file)
    state = json.loads(file.read_text())
    assert end.value.code == device_parts.UNUSABLE
    assert (state["running"], state["total"], len(state["results"])) == (None, 2, 1)


def test_numbers_that_are_not_finite_are_texts(tmp_path):
    file = tmp_path / "part.json"
    device_parts.measure([Measurement("nan", lambda: {"difference": float("nan")})], file)
    assert json.loads(file.read_text())["results"][0]["difference"] == "nan"


def test_lanes_and_then_layers_are_halved_until_they_fit():
    config = device_parts.PRESETS["qwen2.5-vl-7b"]
    for gib, lanes, layers in ((130, 256, 28), (70, 256, 28), (28, 64, 28), (15, 16, 14)):
        fitted, fitting = device_parts.largest_that_fits(config, 256, 2048, "bfloat16", gib * 2**30)
        assert (fitting, fitted.text.num_layers) == (lanes, layers)
    with pytest.raises(MemoryError):
        device_parts.largest_that_fits(config, 256, 2048, "bfloat16", 2**30)
