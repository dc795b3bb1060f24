"""Documents as page images that fit into a token budget."""

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

POINTS_TO_PIXELS = 2.0  # 144 dpi, as in MMLongBench-Doc; a point is 1/72 inch
_MIN_TOKENS = 4  # per page: the lower bound of the released preprocessor_config.json


@dataclasses.dataclass(frozen=True)
class PageFit:
    """Result of fitting pages into a token budget.

    Attributes:
      pages: Number of leading pages that fit. All pages do, unless they exceed the budget even at
        their minimum size.
      max_pixels: Largest bound on the area of each image with which the pages fit.
      sizes: (height, width) of each of these pages in pixels, after resizing.
    """

    pages: int
    max_pixels: int
    sizes: tuple[tuple[int, int], ...]


def page_processor(processor: ImageProcessor) -> ImageProcessor:
    """Return the image processor with which pages are fitted and shown.

    A lower bound meant for photographs would leave space for only a few pages, so the bound for
    pages is at most that of the released Qwen2.5-VL, four tokens.
    """
    side = processor.patch_size * processor.merge_size
    return processor.with_limits(min(processor.min_pixels, _MIN_TOKENS * side**2), None)


def fit_pages(sizes: Sequence[tuple[int, int]], tokens: int, processor: ImageProcessor) -> PageFit:
    """Find the largest bound on a page's pixels with which pages take at most `tokens` tokens.

    A token covers a square with sides of `patch_size * merge_size` pixels (28 in Qwen2.5-VL). One
    bound applies to all pages, so small pages keep their size. The bound and the sizes lie within
    the processor's own bounds, so the processor leaves a page that has its fitted size unchanged.
    The minimum size of a page is its size at the processor's lower bound.

    Args:
      sizes: (height, width) of each page, in pixels.
      tokens: Token budget for all pages together.

    Raises:
      DataError: The first page does not fit even at its minimum size.
      ImageError: A page's aspect ratio is too extreme, see `ImageProcessor.target_size`.
    """
    side = processor.patch_size * processor.merge_size

    def target(height: int, width: int, bounded: ImageProcessor) -> tuple[int, int]:
        rows, columns = bounded.target_size(height, width)
        while rows * columns < processor.min_pixels:  # rounding down made it too small
            if rows * width < columns * height:
                rows += side
            else:
                columns += side
        return rows, columns

    def targets(max_pixels: int, pages: int) -> tuple[tuple[int, int], ...]:
        bounded = processor.with_limits(None, max_pixels)
        return tuple(target(height, width, bounded) for height, width in sizes[:pages])

    def num_tokens(page_sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [height * width // side**2 for height, width in page_sizes]

    min_tokens = list(itertools.accumulate(num_tokens(targets(processor.min_pixels, len(sizes)))))
    pages = bisect.bisect_right(min_tokens, tokens)
    if not pages:
        raise DataError(
            f"the first page needs at least {min_tokens[0] if min_tokens else 1} tokens, more than "
            f"the page_tokens={tokens} allowed for all pages"
        )
    low, high = processor.min_pixels, processor.max_pixels
    while low < high:  # invariant: `low` fits
        middle = (low + high + 1) // 2
        if sum(num_tokens(targets(middle, pages))) <= tokens:
            low = middle
        else:
            high = middle - 1
    return PageFit(pages, low, targets(low, pages))


def shrink_pages(
    images: Sequence[bytes], tokens: int, processor: ImageProcessor, *, max_file_pixels: int
) -> tuple[tuple[bytes, ...], int]:
    """Shrink page images to fit into `tokens` tokens.

    Files are returned unchanged if they fit without resizing.

    Returns:
      The image files of the pages that fit, and the number of omitted pages.

    Raises:
      DataError: See `fit_pages`.
      ImageError: An image is unusable; the message names its page, counting from 1.
    """
    sizes = []
    for page, image in enumerate(images, 1):
        try:
            sizes.append(image_size(image, max_pixels=max_file_pixels))
            processor.target_size(*sizes[-1])  # raises for extreme aspect ratios
        except ImageError as error:
            raise ImageError(f"page {page}: {error}") from None
    fit = fit_pages(sizes, tokens, processor)
    omitted = len(images) - fit.pages
    if fit.max_pixels == processor.max_pixels:
        return tuple(images[: fit.pages]), omitted
    return tuple(
        process_image(image, functools.partial(resized_png, size=size), max_pixels=max_file_pixels)
        for image, size in zip(images, fit.sizes, strict=False)
    ), omitted


def render_pdf(
    path: pathlib.Path, tokens: int, processor: ImageProcessor
) -> tuple[tuple[bytes, ...], int]:
    """Render the pages of a PDF to fit into `tokens` tokens.

    Pages are rendered at 144 dpi if the budget and the processor allow it, and smaller otherwise.

    Returns:
      The pages that fit as PNG files, and the number of omitted pages.

    Raises:
      DataError: See `fit_pages`; or `pypdfium2` is not installed.
      ImageError: The file is not a readable PDF, has no pages or has a page without area.
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
            raise ImageError(f"{path}: has no pages, or a page without area")
        fit = fit_pages(sizes, tokens, processor)
        pages = workers.run(render_pages, file, fit.sizes, limits=PDF_LIMITS)
    except workers.WorkerError as error:
        raise ImageError(f"{path}: cannot be rendered: {error}") from None
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
