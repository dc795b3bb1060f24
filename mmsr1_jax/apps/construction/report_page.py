"""Report of a construction: what was dropped where and why, costs, categories, and samples.

The page is static: all texts are escaped, and its policy allows no script and no network.
"""

import collections
import html
import pathlib
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsr1_jax.apps.construction.thumbnails import thumbnail
from mmsr1_jax.apps.self_contained import security_policy
from mmsr1_jax.data.construction.labels import Labelled
from mmsr1_jax.data.construction.meter import read_prices
from mmsr1_jax.data.construction.pipeline import STAGES, ConstructionResult, count_reasons
from mmsr1_jax.utils import outputs

_FOLDER = pathlib.Path(__file__).parent
_NUM_SAMPLES = 30
_NOUNS = {
    "sources": "pages with pictures",
    "questions": "questions written",
    "checked": "questions that pass the checks",
    "labelled": "questions with labels",
}


def write(path: pathlib.Path, made: ConstructionResult, out: pathlib.Path) -> None:
    """Write the report of a construction, whose pictures are in `out`."""
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    sections = [_stages(made), _costs(made), _distribution(made), _samples(made, out)]
    page = string.Template((_FOLDER / "report.html").read_text(encoding="utf-8")).substitute(
        policy=security_policy("", style),
        style=style,
        summary=html.escape(summary(made).partition("\n")[0]),
        body="\n".join(sections),
    )
    with outputs.new_file(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")


def summary(made: ConstructionResult) -> str:
    """Return the numbers of a construction as lines."""
    lines = [
        f"{len(made.questions)} questions about {len(made.concepts)} of {made.num_concepts} "
        "concepts"
    ]
    for name in STAGES:
        result = made.results[name]
        reasons = ", ".join(f"{reason} {n}" for reason, n in count_reasons(result).items())
        dropped = f"; dropped {len(result.dropped)}: {reasons}" if reasons else ""
        lines.append(f"{_NOUNS[name]}: {len(result.kept)}{dropped}")
    lines += [f"{file}: {count} questions added" for file, count in made.added.items()]
    requests = ", ".join(f"{name} {n}" for name, n in sorted(made.meter.requests.items()))
    lines.append(f"requests: {requests or 'none'}")
    return "\n".join(lines)


def _stages(made: ConstructionResult) -> str:
    rows: list[Sequence[Any]] = []
    for name in STAGES:
        result = made.results[name]
        rows.append((_NOUNS[name], "kept", len(result.kept)))
        rows += [("", reason, count) for reason, count in count_reasons(result).items()]
        if result.unresolved:
            rows.append(("", "not worked on: a service did not respond", len(result.unresolved)))
    return "<h2>Stages</h2>" + _table(("stage", "outcome", "number"), rows)


def _costs(made: ConstructionResult) -> str:
    prices = read_prices(made.config.construction.prices)
    rows = []
    for name, count in sorted(made.meter.requests.items()):
        prompt, completion = made.meter.tokens.get(name, (0, 0))
        price = prices.get(name)
        cost = "-" if price is None else f"{price.dollars(count, prompt, completion):.2f}"
        rows.append((name, count, prompt, completion, cost))
    head = ("service", "requests", "prompt tokens", "completion tokens", "dollars")
    return "<h2>Requests, over all runs</h2>" + _table(head, rows)


def _distribution(made: ConstructionResult) -> str:
    categories = collections.Counter(item.category for item in made.questions)
    bands = collections.Counter(item.draft.source.band for item in made.questions)
    rows = [(name, count) for name, count in categories.most_common()]
    tables = "<h2>Categories</h2>" + _table(("category", "questions"), rows)
    if set(bands) - {""}:
        tables += "<h2>Frequency of the concepts</h2>" + _table(
            ("band", "questions"), bands.most_common()
        )
    return tables


def _samples(made: ConstructionResult, out: pathlib.Path) -> str:
    rng = np.random.default_rng([made.config.construction.seed, 4])
    indices = sorted(rng.permutation(len(made.questions))[:_NUM_SAMPLES].tolist())
    items = [_sample(made.questions[index], out) for index in indices]
    return f"<h2>{len(items)} samples</h2>" + "\n".join(items)


def _sample(item: Labelled, out: pathlib.Path) -> str:
    draft, source = item.draft, item.draft.source
    pairs = {
        "Answer": draft.answer,
        "Also": "; ".join(item.aliases),
        "Shows": source.concept,
        "Evidence": draft.evidence,
        "Page": source.url,
        "Picture": source.image_title,
        "Licence": source.licence,
        "Category": item.category,
    }
    terms = "".join(
        f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in pairs.items() if value
    )
    image = html.escape(thumbnail(source, out))
    return (
        f'<div class="item"><img src="{image}" alt="Picture of the question"><div>'
        f'<p class="question">{html.escape(draft.question)}</p><dl>{terms}</dl></div></div>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(kind: str, value: Any, is_number: bool) -> str:
        style = ' class="number"' if is_number else ""
        return f"<{kind}{style}>{html.escape(str(value))}</{kind}>"

    first = "".join(cell("th", name, False) for name in head)
    lines = ["".join(cell("td", value, isinstance(value, int)) for value in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )
