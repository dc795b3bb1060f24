"""Commands with a policy of another family than the first."""

import json

import jax
import numpy as np
import pytest

from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rl import lora
from mmsr1_jax.scripts import merge
from mmsr1_jax.training import metrics
from tests.engines import random_image
from tests.programs import read_jsonl, run_module, write_jsonl
from tests.reference import AutoModelForImageTextToText, torch, torch_inputs, torch_model
from tests.train_runs import run_without_tools


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy") / "qwen3_vl"
    arguments = ("--family=qwen3_vl", f"--out={directory}")
    process = run_module(*arguments, module="mmsr1_jax.scripts.random_policy")
    assert process.returncode == 0, process.stderr
    assert json.loads((directory / "config.json").read_text())["model_type"] == "qwen3_vl"
    return directory


def test_score_equals_torch(policy_dir, tmp_path):
    random_image(0, 300, 170).save(tmp_path / "0.png")
    content = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What is this?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "<answer>A bridge</answer>"},
    ]
    write_jsonl(tmp_path / "in.jsonl", [{"id": "a", "messages": messages}])
    process = run_module(
        "--config=tests/small_config.py", f"--model={policy_dir}",
        f"--conversations={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (result,) = read_jsonl(tmp_path / "out.jsonl")
    content[0]["image"] = str(tmp_path / "0.png")
    prompt = Processor.from_directory(policy_dir).conversation(messages)
    assert result["tokens"] == prompt.tokens.tolist()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = checkpoint.load(policy_dir, mesh=mesh)
    logits = torch_model(model)(**torch_inputs(prompt, model.config)).logits[0]
    targets = torch.tensor(prompt.tokens[1:, None], dtype=torch.long)
    expected = torch.log_softmax(logits[:-1], -1).gather(-1, targets)[:, 0]
    np.testing.assert_allclose(result["logprobs"][1:], expected, atol=2e-4, rtol=0)


@pytest.mark.proof
def test_train_and_the_engine_agree_and_transformers_loads_the_policy(policy_dir, tmp_path):
    result = run_without_tools(tmp_path / "run", policy_dir, "--config.run.steps=2")
    assert result.returncode == 0, result.stderr[-3000:]
    for line in metrics.read(tmp_path / "run" / "metrics.jsonl"):
        assert line["update/rollout_logprob_diff_abs"] < 1e-4
        assert line["update/gradient_norm"] > 0 and line["errors"] == 0
    _, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "run" / "policy", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.proof
def test_adapters_are_trained_and_merged(policy_dir, tmp_path):
    names = ("q", "down", "vision.fc1")
    result = run_without_tools(
        tmp_path / "run", policy_dir, "--config.run.steps=1", "--config.update.lora_rank=2",
        f"--config.update.lora_targets={names}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "adapter" / lora.CONFIG).is_file()
    merge.merge(str(policy_dir), str(tmp_path / "run" / "adapter"), str(tmp_path / "merged"))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    merged, saved = (
        dict(checkpoint.hf_tensors(checkpoint.load(path, mesh=mesh)))
        for path in (tmp_path / "merged", tmp_path / "run" / "policy")
    )
    for name, value in saved.items():
        np.testing.assert_allclose(merged[name], value, rtol=0, atol=1e-6, err_msg=name)
