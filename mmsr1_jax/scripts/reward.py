"""Compute rewards of episodes given as text.

    python -m mmsr1_jax.scripts.reward --episodes=IN.jsonl --out=OUT.jsonl \\
        [--match=EM|SubEM] [--search_penalty=0.1] [--per_search_penalty] [--format_penalty=0.1] \\
        [--strict_form]

Each line of IN is {"turns": [text, ..], "answers": [text, ..]}: the turns of the policy, without
end tokens, and the gold answer with its aliases.

Each line of OUT, in the order of IN, is {"reward": .., "correct": .., "format": .., "searches": ..}
or, if the line cannot be scored, {"error": ..}, in which case the exit code is 1. Searches are
counted by the published rule (`reward_function.count_searches`), because the text does not show
which searches the engine refused.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.config.choices import MATCHES
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.config.rewards import Rewards, RewardsError, check
from mmsr1_jax.episodes import turns
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.utils import checked_json, outputs


class LineError(UserError):
    """A line that is not a valid episode."""


def main(argv) -> int:
    del argv
    try:
        settings = Rewards(
            match=_MATCH.value,
            search_penalty=_SEARCH.value,
            per_search_penalty=_PER_SEARCH.value,
            format_penalty=_FORMAT.value,
            strict_form=_STRICT.value,
        )
        try:
            check(settings)
        except RewardsError as error:
            raise ValueError(f"--{error}") from None
        failed = reward_file(settings, pathlib.Path(_IN.value), pathlib.Path(_OUT.value))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return 1 if failed else 0


def reward_file(settings: Rewards, source: pathlib.Path, out: pathlib.Path) -> int:
    """Score the episodes of `source` and write `out` atomically.

    Returns:
      Number of lines that could not be scored.

    Raises:
      ValueError: `out` is not a file path in an existing directory, or is `source`.
      OSError: Reading or writing failed.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out={out}: must be a file in a directory that exists")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"--out={out}: would replace the file that is read")
    lines, failed, total, correct, searching = 0, 0, 0.0, 0, 0
    with (
        open(source, "rb") as episodes,
        outputs.new_text_file(out) as file,
    ):
        for number, text in read_lines(episodes):
            result = reward_line(number, text, settings)
            lines += 1
            if "error" in result:
                failed += 1
                print(result["error"], file=sys.stderr)
            else:
                total += result["reward"]
                correct += result["correct"]
                searching += result["searches"] > 0
            file.write(json.dumps(result) + "\n")
    scored = lines - failed
    mean = f", mean reward {total / scored:.4f}" if scored else ""
    print(
        f"scored {scored} of {lines} episodes{mean}, {correct} correct, {searching} with a search: "
        f"{out}"
    )
    if failed:
        print(f"{failed} of {lines} lines could not be scored", file=sys.stderr)
    return failed


def reward_line(number: int, text: bytes, settings: Rewards) -> dict[str, Any]:
    """Return the OUT line for one IN line. Never raises."""
    try:
        written, answers = parse_line(text)
        read = [turns.parse(turn) for turn in written]
        correct = reward_function.matches(reward_function.final_answer(read), answers, settings)
        reward = reward_function.compute_reward(read, correct, settings)
    except LineError as error:
        return {"error": f"line {number}: {error}"}
    except Exception as error:  # no line may end the run, whatever it contains
        return {"error": f"line {number}: {type(error).__name__}: {error}"}
    return {
        "reward": reward.reward,
        "correct": reward.correct,
        "format": reward.format,
        "searches": reward.searches,
    }


def parse_line(text: bytes) -> tuple[list[str], list[str]]:
    """Return the turns and answers of a line. Raise LineError if the line is invalid."""
    try:
        line = checked_json.loads(text, surrogates=True)
    except checked_json.FormatError as error:
        raise LineError(str(error)) from None
    if not isinstance(line, dict):
        raise LineError("must be an object with 'turns' and 'answers'")
    for field in ("turns", "answers"):
        if field not in line:
            raise LineError(f"has no {field!r}")
        if not isinstance(line[field], list):
            raise LineError(f"{field!r} must be a list of texts, not {_kind(line[field])}")
        for index, value in enumerate(line[field]):
            if not isinstance(value, str):
                raise LineError(f"{field}[{index}] must be a text, not {_kind(value)}")
    if not any(answer.strip() for answer in line["answers"]):
        raise LineError("'answers' holds no text: nothing could be right")
    return line["turns"], line["answers"]


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else kinds.get(type(value), "a number")


def read_lines(file) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) for each non-blank line. Only a newline ends a line."""
    yield from checked_json.jsonl_lines(file)


if __name__ == "__main__":
    default = Rewards()
    _IN = flags.DEFINE_string("episodes", None, "JSONL to read", required=True)
    _OUT = flags.DEFINE_string("out", None, "JSONL to write", required=True)
    _MATCH = flags.DEFINE_enum("match", default.match, MATCHES, "what is a right answer")
    _SEARCH = flags.DEFINE_float(
        "search_penalty", default.search_penalty, "what searching costs a right answer, in [0, 1]"
    )
    _PER_SEARCH = flags.DEFINE_bool(
        "per_search_penalty", default.per_search_penalty, "each search costs that, not all together"
    )
    _FORMAT = flags.DEFINE_float(
        "format_penalty", default.format_penalty, "the share that is for the form, in [0, 1]"
    )
    _STRICT = flags.DEFINE_bool(
        "strict_form",
        default.strict_form,
        "no words between the reasoning of a turn and its action",
    )
    cli.run(main)
