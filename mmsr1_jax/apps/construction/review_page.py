"""Page on which people accept, edit or reject questions: one HTML file.

All texts are in a block of JSON in which every `<` is escaped, and the script inserts them as text.
"""

import hashlib
import json
import pathlib
import string
from collections.abc import Sequence
from typing import Any

from mmsr1_jax.apps import report
from mmsr1_jax.apps.construction.thumbnails import thumbnail
from mmsr1_jax.apps.self_contained import json_block, security_policy
from mmsr1_jax.data.construction.labels import Labelled
from mmsr1_jax.data.construction.pipeline import question_id
from mmsr1_jax.utils import outputs

_FOLDER = pathlib.Path(__file__).parent
_SCRIPTS = (pathlib.Path(report.__file__).parent / "dom.js", _FOLDER / "review.js")


def write(path: pathlib.Path, questions: Sequence[Labelled], out: pathlib.Path) -> None:
    """Write the page of constructed questions, whose pictures are in `out`."""
    items = [_item(question, out) for question in questions]
    identity = json.dumps([item["id"] for item in items])
    script = "\n".join(file.read_text(encoding="utf-8") for file in _SCRIPTS)
    script = f'"use strict";\n{script}'
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    page = string.Template((_FOLDER / "review.html").read_text(encoding="utf-8")).substitute(
        policy=security_policy(script, style),
        style=style,
        data=json_block(
            {
                "digest": hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
                "items": items,
            }
        ),
        script=script,
    )
    with outputs.new_file(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")


def _item(question: Labelled, out: pathlib.Path) -> dict[str, Any]:
    draft, source = question.draft, question.draft.source
    calculation = draft.calculation
    return {
        "id": question_id(question),
        "question": draft.question,
        "answer": draft.answer,
        "aliases": "; ".join(question.aliases),
        "concept": source.concept,
        "evidence": draft.evidence,
        "calculation": ""
        if calculation is None
        else f"{calculation.operation} of {', '.join(calculation.numbers)}",
        "url": source.url,
        "imageTitle": source.image_title,
        "licence": source.licence,
        "category": question.category,
        "image": thumbnail(source, out),
    }
