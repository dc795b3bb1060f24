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
_PARAMETER_MARKS = re.compile("([?#&;])")  # characters that precede a parameter
REDACTED = "***"
_MAX_DECODINGS = 2  # levels of percent-encoding, for a URL inside another URL


def find_secret(text: str) -> str | None:
    """Describe the first credential in the URLs of a string, without revealing it.

    The string is searched as given, and after percent-decoding it once and twice.

    Args:
      text: Value of any setting, such as a URL or a file path.

    Returns:
      The description, or None if no credential was found.
    """
    for _ in range(_MAX_DECODINGS + 1):
        for match in _ADDRESS.finditer(text):
            if description := _describe_secret(match[0]):
                return description
        text, previous = urllib.parse.unquote(text), text
        if text == previous:
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
        # The boundaries of the secret are unknown, as in an encoded URL: redact the whole word.
        return re.sub(r"\S+", lambda word: word[0] if _is_clean(word[0]) else REDACTED, text)
    if isinstance(value, dict):
        return {name: redact(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(redact, value))
    return value


def _describe_secret(address: str) -> str | None:
    scheme, rest = _split_scheme(address)
    authority = re.split("[?#]", rest, maxsplit=1)[0]
    if scheme:
        has_user = "@" in authority.partition("/")[0] or _has_password(authority)
    else:
        has_user = _USER.match(rest) is not None
    nested = [re.split("[?#]", part, maxsplit=1)[0] for part in rest.split("//")[1:]]
    has_user |= any(url.partition("/")[0].find("@") > 0 or _has_password(url) for url in nested)
    if has_user:
        return "a user name or password before the host"
    for parameter in _PARAMETER_MARKS.split(rest)[2::2]:
        name, _, value = parameter.partition("=")
        name = urllib.parse.unquote_plus(name)
        if value and _is_secret(name):
            return f"the parameter {name!r}"
    return None


def _redact_address(address: str) -> str:
    if find_secret(address) is None:
        return address
    scheme, rest = _split_scheme(address)
    head, *query = re.split("([?#])", rest, maxsplit=1)
    if "@" in head:
        head = f"{REDACTED}@{head.rpartition('@')[2]}"
    result, *parts = _PARAMETER_MARKS.split("".join([head, *query]))
    is_redacted = False
    for mark, parameter in zip(parts[::2], parts[1::2], strict=True):
        name, equals, value = parameter.partition("=")
        if equals:
            is_redacted = bool(value) and _is_secret(urllib.parse.unquote_plus(name))
            is_redacted = is_redacted or find_secret(value) is not None
            result += f"{mark}{name}={REDACTED if is_redacted else value}"
        elif not is_redacted:  # otherwise it may be the rest of a redacted value
            result += mark + parameter
    return scheme + result


def _is_clean(text: str) -> bool:
    return find_secret(text.replace(f"{REDACTED}@", "").replace(f"={REDACTED}", "=")) is None


def _has_password(head: str) -> bool:
    """Return whether a password contains a slash, at which URL parsers end the authority."""
    authority = re.split("[/@]", head, maxsplit=1)[0]
    _, colon, port = authority.partition(":")
    is_port = port.isdecimal() and head[len(authority) : len(authority) + 1] == "/"
    return "@" in head and bool(colon) and not is_port


def _split_scheme(address: str) -> tuple[str, str]:
    """Return the scheme with its slashes (empty if there is no scheme) and the rest."""
    scheme, slashes, rest = address.partition("//")
    is_scheme = slashes and not set(scheme) & set("/?#@&;=")
    return (scheme + slashes, rest) if is_scheme else ("", address)


def _is_secret(name: str) -> bool:
    # "apiKey", "API-KEY" and "X-Amz-Signature" are split into words in the same way.
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    parts = words.replace("]", "").split("[")  # "key[]", "key[0]", "user[password]"
    return "/" not in words and any(map(_SECRET_NAMES.fullmatch, parts))
