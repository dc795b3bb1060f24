"""Image embeddings by the vision tower, and image searches with them."""

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
from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.models.checkpoint import CheckpointError
from mmsr1_jax.models.image_rows import num_windows, pack_images
from mmsr1_jax.processing.images import ImageError, ImageProcessor
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools import Query, embedding, index_builder
from mmsr1_jax.tools.build import make_tools
from mmsr1_jax.tools.embedding import WINDOWS, Embedder
from mmsr1_jax.tools.index_builder import LocalIndexError, build_index
from mmsr1_jax.tools.local_index import LocalIndex
from mmsr1_jax.utils import compile_counter
from tests.programs import run_module as run
from tests.tools.test_local_index import MODIFICATIONS, look_up, titles, write


@pytest.fixture(scope="module")
def embed(tiny_dir):
    return Embedder(tiny_dir)


def make_image(width, height, seed=0):
    """Return an image of a few random colours, smoothly blended."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return PIL.Image.fromarray(colours).resize((width, height), PIL.Image.Resampling.BICUBIC)


# They take 1, 20 and 2 windows, hence two programs.
IMAGES = [make_image(112, 112), make_image(20 * 112, 84, 1), make_image(140, 112, 2)]


def copy_modified(source, target, modify):
    """Copy a policy directory and apply `modify` to its tensors."""
    shutil.copytree(source, target)
    tensors = safetensors.numpy.load_file(target / "model.safetensors")
    modify(tensors)
    safetensors.numpy.save_file(tensors, target / "model.safetensors")
    return target


def add(name, value, tensors):
    """Add a value to one number of a tensor."""
    tensor = tensors[name].copy()
    tensor.reshape(-1)[-1] += value
    tensors[name] = tensor


def without_vision(tensors):
    for name in [name for name in tensors if name.startswith("visual.")]:
        del tensors[name]


BIAS = "visual.merger.mlp.2.bias"


@pytest.mark.proof
def test_embedding_is_the_mean_of_the_models_visual_tokens(tiny_dir, embed):
    """Compared with the mean, in float64, of the model's visual tokens of larger batches."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = checkpoint.load(tiny_dir, mesh=mesh)
    processor = ImageProcessor.from_directory(tiny_dir)
    patches = [processor(image) for image in IMAGES]
    images = [(p.values, p.grid) for p in patches]
    packed, indices = pack_images([images[:2], images[2:]], 24, model.config.vision)
    tokens = np.asarray(model.encode_images(packed), np.float64)
    merged = np.concatenate([tokens[row][index] for row, index in enumerate(indices)])
    ends = np.cumsum([len(p.values) // 4 for p in patches])
    assert ends[-1] == len(merged)
    for image, tokens_of_image in zip(IMAGES, np.split(merged, ends[:-1]), strict=True):
        expected = tokens_of_image.mean(axis=0) / np.sqrt((tokens_of_image.mean(axis=0) ** 2).sum())
        vector = embed(image)
        assert vector.dtype == np.float32 and vector.shape == (model.config.text.hidden_size,)
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5)


def test_one_program_is_compiled_per_window_bucket(tiny_dir, embed):
    expected = [embed(image) for image in IMAGES]
    fresh, before = Embedder(tiny_dir), compile_counter.count()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        vectors = list(threads.map(fresh, IMAGES * 4))
    assert compile_counter.count() - before == 2
    with jax.set_mesh(sharding.make_mesh()):  # the caller's mesh has no effect
        vectors += [fresh(image) for image in IMAGES]
    assert compile_counter.count() - before == 2
    for number, vector in enumerate(vectors):
        np.testing.assert_array_equal(vector, expected[number % 3])


def test_the_largest_image_fits_the_largest_program():
    processor = ImageProcessor(max_pixels=embedding.MAX_PIXELS)
    rng = np.random.default_rng(0)
    short = np.exp(rng.uniform(0, 9, 5000))
    sizes = np.stack([short, short * np.exp(rng.uniform(0, np.log(199), 5000))]).astype(int) + 1
    worst = 0
    for low, high in [*sizes.T, (69, 13800), (41, 8200), (69, 13798), (97, 19400), (67, 13400)]:
        if high <= 200 * low:
            height, width = processor.target_size(low, high)
            grid = (1, height // 14, width // 14)
            worst = max(worst, num_windows([grid], random_policy.CONFIG.vision))
    assert WINDOWS[-2] < worst <= WINDOWS[-1]


def test_fingerprint_depends_on_tower_and_preprocessing_only(tiny_dir, embed, tmp_path):
    def fingerprint(name, modify):
        return Embedder(copy_modified(tiny_dir, tmp_path / name, modify)).fingerprint

    assert len(embed.fingerprint) == 32
    assert fingerprint("copy", lambda tensors: None) == embed.fingerprint
    assert fingerprint("text", functools.partial(add, "lm_head.weight", 1)) == embed.fingerprint
    assert fingerprint("tower", functools.partial(add, BIAS, 1e-3)) != embed.fingerprint
    file = tmp_path / "copy" / "preprocessor_config.json"
    prepared = json.loads(file.read_text())
    file.write_text(json.dumps(prepared | {"image_mean": [0.5, 0.5, 0.5]}))
    assert Embedder(tmp_path / "copy").fingerprint != embed.fingerprint
    file.write_text(json.dumps(prepared | {"patch_size": 16}))
    with pytest.raises(ImageError, match="has patch_size=16, but the vision tower has 14"):
        Embedder(tmp_path / "copy")
    file.unlink()
    with pytest.raises(ImageError, match=r"copy: contains neither preprocessor_config\.json"):
        Embedder(tmp_path / "copy")


def test_nonfinite_embeddings_are_rejected(tiny_dir, tmp_path, capsys):
    add_nan = functools.partial(add, BIAS, np.nan)
    broken = Embedder(copy_modified(tiny_dir, tmp_path / "broken", add_nan))
    with pytest.raises(ImageError, match="embedding of the image is not finite"):
        broken(IMAGES[0])
    IMAGES[0].save(tmp_path / "one.png")
    lines = write(tmp_path / "i.jsonl", [{"image": "one.png", "title": "One"}])
    with pytest.raises(LocalIndexError, match="no valid page and no valid image"):
        build_index(tmp_path / "index", images=[lines], embed=broken)
    assert (
        "i.jsonl, line 1: skipped: the embedding of the image is not finite"
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def indexed(tiny_dir, tmp_path_factory):
    """Return (directory, process of the command, images) of an index of 12 images with 2 titles."""
    folder = tmp_path_factory.mktemp("indexed")
    images = [make_image(120, 100, seed) for seed in range(12)]
    for position, image in enumerate(images):
        image.save(folder / f"{position}.png")
    PIL.Image.new("RGB", (1000, 2)).save(folder / "long.png")
    lines = [{"image": f"{n}.png", "titles": [f"{n} a", f"{n} b"]} for n in range(12)]
    lines.append({"image": "long.png", "title": "long"})
    file = write(folder / "i.jsonl", lines)
    process = run(f"--images={file}", f"--out={folder / 'index'}", f"--model={tiny_dir}",
               module="mmsr1_jax.scripts.index")  # fmt: skip
    return folder / "index", process, images


def test_search_results_are_ordered_by_cosine_similarity(indexed, embed):
    """The order is that of the similarities in float64, up to rounding to float16."""
    directory, process, images = indexed
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("0 pages and 24 image titles in ")
    assert "i.jsonl, line 13: skipped: 1000x2 pixels: the aspect ratio" in process.stderr
    index, vectors = (
        LocalIndex(directory, max_results=6, embed=embed),
        np.stack(list(map(embed, images))),
    )
    for seed in range(12, 16):
        query_image = make_image(130, 90, seed)
        cosine = vectors.astype(np.float64) @ embed(query_image).astype(np.float64)
        result_titles = titles(look_up(index, query_image))
        numbers = [int(title.split()[0]) for title in result_titles]
        assert result_titles == [f"{n} {letter}" for n in numbers[::2] for letter in "ab"]
        best = np.sort(cosine)[::-1][:3]
        np.testing.assert_allclose(cosine[numbers[::2]], best, rtol=0, atol=1e-3)
    for position, image in enumerate(images):
        assert titles(look_up(index, image))[:2] == [f"{position} a", f"{position} b"]
    assert look_up(index, PIL.Image.new("RGB", (1000, 2))).status == "failed"
    assert look_up(index, b"rubbish").status == "failed"
    # The index has the hashes as well.
    assert titles(look_up(LocalIndex(directory), images[3]))[:2] == ["3 a", "3 b"]


def test_index_of_another_model_is_rejected(indexed, tmp_path):
    random_policy.write(tmp_path / "other", seed=2)
    other = Embedder(tmp_path / "other")
    with pytest.raises(LocalIndexError, match=r"index: .*another model.* --model=DIR") as raised:
        LocalIndex(indexed[0], embed=other)
    assert other.fingerprint in str(raised.value)


def test_index_without_embeddings_is_rejected(indexed, embed, tmp_path):
    _, _, images = indexed
    (tmp_path / "pages.jsonl").write_text('{"title": "one"}')
    images[0].save(tmp_path / "0.png")
    lines = write(tmp_path / "i.jsonl", [{"image": "0.png", "title": "zero"}])
    build_index(tmp_path / "new", images=[lines])
    (tmp_path / "old").mkdir()
    # An index from before embeddings.
    with sqlite3.connect(tmp_path / "old" / "index.sqlite") as old:
        old.executescript(index_builder.SCHEMA)
        old.executescript("DROP TABLE embedding_model; ALTER TABLE image DROP COLUMN embedding")
        old.execute("ATTACH ? AS new", (str(tmp_path / "new" / "index.sqlite"),))
        old.execute("INSERT INTO image SELECT hash, title, link, thumbnail FROM new.image")
    for path in (tmp_path / "new", tmp_path / "old", tmp_path):
        with pytest.raises(
            LocalIndexError, match=r"no image embeddings.* rebuild the index: python -m"
        ):
            LocalIndex(path, embed=embed)
    for path in (tmp_path / "new", tmp_path / "old"):
        assert titles(look_up(LocalIndex(path), images[0])) == ["zero"]
    # Built with a model but without images: searches find nothing.
    build_index(tmp_path / "pages", [tmp_path / "pages.jsonl"], embed=embed)
    assert look_up(LocalIndex(tmp_path / "pages", embed=embed), images[0]).status == "empty"


def test_model_directory_without_vision_tower_is_rejected(tiny_dir, tmp_path):
    broken = copy_modified(tiny_dir, tmp_path / "text only", without_vision)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor visual\..* is missing"):
        Embedder(broken)
    process = run(
        f"--out={tmp_path / 'index'}", f"--model={broken}", module="mmsr1_jax.scripts.index"
    )
    assert process.returncode == 2 and not (tmp_path / "index").exists()
    (line,) = process.stderr.strip().splitlines()
    assert line.startswith("error: ") and "tensor visual." in line


def test_make_tools_loads_and_precompiles_the_embedder(indexed, tiny_dir, embed, monkeypatch):
    monkeypatch.setattr(embedding, "WINDOWS", (16,))  # fewer programs to compile
    directory, _, images = indexed
    tools = settings.Tools(index=str(directory), image_model=str(tiny_dir), max_results=4)
    config = settings.validate(settings.Config(tools=tools))
    search = make_tools(config)["image_search"]
    before = compile_counter.count()
    query = Query(action="image_search", text=None, question="?", images=[images[5]])
    result_titles = titles(asyncio.run(search(query)))
    assert result_titles == titles(
        look_up(LocalIndex(directory, max_results=4, embed=embed), images[5])
    )
    assert result_titles[:2] == ["5 a", "5 b"] and len(result_titles) == 4
    assert compile_counter.count() == before
    config.tools.image = "none"  # the model is not loaded
    config.tools.image_model = "nowhere"
    assert set(make_tools(config)) == {"text_search"}


def test_jax_and_the_model_are_imported_lazily():
    code = (
        "import sys, mmsr1_jax.tools.local_index\n"
        "assert not {'jax', 'flax'} & set(sys.modules)\n"
        "import mmsr1_jax.tools.build\n"
        "assert not {'mmsr1_jax.tools.embedding', 'mmsr1_jax.models.families'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.proof
def test_real_photographs_are_found_by_a_random_tower(shared, tmp_path):
    """Scaled and compressed photographs are found, and most of the cropped ones.

    The tower is untrained; the index uses hashes by default (`test_local_index.py`).
    """
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
    build_index(tmp_path / "index", images=[lines], embed=embed)
    index = LocalIndex(tmp_path / "index", embed=embed)
    assert len(photographs) == 26
    right = {
        name: np.mean([
            titles(look_up(index, modify(photograph)))[:2] == [f"{n}", f"again {n}"]
            for n, photograph in enumerate(photographs)
        ])
        for name, modify in [("same", lambda image: image), *list(MODIFICATIONS.items())[:3]]
    }  # fmt: skip
    assert right["same"] == 1 and min(right["half"], right["jpeg 40"]) >= 0.95
    assert right["cropped around"] >= 0.88 and np.mean(list(right.values())) >= 0.95, right
