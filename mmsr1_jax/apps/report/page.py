"""The report page: one HTML file with its style, its script, and its data as JSON.

All untrusted text is in blocks of JSON in which every `<` is escaped, and the script inserts it
into the page only as text. A Content-Security-Policy in the page's head allows this script, this
style and no network.
"""

import html
import os
import pathlib
import string
import urllib.parse
from collections.abc import Sequence
from typing import Any

from mmsr1_jax.apps.report.charts import draw_charts
from mmsr1_jax.apps.report.reader import ReportData
from mmsr1_jax.apps.self_contained import json_block, security_policy
from mmsr1_jax.utils import outputs

_FOLDER = pathlib.Path(__file__).parent
_SCRIPTS = ("dom.js", "overview.js", "turns.js", "episodes.js", "main.js")
# Fields for the list, the filters and the tiles; the rest of an episode is parsed when shown.
_ROW_FIELDS = (
    "question", "answer", "correct", "actions", "category", "source", "workflow", "step", "end"
)  # fmt: skip


def write(out: pathlib.Path, data: ReportData) -> int:
    """Write the page atomically and return its size in bytes.

    Messages about missing images are added to `data.skipped`.
    """
    text = page(data, out.parent)
    with outputs.new_file(out) as partial:
        # A lone surrogate, which JSON can contain, cannot be encoded as UTF-8.
        partial.write_text(text, encoding="utf-8", errors="replace")
    return out.stat().st_size


def page(data: ReportData, folder: pathlib.Path) -> str:
    """Return the page as HTML text.

    Args:
      data: Contents of the page. Messages about missing images are added to `data.skipped`.
      folder: Directory of the page, to which its links to traces are relative.
    """
    images, messages = data.images.encode()
    data.skipped.extend(messages)
    summary = {
        "name": data.name,
        "curves": data.curves,
        "results": data.results,
        "rows": [_row(episode) for episode in data.episodes],
        "numLines": data.num_lines,
        "numRead": data.num_read,
        "skipped": data.skipped,
        "hasTokenTexts": data.has_token_texts,
        "traces": _relative_urls(data.traces, folder),
    }
    script = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'"use strict";\n{script}'
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    return string.Template((_FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{data.name} · report"),
        policy=security_policy(script, style),
        style=style,
        summary=json_block(summary),
        charts=json_block(draw_charts(data.curves)),
        details="\n".join(map(json_block, data.episodes)),
        images=json_block(images),
        script=script,
    )


def _row(episode: dict[str, Any]) -> dict[str, Any]:
    row = {field: episode[field] for field in _ROW_FIELDS}
    row["reward"] = episode["reward"].get("reward")
    row["image"] = episode["images"][0] if episode["images"] else -1
    return row


def _relative_urls(paths: Sequence[pathlib.Path], folder: pathlib.Path) -> list[str]:
    """Return the paths as URLs relative to `folder`; special characters are percent-encoded."""
    start = os.path.realpath(folder)
    relative = (os.path.relpath(os.path.realpath(path), start) for path in paths)
    return [urllib.parse.quote(os.fsencode(path)) for path in relative]
