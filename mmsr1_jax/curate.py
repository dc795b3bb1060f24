"""Select training questions: a mix of questions that do and do not require a search.

    python -m mmsr1_jax.curate --config=FILE --model=DIR --out=OUT \\
        "--config.data.train=('train.parquet',)" [--config.run.group_size=8] [--mix=..] [--keep=1]
    python -m mmsr1_jax.curate --out=OUT ..   uses another mix or judge for the episodes of OUT

    questions ─► n episodes each ─► right or wrong ─► classes ─► mix of classes

Classes and mixes are defined in `data/curation.py`. The episodes are an evaluation
(`evaluation/run.py`) of the questions under the conditions of training: `run.group_size` episodes
of each question, sampled with `sampling` (temperature 1 by default), and correct according to the
judge, or to `rewards.match` without a judge. Episodes for which the judge could not be reached are
left out, like those that could not be run, and counted. `eval` is ignored. OUT contains the files
of an evaluation (`episodes.jsonl`, `pictures/`, `results.json`), and

    curated.parquet   the questions of the mix, for `train`; their category is the class
    sft.jsonl         correct episodes of all questions, at most `keep` of each, those with the
                      fewest searches; for `sft`
    curation.json     number of questions in each class

The command may be killed at any time; the same command resumes it and produces the same files.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.config import settings
from mmsr1_jax.data import DataError, QuestionSource, curation, write_parquet
from mmsr1_jax.data.curation import Attempt
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.records import EPISODES
from mmsr1_jax.evaluation.scoring import rescore
from mmsr1_jax.utils import outputs

CURATED, SFT, FIGURES = "curated.parquet", "sft.jsonl", "curation.json"
_WORKFLOW = "on_demand"  # as in training: the policy decides when to search


def main(argv) -> int:
    del argv
    out = pathlib.Path(_OUT.value)
    try:
        mix = curation.read_mix(_MIX.value)
        with outputs.lock(out):
            made_with = roll_out(_CONFIG.value, _MODEL.value, out)
            found = decide(_CONFIG.value, made_with, out, mix, _KEEP.value)
    except (ValueError, OSError) as error:  # invalid settings, checkpoint, data or tools
        sys.exit(f"error: {error}")
    print(curation.format_table(found))
    for part, one in found["parts"].items():
        short = isinstance(one["requested"], int) and one["chosen"] < one["requested"]
        if short or not one["available"]:
            print(f"{part}: requested {one['requested']} questions, available {one['available']}")
    if found["no_verdict"]:
        print(f"{found['no_verdict']} episodes that the judge could not be asked about were left "
              "out; the same command asks again", file=sys.stderr)  # fmt: skip
    if not found["chosen"]:
        print(f"error: no set can be drawn, so there is no {CURATED}; the episodes are kept: give "
              "another --mix", file=sys.stderr)  # fmt: skip
        return 1
    return 0


def roll_out(config: settings.Config, model_dir: str | None, out: pathlib.Path) -> dict[str, Any]:
    """Roll out the episodes that `out` lacks, and judge them if a judge is configured.

    Args:
      config: Settings.
      model_dir: HF directory of the policy, or None if `out` already contains all episodes.
      out: Results directory, created if necessary.

    Returns:
      The settings and files that the episodes depend on.

    Raises:
      ValueError, OSError: The settings, data or policy are invalid; `out` contains a different
        evaluation; or `out` has no episodes and `model_dir` is None.
    """
    if not config.data.train:
        raise DataError("config.data.train: parquet files of questions are needed")
    if model_dir is None:
        if not (out / EPISODES).is_file():
            raise ValueError(f"--model: needed, as {out} has no {EPISODES}")
        records.truncate_partial_line(out / EPISODES)
        return rescore(config, out / EPISODES, None)["made_with"]
    if config.sampling.temperature == 0 and config.run.group_size > 1:
        raise ValueError(
            "config.sampling.temperature=0: the episodes of a question would all be the same"
        )
    from mmsr1_jax.evaluation.run import evaluate  # only this path needs a model

    of_training = settings.Eval(
        data=config.data.train,
        workflows=(_WORKFLOW,),
        num_samples=config.run.group_size,
        temperature=config.sampling.temperature,
    )
    return evaluate(dataclasses.replace(config, eval=of_training), model_dir, out)["made_with"]


def decide(
    config: settings.Config,
    made_with: Mapping[str, Any],
    out: pathlib.Path,
    mix: curation.Mix,
    keep: int,
) -> dict[str, Any]:
    """Classify the questions by the episodes of `out` and write the curated files.

    Args:
      config: Settings. Of `run`, only `seed` and `steps` are read.
      made_with: Settings that the episodes depend on, see `roll_out`.
      out: Results directory.
      mix: Mix of the selected questions.
      keep: Maximum number of episodes per question in `sft.jsonl`, see `curation.cheapest`.

    Returns:
      The contents of `curation.json`: `curation.summarize`; `sft`, the number of episodes and
      questions in `sft.jsonl`; `no_verdict`, the number of episodes left out because the judge
      could not be reached; `bad_rows`, the number of unusable rows of the data; and `made_with`.

    Raises:
      DataError: The episodes are not those of `config.data.train`, or some are missing.
    """
    source = QuestionSource(
        config.data.train,
        image_roots=config.data.image_roots,
        max_bad_rows=config.data.max_bad_rows,
        max_file_pixels=config.images.max_file_pixels,
    )
    if source.fingerprint() != made_with.get("data"):
        raise DataError(f"{out}: has the episodes of other questions than config.data.train")

    # Right or wrong
    attempts: dict[int, list[Attempt]] = {}
    places: dict[int, tuple[int, int]] = {}
    no_verdict = 0
    for place, line_number, line in records.scan(out / EPISODES):
        judged = line.get("judge")
        verdict = judged["correct"] if judged else None
        unjudged = judged is not None and verdict is None
        no_verdict += unjudged
        attempt = curation.read_attempt(line, config.rewards, verdict, config.run.steps)
        if unjudged:
            attempt = dataclasses.replace(attempt, ran=False)
        attempts.setdefault(attempt.question, []).append(attempt)
        places[attempt.index] = place, line_number

    count = sum(1 for _ in source) * made_with["eval.num_samples"]
    if len(places) != count:
        raise DataError(f"{out}: has {len(places)} of {count} episodes; --model: the policy that "
                        "makes the others")  # fmt: skip

    if sorted(attempts) != list(range(len(attempts))):
        raise DataError(
            f"{out / EPISODES}: the numbers of its questions ('group') are not 0, 1, .."
        )

    # Classes and selection
    groups = [attempts[number] for number in range(len(attempts))]
    classes = [curation.classify(group) for group in groups]
    chosen = curation.choose(classes, mix, config.run.seed)
    kept = [curation.cheapest(group, keep) for group in groups]

    (out / FIGURES).unlink(missing_ok=True)  # written last: marks the other files as complete
    write_sft(out, [(a, classes[a.question]) for a in itertools.chain(*kept)], places)
    write_curated(out / CURATED, source, {number: classes[number] for number in chosen})
    found = curation.summarize(groups, classes, chosen, mix)
    found["sft"] = {"episodes": sum(map(len, kept)), "questions": sum(map(bool, kept))}
    found["no_verdict"] = no_verdict
    found["bad_rows"] = len(source.bad_rows)
    found["made_with"] = {**made_with, "keep": keep, "run.seed": config.run.seed}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    outputs.write_text(out / FIGURES, text)
    return found


def write_sft(
    out: pathlib.Path,
    kept: Sequence[tuple[Attempt, str]],
    places: Mapping[int, tuple[int, int]],
) -> None:
    """Write `out/sft.jsonl`: lines of `out/episodes.jsonl` with their reward and class.

    Args:
      out: Results directory.
      kept: Attempts and the classes of their questions, in the order of the written file. If empty,
        no file is written and an existing one is removed.
      places: (byte offset, line number) of each episode, by its number.
    """
    if not kept:
        (out / SFT).unlink(missing_ok=True)
        return
    with (
        open(out / EPISODES, "rb") as old,
        outputs.new_text_file(out / SFT) as new,
    ):
        for attempt, name in kept:
            place, number = places[attempt.index]
            old.seek(place)
            line = records.parse(old.readline(), number)
            line |= {"category": name, "reward": dataclasses.asdict(attempt.reward)}
            new.write(json.dumps(line, ensure_ascii=False) + "\n")


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
    questions = ((number, question) for number, question in enumerate(source) if number in chosen)
    write_parquet(path, (dataclasses.replace(q, category=chosen[n]) for n, q in questions))


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy; not if OUT has all")
    _OUT = flags.DEFINE_string("out", None, "directory of what comes of it", required=True)
    _MIX = flags.DEFINE_string(
        "mix", curation.PAPER_MIX,
        "PART=NUMBER,.. or PART=SHARE,.. with shares that sum to 1.0; parts are "
        f"{', '.join(curation.PARTS)}; empty: all questions that were ever right",
    )  # fmt: skip
    _KEEP = flags.DEFINE_integer(
        "keep", 1, "right episodes of a question in sft.jsonl", lower_bound=1
    )
    cli.run(main)
