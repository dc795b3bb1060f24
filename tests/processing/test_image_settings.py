"""Settings of the image processor have the same effect as in `transformers`, or are rejected with
an error that names the field."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmsr1_jax.processing.images import ImageError, ImageProcessor, read_image, write_image

BASE = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIZE = {"shortest_edge": 3136, "longest_edge": 50176}
SMALL = {"max_pixels": 50176}
IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (448, 700, 3), np.uint8))


def write(directory, fields, name="preprocessor_config.json"):
    (directory / name).write_text(json.dumps(fields))


def theirs(directory, image=IMAGE):
    features = Qwen2VLImageProcessorPil.from_pretrained(directory)(
        images=[image], return_tensors="np"
    )
    return tuple(np.asarray(features["image_grid_thw"])[0].tolist()), np.asarray(
        features["pixel_values"]
    )


def assert_same(directory, image=IMAGE):
    ours = ImageProcessor.from_directory(directory)(image)
    grid, values = theirs(directory, image)
    assert ours.grid == grid
    np.testing.assert_allclose(ours.values, values, rtol=0, atol=1e-5)


SUPPORTED = {
    "released": {"min_pixels": 3136, "max_pixels": 12845056},
    "released, patches of 16": {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
    "a size": {"size": SIZE},
    "limits before a size": {"size": SIZE, "min_pixels": 200704, "max_pixels": 12845056},
    "one limit and a size": {"size": SIZE, "max_pixels": 100352},
    "limits twice": {"size": {"min_pixels": 1, "max_pixels": 2}, "min_pixels": 3136} | SMALL,
    "nulls": {"size": SIZE, "min_pixels": None, "max_pixels": None, "crop_size": None},
    "only the upper limit": SMALL,
    "no limits": {},
    "null size": {"size": None, "image_processor_type": None, "do_convert_rgb": None},
    "do_normalize false": SMALL | {"do_normalize": False},
    "do_rescale false": SMALL | {"do_rescale": False},
    "neither": SMALL | {"do_rescale": False, "do_normalize": False, "image_mean": [9, 9, 9]},
    "rescaled to -1 and 1": SMALL | {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1]},
    "one mean for all": SMALL | {"image_mean": 0.5, "image_std": 0.25},
    "negative": SMALL | {"image_mean": [-0.5] * 3, "image_std": [-2, 0.5, 1]},
    "crop without do_center_crop": SMALL | {"crop_size": {"height": 9, "width": 9}},
    "crop that transformers ignores": SMALL | {"crop_size": 9, "do_center_crop": True},
    "padding is ignored": SMALL | {"do_pad": True, "pad_size": {"height": 9, "width": 9}},
    "formats": SMALL | {"data_format": "channels_last", "input_data_format": "channels_first"},
    "colours": SMALL | {"do_convert_rgb": False},
    "another patch": SMALL | {"patch_size": 16, "merge_size": 1, "temporal_patch_size": 1},
    "another merge": SMALL | {"patch_size": 8, "merge_size": 4, "temporal_patch_size": 3},
} | {f"filter {number}": SMALL | {"resample": number} for number in range(6)}  # fmt: skip


@pytest.mark.parametrize("fields", SUPPORTED.values(), ids=SUPPORTED)
def test_fields_have_the_same_effect_as_in_transformers(tmp_path, fields, capsys):
    write(tmp_path, BASE | fields)
    assert_same(tmp_path)
    assert capsys.readouterr().err == ""


UNSUPPORTED = {
    "size": [{"min_pixels": 3136, "max_pixels": 200704}, {"shortest_edge": 3136}, {}, 448,
             {"shortest_edge": None, "longest_edge": 3136}, {"height": 28, "width": 28},
             SIZE | {"height": 28}, {"shortest_edge": 0, "longest_edge": 9}, [28, 28], "x"],
    "min_pixels": [0, -1, "3136", True, 3136.5, 10**12, 999999999],
    "max_pixels": [1, 0, "many", [5]],
    "resample": [None, 6, -1, "bicubic", True, 2.5],
    "do_resize": [False, None, "no", 1],
    "do_normalize": ["false", None, 0],
    "do_rescale": [2, None],
    "do_center_crop": [True],
    "rescale_factor": ["1/255", None, 0, 1e-300, 1e300, True],
    "image_mean": [None, [0.5], [0.5] * 4, "0.5", ["a"] * 3, 1e30],
    "image_std": [0, None, [1, 0, 1], [1e-45] * 3, 1e40],
    "patch_size": [0, 14.5, "14", -14],
    "temporal_patch_size": [0],
    "merge_size": ["2", None],
    "image_processor_type": ["CLIPImageProcessor", "SiglipImageProcessorFast", 5],
    "auto_map": [{"AutoImageProcessor": "code.Mine"}],
}  # fmt: skip


@pytest.mark.parametrize("field, value", [(f, v) for f, vs in UNSUPPORTED.items() for v in vs])
def test_unsupported_values_are_errors_that_name_the_field(tmp_path, field, value):
    write(tmp_path, BASE | {field: value})
    with pytest.raises(ImageError) as caught:
        ImageProcessor.from_directory(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and "preprocessor_config.json: " in message and field in message


def test_unknown_fields_are_reported_and_ignored(tmp_path, capsys):
    write(tmp_path, BASE | SMALL | {"do_flip": True, "image_token": "<i>"})
    assert_same(tmp_path)
    assert (
        "preprocessor_config.json: ignoring do_flip, image_token, which" in capsys.readouterr().err
    )


def test_of_two_settings_files_the_one_that_transformers_uses_is_read(tmp_path, tiny_dir, capsys):
    (tmp_path / "config.json").write_text((tiny_dir / "config.json").read_text())
    section = BASE | {"size": SIZE}
    write(tmp_path, BASE | {"max_pixels": 12845056})
    write(tmp_path, {"image_processor": section}, "processor_config.json")
    assert_same(tmp_path)
    auto = AutoImageProcessor.from_pretrained(tmp_path)
    assert auto.size["longest_edge"] == ImageProcessor.from_directory(tmp_path).max_pixels == 50176
    warning = "using image_processor of processor_config.json and ignoring preprocessor_config.json"
    assert warning in capsys.readouterr().err
    # An older file has no such section, and is not used.
    for older in ({"processor_class": "Qwen2_5_VLProcessor"}, {"image_processor": None}, section):
        write(tmp_path, older, "processor_config.json")
        assert_same(tmp_path)
        assert ImageProcessor.from_directory(tmp_path).max_pixels == 12845056
    assert capsys.readouterr().err == ""
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(
        ImageError, match="contains neither preprocessor_config.json nor a processor_config.json"
    ):
        ImageProcessor.from_directory(tmp_path)
    broken_files = {
        "expected object": [],
        "must be an object": {"image_processor": [1]},
        "merge_size": {"image_processor": {"merge_size": 0}},
    }
    for reason, broken in broken_files.items():
        write(tmp_path, broken, "processor_config.json")
        with pytest.raises(ImageError, match=f"processor_config.json: .*{reason}"):
            ImageProcessor.from_directory(tmp_path)


def test_random_settings_are_supported_unless_transformers_fails(tmp_path):
    rng = np.random.default_rng(0)
    image = IMAGE.resize((150, 90))
    choices = {
        "size": [None, SIZE, {"shortest_edge": 784, "longest_edge": 7840}, {"longest_edge": 7840}],
        "min_pixels": [None, 784, 3136],
        "max_pixels": [None, 7840, 50176],
        "resample": [*range(6)],
        "do_rescale": [True, False],
        "rescale_factor": [0.01, 1, 1 / 127.5],
        "do_normalize": [True, False],
        "image_mean": [[0.1, 0.2, 0.3], 0.5],
        "image_std": [[1, 2, 3], 0.5],
        "crop_size": [None, {"height": 20, "width": 30}],
        "do_center_crop": [None, False, True],
    }
    supported = 0
    for _ in range(120):
        fields = {f: v[rng.integers(len(v))] for f, v in choices.items() if rng.random() < 0.5}
        write(tmp_path, BASE | fields)
        try:
            theirs(tmp_path, image)
        except (ValueError, TypeError):
            with pytest.raises(ImageError):
                ImageProcessor.from_directory(tmp_path)
            continue
        assert_same(tmp_path, image)
        supported += 1
    assert supported > 60


@pytest.mark.parametrize("name", ["released", "neither", "rescaled to -1 and 1", "negative"])
def test_saved_images_give_bit_identical_patches(tmp_path, name):
    write(tmp_path, BASE | SUPPORTED[name])
    processor = ImageProcessor.from_directory(tmp_path)
    patches = processor(IMAGE)
    path = write_image(patches, processor, tmp_path)
    np.testing.assert_array_equal(read_image(path, processor).values, patches.values)


def test_written_settings_are_read_back(tmp_path):
    processor = ImageProcessor(resample=2, rescale_factor=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    write(tmp_path, processor.to_hf())
    assert ImageProcessor.from_directory(tmp_path) == processor
    assert_same(tmp_path)
    released = dataclasses.asdict(ImageProcessor())
    assert released["resample"] == 3 and released["rescale_factor"] == 1 / 255
