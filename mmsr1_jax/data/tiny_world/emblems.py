"""Emblems of the landmarks, and photos of them.

An emblem has a few attributes, all of which are visible in a photo: the side towards which each
piece of the field gets lighter, the field's two colours, and the charge in the middle with its
tone. The field is what the difference hash of the local index distinguishes best.
"""

import functools
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageDraw

PHOTO = 84  # side length in pixels: 9 merged tokens of 28 x 28
FIELD_PIECES = 8

# Side length in pixels of the part of a drawing that a photo shows. It is larger than PHOTO because
# photos are sampled at an angle.
_VIEW = 126
_MARGIN = 14  # pixels around the view, so that a rotated photo shows no edge
_DARK = ("#14306e", "#7a1020", "#0c5a2c", "#54188a", "#603a10", "#0a5c66")
_LIGHT = ("#ffe24a", "#9fdcff", "#ffb0d0", "#a8f5a0", "#ffb45a", "#f4f4f4")
_TONES = ("#ffffff", "#101010")  # fill of a charge; its outline has the other tone
_CHARGES = 8
_ROWS = FIELD_PIECES // 2


class Emblem(NamedTuple):
    """Visual attributes of an emblem.

    Attributes:
      field: Bit mask of the 4 rows x 2 halves of the field. A set bit means that the piece gets
        lighter to the right, a clear one to the left.
      dark, light: Indices of the field's two colours.
      charge: Index of the shape in the middle.
      tone: Index of the charge's tone.
    """

    field: int
    dark: int
    light: int
    charge: int
    tone: int


# Number of values of each attribute.
SIZES = Emblem(2**FIELD_PIECES, len(_DARK), len(_LIGHT), _CHARGES, len(_TONES))


@functools.lru_cache(maxsize=512)
def _drawing(emblem: Emblem) -> PIL.Image.Image:
    """Return the RGB image that photos are sampled from, with a margin around it."""
    side = _VIEW + 2 * _MARGIN
    position = np.clip((np.arange(side) + 0.5 - _MARGIN) / _VIEW, 0, 1 - 1e-6)  # in the view
    bits = (emblem.field >> np.arange(FIELD_PIECES)).reshape(_ROWS, 2) & 1
    half, offset = np.divmod(2 * position, 1)
    bits = bits[(_ROWS * position).astype(int)][:, half.astype(int)]
    mix = np.where(bits, offset, 1 - offset)[..., None]
    colours = (_DARK[emblem.dark], _LIGHT[emblem.light])
    dark, light = (np.array(PIL.ImageColor.getrgb(colour), np.float64) for colour in colours)
    image = PIL.Image.fromarray((dark + mix * (light - dark)).astype(np.uint8))
    _draw_charge(PIL.ImageDraw.Draw(image), emblem, side / 2)
    return image


def reference_photo(emblem: Emblem) -> PIL.Image.Image:
    """Return the unaltered photo of an emblem: RGB, `PHOTO` pixels a side."""
    box = (_MARGIN, _MARGIN, _MARGIN + _VIEW, _MARGIN + _VIEW)
    return _drawing(emblem).resize((PHOTO, PHOTO), PIL.Image.Resampling.BOX, box)


def _draw_charge(pen: PIL.ImageDraw.ImageDraw, emblem: Emblem, centre: float) -> None:
    fill, outline = _TONES[emblem.tone], _TONES[1 - emblem.tone]
    r = 0.22 * _VIEW

    def shape(points: Sequence[tuple[float, float]]) -> None:
        path = [(centre + r * x, centre + r * y) for x, y in points]
        pen.polygon(path, fill=fill, outline=outline, width=4)

    def disc(radius: float, colour: str = fill) -> None:
        box = (centre - radius, centre - radius, centre + radius, centre + radius)
        pen.ellipse(box, fill=colour, outline=outline, width=4)

    if emblem.charge == 0:
        disc(r)
    elif emblem.charge == 1:
        shape([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])
    elif emblem.charge == 2:
        shape([(0, -1.1), (1.1, 0.9), (-1.1, 0.9)])
    elif emblem.charge == 3:
        shape([(0, 1.1), (1.1, -0.9), (-1.1, -0.9)])
    elif emblem.charge == 4:
        arm = 0.35
        corners = [(arm, 1.15), (arm, arm), (1.15, arm)]
        rotated = [[(x, y), (y, -x), (-x, -y), (-y, x)] for x, y in corners]
        shape([rotated[k][q] for q in range(4) for k in range(3)])
    elif emblem.charge == 5:
        disc(1.1 * r)
        disc(0.5 * r, outline)
    elif emblem.charge == 6:
        for side in (-1, 1):
            shape([(side * x, y) for x, y in ((0.25, -1.1), (0.9, -1.1), (0.9, 1.1), (0.25, 1.1))])
    else:
        tips = [(math.sin(k * math.pi / 5), -math.cos(k * math.pi / 5)) for k in range(10)]
        shape([(1.25 * x, 1.25 * y) if k % 2 == 0 else (0.5 * x, 0.5 * y)
               for k, (x, y) in enumerate(tips)])  # fmt: skip


def photo(emblem: Emblem, rng: np.random.Generator) -> PIL.Image.Image:
    """Return a photo of an emblem, randomly cropped, rotated, lit and noised.

    The photo is RGB, with `PHOTO` pixels a side. Rotations are small because the difference hash of
    the local index compares neighbours in a row.
    """
    drawing = _drawing(emblem)
    angle = math.radians(rng.uniform(-4, 4))
    scale = _VIEW / PHOTO * rng.uniform(0.93, 1.03)
    dx, dy = rng.uniform(-0.03, 0.03, 2) * _VIEW + drawing.width / 2
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    middle = PHOTO / 2
    matrix = (
        cos, -sin, dx - middle * (cos - sin),
        sin, cos, dy - middle * (sin + cos),
    )  # fmt: skip
    view = drawing.transform(
        (PHOTO, PHOTO), PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.BILINEAR
    )
    pixels = np.asarray(view, np.float32)
    slope = np.linspace(-1, 1, PHOTO, dtype=np.float32)
    light = rng.uniform(0.75, 1.15) * rng.uniform(0.93, 1.07, 3).astype(np.float32)
    light = light * (1 + 0.1 * np.float32(rng.uniform(-1, 1)) * slope[:, None, None])
    light = light * (1 + 0.1 * np.float32(rng.uniform(-1, 1)) * slope[None, :, None])
    noise = rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(2, 10))
    return PIL.Image.fromarray(np.clip(pixels * light + noise, 0, 255).astype(np.uint8))


def jpeg(image: PIL.Image.Image) -> bytes:
    """Return an image as the bytes of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=92)
    return file.getvalue()
