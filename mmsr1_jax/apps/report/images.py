"""Images for the page: downscaled, deduplicated, and bounded in total size."""

import base64
import hashlib
import io
import os
import pathlib
from typing import Any

from mmsr1_jax.processing.image_files import ImageError, open_image
from mmsr1_jax.utils.files import read_regular

QUESTION, RESULT = 320, 160  # longer side in pixels
_MAX_CHARS = 24_000_000  # total size of a page's images in characters
_MAX_FILE_BYTES = 64_000_000


class ImageRegistry:
    """Registry that gives image files an index while episodes are read, and then encodes them.

    Args:
      folders: Directories whose files may be shown. Episode files may come from other people and
        the page may be shared, so it must not contain files that its author did not mean to show.
    """

    def __init__(self, *folders: pathlib.Path):
        self._folders = [os.path.realpath(folder) for folder in folders]
        self._indices: dict[pathlib.Path, int] = {}
        self._sides: list[int] = []

    def register(self, path: pathlib.Path, side: int) -> int:
        """Return the index, from 0, of a file whose longer side is shown with `side` pixels."""
        index = self._indices.setdefault(path, len(self._indices))
        if index == len(self._sides):
            self._sides.append(side)
        self._sides[index] = max(self._sides[index], side)
        return index

    def encode(self) -> tuple[dict[str, list[Any]], list[str]]:
        """Encode the images within the size limit, those of questions first.

        Returns:
          `{"urls": [data URL, ..], "url_indices": [index into "urls" or None, ..]}`, with
          "url_indices" by image index; and a message for each file that cannot be shown, plus one
          for those over the size limit.
        """
        urls: list[str] = []
        known: dict[tuple[str, int], int] = {}  # index into `urls`, by file digest and side
        url_indices: list[int | None] = [None] * len(self._sides)
        messages, budget, num_omitted = [], _MAX_CHARS, 0
        order = sorted(self._indices.items(), key=lambda item: -self._sides[item[1]])
        for path, index in order:
            try:
                file = self._read(path)
                key = hashlib.sha256(file).hexdigest(), self._sides[index]
                if key not in known:
                    url = _thumbnail_url(file, self._sides[index])
                    if len(url) > budget:
                        num_omitted += 1
                        continue
                    budget -= len(url)
                    known[key] = len(urls)
                    urls.append(url)
                url_indices[index] = known[key]
            except (OSError, ValueError) as error:  # an invalid path, a missing file, not an image
                messages.append(f"{path}: {getattr(error, 'strerror', None) or error}")
        if num_omitted:
            messages.append(f"{num_omitted} images: over the size limit of the page")
        return {"urls": urls, "url_indices": url_indices}, messages

    def _read(self, path: pathlib.Path) -> bytes:
        """Read a file.

        Raises:
          OSError, ValueError: The file does not exist, or may not be shown.
        """
        real = pathlib.Path(os.path.realpath(path))
        if not any(real.is_relative_to(folder) for folder in self._folders):
            raise ImageError("not in the directory of the report; --image_dir=DIR allows another")
        return read_regular(real, max_bytes=_MAX_FILE_BYTES)


def _thumbnail_url(file: bytes, side: int) -> str:
    """Return a downscaled image as a data URL. Raises ImageError if it cannot be read."""
    image = open_image(file)
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "webp", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
