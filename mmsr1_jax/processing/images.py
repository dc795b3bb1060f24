"""Image processor: resizes and normalises images and splits them into patches.

The result is identical to the HF Qwen2-VL image processor's (its PIL backend): same grid, same
patches. `processing/image_files.py` opens image files.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from mmsr1_jax.processing import image_settings
from mmsr1_jax.processing.image_files import DEFAULT_MAX_FILE_PIXELS, ImageError, open_image, to_rgb
from mmsr1_jax.utils import outputs
from mmsr1_jax.utils.checked_json import FormatError

__all__ = [
    "DEFAULT_MAX_FILE_PIXELS",
    "ImageError",
    "ImageProcessor",
    "Patches",
    "open_image",
    "read_image",
    "to_rgb",
    "write_image",
]

MAX_ASPECT_RATIO = 200  # long side / short side; the published processor rejects more


@dataclasses.dataclass(frozen=True)
class Patches:
    """Patches of one image, the input of the vision tower.

    Attributes:
      values: float32[P, patch_dim]. Patches, patch_dim = channels x frames x patch x patch, ordered
        by frame, then merge block, then row by row within a block.
      grid: Numbers of patches (t, h, w): frames, rows, columns.
    """

    values: np.ndarray
    grid: tuple[int, int, int]

    @functools.cached_property
    def digest(self) -> str:
        """Digest of grid and values, equal for equal images."""
        return hashlib.blake2b(repr(self.grid).encode() + self.values.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Image processor with the settings of a `preprocessor_config.json`, by default Qwen2.5-VL's.

    Attributes:
      min_pixels, max_pixels: Bounds on the area after resizing, in pixels.
      patch_size: Side of a patch, in pixels.
      temporal_patch_size: Number of frames in a patch; a still image is repeated.
      merge_size: Number of patches along each side of a merged token.
      resample: Resampling filter, one of `PIL.Image.Resampling`.
      rescale_factor: Factor applied to uint8 pixel values.
      mean, std: Mean and standard deviation per colour channel of rescaled values (CLIP's, on the
        scale 0 to 1).
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16384
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    resample: int = PIL.Image.Resampling.BICUBIC.value
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "ImageProcessor":
        """Return the image processor of an HF directory, see `image_settings.read`.

        Raises:
          ImageError: If the settings are missing or unusable, or do not allow images to be
            recovered bit for bit from patches. The message names file and field.
        """
        try:
            path, arguments = image_settings.read(directory)
        except FormatError as error:
            raise ImageError(str(error)) from None
        processor = cls(**arguments)
        ramp = np.arange(256, dtype=np.uint8)[:, None].repeat(len(processor.mean), axis=1)
        with np.errstate(all="ignore"):
            exact = np.array_equal(processor._restore(processor._normalise(ramp)), ramp)
        if not exact:
            raise ImageError(
                f"{path}: rescale_factor={processor.rescale_factor}, "
                f"image_mean={list(processor.mean)}, image_std={list(processor.std)}: some of the "
                "256 pixel values become equal"
            )
        return processor

    def with_limits(self, min_pixels: int | None, max_pixels: int | None) -> "ImageProcessor":
        """Return a copy with new bounds on the area; None keeps a bound."""
        low, high = min_pixels or self.min_pixels, max_pixels or self.max_pixels
        if low > high:
            raise ImageError(f"min_pixels={low} is more than max_pixels={high}")
        return dataclasses.replace(self, min_pixels=low, max_pixels=high)

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a `preprocessor_config.json`."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "resample": self.resample,
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) in pixels to which an image is resized.

        Both are multiples of a merged token's side, the area is within the bounds, and the aspect
        ratio is preserved as closely as possible (Qwen2-VL's rule, including its rounding).

        Raises:
          ImageError: If the long side is more than 200 times the short side.
        """
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ImageError(
                f"{width}x{height} pixels: the aspect ratio is more than {MAX_ASPECT_RATIO}"
            )
        side = self.patch_size * self.merge_size
        h, w = (round(x / side) * side for x in (height, width))
        if h * w > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            h, w = (max(side, math.floor(x / shrink / side) * side) for x in (height, width))
        elif h * w < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            h, w = (math.ceil(x * grow / side) * side for x in (height, width))
        return h, w

    def __call__(self, image: PIL.Image.Image) -> Patches:
        """Resize and normalise an RGB image and split it into patches.

        Raises:
          ImageError: If the image is too elongated, see `target_size`.
        """
        height, width = self.target_size(image.height, image.width)
        return self.patchify(image.resize((width, height), self.resample))

    def patchify(self, image: PIL.Image.Image) -> Patches:
        """Normalise an RGB image and split it into patches, without resizing.

        Raises:
          ImageError: If the sides are not multiples of a merged token's side.
        """
        p, m = self.patch_size, self.merge_size
        height, width = image.height, image.width
        if height % (p * m) or width % (p * m):
            raise ImageError(f"{width}x{height} pixels: the sides must be multiples of {p * m}")
        pixels = self._normalise(np.asarray(image))
        h, w = height // p, width // p
        blocks = pixels.reshape(h // m, m, p, w // m, m, p, -1)
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # block row, column; patch; C, y, x
        frames = np.repeat(blocks[:, :, :, :, :, None], self.temporal_patch_size, axis=5)
        return Patches(frames.reshape(h * w, -1), (1, h, w))

    def unpatchify(self, patches: Patches) -> PIL.Image.Image:
        """Recover the RGB image from patches. Its `patchify` yields the same patches, bit for bit.

        Raises:
          ImageError: If there are several frames, or the patches have another size.
        """
        p, m, c = self.patch_size, self.merge_size, len(self.mean)
        frames, h, w = patches.grid
        shape = (frames * h * w, c * self.temporal_patch_size * p * p)
        if frames != 1 or h % m or w % m or patches.values.shape != shape:
            raise ImageError(
                f"patches of shape {patches.values.shape} and grid {patches.grid} are not an image"
            )
        blocks = patches.values.reshape(h // m, w // m, m, m, c, self.temporal_patch_size, p, p)
        pixels = blocks[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * p, w * p, c)
        return PIL.Image.fromarray(self._restore(pixels))

    def _normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Rescale and normalise pixels, uint8[..., channels] -> float32[..., channels]."""
        scaled = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def _restore(self, values: np.ndarray) -> np.ndarray:
        """Invert `_normalise`, float32[..., channels] -> uint8[..., channels]."""
        scaled = values * np.array(self.std, np.float64) + np.array(self.mean, np.float64)
        return np.rint(scaled / self.rescale_factor).clip(0, 255).astype(np.uint8)


def write_image(
    patches: Patches, processor: ImageProcessor, directory: pathlib.Path
) -> pathlib.Path:
    """Write an image as `directory/DIGEST.png` unless the file exists, and return its path.

    Raises:
      ImageError: If the image cannot be recovered, see `ImageProcessor.unpatchify`.
    """
    path = directory / f"{patches.digest}.png"
    if not path.is_file():
        # Another process may be writing the same image.
        with contextlib.suppress(outputs.LockedError), outputs.new_file(path) as partial:
            processor.unpatchify(patches).save(partial, "png", compress_level=1)
    return path


def read_image(
    path: str | pathlib.Path,
    processor: ImageProcessor,
    *,
    max_pixels: int = DEFAULT_MAX_FILE_PIXELS,
) -> Patches:
    """Return the patches of an image written by `write_image`, bit for bit.

    Raises:
      ImageError: If the file cannot be opened, see `open_image`, or its patches do not match the
        digest in its name.
    """
    image = open_image(path, max_pixels=max_pixels)
    try:
        patches = processor.patchify(image)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    if patches.digest != pathlib.Path(path).stem:
        raise ImageError(
            f"{path}: the image does not match the digest in its file name; the file was changed, "
            "or written with other image processor settings"
        )
    return patches
