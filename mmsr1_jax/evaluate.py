"""Evaluate a policy: accuracy and number of searches.

    python -m mmsr1_jax.evaluate --config=FILE --model=DIR --out=OUT \\
        "--config.eval.data=('test.parquet',)" [--config.eval.workflows=..]
    python -m mmsr1_jax.evaluate --workdir=RUN ..   evaluates the policy of a run, or its `--step`
    python -m mmsr1_jax.evaluate --rescore=EPISODES.jsonl [--out=OUT]
    python -m mmsr1_jax.evaluate --compare=OUT_A[:workflow],OUT_B[:workflow]

    questions ─► workflow ─► episodes ─► verdicts ─► metrics

OUT contains `episodes.jsonl` (`evaluation/records.py`) with the `images/` of the episodes, and
`results.json`. An evaluation may be killed at any time; the same command resumes it and produces
the same results. Every web service receives one test request before the first episode. The command
ends if a service refuses it, or if the judge refuses requests later; completed work is kept.

`--rescore` recomputes which answers are correct, without a policy. The judge is queried only for
answers without a verdict, or with one by another judge. For benchmarks that score short forms of
answers (MMLongBench-Doc), the judge's server extracts those too (`evaluation/extraction.py`).
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.evaluation.compare import compare_files
from mmsr1_jax.evaluation.extraction import score_documents
from mmsr1_jax.evaluation.scoring import rescore
from mmsr1_jax.evaluation.table import format_results
from mmsr1_jax.training import train_utils
from mmsr1_jax.utils import outputs, processes


def main(argv: Sequence[str]) -> int:
    del argv
    if _COMPARE.value:
        print(compare_files(_COMPARE.value))
        return 0
    if _RESCORE.value:
        path = pathlib.Path(_RESCORE.value)
        out = path.parent if _OUT.value is None else pathlib.Path(_OUT.value)
        with outputs.lock(out):
            results = rescore(_CONFIG.value, path, _OUT.value)
            results = score_documents(_CONFIG.value, out, results)
    else:
        from mmsr1_jax.evaluation.run import evaluate  # only this path needs a model

        _START_PROCESSES(_CONFIG.value)
        config, model_dir, checkpoint = _policy()
        if _OUT.value:
            out = train_utils.local_directory(_OUT.value, "out")
        elif _WORKDIR.value:
            out = pathlib.Path(_WORKDIR.value, "evaluation")
        else:
            raise UserError("--out: required, a directory for the results")
        with outputs.lock(out):
            train_utils.check_directory(out)
            processes.agree(train_utils.facts(config, model_dir))
            results = evaluate(config, model_dir, out, checkpoint=checkpoint)
    if processes.main():
        print(format_results(results))
    return 0


def _policy() -> tuple[settings.Config, str, tuple[pathlib.Path, int] | None]:
    """Return the settings, HF directory and checkpoint (see `evaluate`) from the flags."""
    if _WORKDIR.value is None:
        if _MODEL.value is None:
            raise UserError("--model or --workdir: one of them is required, to name the policy")
        return _CONFIG.value, _MODEL.value, None
    run = train_utils.local_directory(_WORKDIR.value, "workdir")
    if _MODEL.value is not None:
        raise UserError("--model: must not be given with --workdir, which names the policy")
    if not (run / "config.json").is_file():
        raise UserError(f"--workdir={run}: is not the directory of a run, as it has no config.json")
    config, model_dir = train_utils.resolve_settings(run, _CONFIG.value, None)
    if _STEP.value is None and (run / "policy").is_dir():
        return config, str(run / "policy"), None
    steps = train_utils.saved_steps(run)
    step = max(steps, default=0) if _STEP.value is None else _STEP.value
    if step not in steps:
        raise UserError(f"{run}: has no {f'checkpoint {step}' if step else 'policy yet'}")
    return config, model_dir, (run, step)


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _START_PROCESSES = cli.define_process_flags()
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy")
    _WORKDIR = flags.DEFINE_string(
        "workdir", None, "run whose policy is evaluated, with the run's settings"
    )
    _STEP = flags.DEFINE_integer(
        "step", None, "checkpoint of the run (default: its final policy, or its last checkpoint)"
    )
    _OUT = flags.DEFINE_string(
        "out", None, "directory for the results (default with --workdir: RUN/evaluation)"
    )
    _RESCORE = flags.DEFINE_string("rescore", None, "file of episodes to score again")
    _COMPARE = flags.DEFINE_list(
        "compare", None, "two directories of results, each optionally with :workflow"
    )
    cli.run(main)
