"""Construct questions about pictures: from visual concepts to a data set that people can check.

    python -m mmsr1_jax.construct --config=FILE --out=OUT --dry_run     requests, none of them sent
    python -m mmsr1_jax.construct --config=FILE --out=OUT --pilot=20    the first 20 concepts
    python -m mmsr1_jax.construct --config=FILE --out=OUT               all
    python -m mmsr1_jax.construct --out=OUT --reviews=ANN.json,BOB.json    what people decided

    concepts ─► pages, pictures ─► questions ─► checks ─► other answers, categories ─► parquet
                by searches        a model      votes     both models                  people

Based on the pipeline that MMSearch-R1 describes (arXiv 2506.20670, section 3.1). Settings are
`config.construction`, the models `services.writer_url` and `services.checker_url`, the searches
those of `config.tools`. OUT contains a file for each stage (`data/construction/pipeline.py`), and

    questions.parquet   questions in veRL's schema, for `curate` and `train`
    report.html         where and why questions were dropped, costs, categories, and samples
    review.html         page on which people accept, edit or reject the questions
    reviewed.parquet    with --reviews: the questions that people accept

Answers of all services are recorded. The command may be killed at any time; the same command
resumes it, repeats no request that was answered, and writes the same files.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.apps.construction import report_page, review_page
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data.construction import pipeline, reviews
from mmsr1_jax.training import train_utils
from mmsr1_jax.utils import outputs
from mmsr1_jax.utils.logs import log

REPORT, REVIEW, REVIEWED = "report.html", "review.html", "reviewed.parquet"


def main(argv: Sequence[str]) -> int:
    del argv
    out = train_utils.local_directory(_OUT.value, "out")
    with outputs.lock(out):
        if _DRY_RUN.value:
            print(pipeline.dry_run(_CONFIG.value, out))
            return 0
        if _REVIEWS.value:
            return apply_reviews(out, _REVIEWS.value)
        return run(out)


def run(out: pathlib.Path) -> int:
    """Construct the questions, and write the report and the page for people."""
    made = pipeline.construct(_CONFIG.value, out, pilot=_PILOT.value)
    report_page.write(out / REPORT, made, out)
    review_page.write(out / REVIEW, made.questions, out)
    print(report_page.summary(made))
    unresolved = [item for result in made.results.values() for item in result.unresolved]
    if unresolved:
        log.warning(
            "%d items were left out because a service did not respond, such as %r (%s); the same "
            "command retries them", len(unresolved), unresolved[0].name, unresolved[0].reason,
        )  # fmt: skip
    if not made.questions:
        log.error("error: no question was constructed; %s says why", out / REPORT)
        return 1
    return 0


def apply_reviews(out: pathlib.Path, files: Sequence[str]) -> int:
    """Write the questions that people accept, and print their agreement."""
    questions = out / pipeline.PARQUET
    if not questions.is_file():
        raise UserError(f"--reviews: {out} has no {pipeline.PARQUET} yet")
    given = [reviews.read(pathlib.Path(file)) for file in files]
    outcome = reviews.apply(questions, given, out / REVIEWED)
    print(reviews.format_outcome(outcome))
    return 0 if outcome.num_accepted else 1


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _OUT = flags.DEFINE_string("out", None, "directory for the results", required=True)
    _PILOT = flags.DEFINE_integer(
        "pilot", 0, "number of concepts to work on; 0: all", lower_bound=0
    )
    _DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the expected requests and send none")
    _REVIEWS = flags.DEFINE_list("reviews", [], "files saved on review.html, one per person")
    cli.run(main)
