"""Images for the page: downscaled, deduplicated, and bounded in total size."""

import base64
import hashlib
import io
import os
import pathlib

from mmsr1_jax.processing.image_files import ImageError, open_image
from mmsr1_jax.utils.files import read_regular

QUESTION, RESULT = 320, 160  # longer side in pixels
_MOST = 24_000_000  # total size of a page's images in characters
_LARGEST = 64_000_000  # maximum size of a file in bytes


class Pictures:
    """Registry that numbers image files while episodes are read, and then encodes them.

    Args:
      folders: Directories whose files may be shown. Episode files may come from other people and
        the page may be shared, so it must not contain files that its author did not mean to show.
    """

    def __init__(self, *folders: pathlib.Path):
        self._folders = [os.path.realpath(folder) for folder in folders]
        self._numbers: dict[pathlib.Path, int] = {}
        self._sides: list[int] = []

    def number(self, path: pathlib.Path, side: int) -> int:
        """Return the number, from 0, of a file whose longer side is shown with `side` pixels."""
        number = self._numbers.setdefault(path, len(self._numbers))
        if number == len(self._sides):
            self._sides.append(side)
        self._sides[number] = max(self._sides[number], side)
        return number

    def encode(self) -> tuple[dict[str, list], list[str]]:
        """Encode the images within the size limit, those of questions first.

        Returns:
          `{"data": [data URL, ..], "of": [index into "data" or None, ..]}`, with "of" by image
          number; and a message for each file that cannot be shown, plus one for those over the size
          limit.
        """
        data: list[str] = []
        places: dict[tuple[str, int], int] = {}  # by file digest and side
        of: list[int | None] = [None] * len(self._sides)
        missing, room, without = [], _MOST, 0
        order = sorted(self._numbers.items(), key=lambda item: -self._sides[item[1]])
        for path, number in order:
            try:
                file = self._read(path)
                key = hashlib.sha256(file).hexdigest(), self._sides[number]
                if key not in places:
                    url = _small(file, self._sides[number])
                    if len(url) > room:
                        without += 1
                        continue
                    room -= len(url)
                    places[key] = len(data)
                    data.append(url)
                of[number] = places[key]
            except (OSError, ValueError) as error:  # an invalid path, a missing file, not an image
                missing.append(f"{path}: {getattr(error, 'strerror', None) or error}")
        if without:
            missing.append(f"{without} pictures: the page would become too large")
        return {"data": data, "of": of}, missing

    def _read(self, path: pathlib.Path) -> bytes:
        """Read a file.

        Raises:
          OSError, ValueError: The file does not exist, or may not be shown.
        """
        real = pathlib.Path(os.path.realpath(path))
        if not any(real.is_relative_to(folder) for folder in self._folders):
            raise ImageError("not in the directory that is read; --pictures=DIR allows another")
        return read_regular(real, max_bytes=_LARGEST)


def _small(file: bytes, side: int) -> str:
    """Return a downscaled image as a data URL. Raises ImageError if it cannot be read."""
    image = open_image(file)
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "webp", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
