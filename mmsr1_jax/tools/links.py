"""Display forms of links and titles: one line each, and web addresses that show their real host."""

import re
import urllib.parse

from mmsr1_jax.tools.lookalikes import LOOKS_LIKE, is_lookalike

_MAX_LINK = 1000  # characters; the host is near the beginning
# Characters that some program treats as a line break, and control characters.
_BREAKS = r"\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029"
_BREAK = re.compile(rf"[{_BREAKS}][{_BREAKS}\s]*")
_WEB = re.compile(r"(https?):[/\\]+([^/?#]*)", re.IGNORECASE)
_PORT = re.compile(r"(.*?)(:[0-9]*)?", re.DOTALL)
_DOTS = re.compile("[\u3002\uff0e\uff61]")  # label separators that are equivalent to a dot
# In a URL: white space, control characters, angle brackets, and invisible or bidirectional marks.
_UNSAFE = re.compile(r"[\s<>\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def one_line(text: str) -> str:
    """Return a text with each run of line breaks and control characters replaced by a space."""
    return _BREAK.sub(" ", text)


def display_link(link: str) -> str:
    """Return the first 1,000 characters of a link as one line.

    In a web address, the user name before the host is removed, host labels that imitate another
    host are written in Punycode (`xn--..`), and unsafe characters are percent-encoded. Text that
    only resembles a web address is percent-encoded. Other text, such as the title of a passage, is
    only reduced to one line.
    """
    link = link[:_MAX_LINK]
    address = link.strip()
    web = _WEB.match(address)
    if web is None:
        if not _WEB.match(address[:20].translate(LOOKS_LIKE).lstrip()):
            return one_line(link)
        return urllib.parse.quote(address, safe=":/?#@")  # a lookalike of a web address
    authority = _PORT.fullmatch(web[2].rpartition("@")[2])
    assert authority is not None  # the pattern matches any text
    host, port = authority.groups(default="")
    host = ".".join(map(_display_label, _DOTS.sub(".", host).split(".")))
    rest = _UNSAFE.sub(lambda match: urllib.parse.quote(match[0]), address[web.end() :])
    slashes = address[web.end(1) : web.start(2)]
    return f"{web[1]}{slashes}{host}{port}{rest}"


def _display_label(label: str) -> str:
    """Return the display form of one label of a host name."""
    if not label.isascii():
        other = [character for character in label if not character.isascii()]
        lookalikes = [character for character in other if is_lookalike(character)]
        has_latin = any(character.isascii() and character.isalpha() for character in label)
        if lookalikes and (has_latin or len(lookalikes) == len(other)):
            return f"xn--{label.encode('punycode').decode('ascii')}"
        return label
    return urllib.parse.quote(label, safe="-._~:[]%!$&'()*+,;=")
