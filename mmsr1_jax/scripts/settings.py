"""Print every setting with its type, default, allowed values and meaning.

mmsr1 settings [PREFIX]        such as `mmsr1 settings update` or `mmsr1 settings run.seed`
"""

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence

from mmsr1_jax import cli
from mmsr1_jax.config import Config
from mmsr1_jax.config.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
      name: Name of its command-line flag, without `--`.
      type: Python type, as a string.
      default: Default value.
      allowed: Description of the bounds or choices; empty if there are no restrictions.
      meaning: Description from the docstring of its dataclass.
    """

    name: str
    type: str
    default: typing.Any
    allowed: str
    meaning: str

    def __str__(self) -> str:
        head = f"{self.name}: {self.type} = {self.default!r}"
        allowed = f"  [{self.allowed}]" if self.allowed else ""
        meaning = textwrap.fill(self.meaning, 92, initial_indent="    ", subsequent_indent="    ")
        return f"{head}{allowed}\n{meaning}"


def all_settings() -> Iterator[Setting]:
    """Yield all settings in declaration order."""
    for part in dataclasses.fields(Config):
        cls = typing.get_type_hints(Config)[part.name]
        hints, meanings = typing.get_type_hints(cls), field_meanings(cls)
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            yield Setting(
                name=f"config.{part.name}.{field.name}",
                type=hint.__name__ if isinstance(hint, type) else str(hint),
                default=field.default,
                allowed=str(field.metadata.get("allowed", "")),
                meaning=meanings.get(field.name, ""),
            )


def field_meanings(cls: type) -> dict[str, str]:
    """Return the description of each field in the `Attributes:` block of a dataclass."""
    _, _, block = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    meanings: dict[str, str] = {}
    for entry in re.split(r"\n(?=  \S)", block):
        names, colon, text = entry.strip().partition(": ")
        for name in names.split(", ") if colon else ():
            meanings[name] = " ".join(text.split())
    return meanings


def main(argv: Sequence[str]) -> None:
    prefix = argv[1].removeprefix("--").removeprefix("config.") if len(argv) > 1 else ""
    selected = [s for s in all_settings() if s.name.startswith(f"config.{prefix}")]
    if not selected:
        raise UserError(f"no setting begins with config.{prefix}; `mmsr1 settings` lists all")
    print("\n".join(map(str, selected)))


if __name__ == "__main__":
    cli.run(main, max_arguments=1)
