"""Images have the same grids and patches as with the HF Qwen2-VL image processor."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmsr1_jax.processing.images import ImageError, ImageProcessor, open_image, to_rgb


def noise(width, height, mode="RGB", seed=0):
    """Return an image with smooth and rough parts, on which resizing filters differ."""
    rng = np.random.default_rng(seed)
    bands = []
    for _ in PIL.Image.new(mode, (1, 1)).getbands():
        smooth = PIL.Image.fromarray(rng.integers(0, 256, (9, 7), np.uint8))
        smooth = smooth.resize((width, height), PIL.Image.Resampling.BICUBIC)
        rough = PIL.Image.fromarray(rng.integers(0, 256, (height, width), np.uint8))
        bands.append(PIL.Image.blend(smooth, rough, 0.3))
    return PIL.Image.merge(mode, bands)


def encoded(image, kind="PNG", **keywords):
    stream = io.BytesIO()
    image.save(stream, kind, **keywords)
    return stream.getvalue()


def rotated(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(300, 170, seed=orientation), "JPEG", exif=exif)


def palette_with_transparency():
    image = noise(90, 120).quantize(32)
    return encoded(image, transparency=3)


def random_image(seed):
    rng = np.random.default_rng(seed)
    width, height = (int(2 ** rng.uniform(3, 10.5)) for _ in range(2))
    return encoded(noise(width, height, ["RGB", "L", "RGBA"][seed % 3], seed))


SYNTHETIC = {
    "grey": encoded(noise(333, 201, "L")),
    "palette": encoded(noise(150, 260).quantize(64)),
    "palette, a colour transparent": palette_with_transparency(),
    "alpha": encoded(noise(200, 200, "RGBA")),
    "grey and alpha": encoded(noise(97, 64, "LA")),
    "cmyk": encoded(noise(120, 90, "CMYK"), "JPEG"),
    "black and white": encoded(noise(120, 90, "L").convert("1")),
    "4000x30": encoded(noise(4000, 30)),
    "30x4000": encoded(noise(30, 4000)),
    "4x800": encoded(noise(4, 800)),
    "1x1": encoded(noise(1, 1)),
    "tiny": encoded(noise(5, 3)),
    "exact": encoded(noise(280, 224)),
    "rounds half down": encoded(noise(42, 70)),
    "large": encoded(noise(2100, 1500), "JPEG"),
    **{f"exif {i}": rotated(i) for i in (3, 6, 8)},
    **{f"random {i}": random_image(i) for i in range(14)},
}
assert len(SYNTHETIC) >= 30


# The settings of the released Qwen2.5-VL, with a lower bound on the area, and of Qwen3-VL.
PROCESSORS = {
    "qwen2_5_vl": ImageProcessor(min_pixels=3136, max_pixels=1_003_520),
    "qwen3_vl": ImageProcessor(
        min_pixels=65_536, max_pixels=16_777_216, patch_size=16, mean=(0.5,) * 3, std=(0.5,) * 3
    ),
}
both = pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)


def check(data, processor):
    image = open_image(data)
    # The reference opens the file itself, but ignores the EXIF orientation.
    compare(image, PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))), processor)


def compare(image, upright, processor):
    """Compare our patches of `image` with those of `transformers` of the same picture."""
    ours = processor(image)
    reference = Qwen2VLImageProcessorPil(
        size={"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
        patch_size=processor.patch_size,
        image_mean=processor.mean,
        image_std=processor.std,
    )
    theirs = reference(images=[upright], return_tensors="np")
    assert ours.grid == tuple(theirs["image_grid_thw"][0])
    np.testing.assert_allclose(ours.values, theirs["pixel_values"], atol=1e-5, rtol=0)


@both
@pytest.mark.parametrize("name", SYNTHETIC)
def test_patches_of_synthetic_images_equal_those_of_transformers(name, processor):
    check(SYNTHETIC[name], processor)


@both
def test_patches_of_reported_images_equal_those_of_transformers(shared, processor):
    """Images of every format and mode that are opened, both given as RGB."""
    opened = 0
    for path in sorted((shared / "cases/reports/images/files").iterdir()):
        try:
            image = open_image(path)
        except ImageError:
            continue
        if max(image.size) <= 200 * min(image.size):
            compare(image, image, processor)
            opened += 1
    assert opened > 30


@both
def test_patches_of_photographs_equal_those_of_transformers(shared, processor):
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="reading parquet needs pyarrow")
    rows = pyarrow.read_table(shared / "data" / "fvqa_mini.parquet").to_pylist()
    files = [image["bytes"] for row in rows for image in row["images"]]
    assert len(files) >= 26
    for data in files:
        check(data, processor)


@pytest.mark.parametrize("patch_size", [14, 16])
def test_target_sizes_equal_those_of_transformers(patch_size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(0)
    processor = ImageProcessor(
        min_pixels=512 * 512, max_pixels=2 * 672 * 672, patch_size=patch_size
    )
    for _ in range(2000):
        height, width = (int(2 ** rng.uniform(0, 13)) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            continue
        theirs = smart_resize(height, width, 2 * patch_size, 512 * 512, 2 * 672 * 672)
        assert processor.target_size(height, width) == theirs


def test_extreme_aspect_ratios_are_errors_as_in_transformers():
    data = encoded(noise(1, 800))
    with pytest.raises(ImageError, match="1x800 pixels: the aspect ratio is more than 200"):
        ImageProcessor()(open_image(data))
    with pytest.raises(ValueError, match="aspect ratio"):
        Qwen2VLImageProcessorPil()(images=[to_rgb(PIL.Image.open(io.BytesIO(data)))])


def test_unusable_image_files_are_errors_that_name_the_file(tmp_path):
    text = tmp_path / "page.html"
    text.write_text("<html>403</html>")
    cut = encoded(noise(200, 200), "JPEG")[:900]
    bomb = tmp_path / "bomb.png"
    PIL.Image.new("1", (12_000, 12_000)).save(bomb)
    larger_bomb = tmp_path / "worse.png"
    PIL.Image.new("1", (20_000, 20_000)).save(larger_bomb)
    assert bomb.stat().st_size < 100_000
    for source, reason in (
        (text, "page.html: not an image"),
        (tmp_path / "none.png", "none.png: no such file"),
        (tmp_path, "cannot be decoded"),
        (cut, "900 bytes: cannot be decoded"),
        (b"", "0 bytes: not an image"),
        (bomb, "12000x12000 pixels are more than the 100000000 allowed"),
        (larger_bomb, "400000000 pixels"),
    ):
        with pytest.raises(ImageError, match=reason):
            open_image(source)


def test_settings_are_read_from_a_directory(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    with pytest.raises(ImageError, match="contains neither preprocessor_config.json"):
        ImageProcessor.from_directory(tmp_path)
    processor = ImageProcessor(min_pixels=784, max_pixels=78400)
    file.write_text(json.dumps(processor.to_hf()))
    assert ImageProcessor.from_directory(tmp_path) == processor
    # As written by `transformers` 5.
    Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 78400}).save_pretrained(
        tmp_path
    )
    assert ImageProcessor.from_directory(tmp_path) == processor
    file.write_text('{"min_pixels": 500, "max_pixels": 100}')
    with pytest.raises(
        ImageError, match="preprocessor_config.json: min_pixels=500 is more than max_pixels=100"
    ):
        ImageProcessor.from_directory(tmp_path)
    file.write_text("{")
    with pytest.raises(ImageError, match="preprocessor_config.json: "):
        ImageProcessor.from_directory(tmp_path)
