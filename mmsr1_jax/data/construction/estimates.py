"""Requests of a construction before they are sent: an upper bound, and an estimate from a pilot.

The bound follows from the settings: every page, vote and attempt that they allow. The estimate is
taken from the last run that ended, such as a pilot: its requests to models per source (a page with
a picture) if the number of sources is known, and its other requests per concept.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

from mmsr1_jax.config import settings
from mmsr1_jax.data.construction.meter import Meter, Price
from mmsr1_jax.data.construction.questions import MAX_ATTEMPTS
from mmsr1_jax.utils import checked_json, outputs

_MODELS = ("writer", "checker")
_SPARE_PAGES = 5  # that a text search may read instead of pages that fail; see `TextSearch`
_TESTS = 1  # requests that find out whether a model refuses everything, see `Model`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Requests to one service.

    Attributes:
      service: Name of the service.
      sent: Number of requests so far.
      expected: Expected number of all requests; None without a pilot.
      bound: Number that is never exceeded.
      dollars: Expected cost of all requests in dollars; None without a pilot or a price.
    """

    service: str
    sent: int
    expected: int | None
    bound: int
    dollars: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Requests of a run that ended, together with those of earlier runs on the same concepts.

    Attributes:
      concepts: Number of concepts that it worked on.
      sources: Number of pages with pictures that were found for them.
      requests: Number of requests by service.
      tokens: (prompt, completion) tokens by service.
    """

    concepts: int
    sources: int
    requests: dict[str, int]
    tokens: dict[str, tuple[int, int]]


def write_measured(path: pathlib.Path, num_concepts: int, num_sources: int, meter: Meter) -> None:
    """Write the requests of a run that has ended."""
    measured = Measured(
        concepts=num_concepts,
        sources=num_sources,
        requests=dict(meter.requests),
        tokens=dict(meter.tokens),
    )
    with outputs.new_file(path) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(measured)) + "\n", encoding="utf-8")


def read_measured(path: pathlib.Path) -> Measured | None:
    """Return the requests of the last run that ended, or None without one. Raises FormatError."""
    return checked_json.load(path, Measured) if path.is_file() else None


def estimate(
    config: settings.Config,
    num_concepts: int,
    num_sources: int | None,
    measured: Measured | None,
    meter: Meter,
    limits: Mapping[str, int],
    prices: Mapping[str, Price],
) -> list[Estimate]:
    """Return the requests to each service that a construction uses.

    Args:
      config: Settings, see `pipeline.resolve`.
      num_concepts: Number of concepts of the construction.
      num_sources: Number of its sources, if they can be found without requests.
      measured: Requests of a run that ended.
      meter: Meter of the requests so far.
      limits: Limits on requests.
      prices: Prices.
    """
    rows = []
    for service, bound in upper_bounds(config, num_concepts).items():
        bound = min(bound, limits.get(service, bound))
        expected = cost = None
        if measured is not None and measured.concepts:
            scale = num_concepts / measured.concepts
            if service in _MODELS and num_sources is not None and measured.sources:
                scale = num_sources / measured.sources
            count = measured.requests.get(service, 0)
            expected = min(bound, round(scale * count))
            if service in prices:
                tokens = measured.tokens.get(service, (0, 0))
                cost = scale * prices[service].dollars(count, *tokens)
        rows.append(
            Estimate(
                service=service,
                sent=meter.requests[service],
                expected=expected,
                bound=bound,
                dollars=cost,
            )
        )
    return rows


def upper_bounds(config: settings.Config, num_concepts: int) -> dict[str, int]:
    """Return the maximum number of requests to each service that a construction uses."""
    options, services, tools = config.construction, config.services, config.tools
    attempts = services.max_attempts
    num_questions = options.pages_per_concept * options.questions_per_page
    names = set(options.checks)
    per_question = options.votes * (
        len(names & {"title", "blind", "answerable", "sound"}) + 2  # also aliases and category
    )
    shown = options.votes * options.pages_per_concept * ("shown" in names)
    bounds: dict[str, int] = {}

    def add(service: str, per_concept: int, tries: int = attempts, extra: int = 0) -> None:
        count = tries * (num_concepts * per_concept + extra)
        bounds[service] = bounds.get(service, 0) + count

    if tools.text not in ("local", "none"):
        add(tools.text, 1)
        if tools.text != "retrieval" and services.reader != "none":
            pages = tools.max_results + _SPARE_PAGES
            add("reader", pages, attempts if services.reader == "jina" else 1)
    if options.pictures != "local":
        add(options.pictures, 1)
        add("thumbnails", 2 * options.pictures_per_concept, 1)
    add("writer", options.pages_per_concept * MAX_ATTEMPTS + num_questions, extra=_TESTS)
    add("checker", num_questions * per_question + shown, extra=_TESTS)
    return bounds


def format_table(rows: list[Estimate], num_concepts: int, measured: Measured | None) -> str:
    """Format the estimates as lines of a table."""
    pilot = "no pilot yet: use --pilot=20"
    if measured is not None:
        pilot = f"measured on {measured.concepts} of them"
    lines = [
        f"{num_concepts} concepts, {pilot}",
        f"{'service':12} {'sent':>9} {'expected':>9} {'at most':>9} {'dollars':>9}",
    ]
    for row in rows:
        expected = "-" if row.expected is None else str(row.expected)
        dollars = "-" if row.dollars is None else f"{row.dollars:.2f}"
        lines.append(f"{row.service:12} {row.sent:9} {expected:>9} {row.bound:9} {dollars:>9}")
    return "\n".join(lines)
