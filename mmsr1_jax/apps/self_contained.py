"""Pages that are one file: data as JSON that cannot end a script, and a policy without network."""

import base64
import hashlib
import json
from typing import Any


def json_block(value: Any) -> str:
    """Encode a value as one line of JSON that cannot end a script or begin a comment.

    NaN, which a results file may contain but JSON does not allow, becomes null.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        value = json.loads(json.dumps(value), parse_constant=lambda name: None)
        return json_block(value)
    return text.replace("<", "\\u003c")


def security_policy(script: str, style: str) -> str:
    """Return a Content-Security-Policy that allows one script, one style and data images.

    Args:
      script: Text of the inline script; empty allows none.
      style: Text of the inline style.
    """
    scripts = f"'{_digest(script)}'" if script else "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src '{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    """Return the Content-Security-Policy hash of an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}"
