"""Decoding of untrusted image files in worker processes, within resource limits.

An image source is a path, the bytes of a file, or a `PIL.Image.Image`. All three yield the same
pixels for the same image: upright (according to its EXIF tag), RGB, transparent parts composited
over white. Encoded images are decoded in a worker (`utils/workers.py`). An image object whose
pixels are already loaded is converted in this process.

Only the formats in `FORMATS` are opened. Pillow supports others, some of which start other programs
(EPS) or decode before the size is known (ICO).
"""

import hashlib
import io
import os
import pathlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import PIL.Image
import PIL.ImageFile
import PIL.ImageOps

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils import workers
from mmsr1_jax.utils.files import FileRefusedError, read_regular

ImageSource = PIL.Image.Image | bytes | str | pathlib.Path  # bytes: contents of a file; str: a path

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG includes MPO
DEFAULT_MAX_FILE_PIXELS = 100_000_000  # before resizing; larger files count as decompression bombs
MAX_FILE_BYTES = 512 * 2**20
# Encoders write about 10 scans. Decoding time is proportional to scans times pixels.
_MAX_JPEG_SCANS = 100
_MAX_SCANNED_PIXELS = 2_000_000_000
_LOCK = threading.Lock()
_MAX_REJECTED = 10_000
_rejected: dict[tuple[bytes, int], str] = {}  # error of each file over a limit, by `_key`
_STRIP_ROWS = 256  # rows of a transparent image composited at a time


class ImageError(UserError):
    """Error for an unusable image. The message gives the reason."""


def open_image(
    source: ImageSource, *, max_pixels: int = DEFAULT_MAX_FILE_PIXELS
) -> PIL.Image.Image:
    """Return an image in RGB, rotated according to its EXIF tag.

    Transparent parts become white, as in the published processor.

    Raises:
      ImageError: If the file is missing, damaged or in none of `FORMATS`, has more than
        `max_pixels` pixels (checked in the header, before decompression), or exceeds a limit of the
        worker.
    """
    size, pixels = _in_worker(_pixels, source, max_pixels)
    return PIL.Image.frombytes("RGB", size, pixels)


def process_image(
    source: ImageSource,
    processor: Callable[[PIL.Image.Image], Any],
    *,
    max_pixels: int = DEFAULT_MAX_FILE_PIXELS,
) -> Any:
    """Return `processor(open_image(source))`, computed in the worker.

    Args:
      source: Image to open.
      processor: Picklable function, such as an `images.ImageProcessor`, from a module that does not
        import JAX.
      max_pixels: Maximum number of pixels, see `open_image`.

    Raises:
      ImageError: If the image cannot be opened, see `open_image`, or the processor raises it.
    """
    return _in_worker(processor, source, max_pixels)


async def process_image_async(
    source: ImageSource,
    processor: Callable[[PIL.Image.Image], Any],
    *,
    max_pixels: int = DEFAULT_MAX_FILE_PIXELS,
) -> Any:
    """Run `process_image` from a coroutine. Cancelling it stops the worker."""
    function, args = _task(processor, source, max_pixels)
    if function is None:
        return _in_process(processor, source, max_pixels)
    _check_rejected(args[0], max_pixels)
    try:
        return await workers.run_async(function, *args, limits=_limits(max_pixels))
    except workers.WorkerError as error:
        raise _rejection(args[0], max_pixels, error) from None


def image_size(
    source: ImageSource, *, max_pixels: int = DEFAULT_MAX_FILE_PIXELS
) -> tuple[int, int]:
    """Decode an image and return its upright (height, width).

    Raises:
      ImageError: If the image cannot be opened, see `open_image`.
    """
    return _in_worker(_size, source, max_pixels)


async def check_image(source: ImageSource, *, max_pixels: int) -> None:
    """Raise ImageError if an image cannot be decoded, see `open_image`."""
    await process_image_async(source, _size, max_pixels=max_pixels)


