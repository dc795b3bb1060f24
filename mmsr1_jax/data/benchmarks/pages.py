"""Documents as pictures of their pages, within a number of tokens."""

import bisect
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Sequence

from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.processing.image_files import ImageError, image_size, process_image
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.pdf_files import LIMITS as PDF_LIMITS
from mmsr1_jax.processing.pdf_files import page_sizes, render_pages, resized_png
from mmsr1_jax.utils import workers

POINTS_TO_PIXELS = 2.0  # 144 dots an inch, as MMLongBench-Doc renders; a point is 1/72 inch
_LEAST_TOKENS = 4  # of a page: the lower bound of the released preprocessor_config.json


@dataclasses.dataclass(frozen=True)
class Fit:
    """How pages fit into a number of tokens.

    Attributes:
      pages: how many do, the first ones; all, unless they do not fit even at the least size.
      max_pixels: bound on each picture's area, the largest with which they do.
      sizes: (height, width) of each of these in pixels, after resizing.
    """

    pages: int
    max_pixels: int
    sizes: tuple[tuple[int, int], ...]


def page_processor(processor: ImageProcessor) -> ImageProcessor:
    """The processor by which pages are fitted and shown: a lower bound that is meant for
    photographs would leave room for a few of them only, so theirs is that of Qwen2.5-VL as
    released, four tokens."""
    side = processor.patch_size * processor.merge_size
    return processor.with_limits(min(processor.min_pixels, _LEAST_TOKENS * side**2), None)


def fit_pages(sizes: Sequence[tuple[int, int]], tokens: int, processor: ImageProcessor) -> Fit:
    """The largest bound on a page's pixels with which the pages take at most `tokens` tokens.

    A token is a square of `patch_size * merge_size` pixels (28 in Qwen2.5-VL). One bound holds for
    all pages, so small ones stay as they are. It is within the processor's own bounds, and so are
    the sizes: the processor leaves a page as it is that has its size of these. The least size is
    that at the processor's lower bound.

    Args:
      sizes: (height, width) of each page, in pixels.
      tokens: for all pages together.

    Raises:
      DataError: not even the first page fits at the least size.
      ImageError: a page is too long, see `ImageProcessor.target_size`.
    """
    side = processor.patch_size * processor.merge_size

    def target(height: int, width: int, bounded: ImageProcessor) -> tuple[int, int]:
        rows, columns = bounded.target_size(height, width)
        while rows * columns < processor.min_pixels:  # rounded down, by which it got too small
            if rows * width < columns * height:
                rows += side
            else:
                columns += side
        return rows, columns

    def targets(max_pixels: int, pages: int) -> tuple[tuple[int, int], ...]:
        bounded = processor.with_limits(None, max_pixels)
        return tuple(target(height, width, bounded) for height, width in sizes[:pages])

    def costs(found: Sequence[tuple[int, int]]) -> list[int]:
        return [height * width // side**2 for height, width in found]

    least = list(itertools.accumulate(costs(targets(processor.min_pixels, len(sizes)))))
    pages = bisect.bisect_right(least, tokens)
    if not pages:
        raise DataError(
            f"the first page needs {least[0] if least else 1} tokens at the least, more than the "
            f"{tokens} that are allowed for all pages"
        )
    low, high = processor.min_pixels, processor.max_pixels
    while low < high:  # `low` fits
        middle = (low + high + 1) // 2
        if sum(costs(targets(middle, pages))) <= tokens:
            low = middle
        else:
            high = middle - 1
    return Fit(pages, low, targets(low, pages))


def shrink_pictures(
    pictures: Sequence[bytes], tokens: int, processor: ImageProcessor, *, max_file_pixels: int
) -> tuple[tuple[bytes, ...], int]:
    """Picture files of pages, made small enough for `tokens` tokens; and how many were left out.

    Files are handed through as they are where all fit without it.

    Raises:
      DataError: see `fit_pages`.
      ImageError: one of them is no picture that can be used; it says which, counting from 1.
    """
    sizes = []
    for number, picture in enumerate(pictures, 1):
        try:
            sizes.append(image_size(picture, max_pixels=max_file_pixels))
            processor.target_size(*sizes[-1])  # refuses too long ones
        except ImageError as error:
            raise ImageError(f"page {number}: {error}") from None
    fit = fit_pages(sizes, tokens, processor)
    left_out = len(pictures) - fit.pages
    if fit.max_pixels == processor.max_pixels:
        return tuple(pictures[: fit.pages]), left_out
    shown = zip(pictures, fit.sizes, strict=False)
    return tuple(
        process_image(
            picture, functools.partial(resized_png, size=size), max_pixels=max_file_pixels
        )
        for picture, size in shown
    ), left_out


def render_pdf(
    path: pathlib.Path, tokens: int, processor: ImageProcessor
) -> tuple[tuple[bytes, ...], int]:
    """The pages of a PDF as PNG files, small enough for `tokens` tokens; and how many were left
    out. A page is as large as at 144 dots an inch where tokens and processor allow it.

    Raises:
      DataError: see `fit_pages`; or `pypdfium2` is not installed.
      ImageError: the file is no PDF that can be read, or has no page that can be shown.
    """
    load_pdfium()
    file = os.path.abspath(path)
    try:
        shapes = workers.run(page_sizes, file, limits=PDF_LIMITS)
        sizes = [
            (round(height * POINTS_TO_PIXELS), round(width * POINTS_TO_PIXELS))
            for width, height in shapes
        ]
        if not sizes or min(map(min, sizes)) < 1:
            raise ImageError(f"{path}: no page, or one without area")
        fit = fit_pages(sizes, tokens, processor)
        pages = workers.run(render_pages, file, fit.sizes, limits=PDF_LIMITS)
    except workers.WorkerError as error:
        raise ImageError(f"{path}: rendering it {error}") from None
    return tuple(pages), len(sizes) - len(pages)


def load_pdfium() -> None:
    """Raise DataError if the library that renders PDFs is not installed."""
    try:
        import pypdfium2  # noqa: F401
    except ImportError:
        raise DataError(
            "documents are PDFs, and the package that renders them is not installed: "
            "pip install pypdfium2"
        ) from None
