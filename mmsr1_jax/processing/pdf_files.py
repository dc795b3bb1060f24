"""Rendering of untrusted PDFs. These functions run in worker processes (`utils/workers.py`)."""

import io
from collections.abc import Sequence

import PIL.Image

from mmsr1_jax.processing.image_files import ImageError
from mmsr1_jax.utils import workers

# Rendering takes about 0.1 s per page; benchmark documents have up to a few hundred pages.
LIMITS = workers.Limits(cpu_seconds=120.0, wall_seconds=600.0, memory_bytes=2 << 30)


def page_sizes(path: str) -> list[tuple[float, float]]:
    """Return the (width, height) of each page, in points.

    Raises:
      ImageError: If the file is not a readable PDF.
    """
    import pypdfium2

    try:
        with pypdfium2.PdfDocument(path) as document:
            return [document.get_page_size(index) for index in range(len(document))]
    except (pypdfium2.PdfiumError, OSError) as error:
        raise ImageError(f"{path}: not a readable PDF ({error})") from None


def render_pages(path: str, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    """Render the first `len(sizes)` pages as PNG files of the given (height, width) in pixels.

    Raises:
      ImageError: If the file is not a readable PDF.
    """
    import pypdfium2

    pages = []
    try:
        with pypdfium2.PdfDocument(path) as document:
            for index, (rows, columns) in enumerate(sizes):
                width, height = document.get_page_size(index)
                # The sides round differently, so render at least this large, then resize exactly.
                bitmap = document[index].render(scale=max(rows / height, columns / width))
                pages.append(resized_png(bitmap.to_pil().convert("RGB"), (rows, columns)))
    except (pypdfium2.PdfiumError, OSError) as error:
        raise ImageError(f"{path}: not a readable PDF ({error})") from None
    return pages


def resized_png(image: PIL.Image.Image, size: tuple[int, int]) -> bytes:
    """Return an image resized to (height, width) pixels as a PNG file."""
    file = io.BytesIO()
    image.resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC).save(
        file, "png", compress_level=1
    )
    return file.getvalue()
