"""Create an HTML report of a run, an evaluation or a file of episodes.

    python -m mmsr1_jax.report WORKDIR|EPISODES.jsonl --out=report.html \\
        [--model=DIR] [--episodes=1000] [--pictures=DIR]

The page is self-contained and uses no network. It shows the table of workflows, curves, and the
episodes with their images, turns, searches and log-probs. The texts of single tokens come from the
tokenizer of `--model`, or else of the run's policy if it can be found.

Lines that are not valid episodes are reported and skipped. Images are shown only if they are in
WORKDIR, in the directory of the file, or in that of `--pictures`. The latter is needed for lines
that `evaluate --rescore` wrote to another directory, since they refer to the original images.
"""

import pathlib
import sys

from absl import app, flags

from mmsr1_jax.apps.report import page, reader
from mmsr1_jax.utils import shutdown


def main(argv) -> None:
    out = pathlib.Path(_OUT.value)
    try:
        if len(argv) != 2:
            raise ValueError("name one directory of a run or an evaluation, or one JSONL file")
        source = pathlib.Path(argv[1])
        if out.is_dir() or not out.parent.is_dir():
            raise ValueError(f"--out={out}: must be a file in a directory that exists")
        if out.exists() and source.exists() and out.samefile(source):
            raise ValueError(f"--out={out}: would replace the file that is read")
        shown = None if _PICTURES.value is None else pathlib.Path(_PICTURES.value)
        found = reader.read(source, _EPISODES.value, _MODEL.value, shown)
        size = page.write(out, found)
    except (ValueError, OSError) as error:  # unreadable input or unwritable output
        sys.exit(f"error: {error}")
    for reason in found.skipped:
        print(f"{reason}; left out", file=sys.stderr)
    print(f"{out}: {len(found.episodes)} of {found.lines} episodes, {size / 1e6:.1f} MB")


def _parse_flags(argv) -> list[str]:
    """Parse the flags; exit with a one-line message if they are invalid."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "HTML file to write", required=True)
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy, for its tokenizer")
    _PICTURES = flags.DEFINE_string(
        "pictures", None, "another directory whose pictures may be shown"
    )
    _EPISODES = flags.DEFINE_integer(
        "episodes",
        1000,
        "episodes that are shown at most; of more, evenly spaced ones",
        lower_bound=1,
    )
    app.run(shutdown.guard(main), flags_parser=_parse_flags)
