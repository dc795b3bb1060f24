"""Allowed values of settings, declared next to the defaults and checked in one place.

lanes: int = setting(16, at_least=1, at_most=65536)
dtype: str = setting("float32", one_of=DTYPES)
"""

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

from mmsr1_jax.config.errors import UserError

_MAX_LENGTH = 100_000  # of strings (characters) and tuples (items)


class ConfigError(UserError):
    """An invalid setting; the message begins with the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Allowed:
    """Bounds of a number, or a list of allowed values. For a tuple, they apply to each element."""

    at_least: float = -math.inf
    over: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    one_of: Sequence[str] | None = None

    def problem(self, value: Any) -> str | None:
        if self.one_of is not None and value not in self.one_of:
            return f"is not one of {', '.join(self.one_of)}"
        if isinstance(value, str):
            return _problem_of_text(value)
        if isinstance(value, bool) or value is None:
            return None
        if value < self.at_least:
            return f"must be at least {self.at_least:g}"
        if value <= self.over:
            return f"must be over {self.over:g}"
        if value > self.at_most:
            return f"must be at most {self.at_most}"
        if value >= self.below:
            return f"must be less than {self.below:g}"
        return None if math.isfinite(value) else "must be a finite number"

    def __str__(self) -> str:
        if self.one_of is not None:
            return f"one of {', '.join(self.one_of)}"
        bounds = [
            f"{sign} {int(bound):,}" if float(bound).is_integer() else f"{sign} {bound:g}"
            for sign, bound in (
                (">=", self.at_least), (">", self.over), ("<=", self.at_most), ("<", self.below)
            )
            if math.isfinite(bound)
        ]  # fmt: skip
        return ", ".join(bounds)


_ANY = _Allowed(at_least=-(2.0**63), at_most=2.0**63)


def setting(default: Any, **allowed: Any) -> Any:
    """Return a dataclass field with bounds.

    Args:
      default: Default value of the field.
      allowed: `at_least`, `over`, `at_most`, `below` or `one_of`. For a tuple, they apply to each
        element.
    """
    return dataclasses.field(default=default, metadata={"allowed": _Allowed(**allowed)})


def check(settings: Any, where: str) -> None:
    """Check the types and values of a dataclass and of the dataclasses nested in it.

    Args:
      settings: Instance of a dataclass whose fields are int, float, bool, str, unions of these with
        None, tuples of these, or dataclasses.
      where: Name of the instance in error messages.

    Raises:
      ConfigError: A field has the wrong type (an int is accepted for a float, but a float is not
        accepted for an int, and a bool for neither), its declaration does not allow the value, a
        number is not finite, or a string is too long, is not valid Unicode or contains a NUL.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint, path = (
            getattr(settings, field.name),
            hints[field.name],
            f"{where}.{field.name}",
        )
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):
                raise ConfigError(f"{path} must be a {hint.__name__}, not {value!r:.100}")
            check(value, path)
            continue
        if not _has_type(value, hint):
            name = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ConfigError(f"{path} must be of type {name}, not {value!r:.100}")
        if isinstance(value, tuple) and len(value) > _MAX_LENGTH:
            raise ConfigError(f"{path} must have at most {_MAX_LENGTH} items, not {len(value)}")
        allowed = field.metadata.get("allowed", _ANY)
        for item in value if isinstance(value, tuple) else (value,):
            problem = allowed.problem(item)
            if problem:
                raise ConfigError(f"{path}={item!r:.100} {problem}")


def made(kind: type, data: Any, where: str) -> Any:
    """Build a dataclass from plain data. Missing fields get their defaults; lists become tuples.

    Values are not checked.

    Raises:
      ConfigError: The data is not an object, or names a field that the dataclass does not have.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be an object, not {data!r:.100}")
    hints, values = typing.get_type_hints(kind), {}
    for name, value in data.items():
        if name not in hints:
            raise ConfigError(f"{where} has no field {name!r:.100}; remove it")
        if dataclasses.is_dataclass(hints[name]):
            value = made(hints[name], value, f"{where}.{name}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _problem_of_text(text: str) -> str | None:
    if len(text) > _MAX_LENGTH:
        return f"must have at most {_MAX_LENGTH} characters"
    if "\0" in text:
        return "must not hold a NUL character"
    try:
        # A path on the command line may contain bytes that are not UTF-8.
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    return None


def _has_type(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, arg) for arg in args)
    if origin is tuple:  # tuple[x, ...] is the only form in use
        return isinstance(value, tuple) and all(_has_type(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
