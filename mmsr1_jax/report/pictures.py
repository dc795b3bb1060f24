"""Pictures for the page: made small, each held once, and all together of a bounded size."""

import base64
import hashlib
import io
import pathlib

from mmsr1_jax.images import ImageError, open_image

QUESTION, RESULT = 320, 160  # pixels of the longer side
_MOST = 24_000_000  # characters of all pictures of a page


class Pictures:
    """Numbers for files while episodes are read; afterwards what the page holds of them.

    A picture is known by its number, from 0.
    """

    def __init__(self):
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
          line for each file that cannot be read, and one for those that there is no room for.
        """
        data: list[str] = []
        places: dict[tuple[str, int], int] = {}  # by digest of the file, and size
        of: list[int | None] = [None] * len(self._sides)
        missing, room, without = [], _MOST, 0
        order = sorted(self._numbers.items(), key=lambda item: -self._sides[item[1]])
        for path, number in order:
            try:
                file = path.read_bytes()
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
            except (ImageError, OSError) as error:
                missing.append(f"{path}: {getattr(error, 'strerror', None) or error}")
        if without:
            missing.append(f"{without} pictures: the page would become too large")
        return {"data": data, "of": of}, missing


def _small(file: bytes, side: int) -> str:
    """A data URL. Raises ImageError."""
    image = open_image(file)
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "webp", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
