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
from collections.abc import Sequence
from typing import Any

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.config import ConfigError
from mmsr1_jax.config.choices import MATCHES
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.config.rewards import Rewards, check
from mmsr1_jax.episodes import turns
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.utils import checked_json, outputs
from mmsr1_jax.utils.logs import log


class LineError(UserError):
    """A line that is not a valid episode."""


def main(argv: Sequence[str]) -> int:
    del argv
    settings = Rewards(
        match=_MATCH.value,
        search_penalty=_SEARCH_PENALTY.value,
        per_search_penalty=_PER_SEARCH_PENALTY.value,
        format_penalty=_FORMAT_PENALTY.value,
        strict_form=_STRICT_FORM.value,
    )
    try:
        check(settings)
    except ConfigError as error:  # named by its flag
        raise UserError(str(error).replace("rewards.", "--", 1)) from None
    failed = reward_file(settings, pathlib.Path(_IN.value), pathlib.Path(_OUT.value))
    return 1 if failed else 0


def reward_file(settings: Rewards, source: pathlib.Path, out: pathlib.Path) -> int:
    """Score the episodes of `source` and write `out` atomically.

    Returns:
      Number of lines that could not be scored.

    Raises:
      UserError: `out` is not a file path in an existing directory, or is `source`.
      OSError: Reading or writing failed.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out={out}: must be a file in an existing directory")
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"--out={out}: would overwrite the input; name another file")
    num_lines, failed, total, correct, searching = 0, 0, 0.0, 0, 0
    with (
        open(source, "rb") as episodes,
        outputs.new_text_file(out) as file,
    ):
        for line_number, text in checked_json.jsonl_lines(episodes):
            result = reward_line(line_number, text, settings)
            num_lines += 1
            if "error" in result:
                failed += 1
                log.warning("%s", result["error"])
            else:
                total += result["reward"]
                correct += result["correct"]
                searching += result["searches"] > 0
            file.write(json.dumps(result) + "\n")
    scored = num_lines - failed
    mean = f", mean reward {total / scored:.4f}" if scored else ""
    print(
        f"scored {scored} of {num_lines} episodes{mean}, {correct} correct, "
        f"{searching} with a search: {out}"
    )
    if failed:
        log.warning("%d of %d lines could not be scored", failed, num_lines)
    return failed


def reward_line(line_number: int, text: bytes, settings: Rewards) -> dict[str, Any]:
    """Return the OUT line for one IN line. Never raises."""
    try:
        texts, answers = parse_line(text)
        parsed = [turns.parse(turn) for turn in texts]
        correct = reward_function.matches(reward_function.final_answer(parsed), answers, settings)
        reward = reward_function.compute_reward(parsed, correct, settings)
    except LineError as error:
        return {"error": f"line {line_number}: {error}"}
    except Exception as error:  # no line may end the run, whatever it contains
        return {"error": f"line {line_number}: {type(error).__name__}: {error}"}
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
            raise LineError(f"{field!r} must be a list of strings, not {_kind(line[field])}")
        for index, value in enumerate(line[field]):
            if not isinstance(value, str):
                raise LineError(f"{field}[{index}] must be a string, not {_kind(value)}")
    if not any(answer.strip() for answer in line["answers"]):
        raise LineError("'answers' contains only blank strings, so no answer could be correct")
    return line["turns"], line["answers"]


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


if __name__ == "__main__":
    default = Rewards()
    _IN = flags.DEFINE_string("episodes", None, "JSONL file to read", required=True)
    _OUT = flags.DEFINE_string("out", None, "JSONL file to write", required=True)
    _MATCH = flags.DEFINE_enum("match", default.match, MATCHES, "criterion for a correct answer")
    _SEARCH_PENALTY = flags.DEFINE_float(
        "search_penalty",
        default.search_penalty,
        "fraction in [0, 1] of a correct answer's reward that searching costs",
    )
    _PER_SEARCH_PENALTY = flags.DEFINE_bool(
        "per_search_penalty",
        default.per_search_penalty,
        "apply the penalty to each search instead of once per episode",
    )
    _FORMAT_PENALTY = flags.DEFINE_float(
        "format_penalty",
        default.format_penalty,
        "weight of the format reward, as a fraction in [0, 1] of the total reward",
    )
    _STRICT_FORM = flags.DEFINE_bool(
        "strict_form",
        default.strict_form,
        "allow only white space between the reasoning of a turn and its action",
    )
    cli.run(main)
