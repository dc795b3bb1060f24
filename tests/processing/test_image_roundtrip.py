"""Images restored from their patches, and saved as PNGs that give the same patches again."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from mmsr1_jax.processing.images import ImageError, ImageProcessor, read_image, write_image
from tests.sft_files import noise


@pytest.mark.parametrize("width, height", [(112, 112), (640, 480), (31, 900), (1000, 41)])
def test_an_image_is_restored_from_its_patches(tmp_path, width, height):
    processor = ImageProcessor(min_pixels=56 * 56, max_pixels=300 * 300)
    image = noise(width, width, height)
    patches = processor(image)
    restored = processor.unpatchify(patches)
    rows, columns = processor.target_size(height, width)
    resized = image.resize((columns, rows), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(restored), np.asarray(resized))
    path = write_image(patches, processor, tmp_path)
    # The reader's limits on the size of an image do not resize it again.
    saved = read_image(path, processor.with_limits(28 * 28, 28 * 28))
    assert saved.grid == patches.grid and saved.values.tobytes() == patches.values.tobytes()


def test_every_colour_is_restored():
    levels = np.arange(256, dtype=np.uint8).repeat(4).reshape(1, 32, 32)
    image = PIL.Image.fromarray(np.concatenate([levels, levels[:, ::-1], levels]).T.copy())
    processor = ImageProcessor(patch_size=8)
    patches = processor.patchify(image)
    np.testing.assert_array_equal(np.asarray(processor.unpatchify(patches)), np.asarray(image))


def test_invalid_sizes_and_changed_images_are_rejected(tmp_path):
    processor = ImageProcessor()
    path = write_image(processor.patchify(noise(0)), processor, tmp_path)
    with pytest.raises(ImageError, match="no multiples of 28"):
        processor.patchify(noise(1, 112, 100))
    with pytest.raises(ImageError, match="no picture"):
        dataclasses.replace(processor, patch_size=7).unpatchify(processor.patchify(noise(0)))
    with pytest.raises(ImageError, match="not the picture that the file is named after"):
        read_image(path, dataclasses.replace(processor, mean=(0.5, 0.5, 0.5)))
    noise(2).save(path)
    with pytest.raises(ImageError, match="not the picture that the file is named after"):
        read_image(path, processor)
