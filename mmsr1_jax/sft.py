"""Train a policy on given episodes: supervised fine-tuning by the likelihood of their tokens.

    python -m mmsr1_jax.sft --config=configs/qwen7b.py:sft [--model=DIR] [--workdir=RUN] \\
        --config.data.train="('stories.jsonl',)" [--config.field=value ..]
    python -m mmsr1_jax.sft --workdir=RUN        resumes an existing run

A step:

    lessons ─► packed rows ─► update          loss = -mean log p(token), over the policy's tokens

A line of the training data is a saved episode, or a question with the policy's turns, whose
searches are executed when the run starts (`training/sft_dataset.py`). `config.run.prompts_per_step`
is the number of examples per step. RUN contains `config.json`, `metrics.jsonl`, `stories.jsonl`
with its images in `pictures/`, `checkpoints/`, and at the end `policy/`, an HF directory (with LoRA
also `adapter/`). A run may be killed at any time; a resumed run is bit-identical to an
uninterrupted one.
"""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from mmsr1_jax import cli
from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.rl import packing
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.loss import token_weights, weighted_sum
from mmsr1_jax.rl.packing import Sample, TrainBatch
from mmsr1_jax.rollout.build import make_processor
from mmsr1_jax.training import metrics, run_config, sft_dataset, train_utils
from mmsr1_jax.training.checkpoint import Checkpoints
from mmsr1_jax.training.sft_dataset import SFTExample
from mmsr1_jax.utils import compile_counter, outputs


def main(argv) -> int:
    del argv
    try:
        workdir = train_utils.resolve_workdir(_WORKDIR.value)
        with outputs.lock(workdir):
            config, model_dir = train_utils.resolve_settings(workdir, _CONFIG.value, _MODEL.value)
            train_utils.check_matches_existing_run(workdir, config, model_dir)
            return train(config, model_dir, workdir)
    except (ValueError, OSError) as error:  # settings, checkpoint, data, tools: no traceback
        sys.exit(f"error: {error}")


def train(config: settings.Config, model_dir: str, workdir: pathlib.Path) -> int:
    """Train until the last step or SIGTERM, and return the exit code."""
    with contextlib.ExitStack() as resources:  # closed at every exit
        return _train(config, model_dir, workdir, resources)


