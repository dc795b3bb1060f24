"""Create an HTML report of a run, an evaluation or a file of episodes.

    python -m mmsr1_jax.report WORKDIR|EPISODES.jsonl --out=report.html \\
        [--model=DIR] [--episodes=1000] [--image_dir=DIR]

The page is self-contained and uses no network. It shows the table of workflows, curves, and the
episodes with their images, turns, searches and log-probs, and lists the traces of the run. The
texts of single tokens come from the tokenizer of `--model`, or else of the run's policy if it can
be found.

Lines that are not valid episodes are reported and skipped. Images are shown only if they are in
WORKDIR, in the directory of the file, or in that of `--image_dir`. The latter is needed for lines
that `evaluate --rescore` wrote to another directory, since they refer to the original images.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.apps.report import page, reader
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils.logs import log


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise UserError("name the directory of a run or an evaluation, or a JSONL file of episodes")
    source, out = pathlib.Path(argv[1]), pathlib.Path(_OUT.value)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out={out}: must be a file in an existing directory")
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"--out={out}: would overwrite the input; name another file")
    image_dir = None if _IMAGE_DIR.value is None else pathlib.Path(_IMAGE_DIR.value)
    data = reader.read(source, _EPISODES.value, _MODEL.value, image_dir)
    size = page.write(out, data)
    for reason in data.skipped:
        log.warning("%s; skipped", reason)
    print(f"{out}: {len(data.episodes)} of {data.num_lines} episodes, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "HTML file to write", required=True)
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy, for its tokenizer")
    _IMAGE_DIR = flags.DEFINE_string(
        "image_dir", None, "additional directory whose images may be shown"
    )
    _EPISODES = flags.DEFINE_integer(
        "episodes",
        1000,
        "maximum number of episodes to show; if there are more, evenly spaced ones are shown",
        lower_bound=1,
    )
    cli.run(main, max_arguments=1)
