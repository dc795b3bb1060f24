"""Pictures by embeddings of the vision tower: the tower's own numbers, and searches with them."""

import asyncio
import concurrent.futures
import functools
import json
import shutil
import sqlite3
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from pyarrow import parquet

from mmsr1_jax.config import settings
from mmsr1_jax.models import qwen2_5_vl, sharding
from mmsr1_jax.models.qwen2_5_vl.checkpoint import CheckpointError
from mmsr1_jax.models.qwen2_5_vl.vision import num_windows, pack_images
from mmsr1_jax.processing.images import ImageError, ImageProcessor
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools import Query, embedding, local
from mmsr1_jax.tools.build import make_tools
from mmsr1_jax.tools.embedding import WINDOWS, Embedder
from mmsr1_jax.tools.local import LocalIndex, LocalIndexError, build
from mmsr1_jax.utils import compile_counter
from tests.programs import run
from tests.test_local import CHANGES, look_up, titles, write


@pytest.fixture(scope="module")
def embed(tiny_dir):
    return Embedder(tiny_dir)


def picture(width, height, seed=0):
    """A few random colours, smoothly blended."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return PIL.Image.fromarray(colours).resize((width, height), PIL.Image.Resampling.BICUBIC)


# Of 1, 20 and 2 windows: two programs.
PICTURES = [picture(112, 112), picture(20 * 112, 28, 1), picture(140, 112, 2)]


def changed(source, target, change):
    """A copy of a policy whose tensors went through `change(tensors)`."""
    shutil.copytree(source, target)
    tensors = safetensors.numpy.load_file(target / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, target / "model.safetensors")
    return target


def add(name, value, tensors):
    """Adds to one number of a tensor."""
    tensor = tensors[name].copy()
    tensor.reshape(-1)[-1] += value
    tensors[name] = tensor


def without_vision(tensors):
    for name in [name for name in tensors if name.startswith("visual.")]:
        del tensors[name]


BIAS = "visual.merger.mlp.2.bias"


def test_equals_the_whole_model(tiny_dir, embed):
    """The mean, in float64, of the tokens that the policy itself would see. There the pictures are
    in a batch of two rows, of another length."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = qwen2_5_vl.load(tiny_dir, mesh=mesh)
    processor = ImageProcessor.from_directory(tiny_dir)
    patches = [processor(image) for image in PICTURES]
    images = [(p.values, p.grid) for p in patches]
    packed, indices = pack_images([images[:2], images[2:]], 24, model.config.vision)
    tokens = np.asarray(model.encode_images(packed), np.float64)
    merged = np.concatenate([tokens[row][index] for row, index in enumerate(indices)])
    ends = np.cumsum([len(p.values) // 4 for p in patches])
    assert ends[-1] == len(merged)
    for image, own in zip(PICTURES, np.split(merged, ends[:-1]), strict=True):
        expected = own.mean(axis=0) / np.sqrt((own.mean(axis=0) ** 2).sum())
        found = embed(image)
        assert found.dtype == np.float32 and found.shape == (model.config.text.hidden_size,)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_one_program_for_each_number_of_windows(tiny_dir, embed):
    expected = [embed(image) for image in PICTURES]
    fresh, before = Embedder(tiny_dir), compile_counter.count()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(fresh, PICTURES * 4))
    assert compile_counter.count() - before == 2
    with jax.set_mesh(sharding.make_mesh()):  # a mesh of the caller's changes nothing
        found += [fresh(image) for image in PICTURES]
    assert compile_counter.count() - before == 2
    for number, vector in enumerate(found):
        np.testing.assert_array_equal(vector, expected[number % 3])


def test_every_picture_fits_a_program():
    processor = ImageProcessor(max_pixels=embedding.MAX_PIXELS)
    rng = np.random.default_rng(0)
    short = np.exp(rng.uniform(0, 9, 5000))
    sizes = np.stack([short, short * np.exp(rng.uniform(0, np.log(199), 5000))]).astype(int) + 1
    worst = 0
    for low, high in [*sizes.T, (69, 13800), (41, 8200), (69, 13798), (97, 19400), (67, 13400)]:
        if high <= 200 * low:
            height, width = processor.target_size(low, high)
            grid = (1, height // 14, width // 14)
            worst = max(worst, num_windows(grid, random_policy.CONFIG.vision))
    assert WINDOWS[-2] < worst <= WINDOWS[-1]


def test_the_fingerprint_is_of_what_makes_the_vectors(tiny_dir, embed, tmp_path):
    def fingerprint(name, change):
        return Embedder(changed(tiny_dir, tmp_path / name, change)).fingerprint

    assert len(embed.fingerprint) == 32
    assert fingerprint("copy", lambda tensors: None) == embed.fingerprint
    assert fingerprint("text", functools.partial(add, "lm_head.weight", 1)) == embed.fingerprint
    assert fingerprint("tower", functools.partial(add, BIAS, 1e-3)) != embed.fingerprint
    file = tmp_path / "copy" / "preprocessor_config.json"
    prepared = json.loads(file.read_text())
    file.write_text(json.dumps(prepared | {"image_mean": [0.5, 0.5, 0.5]}))
    assert Embedder(tmp_path / "copy").fingerprint != embed.fingerprint
    file.write_text(json.dumps(prepared | {"patch_size": 16}))
    with pytest.raises(ImageError, match="patch_size=16, but the vision tower has 14"):
        Embedder(tmp_path / "copy")
    file.unlink()
    with pytest.raises(ImageError, match=r"copy: no preprocessor_config\.json"):
        Embedder(tmp_path / "copy")


def test_numbers_that_are_not_finite(tiny_dir, tmp_path, capsys):
    add_nan = functools.partial(add, BIAS, np.nan)
    broken = Embedder(changed(tiny_dir, tmp_path / "broken", add_nan))
    with pytest.raises(ImageError, match="embedding is not finite"):
        broken(PICTURES[0])
    PICTURES[0].save(tmp_path / "one.png")
    lines = write(tmp_path / "i.jsonl", [{"image": "one.png", "title": "One"}])
    with pytest.raises(LocalIndexError, match="neither pages nor pictures"):
        build(tmp_path / "index", pictures=[lines], embed=broken)
    assert "i.jsonl, line 1: left out, the picture's embedding is not" in capsys.readouterr().err


@pytest.fixture(scope="module")
def indexed(tiny_dir, tmp_path_factory):
    """The command's index of 12 pictures, two titles each: (directory, what it said, pictures)."""
    folder = tmp_path_factory.mktemp("indexed")
    pictures = [picture(120, 100, seed) for seed in range(12)]
    for number, image in enumerate(pictures):
        image.save(folder / f"{number}.png")
    PIL.Image.new("RGB", (1000, 2)).save(folder / "long.png")
    lines = [{"image": f"{n}.png", "titles": [f"{n} a", f"{n} b"]} for n in range(12)]
    lines.append({"image": "long.png", "title": "long"})
    file = write(folder / "i.jsonl", lines)
    done = run(f"--images={file}", f"--out={folder / 'index'}", f"--model={tiny_dir}",
               module="mmsr1_jax.scripts.index")  # fmt: skip
    return folder / "index", done, pictures


def test_the_command_and_a_search(indexed, embed):
    """Results in the order of their cosines in float64, but for what float16 rounds away."""
    directory, done, pictures = indexed
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 pages and 24 image titles in ")
    assert "i.jsonl, line 13: left out, 1000x2 pixels: the sides differ" in done.stderr
    index, vectors = (
        LocalIndex(directory, results=6, embed=embed),
        np.stack(list(map(embed, pictures))),
    )
    for seed in range(12, 16):
        wanted = picture(130, 90, seed)
        cosine = vectors.astype(np.float64) @ embed(wanted).astype(np.float64)
        found = titles(look_up(index, wanted))
        numbers = [int(title.split()[0]) for title in found]
        assert found == [f"{n} {letter}" for n in numbers[::2] for letter in "ab"]
        best = np.sort(cosine)[::-1][:3]
        np.testing.assert_allclose(cosine[numbers[::2]], best, rtol=0, atol=1e-3)
    for number, image in enumerate(pictures):
        assert titles(look_up(index, image))[:2] == [f"{number} a", f"{number} b"]
    assert look_up(index, PIL.Image.new("RGB", (1000, 2))).status == "failed"
    assert look_up(index, b"rubbish").status == "failed"
    # The hashes are there too.
    assert titles(look_up(LocalIndex(directory), pictures[3]))[:2] == ["3 a", "3 b"]


def test_another_model_is_refused(indexed, tmp_path):
    random_policy.write(tmp_path / "other", seed=2)
    other = Embedder(tmp_path / "other")
    with pytest.raises(LocalIndexError, match=r"index: .*another model.* --model=DIR") as caught:
        LocalIndex(indexed[0], embed=other)
    assert other.fingerprint in str(caught.value)


def test_an_index_without_embeddings(indexed, embed, tmp_path):
    _, _, pictures = indexed
    (tmp_path / "pages.jsonl").write_text('{"title": "one"}')
    pictures[0].save(tmp_path / "0.png")
    lines = write(tmp_path / "i.jsonl", [{"image": "0.png", "title": "zero"}])
    build(tmp_path / "new", pictures=[lines])
    (tmp_path / "old").mkdir()
    with sqlite3.connect(tmp_path / "old" / "index.sqlite") as old:  # as it was before embeddings
        old.executescript(local._SCHEMA)
        old.executescript("DROP TABLE embedded; ALTER TABLE picture DROP COLUMN embedding")
        old.execute("ATTACH ? AS new", (str(tmp_path / "new" / "index.sqlite"),))
        old.execute("INSERT INTO picture SELECT hash, title, link, thumbnail FROM new.picture")
    for path in (tmp_path / "new", tmp_path / "old", tmp_path):
        with pytest.raises(LocalIndexError, match=r"no embeddings.* make it anew: python -m"):
            LocalIndex(path, embed=embed)
    for path in (tmp_path / "new", tmp_path / "old"):
        assert titles(look_up(LocalIndex(path), pictures[0])) == ["zero"]
    # Made with a model, but without pictures: there is nothing to be found.
    build(tmp_path / "pages", [tmp_path / "pages.jsonl"], embed=embed)
    assert look_up(LocalIndex(tmp_path / "pages", embed=embed), pictures[0]).status == "empty"


def test_a_directory_without_a_vision_tower(tiny_dir, tmp_path):
    broken = changed(tiny_dir, tmp_path / "text only", without_vision)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor visual\..* is missing"):
        Embedder(broken)
    done = run(f"--out={tmp_path / 'index'}", f"--model={broken}", module="mmsr1_jax.scripts.index")
    assert done.returncode == 1 and not (tmp_path / "index").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "tensor visual." in line


def test_by_settings(indexed, tiny_dir, embed, monkeypatch):
    monkeypatch.setattr(embedding, "WINDOWS", (16,))  # fewer programs to be compiled ahead
    directory, _, pictures = indexed
    tools = settings.Tools(index=str(directory), image_model=str(tiny_dir), max_results=4)
    config = settings.validate(settings.Config(tools=tools))
    search = make_tools(config)["image_search"]
    before = compile_counter.count()
    query = Query(action="image_search", text=None, question="?", images=[pictures[5]])
    found = titles(asyncio.run(search(query)))
    assert found == titles(look_up(LocalIndex(directory, results=4, embed=embed), pictures[5]))
    assert found[:2] == ["5 a", "5 b"] and len(found) == 4
    assert compile_counter.count() == before
    config.tools.image = "none"  # then no model is loaded
    config.tools.image_model = "nowhere"
    assert set(make_tools(config)) == {"text_search"}


def test_nothing_of_it_is_imported_without_need():
    code = (
        "import sys, mmsr1_jax.tools.local\n"
        "assert not {'jax', 'flax'} & set(sys.modules)\n"
        "import mmsr1_jax.tools.build\n"
        "assert not {'mmsr1_jax.tools.embedding', 'mmsr1_jax.models.qwen2_5_vl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.proof
def test_real_photographs_by_a_random_tower(shared, tmp_path):
    """Scaled and compressed ones are found. Of a tower that has learnt nothing no more can be asked
    than most of the cropped ones: the index's default is the hash (`test_local.py`)."""
    random_policy.write(
        tmp_path / "model",
        seed=1,
        images=ImageProcessor(min_pixels=16 * 784, max_pixels=100 * 784),
    )
    embed = Embedder(tmp_path / "model")
    rows = parquet.read_table(shared / "data" / "fvqa_mini.parquet").to_pylist()
    photographs = []
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.img").write_bytes(row["images"][0]["bytes"])
        photographs.append(PIL.Image.open(tmp_path / f"{number}.img").convert("RGB"))
    lines = [{"image": f"{n}.img", "titles": [f"{n}", f"again {n}"]} for n in range(len(rows))]
    lines = write(tmp_path / "i.jsonl", lines)
    build(tmp_path / "index", pictures=[lines], embed=embed)
    index = LocalIndex(tmp_path / "index", embed=embed)
    assert len(photographs) == 26
    right = {
        name: np.mean([
            titles(look_up(index, change(photograph)))[:2] == [f"{n}", f"again {n}"]
            for n, photograph in enumerate(photographs)
        ])
        for name, change in [("same", lambda image: image), *list(CHANGES.items())[:3]]
    }  # fmt: skip
    assert right["same"] == 1 and min(right["half"], right["jpeg 40"]) >= 0.95
    assert right["cropped around"] >= 0.88 and np.mean(list(right.values())) >= 0.95, right
