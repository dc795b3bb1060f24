"""Secrets in addresses: found, so that settings can refuse them, and taken out of what is written.

Settings are written to files, logs and trackers. A key belongs into the environment.
"""

import re
import urllib.parse
from typing import Any

# With a scheme, without one ("//host"), or "user:password@host" alone.
_ADDRESS = re.compile(
    r"(?:(?<![\w+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}:)?//[^\s\"'<>]+|(?<!\S)[^\s/:@]+:[^\s/@]+@[^\s@]+"
)
# Parameters whose value is a credential: by their last word, written in any of the usual ways.
_SECRET_NAMES = re.compile(
    r"hapikey|code|(?:.*[^a-z])?(?:(?:api|access|secret|auth|account|private|subscription|client|app|user)*"
    r"(?:key|keyid|token|secret|password|passwd|passphrase|pwd|pass|pw|signature|sig|credentials?"
    r"|authorization|auth|bearer|jwt|session|sessionid|sid))",
)
_HIDDEN = "***"


def find_secret(text: str) -> str | None:
    """Describe the first secret found in a text's URLs without showing it; None if there is none.

    Args:
      text: a setting: an address, a file's path, anything.
    """
    for match in _ADDRESS.finditer(text):
        head, *query = re.split("[?#]", _split(match[0])[1])
        if "@" in head.partition("/")[0] or _has_password(head):
            return "a user name or password before the host"
        for name, value in urllib.parse.parse_qsl("&".join(query).replace(";", "&")):
            if value and _is_secret(name):
                return f"the parameter {name!r}"
    return None


def redact(value: Any) -> Any:
    """Return plain data (texts, numbers, dicts, lists, tuples) with `***` for each secret that an
    address in it holds."""
    if isinstance(value, str):
        return _ADDRESS.sub(lambda match: _redact_address(match[0]), value)
    if isinstance(value, dict):
        return {name: redact(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(redact, value))
    return value


def _redact_address(address: str) -> str:
    if find_secret(address) is None:
        return address
    scheme, rest = _split(address)
    head, *query = re.split("([?#])", rest, maxsplit=1)
    if "@" in head:
        head = f"{_HIDDEN}@{head.rpartition('@')[2]}"
    tail = "".join(query)
    return (
        scheme
        + head
        + re.sub(
            r"([?#&;])([^=&;#?]*)=([^&;#]*)",
            lambda match: (
                f"{match[1]}{match[2]}="
                + (_HIDDEN if _is_secret(urllib.parse.unquote(match[2])) else match[3])
            ),
            tail,
        )
    )


def _has_password(head: str) -> bool:
    """Whether a password that holds a slash ends the authority for a parser, not for a reader."""
    authority = re.split("[/@]", head, maxsplit=1)[0]
    _, colon, port = authority.partition(":")
    is_port = port.isdecimal() and head[len(authority) : len(authority) + 1] == "/"
    return "@" in head and bool(colon) and not is_port


def _split(address: str) -> tuple[str, str]:
    """The scheme with its slashes, and the rest."""
    scheme, slashes, rest = address.partition("//")
    return (scheme + slashes, rest) if slashes else ("", address)


def _is_secret(name: str) -> bool:
    # "apiKey", "API-KEY" and "X-Amz-Signature" are read as the same kind of words.
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    return _SECRET_NAMES.fullmatch(words) is not None
