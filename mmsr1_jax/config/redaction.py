"""Secrets in addresses: found, so that settings can refuse them, and taken out of what is written.

Settings are written to files, logs and trackers. A key belongs into the environment.
"""

import re
import urllib.parse
from typing import Any

# With a scheme, without one ("//host"), "user:password@host" alone, or any word with parameters.
_ADDRESS = re.compile(
    r"(?:(?<![\w+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}:)?//[^\s\"'<>]+"
    r"|(?<!\S)(?![A-Za-z]:\\)[^\s/:@]+:[^\s/@]+@[^\s@]+"
    r"|(?<![^\s\"'<>])[^\s\"'<>?#;]*[?#;][^\s\"'<>]+"
)
_USER = re.compile(r"(?![A-Za-z]:\\)[^\s/:@]+:[^\s/@]+@")  # without slashes before it
# Parameters whose value is a credential: by their last word, written in any of the usual ways.
_SECRET_NAMES = re.compile(
    r"hapikey|code|(?:.*[^a-z])?(?:"
    r"(?:api|access|secret|auth|account|private|subscription|client|app|user|aws)*"
    r"(?:key|(?:key|session)[_-]?id|appid|token|secret|password|passwd|passphrase|passcode|pwd|pass"
    r"|pw|t?otp|signature|sig|hmac|credentials?|authorization|auth|bearer|jwt|session|sid))",
)
_MARKS = re.compile("([?#&;])")  # before a parameter
HIDDEN = "***"
_ROUNDS = 2  # of percent-encoding, one address within another


def find_secret(text: str) -> str | None:
    """Describe the first secret found in a text's URLs without showing it; None if there is none.

    The text is searched as it is, and with its percent-encoding undone once and twice.

    Args:
      text: a setting: an address, a file's path, anything.
    """
    for _ in range(_ROUNDS + 1):
        for match in _ADDRESS.finditer(text):
            if found := _in_address(match[0]):
                return found
        text, before = urllib.parse.unquote(text), text
        if text == before:
            break
    return None


def redact(value: Any) -> Any:
    """Return plain data (texts, numbers, dicts, lists, tuples) with `***` for each secret that an
    address in it holds."""
    if isinstance(value, str):
        text = _ADDRESS.sub(lambda match: _redact_address(match[0]), value)
        if _is_clean(text):
            return text
        # Where a secret begins and ends is not certain, such as in an encoded address.
        return re.sub(r"\S+", lambda word: word[0] if _is_clean(word[0]) else HIDDEN, text)
    if isinstance(value, dict):
        return {name: redact(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(redact, value))
    return value


def _in_address(address: str) -> str | None:
    scheme, rest = _split(address)
    head = re.split("[?#]", rest, maxsplit=1)[0]
    user = "@" in head.partition("/")[0] or _has_password(head) if scheme else _USER.match(rest)
    inner = (re.split("[?#]", part, maxsplit=1)[0] for part in rest.split("//")[1:])
    if user or any(one.partition("/")[0].find("@") > 0 or _has_password(one) for one in inner):
        return "a user name or password before the host"
    for parameter in _MARKS.split(rest)[2::2]:
        name, _, value = parameter.partition("=")
        name = urllib.parse.unquote_plus(name)
        if value and _is_secret(name):
            return f"the parameter {name!r}"
    return None


def _redact_address(address: str) -> str:
    if find_secret(address) is None:
        return address
    scheme, rest = _split(address)
    head, *query = re.split("([?#])", rest, maxsplit=1)
    if "@" in head:
        head = f"{HIDDEN}@{head.rpartition('@')[2]}"
    done, *parts = _MARKS.split("".join([head, *query]))
    is_hidden = False
    for mark, parameter in zip(parts[::2], parts[1::2], strict=True):
        name, equals, value = parameter.partition("=")
        if equals:
            is_hidden = bool(value) and _is_secret(urllib.parse.unquote_plus(name))
            is_hidden = is_hidden or find_secret(value) is not None
            done += f"{mark}{name}={HIDDEN if is_hidden else value}"
        elif not is_hidden:  # else it may be the rest of what is hidden
            done += mark + parameter
    return scheme + done


def _is_clean(text: str) -> bool:
    return find_secret(text.replace(f"{HIDDEN}@", "").replace(f"={HIDDEN}", "=")) is None


def _has_password(head: str) -> bool:
    """Whether a password that holds a slash ends the authority for a parser, not for a reader."""
    authority = re.split("[/@]", head, maxsplit=1)[0]
    _, colon, port = authority.partition(":")
    is_port = port.isdecimal() and head[len(authority) : len(authority) + 1] == "/"
    return "@" in head and bool(colon) and not is_port


def _split(address: str) -> tuple[str, str]:
    """The scheme with its slashes, if there is one, and the rest."""
    scheme, slashes, rest = address.partition("//")
    is_scheme = slashes and not set(scheme) & set("/?#@&;=")
    return (scheme + slashes, rest) if is_scheme else ("", address)


def _is_secret(name: str) -> bool:
    # "apiKey", "API-KEY" and "X-Amz-Signature" are read as the same kind of words.
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    parts = words.replace("]", "").split("[")  # "key[]", "key[0]", "user[password]"
    return "/" not in words and any(map(_SECRET_NAMES.fullmatch, parts))
