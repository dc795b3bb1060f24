"""Pictures found by words, in a local index and by services: licences, sizes and shapes."""

import asyncio
import io
import json

import numpy as np
import PIL.Image
import pytest

from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.index_builder import LocalIndexError, build_index
from mmsr1_jax.tools.picture_search import (
    LocalPictureSearch,
    Picture,
    PictureFilter,
    PictureSearch,
    usable_pictures,
)
from mmsr1_jax.tools.services import PictureHit
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import StatusError, WebError

ANY = PictureFilter(min_side=20, max_side=50, max_ratio=2.0, licences=())


def file(size=(60, 40), seed=0):
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = PIL.Image.fromarray(pixels)
    image.info["comment"] = b"secret place"
    image.save(data, "jpeg", comment=b"secret place")
    return data.getvalue()


class Finder:
    """Service with fixed pictures, some of which cannot be fetched."""

    def __init__(self, *hits, files=None):
        self.hits, self.files, self.calls = hits, files or {}, 0

    async def pictures(self, query, count, *, free):
        self.calls += 1
        return list(self.hits)[:count]

    async def fetch(self, url):
        if url not in self.files:
            raise StatusError(404)
        return self.files[url]


def found(finder, allowed=ANY, cache=None, count=10, free=False):
    calls = CachedCalls(cache or ToolCache(None, "off"))
    search = PictureSearch(finder, finder.fetch, calls, "serper", free=free)

    async def collect():
        return [picture async for picture in usable_pictures(search, "bridge", count, allowed)]

    return asyncio.run(collect())


def test_pictures_are_shrunk_without_metadata_and_named_by_their_contents():
    finder = Finder(
        PictureHit("http://p", "A\nbridge", "big", "small", "CC BY"), files={"big": file()}
    )
    (picture,) = found(finder)
    assert isinstance(picture, Picture) and picture.title == "A bridge"
    assert (picture.link, picture.licence, len(picture.hash)) == ("http://p", "CC BY", 32)
    assert b"secret" not in picture.jpeg
    assert PIL.Image.open(io.BytesIO(picture.jpeg)).size == (50, 33)
    assert found(finder)[0].name == picture.name


def test_each_reason_is_reported_and_the_next_picture_used():
    files = {
        "small": file((60, 10)),
        "long": file((90, 30)),
        "text": b"<html>",
        "thumb": file(seed=1),
    }
    urls = (("gone", ""), ("text", ""), ("small", ""), ("long", ""), ("gone", "thumb"))
    hits = [PictureHit("l", "t", url, thumb) for url, thumb in urls]
    *reasons, picture = found(Finder(*hits, files=files))
    assert reasons == [
        "picture cannot be fetched", "picture cannot be decoded", "picture too small",
        "picture too elongated",
    ]  # fmt: skip
    assert isinstance(picture, Picture)


@pytest.mark.parametrize(
    "licence, expected",
    [("CC BY-SA 4.0", None), ("Public Domain", None), ("", "licence unknown"),
     ("All rights reserved", "licence 'All rights reserved'")],
)  # fmt: skip
def test_only_allowed_licences_are_used(licence, expected):
    allowed = PictureFilter(
        min_side=1, max_side=9, max_ratio=9, licences=("cc by", "public domain")
    )
    assert allowed.licence_problem(licence) == expected
    finder = Finder(PictureHit("l", "t", "u", "", licence), files={"u": file()})
    (result,) = found(finder, allowed)
    assert isinstance(result, Picture) if expected is None else result == expected


def test_hits_are_recorded_and_replayed(tmp_path):
    finder = Finder(PictureHit("l", "t", "u", "", "CC"), files={"u": file()})
    first = found(finder, cache=ToolCache(tmp_path / "c.sqlite", "resume"))
    again = found(finder, cache=ToolCache(tmp_path / "c.sqlite", "replay"))
    assert first == again and finder.calls == 1
    with pytest.raises(WebError, match="not in the cache"):
        found(finder, cache=ToolCache(tmp_path / "c.sqlite", "replay"), free=True)


def test_a_local_index_is_searched_by_titles(tmp_path):
    titles = ("Harbour Bridge at dusk", "Bridge over the harbour", "A harbour", "東京タワー")
    lines = []
    for number, title in enumerate(titles):
        (tmp_path / f"{number}.jpg").write_bytes(file(seed=number))
        lines.append({"image": f"{number}.jpg", "title": title, "link": f"http://{number}"})
    (tmp_path / "images.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build_index(tmp_path / "index", [], [tmp_path / "images.jsonl"])
    search = LocalPictureSearch(tmp_path / "index")

    def titles_of(query, count=5):
        return {hit.title for hit in asyncio.run(search(query, count))}

    assert titles_of("harbour bridge") == set(titles[:2])
    assert titles_of("東京") == {titles[3]} and titles_of("?") == set() == titles_of("tower")
    assert len(titles_of("harbour", 2)) == 2
    (hit,) = asyncio.run(search("dusk", 1))
    assert hit.link == "http://0" and hit.licence == ""
    assert PIL.Image.open(io.BytesIO(asyncio.run(search.fetch(hit)))).size == (60, 40)
    with pytest.raises(WebError, match="cannot be read from the index"):
        asyncio.run(search.fetch(PictureHit("", "", "99", "")))
    with pytest.raises(LocalIndexError, match="index.sqlite"):
        LocalPictureSearch(tmp_path / "none")
