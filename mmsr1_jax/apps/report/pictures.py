"""Pictures for the page: made small, each held once, and all together of a bounded size."""

import base64
import hashlib
import io
import os
import pathlib

from mmsr1_jax.processing.image_files import ImageError, open_image
from mmsr1_jax.utils.files import read_regular

QUESTION, RESULT = 320, 160  # pixels of the longer side
_MOST = 24_000_000  # characters of all pictures of a page
_LARGEST = 64_000_000  # bytes of a file


class Pictures:
    """Numbers for files while episodes are read; afterwards what the page holds of them.

    A picture is known by its number, from 0.

    Args of the constructor:
      folders: files are shown only if they lie in one of them. Lines may be written by others, and
        a page is there to be passed on: it must not hold what its maker did not mean to show.
    """

    def __init__(self, *folders: pathlib.Path):
        self._folders = [os.path.realpath(folder) for folder in folders]
        self._numbers: dict[pathlib.Path, int] = {}
        self._sides: list[int] = []

    def number(self, path: pathlib.Path, side: int) -> int:
        """Of a file, which is to be shown with `side` pixels."""
        number = self._numbers.setdefault(path, len(self._numbers))
        if number == len(self._sides):
            self._sides.append(side)
        self._sides[number] = max(self._sides[number], side)
        return number

    def encode(self) -> tuple[dict[str, list], list[str]]:
        """The pictures, the questions' first until there is no more room, and what is missing.

        Returns:
          `{"data": [data URL, ..], "of": [place in "data" or None, ..]}`, "of" by number; and a
          line for each file that is not shown, with the reason, and one for those that there is no
          room for.
        """
        data: list[str] = []
        places: dict[tuple[str, int], int] = {}  # by digest of the file, and size
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
            except (OSError, ValueError) as error:  # no such path can be, no file, no picture
                missing.append(f"{path}: {getattr(error, 'strerror', None) or error}")
        if without:
            missing.append(f"{without} pictures: the page would become too large")
        return {"data": data, "of": of}, missing

    def _read(self, path: pathlib.Path) -> bytes:
        """Raises OSError, ValueError: no such file, or one that is not shown."""
        real = pathlib.Path(os.path.realpath(path))
        if not any(real.is_relative_to(folder) for folder in self._folders):
            raise ImageError("not in the directory that is read; --pictures=DIR allows another")
        return read_regular(real, max_bytes=_LARGEST)


def _small(file: bytes, side: int) -> str:
    """A data URL. Raises ImageError."""
    image = open_image(file)
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "webp", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