def _train(
    config: settings.Config, model_dir: str, workdir: pathlib.Path, resources: contextlib.ExitStack
) -> int:
    run, update = config.run, config.update
    metrics.check(run.log_to)
    workdir.mkdir(parents=True, exist_ok=True)

    # Policy
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    model = train_utils.load_policy(config, model_dir, mesh)
    processor = make_processor(config, model_dir)
    processor.check_fits(model.config)
    learner = Learner(model, likelihood_loss, update, mesh, seed=run.seed)
    rate = train_utils.learning_rate(config)
    shape = train_utils.row_shape(update, mesh)

    # Data, and restore checkpoint
    checkpoints = Checkpoints(workdir / "checkpoints", keep=run.keep_checkpoints)
    resources.callback(checkpoints.close)
    begin, bad = checkpoints.latest or 0, 0
    if not begin:
        sft_dataset.prepare(workdir / "stories.jsonl", config, processor, model.config)
    lessons = sft_dataset.load(workdir / "stories.jsonl", config)
    if begin:
        state = {"trained": learner.trained, "optimizer": learner.optimizer}
        state, notes = checkpoints.restore(begin, state)
        learner.trained, learner.optimizer = state["trained"], state["optimizer"]
        made_with = {"seed": run.seed, "questions": run.prompts_per_step}
        if notes["made_with"] != made_with:
            raise ValueError(
                f"{workdir}: already contains a run with {notes['made_with']} of config.run; this "
                f"command sets {made_with}. Use another --workdir"
            )
        bad = notes["bad"]
        print(f"{workdir}: resuming after step {begin}", file=sys.stderr)
    run_config.write(workdir / "config.json", config, model_dir)
    log = metrics.Log(workdir, run.log_to, step=begin, config=dataclasses.asdict(config))
    resources.callback(log.close)
    stop = train_utils.StopSignal()

    def batches_of(number: int) -> list[TrainBatch]:
        numbers = sft_dataset.chosen(number, len(lessons), run.prompts_per_step, run.seed)
        samples = make_samples([lessons[i] for i in numbers], processor.images)
        return packing.pack(samples, model.config, shape)

    bar = tqdm(range(begin + 1, run.steps + 1), initial=begin, total=run.steps, unit="step")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batches_of, begin + 1)
        for number in bar:
            clock = train_utils.Clock()

            with clock("pack"):  # waits for packing that the previous step did not cover
                packed = ahead.result()
            if number < run.steps:
                ahead = pool.submit(batches_of, number + 1)

            with clock("update"):
                figures = learner.update(packed, float(rate(number - 1)))
            lost = not figures.pop("finite")
            bad = bad + 1 if lost else 0
            if bad >= update.max_nonfinite_updates:
                bar.close()
                path = train_utils.write_batch(workdir, number, [packed])
                print(f"error: {bad} updates in a row were not finite; what they were made from is "
                      f"in {path}", file=sys.stderr)  # fmt: skip
                return 1

            # Metrics
            figures |= {
                "learning_rate": float(rate(number - 1)),
                "nonfinite": float(lost),
                "packing_efficiency": packing.efficiency(packed),
                "epoch": number * run.prompts_per_step / len(lessons),
            }
            last = number == run.steps or stop.is_set()
            figures |= clock.figures(sum(int((b.rows.segment_ids > 0).sum()) for b in packed))
            figures["time/compiles"] = float(compile_counter.count())
            # Metrics are written before the checkpoint: a resumed run has both or neither.
            log.write(number, figures)
            if last or (run.save_every and number % run.save_every == 0):
                state = {"trained": learner.trained, "optimizer": learner.optimizer}
                notes = {"seed": run.seed, "questions": run.prompts_per_step}
                checkpoints.save(number, state, {"made_with": notes, "bad": bad}, score=None)
            bar.set_postfix(
                loss=f"{figures['loss']:.4f}",
                epoch=f"{figures['epoch']:.1f}",
                tokens_s=f"{figures['time/tokens_per_second']:.0f}",
            )
            if last and number < run.steps:
                bar.close()
                print(f"{workdir}: stopped after step {number}, which is saved; the same command "
                      "resumes the run", file=sys.stderr)  # fmt: skip
                return 0

    resources.close()  # waits for the last checkpoint
    train_utils.save_policy(learner, config, model_dir, workdir)
    return 0


def likelihood_loss(
    logprobs: jax.Array, entropies: jax.Array, batch: TrainBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted negative log-likelihood of the policy's tokens, for `rl.learner.Learner`.

    With the weights of `make_samples`, it is the mean over the tokens of a step.
    """
    del entropies
    tokens = jnp.sum(batch.mask, dtype=logprobs.dtype)
    return weighted_sum(-logprobs, batch.weights, batch.mask), {"tokens": tokens}


def make_samples(lessons: Sequence[SFTExample], processor: ImageProcessor) -> list[Sample]:
    """Return the training samples of a step; all of their loss tokens have equal weight."""
    weights = token_weights(np.array([lesson.mask.sum() for lesson in lessons]), "token")
    samples = []
    for lesson, weight in zip(lessons, weights, strict=True):
        nothing = np.zeros(len(lesson.tokens), np.float32)
        samples.append(
            Sample(
                prompt=lesson.prompt(processor),
                mask=lesson.mask,
                weights=np.full(len(lesson.tokens), weight, np.float32),
                advantages=nothing,
                rollout_logprobs=nothing,
            )
        )
    return samples


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _MODEL = flags.DEFINE_string("model", None, "HF directory to begin with; else config.run.model")
    _WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; else build/CONFIG")
    cli.run(main)
