"""Meter of requests to paid services: counts, tokens, dollars, and limits that are never exceeded.

A request is written to a file before it is sent, so the counts survive any kill. The file has one
JSON list per request, `["checker"]`, and one per reply of a model with its tokens,
`["checker", PROMPT, COMPLETION]`.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from mmsr1_jax.config.bounds import ConfigError
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools.service_clients import SERVICES
from mmsr1_jax.utils import checked_json, outputs


class BudgetError(UserError):
    """A limit on requests that is reached; the message names the service and the setting."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """Price of a service in dollars, per request and per million tokens."""

    request: float = 0.0
    prompt: float = 0.0
    completion: float = 0.0

    def dollars(self, requests: int, prompt: int, completion: int) -> float:
        """Return the cost of a number of requests with their tokens."""
        tokens = prompt * self.prompt + completion * self.completion
        return requests * self.request + tokens / 1e6


class Meter:
    """Counts of the requests to each service.

    Args:
      path: File of the counts, created if missing.
      limits: Maximum number of requests by service, over all runs of the command.

    Attributes:
      requests: Number of requests by service.
      tokens: (prompt, completion) tokens by service.
      exceeded: Message of the limit that was reached, or None. The error may have been treated as
        the failure of one page, so the caller looks here too.
    """

    def __init__(self, path: pathlib.Path, limits: Mapping[str, int]):
        """Read the counts. Raises FormatError if the file is not one of a meter."""
        self.requests: collections.Counter[str] = collections.Counter()
        self.tokens: dict[str, tuple[int, int]] = {}
        self.exceeded: str | None = None
        self._limits, self._path = limits, path
        outputs.truncate_partial_line(path)
        if path.is_file():
            for number, entry in checked_json.load_jsonl(path, list):
                match entry:
                    case [str(service)]:
                        self.requests[service] += 1
                    case [str(service), int(prompt), int(completion)]:
                        self._add_tokens(service, prompt, completion)
                    case _:
                        raise checked_json.FormatError(f"{path}, line {number}: not a request")

    def before_request(self, service: str) -> None:
        """Count a request. Raises BudgetError if it would exceed the limit."""
        limit = self._limits.get(service)
        if limit is not None and self.requests[service] >= limit:
            self.exceeded = (
                f"config.construction.max_calls: the limit {service}={limit} is reached; raise it "
                "to resume"
            )
            raise BudgetError(self.exceeded)
        self.requests[service] += 1
        self._append([service])

    def add_tokens(self, service: str, prompt: int, completion: int) -> None:
        """Count the tokens of a model's reply."""
        if prompt or completion:
            self._add_tokens(service, prompt, completion)
            self._append([service, prompt, completion])

    def _add_tokens(self, service: str, prompt: int, completion: int) -> None:
        before = self.tokens.get(service, (0, 0))
        self.tokens[service] = before[0] + prompt, before[1] + completion

    def _append(self, entry: Sequence[str | int]) -> None:
        # Reopened each time: requests take far longer, and the folder may be moved between runs.
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_limits(texts: Sequence[str]) -> dict[str, int]:
    """Parse `SERVICE=COUNT` of `config.construction.max_calls`. Raises ConfigError."""
    limits = {}
    for text in texts:
        service, _, count = text.partition("=")
        if service not in SERVICES or not count.isdecimal() or len(count) > 12:
            raise ConfigError(
                f"config.construction.max_calls: {text!r} is not SERVICE=COUNT with one of the "
                f"services {', '.join(SERVICES)}"
            )
        limits[service] = int(count)
    return limits


def read_prices(texts: Sequence[str]) -> dict[str, Price]:
    """Parse `SERVICE=PRICE` or `SERVICE=PROMPT/COMPLETION` of `config.construction.prices`.

    Raises:
      ConfigError: A text has another form.
    """
    prices = {}
    for text in texts:
        service, _, price = text.partition("=")
        numbers = [_parse_price(part) for part in price.split("/")]
        if service not in SERVICES or None in numbers or len(numbers) > 2:
            raise ConfigError(
                f"config.construction.prices: {text!r} is not SERVICE=PRICE or "
                f"SERVICE=PROMPT/COMPLETION with one of the services {', '.join(SERVICES)}"
            )
        amounts = [number or 0.0 for number in numbers]
        prices[service] = (
            Price(request=amounts[0])
            if len(amounts) == 1
            else Price(prompt=amounts[0], completion=amounts[1])
        )
    return prices


def _parse_price(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < 1e9 else None
