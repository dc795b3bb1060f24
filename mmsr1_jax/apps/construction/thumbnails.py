"""Small versions of pictures, as data URLs."""

import base64
import pathlib

from mmsr1_jax.data.construction.sources import Source, read_picture
from mmsr1_jax.processing.image_files import ImageError, process_image
from mmsr1_jax.tools.picture_search import preview
from mmsr1_jax.utils.files import FileRefusedError


def thumbnail(source: Source, out: pathlib.Path) -> str:
    """Return a small version of a source's picture as a data URL; empty if it is unusable."""
    try:
        jpeg = process_image(read_picture(source, out), preview)
    except (ImageError, FileRefusedError):
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
