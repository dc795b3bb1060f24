"""The local index: pages by their words, pictures by their looks."""

import asyncio
import functools
import io
import json

import numpy as np
import PIL.Image
import pytest
from pyarrow import parquet

from mmsr1_jax.tools import Query
from mmsr1_jax.tools.local import LocalIndex, LocalIndexError, build
from tests.programs import run

PAGES = [
    {"url": "http://a", "title": "Bridges of Porto", "snippet": "s", "summary": "The Dom Luis"},
    {"url": "http://b", "title": "Towers", "snippet": "The Clerigos tower is tall"},
    {"url": "http://c", "title": "Porto wine", "summary": ""},
]


def write(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def ask(index, text):
    query = Query(action="text_search", text=text, question=text)
    return asyncio.run(index.text_search(query))


def look_up(index, *images):
    query = Query(action="image_search", text=None, question="?", images=images)
    return asyncio.run(index.image_search(query))


def texts(observation):
    return [result[0].text for result in observation.results]


def titles(observation):
    return [result[2].text.removeprefix("\ntitle: ") for result in observation.results]


def test_finds_the_page_of_the_words(tmp_path):
    path = write(tmp_path / "pages.jsonl", PAGES)
    build(tmp_path / "built", [path])
    for source in (path, tmp_path, tmp_path / "built"):
        index = LocalIndex(source)
        assert texts(ask(index, "Which bridge has Porto?"))[0] == (
            "link: http://a\nsummary: The Dom Luis"
        )
        assert len(ask(index, "porto").results) == 2
        found = ask(index, 'clerigos" OR tower*)')  # no query language, only words
        assert texts(found) == ["link: http://b\nsummary: The Clerigos tower is tall"]
        for nothing in ("unheard", "http", "?!"):  # addresses are not searched
            assert ask(index, nothing).status == "empty"
        assert look_up(index, PIL.Image.new("RGB", (50, 50))).status == "empty"
    assert len(ask(LocalIndex(path, results=1), "porto").results) == 1


def test_odd_lines_are_named_and_left_out(tmp_path, capsys):
    path = tmp_path / "pages.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"title": "one"}\n\nnot json\n[1]\n{"title": 5}\n{}\n'
        b'{"title": "\\ud800 two", "extra": 1}\n\xff\n'
    )
    index = LocalIndex(path)
    told = capsys.readouterr().err
    assert [f"line {n}: left out" in told for n in range(1, 9)] == [
        False, False, True, True, True, True, False, True,
    ]  # fmt: skip
    assert len(ask(index, "one").results) == len(ask(index, "two").results) == 1


def test_what_cannot_be_an_index(tmp_path):
    with pytest.raises(LocalIndexError, match="No such file"):
        LocalIndex(tmp_path / "none.jsonl")
    (tmp_path / "pages.jsonl").write_text("\n")
    with pytest.raises(LocalIndexError, match="neither pages nor pictures"):
        LocalIndex(tmp_path)
    with pytest.raises(LocalIndexError, match="neither pages nor pictures"):
        build(tmp_path / "out", [tmp_path / "pages.jsonl"])
    assert list((tmp_path / "out").iterdir()) == []  # nothing half made is left
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(LocalIndexError, match="not a database"):
        LocalIndex(tmp_path)


def test_the_command(tmp_path):
    write(tmp_path / "p.jsonl", PAGES)
    PIL.Image.radial_gradient("L").save(tmp_path / "one.png")
    write(tmp_path / "i.jsonl", [{"image": "one.png", "titles": ["One", "The one"], "link": "l"},
                                 {"image": "none.png", "title": "x"}, {"title": "y"},
                                 {"image": "one.png"}])  # fmt: skip
    command = functools.partial(run, module="mmsr1_jax.scripts.index")
    done = command(f"--pages={tmp_path / 'p.jsonl'}", f"--images={tmp_path / 'i.jsonl'}",
                   f"--out={tmp_path / 'index'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 pages and 2 image titles in ")
    for line in (2, 3, 4):
        assert f"i.jsonl, line {line}: left out, " in done.stderr
    index = LocalIndex(tmp_path / "index")
    assert titles(look_up(index, str(tmp_path / "one.png"))) == ["One", "The one"]
    assert look_up(index, b"rubbish").status == look_up(index).status == "failed"
    done = command(f"--pages={tmp_path / 'none'}", f"--out={tmp_path / 'index'}")
    assert done.returncode == 1 and "No such file" in done.stderr.strip().splitlines()[-1]


def recorded(shared, name):
    lines = (shared / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_recorded_queries_find_their_pages(shared, tmp_path):
    """All 16 of them, in the first five."""
    build(tmp_path, [shared / "data" / "web_pages.jsonl"])
    index, pages = LocalIndex(tmp_path), recorded(shared, "web_pages.jsonl")
    queries = sorted({page["query"] for page in pages})
    assert len(queries) == 16
    for query in queries:
        own = {page["url"] for page in pages if page["query"] == query}
        found = texts(ask(index, query))
        assert len(found) == 5
        assert own & {text.split("\n")[0].removeprefix("link: ") for text in found}, query


def half(image):
    return image.resize((image.width // 2, image.height // 2))


def poor(image):
    file = io.BytesIO()
    image.save(file, "jpeg", quality=40)
    return file.getvalue()


def cropped(left, top, right, bottom):
    def crop(image):
        w, h = image.width / 100, image.height / 100
        return image.crop((int(left * w), int(top * h), int((100 - right) * w),
                           int((100 - bottom) * h)))  # fmt: skip

    return crop


CHANGES = {
    "half": half,
    "jpeg 40": poor,
    "cropped around": cropped(2.5, 2.5, 2.5, 2.5),
    "cropped left": cropped(5, 0, 0, 0),
    "cropped in a corner": cropped(0, 0, 5, 5),
}


def test_changed_pictures_are_found(shared, tmp_path):
    """The real photographs with their recorded titles, and those without under their own name: the
    picture's own titles come first."""
    known = json.loads((shared / "data" / "image_search_results.json").read_text("utf-8"))
    rows = parquet.read_table(shared / "data" / "fvqa_mini.parquet").to_pylist()
    lines, photographs, own = [], [], []
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.img").write_bytes(row["images"][0]["bytes"])
        photographs.append(PIL.Image.open(tmp_path / f"{number}.img").convert("RGB"))
        found = [entry["title"] for entry in known.get(row["data_id"], [])][:5]
        own.append(found or [f"photograph {number}"])
        lines.append({"image": f"{number}.img", "titles": own[-1]})
    build(tmp_path / "index", pictures=[write(tmp_path / "images.jsonl", lines)])
    index = LocalIndex(tmp_path / "index")
    assert len(photographs) == 26
    for name, change in CHANGES.items():
        right = [
            titles(look_up(index, change(photograph)))[: len(titles_)] == titles_
            for photograph, titles_ in zip(photographs, own, strict=True)
        ]
        assert np.mean(right) >= 0.95, name
