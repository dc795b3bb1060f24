"""The local index: pages are retrieved by their words, images by their hashes."""

import asyncio
import functools
import io
import json

import numpy as np
import PIL.Image
import pytest
from pyarrow import parquet

from mmsr1_jax.tools import Query
from mmsr1_jax.tools.index_builder import LocalIndexError, build_index
from mmsr1_jax.tools.local_index import LocalIndex
from tests.programs import run_module as run

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


def test_pages_are_found_by_their_words(tmp_path):
    path = write(tmp_path / "pages.jsonl", PAGES)
    build_index(tmp_path / "built", [path])
    for source in (path, tmp_path, tmp_path / "built"):
        index = LocalIndex(source)
        assert texts(ask(index, "Which bridge has Porto?"))[0] == (
            "link: http://a\nsummary: The Dom Luis"
        )
        assert len(ask(index, "porto").results) == 2
        observation = ask(index, 'clerigos" OR tower*)')  # operators are ordinary words
        assert texts(observation) == ["link: http://b\nsummary: The Clerigos tower is tall"]
        for query in ("unheard", "http", "?!"):  # URLs are not searched
            assert ask(index, query).status == "empty"
        assert look_up(index, PIL.Image.new("RGB", (50, 50))).status == "empty"
    assert len(ask(LocalIndex(path, max_results=1), "porto").results) == 1


def test_invalid_lines_are_skipped_and_logged(tmp_path, capsys):
    path = tmp_path / "pages.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"title": "one"}\n\nnot json\n[1]\n{"title": 5}\n{}\n'
        b'{"title": "\\ud800 two", "extra": 1}\n\xff\n'
    )
    index = LocalIndex(path)
    stderr = capsys.readouterr().err
    assert [f"line {n}: skipped: " in stderr for n in range(1, 9)] == [
        False, False, True, True, True, True, False, True,
    ]  # fmt: skip
    assert len(ask(index, "one").results) == len(ask(index, "two").results) == 1


def test_unusable_index_files_are_rejected(tmp_path):
    with pytest.raises(LocalIndexError, match="No such file"):
        LocalIndex(tmp_path / "none.jsonl")
    (tmp_path / "pages.jsonl").write_text("\n")
    with pytest.raises(LocalIndexError, match="no valid page and no valid image"):
        LocalIndex(tmp_path)
    with pytest.raises(LocalIndexError, match="no valid page and no valid image"):
        build_index(tmp_path / "out", [tmp_path / "pages.jsonl"])
    assert list((tmp_path / "out").iterdir()) == []  # no partial file remains
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(LocalIndexError, match="not a database"):
        LocalIndex(tmp_path)


def test_index_command(tmp_path):
    write(tmp_path / "p.jsonl", PAGES)
    PIL.Image.radial_gradient("L").save(tmp_path / "one.png")
    write(tmp_path / "i.jsonl", [{"image": "one.png", "titles": ["One", "The one"], "link": "l"},
                                 {"image": "none.png", "title": "x"}, {"title": "y"},
                                 {"image": "one.png"}])  # fmt: skip
    command = functools.partial(run, module="mmsr1_jax.scripts.index")
    process = command(f"--pages={tmp_path / 'p.jsonl'}", f"--images={tmp_path / 'i.jsonl'}",
                   f"--out={tmp_path / 'index'}")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("3 pages and 2 image titles in ")
    for line in (2, 3, 4):
        assert f"i.jsonl, line {line}: skipped: " in process.stderr
    index = LocalIndex(tmp_path / "index")
    assert titles(look_up(index, str(tmp_path / "one.png"))) == ["One", "The one"]
    assert look_up(index, b"rubbish").status == look_up(index).status == "failed"
    process = command(f"--pages={tmp_path / 'none'}", f"--out={tmp_path / 'index'}")
    assert process.returncode == 2 and "No such file" in process.stderr.strip().splitlines()[-1]


def read_lines(shared, name):
    lines = (shared / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_recorded_queries_find_their_pages(shared, tmp_path):
    """For each of the 16 queries, one of its pages is among the first five."""
    build_index(tmp_path, [shared / "data" / "web_pages.jsonl"])
    index, pages = LocalIndex(tmp_path), read_lines(shared, "web_pages.jsonl")
    queries = sorted({page["query"] for page in pages})
    assert len(queries) == 16
    for query in queries:
        urls = {page["url"] for page in pages if page["query"] == query}
        result_texts = texts(ask(index, query))
        assert len(result_texts) == 5
        assert urls & {text.split("\n")[0].removeprefix("link: ") for text in result_texts}, query


def downscale(image):
    return image.resize((image.width // 2, image.height // 2))


def compress_strongly(image):
    file = io.BytesIO()
    image.save(file, "jpeg", quality=40)
    return file.getvalue()


def cropped(left, top, right, bottom):
    def crop(image):
        w, h = image.width / 100, image.height / 100
        return image.crop((int(left * w), int(top * h), int((100 - right) * w),
                           int((100 - bottom) * h)))  # fmt: skip

    return crop


MODIFICATIONS = {
    "half": downscale,
    "jpeg 40": compress_strongly,
    "cropped around": cropped(2.5, 2.5, 2.5, 2.5),
    "cropped left": cropped(5, 0, 0, 0),
    "cropped in a corner": cropped(0, 0, 5, 5),
}


def test_modified_images_are_found(shared, tmp_path):
    """Photos with recorded titles, or with their own title, rank first after modification."""
    recorded_titles = json.loads((shared / "data" / "image_search_results.json").read_text("utf-8"))
    rows = parquet.read_table(shared / "data" / "fvqa_mini.parquet").to_pylist()
    lines, photographs, titles_by_photograph = [], [], []
    for index, row in enumerate(rows):
        (tmp_path / f"{index}.img").write_bytes(row["images"][0]["bytes"])
        photographs.append(PIL.Image.open(tmp_path / f"{index}.img").convert("RGB"))
        recorded = [entry["title"] for entry in recorded_titles.get(row["data_id"], [])][:5]
        titles_by_photograph.append(recorded or [f"photograph {index}"])
        lines.append({"image": f"{index}.img", "titles": titles_by_photograph[-1]})
    build_index(tmp_path / "index", images=[write(tmp_path / "images.jsonl", lines)])
    index = LocalIndex(tmp_path / "index")
    assert len(photographs) == 26
    for name, modify in MODIFICATIONS.items():
        is_first = [
            titles(look_up(index, modify(photograph)))[: len(expected)] == expected
            for photograph, expected in zip(photographs, titles_by_photograph, strict=True)
        ]
        assert np.mean(is_first) >= 0.95, name
