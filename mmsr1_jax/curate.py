"""Select training questions: a mix of questions that do and do not require a search.

    python -m mmsr1_jax.curate --config=FILE --model=DIR --out=OUT \\
        "--config.data.train=('train.parquet',)" [--config.run.group_size=8] [--mix=..] [--keep=1]
    python -m mmsr1_jax.curate --out=OUT ..   uses another mix or judge for the episodes of OUT

    questions ─► n episodes each ─► correct or wrong ─► classes ─► mix of classes

Classes and mixes are defined in `data/curation.py`. The episodes are an evaluation
(`evaluation/run.py`) of the questions under the conditions of training: `run.group_size` episodes
of each question, sampled with `sampling` (temperature 1 by default), and correct according to the
judge, or to `rewards.match` without a judge. Episodes for which the judge could not be reached are
skipped, like those that could not be run, and counted. `eval` is ignored. OUT contains the files
of an evaluation (`episodes.jsonl`, `images/`, `results.json`), and

    curated.parquet   the questions of the mix, for `train`; their category is the class
    sft.jsonl         correct episodes of all questions, at most `keep` per question, those with the
                      fewest searches; for `sft`
    curation.json     number of questions in each class

The command may be killed at any time; the same command resumes it and produces the same files.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data import DataError, QuestionSource, curation, write_parquet
from mmsr1_jax.data.curation import Attempt
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.records import EPISODES
from mmsr1_jax.evaluation.scoring import rescore
from mmsr1_jax.training import train_utils
from mmsr1_jax.utils import outputs, processes
from mmsr1_jax.utils.logs import log

CURATED, SFT, SUMMARY = "curated.parquet", "sft.jsonl", "curation.json"
_WORKFLOW = "on_demand"  # as in training: the policy decides when to search


def main(argv: Sequence[str]) -> int:
    del argv
    _START_PROCESSES(_CONFIG.value)
    out = train_utils.local_directory(_OUT.value, "out")
    mix = curation.read_mix(_MIX.value)
    with outputs.lock(out):
        train_utils.check_directory(out)
        processes.agree(train_utils.facts(_CONFIG.value, _MODEL.value or ""))
        provenance = roll_out(_CONFIG.value, _MODEL.value, out)
        if not processes.main():
            return 0
        summary = select(_CONFIG.value, provenance, out, mix, _KEEP.value)
    print(curation.format_table(summary))
    for part, counts in summary["parts"].items():
        short = isinstance(counts["requested"], int) and counts["chosen"] < counts["requested"]
        if short or not counts["available"]:
            requested, available = counts["requested"], counts["available"]
            print(f"{part}: requested {requested} questions, available {available}")
    if summary["no_verdict"]:
        log.warning(
            "skipped %d episodes for which the judge could not be reached; the same command "
            "retries them", summary["no_verdict"],
        )  # fmt: skip
    if not summary["chosen"]:
        log.error(
            "error: --mix=%s: selects no question, so %s was not written; the episodes are kept. "
            "Use another --mix", _MIX.value, CURATED,
        )  # fmt: skip
        return 1
    return 0


def roll_out(config: settings.Config, model_dir: str | None, out: pathlib.Path) -> dict[str, Any]:
    """Roll out the episodes that `out` lacks, and judge them if a judge is configured.

    Args:
      config: Settings.
      model_dir: HF directory of the policy, or None if `out` already contains all episodes.
      out: Results directory, created if necessary.

    Returns:
      The settings and files that the episodes depend on; nothing in processes other than 0.

    Raises:
      UserError: The settings, data or policy are invalid; `out` contains a different evaluation; or
        `out` has no episodes and `model_dir` is None.
    """
    if not config.data.train:
        raise DataError("config.data.train: must name at least one parquet file of questions")
    if model_dir is None:
        if not processes.main():
            return {}
        if not (out / EPISODES).is_file():
            raise UserError(f"--model: required, because {out} has no {EPISODES}")
        outputs.truncate_partial_line(out / EPISODES)
        return rescore(config, out / EPISODES, None)["provenance"]
    if config.sampling.temperature == 0 and config.run.group_size > 1:
        raise UserError(
            "config.sampling.temperature=0: all episodes of a question would be the same; set it "
            "over 0, or config.run.group_size=1"
        )
    from mmsr1_jax.evaluation.run import evaluate  # only this path needs a model

    eval_settings = settings.Eval(
        data=config.data.train,
        workflows=(_WORKFLOW,),
        num_samples=config.run.group_size,
        temperature=config.sampling.temperature,
    )
    results = evaluate(dataclasses.replace(config, eval=eval_settings), model_dir, out)
    return results["provenance"] if processes.main() else {}


def select(
    config: settings.Config,
    provenance: Mapping[str, Any],
    out: pathlib.Path,
    mix: curation.Mix,
    keep: int,
) -> dict[str, Any]:
    """Classify the questions by the episodes of `out` and write the curated files.

    Args:
      config: Settings. Of `run`, only `seed` and `steps` are read.
      provenance: Settings that the episodes depend on, see `roll_out`.
      out: Results directory.
      mix: Mix of the selected questions.
      keep: Maximum number of episodes per question in `sft.jsonl`, see `curation.cheapest`.

    Returns:
      The contents of `curation.json`: `curation.summarize`; `sft`, the number of episodes and
      questions in `sft.jsonl`; `no_verdict`, the number of episodes skipped because the judge could
      not be reached; `bad_rows`, the number of unusable rows of the data; and `provenance`.

    Raises:
      DataError: The episodes are not those of `config.data.train`, or some are missing.
    """
    source = QuestionSource(
        config.data.train,
        image_roots=config.data.image_roots,
        max_bad_rows=config.data.max_bad_rows,
        max_file_pixels=config.images.max_file_pixels,
    )
    if source.fingerprint() != provenance.get("data"):
        raise DataError(
            f"{out}: contains episodes of other questions than config.data.train; use another --out"
        )
    attempts = read_attempts(config, out)
    num_expected = sum(1 for _ in source) * provenance["eval.num_samples"]
    if len(attempts.positions) != num_expected:
        raise DataError(
            f"{out}: contains {len(attempts.positions)} of {num_expected} episodes; name the "
            "policy with --model to complete them"
        )
    groups = attempts.groups()
    classes = [curation.classify(group) for group in groups]
    chosen = curation.choose(classes, mix, config.run.seed)
    kept = [curation.cheapest(group, keep) for group in groups]

    (out / SUMMARY).unlink(missing_ok=True)  # written last: marks the other files as complete
    examples = [(a, classes[a.question]) for a in itertools.chain(*kept)]
    write_sft(out, examples, attempts.positions)
    write_curated(out / CURATED, source, {index: classes[index] for index in chosen})
    summary = curation.summarize(groups, classes, chosen, mix)
    summary["sft"] = {"episodes": len(examples), "questions": sum(map(bool, kept))}
    summary["no_verdict"] = attempts.no_verdict
    summary["bad_rows"] = len(source.bad_rows)
    summary["provenance"] = {**provenance, "keep": keep, "run.seed": config.run.seed}
    with outputs.new_file(out / SUMMARY) as partial:
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        partial.write_text(text, encoding="utf-8")
    return summary


@dataclasses.dataclass
class Attempts:
    """The attempts in a file of episodes.

    Attributes:
      path: The file.
      by_question: Attempts at each question, by its index.
      positions: (byte offset, line number) of each episode, by its index.
      no_verdict: Number of episodes for which the judge could not be reached.
    """

    path: pathlib.Path
    by_question: dict[int, list[Attempt]] = dataclasses.field(default_factory=dict)
    positions: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    no_verdict: int = 0

    def groups(self) -> list[list[Attempt]]:
        """Return the attempts at each question, in the order of the questions.

        Raises:
          DataError: The questions' indices are not 0, 1, ..
        """
        if sorted(self.by_question) != list(range(len(self.by_question))):
            raise DataError(f"{self.path}: the values of 'group' must be 0, 1, .. without gaps")
        return [self.by_question[index] for index in range(len(self.by_question))]


def read_attempts(config: settings.Config, out: pathlib.Path) -> Attempts:
    """Read the attempts in `out / EPISODES`, correct by the judge or else by `rewards.match`."""
    attempts = Attempts(out / EPISODES)
    for offset, line_number, line in records.scan(out / EPISODES):
        judged = line.get("judge")
        verdict = judged["correct"] if judged else None
        unjudged = judged is not None and verdict is None
        attempts.no_verdict += unjudged
        attempt = curation.read_attempt(line, config.rewards, verdict, config.run.steps)
        if unjudged:
            attempt = dataclasses.replace(attempt, ran=False)
        attempts.by_question.setdefault(attempt.question, []).append(attempt)
        attempts.positions[attempt.index] = offset, line_number
    return attempts


def write_sft(
    out: pathlib.Path,
    examples: Sequence[tuple[Attempt, str]],
    positions: Mapping[int, tuple[int, int]],
) -> None:
    """Write `out/sft.jsonl`: lines of `out/episodes.jsonl` with their reward and class.

    Args:
      out: Results directory.
      examples: Attempts and the classes of their questions, in the order of the written file. If
        empty, no file is written and an existing one is removed.
      positions: (byte offset, line number) of each episode, by its index.
    """
    if not examples:
        (out / SFT).unlink(missing_ok=True)
        return
    with (
        open(out / EPISODES, "rb") as source,
        outputs.new_file(out / SFT) as partial,
        open(partial, "w", encoding="utf-8") as file,
    ):
        for attempt, name in examples:
            offset, line_number = positions[attempt.index]
            source.seek(offset)
            line = records.parse_line(source.readline(), line_number)
            line |= {"category": name, "reward": dataclasses.asdict(attempt.reward)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_curated(path: pathlib.Path, source: QuestionSource, chosen: Mapping[int, str]) -> None:
    """Write the selected questions with their classes as categories.

    Args:
      path: Parquet file to write.
      source: All questions.
      chosen: Classes, keyed by the index of a question among the usable ones. If empty, no file is
        written and an existing one is removed.
    """
    if not chosen:
        path.unlink(missing_ok=True)
        return
    questions = ((index, question) for index, question in enumerate(source) if index in chosen)
    write_parquet(path, (dataclasses.replace(q, category=chosen[i]) for i, q in questions))


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _START_PROCESSES = cli.define_process_flags()
    _MODEL = flags.DEFINE_string(
        "model", None, "HF directory of the policy; not needed if OUT contains all episodes"
    )
    _OUT = flags.DEFINE_string("out", None, "directory for the results", required=True)
    _MIX = flags.DEFINE_string(
        "mix", curation.PAPER_MIX,
        "PART=NUMBER,.. or PART=FRACTION,.. with fractions that sum to 1.0; parts are "
        f"{', '.join(curation.PARTS)}; empty: all questions with a correct episode",
    )  # fmt: skip
    _KEEP = flags.DEFINE_integer(
        "keep", 1, "maximum number of correct episodes per question in sft.jsonl", lower_bound=1
    )
    cli.run(main)
