"""Pages and pictures of concepts: found by searches, filtered, without near-duplicates.

concept ──► text search ──► pages that name it ───────────────┐
        └─► picture search ──► pictures whose title names it ──┴─► sources: a page, a picture

All searches of all concepts run first. What is compared between concepts (duplicates) is decided
afterwards, in the order of the concepts, so that no result depends on which answer came first.
"""

import asyncio
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from mmsr1_jax.config import Construction
from mmsr1_jax.data.construction.concepts import Concept
from mmsr1_jax.data.construction.matching import NearDuplicates, fold, names_any
from mmsr1_jax.data.construction.meter import Meter
from mmsr1_jax.data.construction.overlap import TestSet
from mmsr1_jax.data.construction.stages import Dropped, StageResult, work_on
from mmsr1_jax.tools.picture_search import (
    LocalPictureSearch,
    Picture,
    PictureFilter,
    PictureSearch,
    usable_pictures,
)
from mmsr1_jax.tools.tool import Observation, Query, Tool
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import files, outputs

IMAGES = "images"  # folder of the pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A page about a concept, and a picture of it.

    Attributes:
      concept: Name of the concept.
      names: All names of it.
      band: Band of frequency: `head`, `tail` or empty.
      url: Link of the page.
      page: Text of the page.
      image: Path of the picture, relative to the directory of the construction.
      image_hash: Perceptual hash of the picture, in hexadecimal.
      other_hashes: Those of the concept's other pictures, for comparisons with test sets.
      image_title: Title of the picture.
      image_link: Link of the page that shows it.
      licence: Licence of the picture, as far as it is known.
    """

    concept: str
    names: tuple[str, ...]
    band: str
    url: str
    page: str
    image: str
    image_hash: str
    other_hashes: tuple[str, ...]
    image_title: str
    image_link: str
    licence: str

    @property
    def hashes(self) -> list[bytes]:
        """Perceptual hashes of all pictures of the concept."""
        return [bytes.fromhex(text) for text in (self.image_hash, *self.other_hashes)]


def read_picture(source: Source, out: pathlib.Path) -> bytes:
    """Return the JPEG file of a source's picture.

    Raises:
      FileRefusedError: It is missing, or not in `out`, the directory of the construction.
    """
    return files.read_regular(files.resolve_inside(source.image, out))


@dataclasses.dataclass(frozen=True)
class _Found:
    """Usable pages (URL, text) and pictures of a concept."""

    concept: Concept
    pages: list[tuple[str, str]]
    pictures: list[Picture]


async def find_sources(
    concepts: Sequence[Concept],
    text_search: Tool,
    picture_search: PictureSearch | LocalPictureSearch,
    settings: Construction,
    heldout: TestSet,
    meter: Meter,
    out: pathlib.Path,
    *,
    timeout: float,
) -> StageResult[Source]:
    """Find pages and pictures of concepts, and write the pictures to `out/images/`.

    Args:
      concepts: Concepts.
      text_search: Search for pages. A summary in its results is taken as the text of the page.
      picture_search: Search for pictures.
      settings: Settings.
      heldout: Questions whose concepts are not used.
      meter: Meter of the requests.
      out: Directory of the construction.
      timeout: Time limit of a text search, in seconds.

    Returns:
      The sources, at most `pages_per_concept` of a concept.
    """
    allowed = PictureFilter(
        min_side=settings.min_side,
        max_side=settings.max_side,
        max_ratio=settings.max_ratio,
        licences=settings.licences,
    )

    async def work(concept: Concept) -> StageResult[_Found]:
        result: StageResult[_Found] = StageResult()
        pages = await _pages(concept, text_search, settings, timeout)
        if isinstance(pages, str):
            result.drop(concept.name, pages)
            return result
        pictures, reasons = [], []
        found = usable_pictures(
            picture_search, concept.name, settings.pictures_per_concept, allowed
        )
        async for picture in found:
            if isinstance(picture, str):
                reasons.append(picture)
            elif names_any(picture.title, concept.names) is None:
                reasons.append("picture's title does not name the concept")
            else:
                pictures.append(picture)
        if not pictures:
            result.drop(concept.name, reasons[0] if reasons else "no picture found")
            return result
        result.kept.append(_Found(concept, pages, pictures))
        return result

    found = await work_on(
        concepts, work, name="sources", label=lambda concept: concept.name, meter=meter,
        max_concurrency=settings.max_concurrency,
    )  # fmt: skip
    return _combine(found, settings, heldout, out)


async def _pages(
    concept: Concept, text_search: Tool, settings: Construction, timeout: float
) -> list[tuple[str, str]] | str:
    """Return (URL, text) of usable pages, or the reason for dropping the concept.

    Raises:
      WebError: A service did not respond.
    """
    query = Query(action="text_search", text=concept.name, question=concept.name)
    try:
        async with asyncio.timeout(timeout):
            observation = await text_search(query)
    except TimeoutError:
        raise WebError("the text search took too long") from None
    if observation.status == "failed":
        if (observation.error or "").startswith("no page could be read"):
            return "no page could be read"
        raise WebError(observation.error or "the text search failed")
    pages = _texts(observation)
    if not pages:
        return "no page found"
    long = [(url, text) for url, text in pages if len(text) >= settings.min_page_chars]
    if not long:
        return "page too short"
    named = [(url, text) for url, text in long if names_any(text, concept.names)]
    return named or "page does not name the concept"


def _texts(observation: Observation) -> list[tuple[str, str]]:
    """Return (link, text) of the results of a text search."""
    pages = []
    for result in observation.results:
        fields = dict(field for part in result for field in part.fields)
        if fields.get("summary"):
            pages.append((fields.get("link", ""), fields["summary"]))
    return pages


def _combine(
    found: StageResult[_Found], settings: Construction, heldout: TestSet, out: pathlib.Path
) -> StageResult[Source]:
    """Drop held-out concepts and duplicates, and pair the pages of a concept with its pictures."""
    result: StageResult[Source] = StageResult(
        dropped=list(found.dropped), unresolved=list(found.unresolved)
    )
    texts, pictures = NearDuplicates(settings.duplicate_text), _Pictures(settings.duplicate_bits)
    links: set[str] = set()
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    for item in found.kept:
        concept = item.concept
        overlap = heldout.concept_overlap(concept.names, [p.hash for p in item.pictures])
        own = [picture for picture in item.pictures if not pictures.contains(picture.hash)]
        if overlap or not own:
            result.drop(concept.name, overlap or "picture is a near-duplicate")
            continue
        pages = []
        for url, text in item.pages:
            if len(pages) == settings.pages_per_concept:
                break
            key = f"{concept.name} {url}"
            if (url and url in links) or texts.add(key, text) is not None:
                result.dropped.append(Dropped(concept.name, "page is a near-duplicate"))
                continue
            links.add(url)
            pages.append((url, text))
        for index, (url, text) in enumerate(pages):
            picture = own[index % len(own)]
            result.kept.append(_source(concept, url, text, picture, item.pictures))
            _write_once(out / IMAGES / f"{picture.name}.jpg", picture.jpeg)
        for picture in own if pages else ():
            pictures.add(picture.hash)
    return result


def _source(
    concept: Concept, url: str, text: str, picture: Picture, pictures: Sequence[Picture]
) -> Source:
    names = list({fold(name): name for name in reversed(concept.names)}.values())[::-1]
    return Source(
        concept=concept.name, names=tuple(names), band=concept.band, url=url, page=text,
        image=f"{IMAGES}/{picture.name}.jpg", image_hash=picture.hash.hex(),
        other_hashes=tuple(other.hash.hex() for other in pictures if other is not picture),
        image_title=picture.title, image_link=picture.link, licence=picture.licence,
    )  # fmt: skip


def _write_once(path: pathlib.Path, data: bytes) -> None:
    """Write a file named by the digest of its contents, unless it is there."""
    if not path.is_file():
        with outputs.new_file(path) as partial:
            partial.write_bytes(data)


class _Pictures:
    """Perceptual hashes of the pictures used so far."""

    def __init__(self, bits: int):
        self._bits, self._count = bits, 0
        self._hashes = np.zeros((64, 4), np.uint64)

    def contains(self, picture: bytes) -> bool:
        """Return whether a near-duplicate of a picture was added."""
        query = np.frombuffer(picture, np.uint64)
        distance = np.bitwise_count(self._hashes[: self._count] ^ query).sum(axis=1)
        return bool((distance <= self._bits).any())

    def add(self, picture: bytes) -> None:
        if self._count == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
        self._hashes[self._count] = np.frombuffer(picture, np.uint64)
        self._count += 1
