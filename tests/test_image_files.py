"""Image files from outside: one meaning by every door, bounded work, nothing private published."""

import asyncio
import io
import os
import pickle
import struct
import zlib

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

SECRET = b"52.5200 13.4050 Jane Doe"


def noise(height=70, width=90, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return PIL.Image.fromarray(values.squeeze())


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return exif


FILES = {
    "photograph": encoded(noise(), "jpeg", exif=turned(6)),
    "mirrored PNG": encoded(noise(), "png", exif=turned(5)),
    "WebP": encoded(noise(), "webp", lossless=True, exif=turned(3)),
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


def doors(data, tmp_path):
    """The same image by every door: bytes, path, text path, PIL objects read and not read, one that
    was pickled, and a copy without its file."""
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
def test_the_same_image_has_the_same_patches_by_every_door(name, tmp_path):
    processor = ImageProcessor()
    wanted = processor(open_image(FILES[name]))
    for door, source in doors(FILES[name], tmp_path).items():
        found = process_image(source, processor)
        assert found.grid == wanted.grid, door
        np.testing.assert_array_equal(found.values, wanted.values, err_msg=door)


@pytest.mark.parametrize("name", ["photograph", "transparent", "palette", "MPO"])
def test_the_same_image_is_published_as_the_same_bytes(name, tmp_path):
    async def all_of_them():
        return [await public_jpeg(source) for source in doors(FILES[name], tmp_path).values()]

    published = asyncio.run(all_of_them())
    assert len(set(published)) == 1
    shown = open_image(published[0][0])
    assert shown.size == open_image(FILES[name]).size


def test_a_frame_that_the_caller_chose_is_the_frame_that_is_read():
    data = encoded(noise(), "gif", save_all=True, append_images=[noise(seed=1), noise(seed=2)])
    image = PIL.Image.open(io.BytesIO(data))
    image.seek(2)
    wanted = PIL.Image.open(io.BytesIO(data))
    wanted.seek(2)
    assert open_image(image).tobytes() == image_files.upright_rgb(wanted).tobytes()


def test_conversations_take_images_by_every_door(tiny_dir, tmp_path):
    processor = Processor.from_directory(tiny_dir)

    def patches(image):
        content = [{"type": "image", "image": image}]
        return processor.conversation([{"role": "user", "content": content}]).images[0]

    sources = doors(FILES["photograph"], tmp_path)
    del sources["path"]  # conversations name paths as text
    assert len({patches(source).digest for source in sources.values()}) == 1


def private_files():
    exif = turned(6)
    exif[0x010F] = SECRET.decode()
    gps = exif.get_ifd(0x8825)
    gps[1], gps[2] = "N", (52.0, 31.0, 12.0)
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("Author", SECRET.decode())
    text.add_itxt("XML:com.adobe.xmp", SECRET.decode())
    image = noise()
    held = image.copy()
    held.info = {"exif": exif.tobytes(), "comment": SECRET, "icc_profile": SECRET, "xmp": SECRET}
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
        "PIL object": held,
    }  # fmt: skip


@pytest.mark.parametrize("name", private_files())
def test_what_is_published_holds_pixels_only(name):
    source = private_files()[name]
    if isinstance(source, bytes) and name != "PNG text":  # whose text is compressed
        assert SECRET in source or name == "second image"
    jpeg, _ = asyncio.run(public_jpeg(source))
    with PIL.Image.open(io.BytesIO(jpeg)) as shown:
        assert shown.format == "JPEG" and not shown.getexif() and "comment" not in shown.info
        assert set(shown.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert SECRET not in jpeg and jpeg.endswith(b"\xff\xd9") and jpeg.count(b"\xff\xd8\xff") == 1


def test_the_digest_is_of_the_pixels():
    data = encoded(noise(), "png")
    again = encoded(noise(), "tiff")  # the same pixels in another file
    assert asyncio.run(public_jpeg(data)) == asyncio.run(public_jpeg(again))
    other = asyncio.run(public_jpeg(encoded(noise(90, 70), "png")))
    assert other[1] != asyncio.run(public_jpeg(data))[1]


def png(width, height, color=6, depth=8):
    """A PNG of zeros, written a row at a time."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    bits = {0: 1, 2: 3, 3: 1, 6: 4}[color] * depth
    pack = zlib.compressobj(9)
    row = bytes(1 + (width * bits + 7) // 8)
    data = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) if color == 3 else b""
    chunks = chunk(b"IHDR", header) + palette + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def scans(side, count):
    """A progressive JPEG whose last scan comes `count` times more."""
    data = encoded(PIL.Image.new("L", (side, side), 128), "jpeg", progressive=True)
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    tables = data.rfind(b"\xff\xc4", 0, last)
    last = min(last, tables) if tables > data.rfind(b"\xff\xda", 0, last) else last
    return data[:end] + data[last:end] * count + b"\xff\xd9"


def icon(inner):
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22)
    return head + inner


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
REFUSED = {
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
    "ICO that holds a large PNG": (icon(png(9000, 9000, 3, 1)), "not an image"),
    "FITS": (b"SIMPLE  =                    T" + bytes(2850), "not an image"),
    "scans": (scans(500, 200), "more than 100 scans"),
    "more pixels than allowed": (png(5000, 4001, 0, 1), "more than the 20000000 allowed"),
    "a bomb by Pillow's own limit": (png(30_000, 30_000, 0, 1), "could be decompression bomb"),
    "nothing": (b"", "not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_files_are_refused(name, tmp_path, monkeypatch):
    """Also where Pillow would start another program for them."""
    called = tmp_path / "called"
    stand_in = tmp_path / "gs"
    stand_in.write_text(f"#!/bin/sh\ntouch {called}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data, words = REFUSED[name]
    with pytest.raises(ImageError, match=words):
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
    if opened is not None:  # a tool may hand it over opened
        with pytest.raises(ImageError):
            open_image(opened, max_pixels=20_000_000)
    assert not called.exists()


def test_decoding_has_limits_of_its_own(monkeypatch):
    """Files that pass every check of their header."""
    limits = Limits(cpu_seconds=0.3, wall_seconds=600.0, memory_bytes=300 << 20)
    monkeypatch.setattr(image_files, "_limits", lambda max_pixels: limits)
    with pytest.raises(ImageError, match=r"used more than 0.3 s of CPU time"):
        open_image(scans(4400, 90), max_pixels=40_000_000)
    with pytest.raises(ImageError, match="MemoryError|MiB|CPU time"):
        open_image(png(9000, 9000), max_pixels=100_000_000)
    assert image_size(FILES["photograph"]) == (90, 70)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, monkeypatch):
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
def test_what_is_no_image_at_all_is_named(source):
    with pytest.raises(ImageError, match="neither an image, nor the bytes or the path"):
        open_image(source)


def test_a_closed_image_is_an_error_of_ours(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(FILES["transparent"])
    image = PIL.Image.open(path)
    image.close()
    with pytest.raises(ImageError):
        open_image(image)
