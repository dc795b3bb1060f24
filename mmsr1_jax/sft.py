"""Train a policy on given episodes: supervised fine-tuning by the likelihood of their tokens.

    python -m mmsr1_jax.sft --config=configs/qwen7b.py:sft [--model=DIR] [--workdir=RUN] \\
        --config.data.train="('examples.jsonl',)" [--config.field=value ..]
    python -m mmsr1_jax.sft --workdir=RUN        resumes an existing run

A step:

    examples ─► packed rows ─► update          loss = -mean log p(token), over the policy's tokens

A line of the training data is a saved episode, or a question with the policy's turns, whose
searches are executed when the run starts (`training/sft_dataset.py`). `config.run.prompts_per_step`
is the number of examples per step. RUN contains `config.json`, `metrics.jsonl`, `examples.jsonl`
with its images in `images/`, `checkpoints/`, and at the end `policy/`, an HF directory (with LoRA
also `adapter/`). A run may be killed at any time; a resumed run is bit-identical to an
uninterrupted one. RUN may be in an object store, `gs://BUCKET/FOLDER`.
"""

import concurrent.futures
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import sharding
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.rl import packing
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.loss import token_weights, weighted_sum
from mmsr1_jax.rl.packing import Sample, TrainBatch
from mmsr1_jax.rollout.build import make_processor
from mmsr1_jax.training import metrics, sft_dataset, train_utils
from mmsr1_jax.training.sft_dataset import SFTExample
from mmsr1_jax.training.training_run import StopSignal, TrainingRun
from mmsr1_jax.training.workdir import Workdir
from mmsr1_jax.utils import processes


def main(argv) -> int:
    del argv
    _START_PROCESSES(_CONFIG.value)
    with train_utils.open_workdir(_WORKDIR.value) as workdir:
        config, model_dir = train_utils.resolve_settings(workdir.path, _CONFIG.value, _MODEL.value)
        train_utils.check_matches_existing_run(workdir, config, model_dir)
        processes.agree(train_utils.facts(config, model_dir))
        return train(config, model_dir, workdir)


def train(config: settings.Config, model_dir: str, workdir: Workdir) -> int:
    """Train until the last step or SIGTERM, and return the exit code."""
    prompts_per_step, seed = config.run.prompts_per_step, config.run.seed
    metrics.check_loggers(config.run.log_to)
    workdir.path.mkdir(parents=True, exist_ok=True)
    sigterm = StopSignal()

    # ---------------------------------------------------------------- policy and learner
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    model = train_utils.load_policy(config, model_dir, mesh)
    processor = make_processor(config, model_dir)
    processor.check_fits(model.config)
    learner = Learner(model, likelihood_loss, config.update, mesh, seed=seed)
    learning_rate = train_utils.learning_rate_schedule(config)
    shape = train_utils.row_shape(config, mesh)

    with TrainingRun(config, model_dir, workdir, learner, sigterm) as run:
        # ------------------------------------------------------------ data and checkpoint
        dataset = workdir.path / "examples.jsonl"
        if not run.start_step and processes.main():
            sft_dataset.prepare(dataset, config, processor, model.config)
            workdir.push()
        processes.barrier("examples", timeout=sft_dataset.PREPARE_SECONDS)
        workdir.pull(dataset.name, "images")
        examples = sft_dataset.load(dataset, config)
        made_with = {"seed": seed, "prompts_per_step": prompts_per_step}
        _check_resumes(run.restore(), made_with, workdir)
        run.start()

        def pack(step: int) -> list[TrainBatch]:
            indices = sft_dataset.step_indices(step, len(examples), prompts_per_step, seed)
            samples = make_samples([examples[i] for i in indices], processor.images)
            own = samples[processes.index() :: processes.count()]
            return packing.pack(own, model.config, shape)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            prefetched = pool.submit(pack, run.start_step + 1)
            for step in run.steps():
                # ---------------------------------------------------- packed rows
                with run.phase("pack"):  # waits if packing took longer than the last step
                    batches = prefetched.result()
                if step < config.run.steps:
                    prefetched = pool.submit(pack, step + 1)

                # ---------------------------------------------------- update
                with run.collective_phase("update"):
                    step_metrics = learner.update(batches, float(learning_rate(step - 1)))
                finite = step_metrics.pop("finite")
                run.check_finite(step, [finite], [batches])

                # ---------------------------------------------------- metrics and checkpoint
                step_metrics |= {
                    "learning_rate": float(learning_rate(step - 1)),
                    "nonfinite": float(not finite),
                    "packing_efficiency": packing.efficiency(batches),
                    "epoch": step * prompts_per_step / len(examples),
                }
                run.finish_step(
                    step,
                    step_metrics,
                    {"made_with": made_with},
                    tokens=packing.num_tokens(batches),
                    shown=("loss", "epoch"),
                )
        return run.finish()


def _check_resumes(
    metadata: dict[str, Any] | None, made_with: dict[str, int], workdir: Workdir
) -> None:
    """Raise UserError if a checkpoint was made with examples in another order."""
    if metadata and metadata["made_with"] != made_with:
        raise UserError(
            f"{workdir}: already contains a run with {metadata['made_with']} of config.run; "
            f"this command sets {made_with}. Use another --workdir"
        )


def likelihood_loss(
    logprobs: jax.Array, entropies: jax.Array, batch: TrainBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted negative log-likelihood of the policy's tokens, for `rl.learner.Learner`.

    With the weights of `make_samples`, it is the mean over the tokens of a step.
    """
    del entropies
    tokens = jnp.sum(batch.mask, dtype=logprobs.dtype)
    return weighted_sum(-logprobs, batch.weights, batch.mask), {"tokens": tokens}


def make_samples(examples: Sequence[SFTExample], processor: ImageProcessor) -> list[Sample]:
    """Return the training samples of a step; all of their loss tokens have equal weight."""
    weights = token_weights(np.array([example.mask.sum() for example in examples]), "token")
    samples = []
    for example, weight in zip(examples, weights, strict=True):
        zeros = np.zeros(len(example.tokens), np.float32)
        samples.append(
            Sample(
                prompt=example.prompt(processor),
                mask=example.mask,
                weights=np.full(len(example.tokens), weight, np.float32),
                advantages=zeros,
                rollout_logprobs=zeros,
                prefix=int(np.argmax(example.mask)),
            )
        )
    return samples


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _START_PROCESSES = cli.define_process_flags()
    _MODEL = flags.DEFINE_string(
        "model", None, "HF directory of the initial policy; default: config.run.model"
    )
    _WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; default: build/CONFIG")
    cli.run(main)
