"""Rendering PDFs from outside; these functions run in worker processes (`utils/workers.py`)."""

import io
from collections.abc import Sequence

import PIL.Image

from mmsr1_jax.processing.image_files import ImageError
from mmsr1_jax.utils import workers

# A page takes about 0.1 s; documents of the benchmarks have up to some hundred.
LIMITS = workers.Limits(cpu_seconds=120.0, wall_seconds=600.0, memory_bytes=2 << 30)


def page_sizes(path: str) -> list[tuple[float, float]]:
    """Return (width, height) of each page, in points.

    Raises:
      ImageError: The file is no PDF that can be read.
    """
    import pypdfium2

    try:
        with pypdfium2.PdfDocument(path) as document:
            return [document.get_page_size(number) for number in range(len(document))]
    except (pypdfium2.PdfiumError, OSError) as error:
        raise ImageError(f"{path}: not a PDF that can be read ({error})") from None


def render_pages(path: str, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the first pages as PNG files of the given (height, width) in pixels.

    Raises:
      ImageError: See `page_sizes`.
    """
    import pypdfium2

    pages = []
    try:
        with pypdfium2.PdfDocument(path) as document:
            for number, (rows, columns) in enumerate(sizes):
                width, height = document.get_page_size(number)
                # Both sides at least as long as wanted, then to the pixel: they round differently.
                bitmap = document[number].render(scale=max(rows / height, columns / width))
                pages.append(resized_png(bitmap.to_pil().convert("RGB"), (rows, columns)))
    except (pypdfium2.PdfiumError, OSError) as error:
        raise ImageError(f"{path}: not a PDF that can be read ({error})") from None
    return pages


def resized_png(image: PIL.Image.Image, size: tuple[int, int]) -> bytes:
    """Return an image of (height, width) pixels as a PNG file."""
    file = io.BytesIO()
    image.resize(size[::-1], PIL.Image.Resampling.BICUBIC).save(file, "png", compress_level=1)
    return file.getvalue()