def read_header(data: bytes) -> tuple[str, int, int]:
    """Return (format, width, height) from the header of an image file, without decompressing it.

    Raises:
      ImageError: If the file is not an image in one of `FORMATS`.
    """
    try:
        return workers.run(_header, data)
    except workers.WorkerError as error:
        raise ImageError(f"{_name(data)}: its header cannot be read: {error}") from None


async def public_jpeg(
    source: ImageSource, *, max_pixels: int = DEFAULT_MAX_FILE_PIXELS
) -> tuple[bytes, str]:
    """Return an image as a JPEG file without metadata, and the digest of its pixels.

    The file has no EXIF (place, device, owner), profile, comment, or bytes after the image. The
    digest depends on the pixels alone, not on the source file or the version of an encoder.

    Raises:
      ImageError: If the image cannot be opened, see `open_image`.
    """
    return await process_image_async(source, _as_jpeg, max_pixels=max_pixels)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an image in RGB, composited over white as in the published processor."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    out = PIL.Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP_ROWS):  # strips bound the memory of the three copies
        bottom = min(top + _STRIP_ROWS, image.height)
        strip = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white = PIL.Image.new("RGBA", strip.size, (255, 255, 255, 255))
        out.paste(PIL.Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return out


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return `to_rgb` of an image, rotated according to its EXIF tag."""
    return to_rgb(PIL.ImageOps.exif_transpose(image))


def _in_worker(function: Callable, source: ImageSource, max_pixels: int) -> Any:
    """Return `function` of the opened image. Raises ImageError."""
    task, args = _task(function, source, max_pixels)
    if task is None:
        return _in_process(function, source, max_pixels)
    _check_rejected(args[0], max_pixels)
    try:
        return workers.run(task, *args, limits=_limits(max_pixels))
    except workers.WorkerError as error:
        raise _rejection(args[0], max_pixels, error) from None


def _check_rejected(file: bytes | str, max_pixels: int) -> None:
    """Raise ImageError for a file that exceeded a limit before.

    All rollouts of a question use the same image, and each would run into the limit again.
    """
    if isinstance(file, bytes) and (reason := _rejected.get(_key(file, max_pixels))):
        raise ImageError(f"{_name(file)}: {reason}")


def _rejection(file: bytes | str, max_pixels: int, error: workers.WorkerError) -> ImageError:
    """Return the error for a file that could not be decoded. Remember files that hit a limit."""
    reason = f"cannot be decoded: {error}"
    if isinstance(file, bytes) and isinstance(error, workers.LimitError):
        with _LOCK:
            while len(_rejected) >= _MAX_REJECTED:
                del _rejected[next(iter(_rejected))]
            _rejected[_key(file, max_pixels)] = reason
    return ImageError(f"{_name(file)}: {reason}")


def _key(file: bytes, max_pixels: int) -> tuple[bytes, int]:
    return hashlib.blake2b(file, digest_size=16).digest(), max_pixels


def _task(
    function: Callable, source: ImageSource, max_pixels: int
) -> tuple[Callable | None, tuple[Any, ...]]:
    """Return the worker's task for an image, or (None, ()) if its pixels are already loaded."""
    name, frame = _name(source), 0
    if isinstance(source, PIL.Image.Image):
        if not isinstance(source, PIL.ImageFile.ImageFile) or source._im is not None:
            return None, ()
        frame = source.tell()
        source = _file_of(source)
    elif isinstance(source, (str, pathlib.Path)):
        source = os.path.abspath(source)
    elif not isinstance(source, bytes):
        raise ImageError(f"{name}: must be an image, the bytes of an image file, or its path")
    return _open, (source, name, frame, max_pixels, function)


def _in_process(function: Callable, image: ImageSource, max_pixels: int) -> Any:
    """Return `function` of an image whose pixels are already loaded. Raises ImageError."""
    assert isinstance(image, PIL.Image.Image)  # see `_task`
    try:
        _check_size(_name(image), image, max_pixels)
        return function(upright_rgb(image))
    except ImageError:
        raise
    except Exception as error:  # a closed image, or an unusual mode
        raise ImageError(
            f"{_name(image)}: cannot be used ({type(error).__name__}: {error})"
        ) from None


def _file_of(image: PIL.ImageFile.ImageFile) -> bytes:
    """Return the file contents of an image that Pillow has opened but not decoded."""
    try:
        with _LOCK:  # several threads may share the image
            file: Any = image.fp  # None if the image is closed
            position = file.tell()
            file.seek(0)
            data = file.read(MAX_FILE_BYTES + 1)
            file.seek(position)
    except Exception as error:  # a closed file
        raise ImageError(
            f"{_name(image)}: cannot be read ({type(error).__name__}: {error})"
        ) from None
    _check_bytes(_name(image), len(data))
    return data


def _limits(max_pixels: int) -> workers.Limits:
    """Return worker limits that suffice to decode any image of up to `max_pixels` pixels."""
    megapixels = max_pixels / 1e6
    return workers.Limits(
        cpu_seconds=1.5 + megapixels / 15,
        wall_seconds=60 + megapixels,
        memory_bytes=(128 << 20) + 20 * max_pixels,
    )


def _name(source: ImageSource) -> str:
    if isinstance(source, PIL.Image.Image):
        return "image"
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return str(source) if isinstance(source, (str, pathlib.Path)) else type(source).__name__


def _check_bytes(name: str, count: int) -> None:
    if count > MAX_FILE_BYTES:
        raise ImageError(f"{name}: the file is larger than {MAX_FILE_BYTES >> 20} MiB")


def _check_size(name: str, image: PIL.Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{name}: {image.width}x{image.height} pixels are more than the {max_pixels} allowed"
        )


# The functions below run in the workers.


def _open(source: bytes | str, name: str, frame: int, max_pixels: int, function: Callable) -> Any:
    """Return `function` of the upright RGB image in a file. Raises ImageError."""
    try:
        data = (
            source if isinstance(source, bytes) else read_regular(source, max_bytes=MAX_FILE_BYTES)
        )
        scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
        if scans > _MAX_JPEG_SCANS:
            raise ImageError(f"{name}: a JPEG with more than the {_MAX_JPEG_SCANS} scans allowed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(name, image, max_pixels)
                if scans * image.width * image.height > _MAX_SCANNED_PIXELS:
                    raise ImageError(f"{name}: too large for a JPEG with {scans} scans")
                if frame:
                    image.seek(frame)
                return function(upright_rgb(image))
    except ImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image ({', '.join(FORMATS)})") from None
    except FileRefusedError as error:
        missing = error.strerror.startswith("No such file")
        reason = "no such file" if missing else f"cannot be decoded ({error.strerror})"
        raise ImageError(f"{name}: {reason}") from None
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # decoders raise arbitrary errors on hostile input
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from None


def _header(data: bytes) -> tuple[str, int, int]:
    # Only the header is read. Pillow's own pixel limit would raise before returning the size.
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # An MPO file is a JPEG followed by further images.
                name = "JPEG" if image.format == "MPO" else str(image.format)
                return name, image.width, image.height
    except Exception as error:
        raise ImageError(f"{_name(data)}: not an image ({type(error).__name__})") from None
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit


def _pixels(image: PIL.Image.Image) -> tuple[tuple[int, int], bytes]:
    return image.size, image.tobytes()


def _size(image: PIL.Image.Image) -> tuple[int, int]:
    return image.height, image.width


def _as_jpeg(image: PIL.Image.Image) -> tuple[bytes, str]:
    digest = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16)
    file = io.BytesIO()
    image.info = {}
    image.save(file, "jpeg", quality=95, subsampling=0)
    return file.getvalue(), digest.hexdigest()
