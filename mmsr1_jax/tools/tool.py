"""What a search tool is: an async function from a query to an observation.

    async def search(query: Query) -> Observation: ...

It may take its time, raise or never come back: the engine goes on without it, and the policy is
told in words that the search failed. What it returns is data from outside, and is treated as such:
its text cannot become a control token, imitate a tag or the border of a result
(`episodes/escaping.py`), its pictures are opened with care and bounded in size
(`episodes/rules.py`). So a tool gives its results by `text_result` and `image_result`: only these
write labels (`link: `) that the policy may trust. A label in the text of a `Part` made by hand
counts as an imitation.

All tools run on one asyncio loop. One that blocks it for too long is left behind with it, and the
others are called on a new loop; so a client that is bound to a loop is to be kept by loop.
"""

import dataclasses
import pathlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

import PIL.Image

from mmsr1_jax.tools.links import one_line, shown_link

Picture = PIL.Image.Image | bytes | str | pathlib.Path  # bytes: of a file; str: the path of one
Status = Literal["ok", "empty", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """What a tool is asked.

    Attributes:
      action: `text_search` or `image_search`.
      text: what to search for; None for an image search, which looks up the whole image.
      question: the question that the policy works on.
      images: the question's images.
      example: id of the example, by which recorded answers are found.
    """

    action: str
    text: str | None
    question: str
    images: Sequence[Picture] = ()
    example: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a result: text, or a picture; one of the two.

    Attributes:
      text: what is shown, unless there are `fields`.
      image: see `Picture`.
      fields: of a text with labels: (label, value) in order, each shown on a line of its own as
        `label: value`. Labels are the tool's own words; values come from outside, and all but a
        `summary` are one line.
    """

    text: str | None = None
    image: Picture | None = None
    fields: tuple[tuple[str, str], ...] = ()


Result = tuple[Part, ...]  # a page, or a picture with its title; shown as a whole or not at all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """What a tool found.

    Attributes:
      status: `ok`; `empty`: searched, and found nothing; `failed`: could not search.
      results: best first.
      error: why it failed, for the record; the policy does not see it, as it may hold addresses.
    """

    status: Status = "ok"
    results: Sequence[Result] = ()
    error: str | None = None


Tool = Callable[[Query], Awaitable[Observation]]


def text_result(link: str, summary: str) -> Result:
    """A page: its link, and what it says (its summary for the question)."""
    link, summary = shown_link(str(link)), str(summary)  # a store made elsewhere may hold anything
    fields = (("link", link), ("summary", summary))
    return (Part(text=f"link: {link}\nsummary: {summary}", fields=fields),)


def image_result(image: Picture, title: str) -> Result:
    """A page with a similar picture: the picture and the page's title."""
    title = one_line(str(title))
    return (
        Part(text="image: ", fields=(("image", ""),)),
        Part(image=image),
        Part(text=f"\ntitle: {title}", fields=(("title", title),)),
    )


def text_result_of(text: str) -> Result:
    """The result of `text_result` from its text, as stores keep it. A text of another form becomes
    a result without labels."""
    link, separator, summary = text.removeprefix("link: ").partition("\nsummary: ")
    if not text.startswith("link: ") or not separator or "\n" in link:
        return (Part(text=text),)
    return text_result(link, summary)
