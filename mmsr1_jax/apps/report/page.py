"""The report page: one HTML file with its style, its script, and its data as JSON.

All untrusted text is in blocks of JSON in which every `<` is escaped, and the script inserts it
into the page only as text. A Content-Security-Policy in the page's head allows this script, this
style and no network.
"""

import base64
import hashlib
import html
import json
import pathlib
import string
from typing import Any

from mmsr1_jax.apps.report.reader import Found
from mmsr1_jax.utils import outputs

_HERE = pathlib.Path(__file__).parent
_SCRIPTS = ("dom.js", "charts.js", "overview.js", "turns.js", "episodes.js", "main.js")
# Fields for the list, the filters and the tiles; the rest of an episode is parsed when shown.
_ROW = ("question", "answer", "correct", "actions", "category", "source", "workflow", "step", "end")


def write(out: pathlib.Path, found: Found) -> int:
    """Write the page atomically and return its size in bytes.

    Missing images are added to `found.skipped`.
    """
    text = page(found)
    # A lone surrogate, which JSON can hold, cannot be encoded as UTF-8.
    outputs.write_text(out, text, errors="replace")
    return out.stat().st_size


def page(found: Found) -> str:
    """Return the page as HTML text. Missing images are added to `found.skipped`."""
    pictures, missing = found.pictures.encode()
    found.skipped.extend(missing)
    summary = {
        "name": found.name,
        "curves": found.curves,
        "results": found.results,
        "rows": [_row(episode) for episode in found.episodes],
        "lines": found.lines,
        "lookedAt": found.looked_at,
        "skipped": found.skipped,
        "tokenTexts": found.token_texts,
    }
    script = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'"use strict";\n{script}'
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    return string.Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{found.name} · report"),
        policy=(
            f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        style=style,
        summary=_json(summary),
        details="\n".join(map(_json, found.episodes)),
        pictures=_json(pictures),
        script=script,
    )


def _row(episode: dict[str, Any]) -> dict[str, Any]:
    row = {field: episode[field] for field in _ROW}
    row["reward"] = episode["reward"].get("reward")
    row["picture"] = episode["pictures"][0] if episode["pictures"] else -1
    return row


def _json(value: Any) -> str:
    """Encode a value as one line of JSON that cannot end a script or begin a comment.

    NaN, which a results file may contain but JSON does not allow, becomes null.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        value = json.loads(json.dumps(value), parse_constant=lambda name: None)
        return _json(value)
    return text.replace("<", "\\u003c")


def _digest(text: str) -> str:
    """Return the Content-Security-Policy hash of an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}"
