"""Detection and redaction of credentials in URLs.

Settings are written to files, logs and experiment trackers, so a URL that contains a credential is
rejected as a setting, and credentials are redacted from all output. Keys belong in environment
variables.
"""

import re
import urllib.parse
from typing import Any

# A URL with a scheme or without one ("//host"), a bare "user:password@host", or any word with
# parameters.
_ADDRESS = re.compile(
    r"(?:(?<![\w+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}:)?//[^\s\"'<>]+"
    r"|(?<!\S)(?![A-Za-z]:\\)[^\s/:@]+:[^\s/@]+@[^\s@]+"
    r"|(?<![^\s\"'<>])[^\s\"'<>?#;]*[?#;][^\s\"'<>]+"
)
_USER = re.compile(r"(?![A-Za-z]:\\)[^\s/:@]+:[^\s/@]+@")  # with no slashes before it
# Parameters whose value is a credential, recognised by the last word of their name in any of the
# usual spellings.
_SECRET_NAMES = re.compile(
    r"hapikey|code|(?:.*[^a-z])?(?:"
    r"(?:api|access|secret|auth|account|private|subscription|client|app|user|aws)*"
    r"(?:key|(?:key|session)[_-]?id|appid|token|secret|password|passwd|passphrase|passcode|pwd|pass"
    r"|pw|t?otp|signature|sig|hmac|credentials?|authorization|auth|bearer|jwt|session|sid))",
)
_MARKS = re.compile("([?#&;])")  # characters that precede a parameter
HIDDEN = "***"
_ROUNDS = 2  # levels of percent-encoding, for a URL inside another URL


def find_secret(text: str) -> str | None:
    """Describe the first credential in the URLs of a string, without revealing it.

    The string is searched as given, and after percent-decoding it once and twice.

    Args:
      text: Value of any setting, such as a URL or a file path.

    Returns:
      The description, or None if no credential was found.
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
    """Replace each credential in the URLs of plain data with `***`.

    Plain data consists of strings, numbers, dicts, lists and tuples.
    """
    if isinstance(value, str):
        text = _ADDRESS.sub(lambda match: _redact_address(match[0]), value)
        if _is_clean(text):
            return text
        # The secret has no certain boundaries, as in an encoded URL, so whole words are hidden.
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
        elif not is_hidden:  # otherwise it may be the rest of a hidden value
            done += mark + parameter
    return scheme + done


def _is_clean(text: str) -> bool:
    return find_secret(text.replace(f"{HIDDEN}@", "").replace(f"={HIDDEN}", "=")) is None


def _has_password(head: str) -> bool:
    """Return whether a password contains a slash, at which URL parsers end the authority."""
    authority = re.split("[/@]", head, maxsplit=1)[0]
    _, colon, port = authority.partition(":")
    is_port = port.isdecimal() and head[len(authority) : len(authority) + 1] == "/"
    return "@" in head and bool(colon) and not is_port


def _split(address: str) -> tuple[str, str]:
    """Return the scheme with its slashes (empty if there is no scheme) and the rest."""
    scheme, slashes, rest = address.partition("//")
    is_scheme = slashes and not set(scheme) & set("/?#@&;=")
    return (scheme + slashes, rest) if is_scheme else ("", address)


def _is_secret(name: str) -> bool:
    # "apiKey", "API-KEY" and "X-Amz-Signature" are split into words in the same way.
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    parts = words.replace("]", "").split("[")  # "key[]", "key[0]", "user[password]"
    return "/" not in words and any(map(_SECRET_NAMES.fullmatch, parts))
