"""`python -m mmsr1_jax.sft`: its loss and gradients against torch, runs, resuming, and errors."""

import os
import pathlib
import signal
import sys

import numpy as np
import pytest
from flax import nnx

from mmsr1_jax import sft
from mmsr1_jax.config import settings
from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.rl import packing
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.training import metrics
from tests import sft_files
from tests.programs import kill_when, run, start, wait_until
from tests.reference import named_tensors, torch, torch_inputs, torch_model
from tests.sft_files import MODEL, make_flags

# One device, and optimised code, since a run has many steps.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a policy, an index and scripted rows, see `sft_files.write`."""
    folder = tmp_path_factory.mktemp("sft")
    sft_files.write(folder)
    return folder


# Loss


def labels_of_assistant_turns(tokens: list[int], processor) -> np.ndarray:
    """Return int[T] labels for torch: the tokens of the assistant's turns, -100 elsewhere."""
    opening = [processor.control["<|im_start|>"], *processor.encode_text("assistant\n")]
    end = processor.control["<|im_end|>"]
    labels = np.full(len(tokens), -100)
    for position in range(len(tokens)):
        if tokens[position : position + len(opening)] == opening:
            start = position + len(opening)
            rest = tokens[start:]
            stop = start + (rest.index(end) if end in rest else len(rest))
            labels[start:stop] = tokens[start:stop]
    return labels


@pytest.mark.proof
def test_loss_and_gradients_equal_torch(folder, tmp_path):
    examples, processor = sft_files.prepare_examples(folder, tmp_path / "examples.jsonl")
    mesh = sharding.make_mesh(1, 1, 1, devices=sharding.jax.devices()[:1])
    model = random_policy.random_model(MODEL, seed=2, logprob_chunk=16)
    reference = torch_model(model)
    update = settings.Update(max_grad_norm=0.0, b1=0.9)
    learner = Learner(model, sft.likelihood_loss, update, mesh)
    samples = sft.make_samples(examples[:3], processor.images)
    shape = packing.RowShape(1, 384, 12)
    values = learner.update(packing.pack(samples, MODEL, shape), 0.0)

    num_tokens, losses = 0, []
    with torch.enable_grad():
        for sample in samples:
            labels = labels_of_assistant_turns(sample.prompt.tokens.tolist(), processor)
            logits = reference(**torch_inputs(sample.prompt, MODEL)).logits[0]
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits[:-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
                )
            )
            num_tokens += int((labels >= 0).sum())
        loss = sum(losses) / num_tokens
        loss.backward()
    assert values["tokens"] == num_tokens and values["finite"]
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = learner.model()
    nnx.update(gradients, learner.optimizer[1].mu)  # the first moment is a tenth of the gradients
    tensors = named_tensors(gradients)
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(
            10 * tensors[name], parameter.grad.numpy(), rtol=1e-3, atol=2e-5, err_msg=name
        )


# The command


def sft_command(workdir: pathlib.Path, *arguments) -> list[str]:
    """Return the command that trains in `workdir`; without `arguments` it resumes a run."""
    return [sys.executable, "-m", "mmsr1_jax.sft", f"--workdir={workdir}", *map(str, arguments)]


def new_run_command(workdir: pathlib.Path, folder: pathlib.Path) -> list[str]:
    return sft_command(workdir, f"--model={folder / 'policy'}", *make_flags(folder))


def run_results(workdir: pathlib.Path) -> tuple[list[dict], list[bytes], str]:
    """Return the metrics, policy files and examples of a complete run, without times."""
    lines = [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in metrics.read(workdir / "metrics.jsonl")
    ]
    files = sorted((workdir / "policy").glob("*.safetensors"))
    assert files
    return lines, [path.read_bytes() for path in files], (workdir / "examples.jsonl").read_text()


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    """Directory of a complete run of 56 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    result = run(new_run_command(workdir, folder), env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    message = "8 training episodes, 8 of them replayed from scripted turns; skipped 0 lines"
    assert message in result.stderr
    return workdir


@pytest.mark.proof
def test_the_loss_of_repeated_examples_falls_to_zero(uninterrupted):
    lines = metrics.read(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 57))
    assert lines[0]["loss"] > 4 and max(line["loss"] for line in lines[-3:]) < 0.05
    assert all(line["nonfinite"] == 0 and line["tokens"] > 100 for line in lines)
    assert lines[-1]["epoch"] == 56 * 6 / 8
    compiles = [line["time/compiles"] for line in lines]
    assert compiles[0] > 0
    # Later ones: the sum over micro-batches, and the gradient for other numbers of loss columns.
    assert compiles[-1] - compiles[0] <= len(packing._column_sizes(384))
    mesh = sharding.make_mesh(1, 1, 1, devices=sharding.jax.devices()[:1])
    checkpoint.load(uninterrupted / "policy", mesh=mesh)
    assert (uninterrupted / "policy" / "tokenizer.json").is_file()


@pytest.mark.proof
def test_a_run_killed_while_saving_and_then_stopped_resumes_bit_identically(
    uninterrupted, folder, tmp_path
):
    workdir = tmp_path / "run"
    checkpoints, log = workdir / "checkpoints", workdir / "metrics.jsonl"
    process = start(new_run_command(workdir, folder), env=ENVIRONMENT)
    kill_when(process, lambda: any(checkpoints.glob("12.*")) or (checkpoints / "12").exists())

    last_step = metrics.read(log)[-1]["step"]
    process = start(sft_command(workdir), env=ENVIRONMENT)
    wait_until(process, lambda: metrics.read(log)[-1]["step"] > last_step, interval=0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "which is saved" in stderr, stderr[-3000:]
    assert "resuming after step" in stderr and last_step < metrics.read(log)[-1]["step"] < 56

    result = run(sft_command(workdir), env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert run_results(workdir) == run_results(uninterrupted)


def test_a_new_run_without_a_policy_ends_with_one_line(folder, tmp_path):
    flags = make_flags(folder, **{"run.model": ""})
    result = run(sft_command(tmp_path / "run", *flags), env=ENVIRONMENT)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: a new run needs a policy")
