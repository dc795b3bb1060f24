"""Untrusted image files: the same pixels from any source, bounded work, no private metadata."""

import asyncio
import io
import os
import pickle
import struct

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest

from mmsr1_jax.processing import image_files
from mmsr1_jax.processing.image_files import (
    ImageError,
    check_image,
    image_size,
    open_image,
    process_image,
    public_jpeg,
)
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.utils.workers import Limits
from tests.hostile_images import EPS, icon, png, scans

SECRET = b"52.5200 13.4050 Jane Doe"


def noise(height=70, width=90, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return PIL.Image.fromarray(values.squeeze())


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rotated(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return exif


FILES = {
    "photograph": encoded(noise(), "jpeg", exif=rotated(6)),
    "mirrored PNG": encoded(noise(), "png", exif=rotated(5)),
    "WebP": encoded(noise(), "webp", lossless=True, exif=rotated(3)),
    "transparent": encoded(noise(mode="RGBA"), "png"),
    "tall transparent": encoded(noise(700, 40, "RGBA"), "png"),
    "palette": encoded(noise().quantize(16), "png", transparency=3),
    "one transparent grey": encoded(noise(mode="L"), "png", transparency=7),
    "16 bits": encoded(
        PIL.Image.fromarray(np.arange(4900, dtype=np.uint16).reshape(70, 70)), "png"
    ),
    "CMYK": encoded(noise().convert("CMYK"), "jpeg"),
    "TIFF": encoded(noise(), "tiff"),
    "BMP": encoded(noise(), "bmp"),
    "GIF": encoded(noise().quantize(8), "gif", transparency=1),
    "MPO": encoded(noise(), "mpo", save_all=True, append_images=[noise(seed=1)]),
}


def sources(data, tmp_path):
    """Return an image in all forms of a source: bytes, path, path as text, PIL objects before and
    after loading, a pickled one, and a copy without a file."""
    path = tmp_path / "image"
    path.write_bytes(data)
    read = PIL.Image.open(io.BytesIO(data))
    read.load()
    pickled = pickle.loads(pickle.dumps(read))
    return {
        "bytes": data, "path": path, "text": str(path), "PIL": PIL.Image.open(io.BytesIO(data)),
        "PIL of a path": PIL.Image.open(path), "PIL, read": read, "pickled": pickled,
        "copy": read.copy(),
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_an_image_has_the_same_patches_from_every_source(name, tmp_path):
    processor = ImageProcessor()
    expected = processor(open_image(FILES[name]))
    for kind, source in sources(FILES[name], tmp_path).items():
        patches = process_image(source, processor)
        assert patches.grid == expected.grid, kind
        np.testing.assert_array_equal(patches.values, expected.values, err_msg=kind)


@pytest.mark.parametrize("name", ["photograph", "transparent", "palette", "MPO"])
def test_an_image_is_published_as_the_same_bytes_from_every_source(name, tmp_path):
    async def publish_all():
        return [await public_jpeg(source) for source in sources(FILES[name], tmp_path).values()]

    published = asyncio.run(publish_all())
    assert len(set(published)) == 1
    image = open_image(published[0][0])
    assert image.size == open_image(FILES[name]).size


def test_the_selected_frame_is_read():
    data = encoded(noise(), "gif", save_all=True, append_images=[noise(seed=1), noise(seed=2)])
    image = PIL.Image.open(io.BytesIO(data))
    image.seek(2)
    expected = PIL.Image.open(io.BytesIO(data))
    expected.seek(2)
    assert open_image(image).tobytes() == image_files.upright_rgb(expected).tobytes()


def test_conversations_accept_images_from_every_source(tiny_dir, tmp_path):
    processor = Processor.from_directory(tiny_dir)

    def patches(image):
        content = [{"type": "image", "image": image}]
        return processor.conversation([{"role": "user", "content": content}]).images[0]

    accepted = sources(FILES["photograph"], tmp_path)
    del accepted["path"]  # conversations name paths as text
    assert len({patches(source).digest for source in accepted.values()}) == 1


def private_files():
    exif = rotated(6)
    exif[0x010F] = SECRET.decode()
    gps = exif.get_ifd(0x8825)
    gps[1], gps[2] = "N", (52.0, 31.0, 12.0)
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("Author", SECRET.decode())
    text.add_itxt("XML:com.adobe.xmp", SECRET.decode())
    image = noise()
    in_memory = image.copy()
    in_memory.info = {
        "exif": exif.tobytes(),
        "comment": SECRET,
        "icc_profile": SECRET,
        "xmp": SECRET,
    }
    return {
        "EXIF": encoded(image, "jpeg", exif=exif),
        "comment": encoded(image, "jpeg", comment=SECRET),
        "profile": encoded(image, "jpeg", icc_profile=SECRET),
        "XMP": encoded(image, "jpeg", xmp=SECRET),
        "behind the image": encoded(image, "jpeg") + b"<script>" + SECRET,
        "behind a PNG": encoded(image, "png") + SECRET,
        "PNG text": encoded(image, "png", pnginfo=text, exif=exif),
        "WebP": encoded(image, "webp", exif=exif, xmp=SECRET),
        "TIFF": encoded(image, "tiff", exif=exif),
        "second image": encoded(image, "mpo", save_all=True, append_images=[noise(seed=1)],
                                exif=exif),
        "PIL object": in_memory,
    }  # fmt: skip


@pytest.mark.parametrize("name", private_files())
def test_published_images_contain_pixels_only(name):
    source = private_files()[name]
    if isinstance(source, bytes) and name != "PNG text":  # its text is compressed
        assert SECRET in source or name == "second image"
    jpeg, _ = asyncio.run(public_jpeg(source))
    with PIL.Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG" and not image.getexif() and "comment" not in image.info
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert SECRET not in jpeg and jpeg.endswith(b"\xff\xd9") and jpeg.count(b"\xff\xd8\xff") == 1


def test_the_digest_depends_on_pixels_only():
    data = encoded(noise(), "png")
    same = encoded(noise(), "tiff")  # the same pixels in another file format
    assert asyncio.run(public_jpeg(data)) == asyncio.run(public_jpeg(same))
    other = asyncio.run(public_jpeg(encoded(noise(90, 70), "png")))
    assert other[1] != asyncio.run(public_jpeg(data))[1]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
HOSTILE = {
    "EPS": (EPS, "not an image"),
    "EPS behind a DOS header": (
        struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(EPS), 0, 0, 0, 0, 0xFFFF) + EPS,
        "not an image",
    ),
    "WMF": (b"\xd7\xcd\xc6\x9a" + bytes(40), "not an image"),
    "SVG": (SVG, "not an image"),
    "PPM": (b"P6 9 9 255\n" + bytes(243), "not an image"),
    "TGA": (encoded(noise(), "tga"), "not an image"),
    "JPEG 2000": (encoded(noise(), "jpeg2000"), "not an image"),
    "ICO that contains a large PNG": (icon(png(9000, 9000, 3, 1)), "not an image"),
    "FITS": (b"SIMPLE  =                    T" + bytes(2850), "not an image"),
    "scans": (scans(500, 200), "more than the 100 scans allowed"),
    "more pixels than allowed": (png(5000, 4001, 0, 1), "more than the 20000000 allowed"),
    "a bomb by Pillow's own limit": (png(30_000, 30_000, 0, 1), "could be decompression bomb"),
    "nothing": (b"", "not an image"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_rejected(name, tmp_path, monkeypatch):
    """Even those for which Pillow would start another program."""
    called = tmp_path / "called"
    stand_in = tmp_path / "gs"
    stand_in.write_text(f"#!/bin/sh\ntouch {called}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data, reason = HOSTILE[name]
    with pytest.raises(ImageError, match=reason):
        open_image(data, max_pixels=20_000_000)
    with pytest.raises(ImageError):
        image_size(data, max_pixels=20_000_000)
    with pytest.raises(ImageError):
        asyncio.run(check_image(data, max_pixels=20_000_000))
    with pytest.raises(ImageError):
        asyncio.run(public_jpeg(data, max_pixels=20_000_000))
    try:
        opened = PIL.Image.open(io.BytesIO(data))
    except Exception:
        opened = None
    if opened is not None:  # a tool may return an opened image
        with pytest.raises(ImageError):
            open_image(opened, max_pixels=20_000_000)
    assert not called.exists()


def test_decoding_is_bounded_in_time_and_memory(monkeypatch):
    """Even for files whose header passes every check."""
    limits = Limits(cpu_seconds=0.3, wall_seconds=600.0, memory_bytes=300 << 20)
    monkeypatch.setattr(image_files, "_limits", lambda max_pixels: limits)
    with pytest.raises(ImageError, match=r"used more than 0.3 s of CPU time"):
        open_image(scans(4400, 90), max_pixels=40_000_000)
    with pytest.raises(ImageError, match="MemoryError|MiB|CPU time"):
        open_image(png(9000, 9000), max_pixels=100_000_000)
    assert image_size(FILES["photograph"]) == (90, 70)


def test_only_regular_files_of_bounded_size_are_decoded(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero", "/dev/stdin"):
        with pytest.raises(ImageError, match="not a regular file|cannot be decoded"):
            open_image(path)
    large = tmp_path / "large.png"
    with open(large, "wb") as file:
        file.truncate(image_files.MAX_FILE_BYTES + 1)
    with pytest.raises(ImageError, match="536870913 bytes are more than"):
        open_image(large)


@pytest.mark.parametrize("source", [5, None, ["a.png"], 1.5, object()])
def test_a_source_of_the_wrong_type_is_an_error(source):
    with pytest.raises(
        ImageError, match="must be an image, the bytes of an image file, or its path"
    ):
        open_image(source)


def test_a_closed_image_is_an_image_error(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(FILES["transparent"])
    image = PIL.Image.open(path)
    image.close()
    with pytest.raises(ImageError):
        open_image(image)
