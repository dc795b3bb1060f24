"""Interface of search tools: an async function from a query to an observation.

    async def search(query: Query) -> Observation: ...

A tool may be slow, raise or never return: the policy then receives an error message, and other
episodes are unaffected. Its output is untrusted: text cannot become a control token or imitate a
tag or the border of a result (`episodes/escaping.py`), and images are opened safely and bounded in
size (`episodes/rules.py`). Tools therefore build their results with `text_result` and
`image_result`, the only functions that write labels (`link: `) that the policy may trust. A label
in the text of a manually created `Part` is escaped as an imitation.

All tools run on one asyncio loop. A tool that blocks the loop for too long is abandoned together
with it, and the other calls are restarted on a new loop. A client that is bound to a loop must
therefore be kept per loop.
"""

import dataclasses
import pathlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

import PIL.Image

from mmsr1_jax.tools.links import display_link, one_line

ImageLike = PIL.Image.Image | bytes | str | pathlib.Path  # bytes: contents of a file; str: path
Status = Literal["ok", "empty", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """Input of a search tool.

    Attributes:
      action: Either `text_search` or `image_search`.
      text: Search query; None for an image search, which looks up the whole image.
      question: Question that the policy is answering.
      images: Images of the question.
      example: ID of the example, used to look up recorded answers.
    """

    action: str
    text: str | None
    question: str
    images: Sequence[ImageLike] = ()
    example: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """Part of a result: either text or an image.

    Attributes:
      text: Text to show, unless `fields` is set.
      image: Image, in one of the forms of `ImageLike`.
      fields: Pairs (label, value) of a labelled text, in order, each shown on its own line as
        `label: value`. Labels are written by the tool. Values are untrusted, and all except a
        `summary` are single lines.
    """

    text: str | None = None
    image: ImageLike | None = None
    fields: tuple[tuple[str, str], ...] = ()


Result = tuple[Part, ...]  # a page, or an image with its title; shown in full or not at all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """Output of a search tool.

    Attributes:
      status: Outcome of the search: `ok`, `empty` (no results) or `failed`.
      results: Results, best first.
      error: Reason of a failure, for the records. It is not shown to the policy, as it may contain
        addresses.
    """

    status: Status = "ok"
    results: Sequence[Result] = ()
    error: str | None = None


Tool = Callable[[Query], Awaitable[Observation]]


def text_result(link: str, summary: str) -> Result:
    """Return a page as a result: its link, and its summary for the question."""
    link, summary = display_link(str(link)), str(summary)  # cached results may be untrusted
    fields = (("link", link), ("summary", summary))
    return (Part(text=f"link: {link}\nsummary: {summary}", fields=fields),)


def image_result(image: ImageLike, title: str) -> Result:
    """Return a page with a similar image as a result: the image and the page's title."""
    title = one_line(str(title))
    return (
        Part(text="image: ", fields=(("image", ""),)),
        Part(image=image),
        Part(text=f"\ntitle: {title}", fields=(("title", title),)),
    )


def parse_text_result(text: str) -> Result:
    """Rebuild a result of `text_result` from its text.

    A text in another form becomes a result without labels.
    """
    link, separator, summary = text.removeprefix("link: ").partition("\nsummary: ")
    if not text.startswith("link: ") or not separator or "\n" in link:
        return (Part(text=text),)
    return text_result(link, summary)
